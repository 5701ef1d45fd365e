"""What generation with media needs beyond Transformers' own: towers run once, beams keep their items, placeholders stay out."""

import torch
from transformers import GenerationMixin
from transformers.generation import LogitsProcessorList
from transformers.modeling_outputs import BaseModelOutputWithPooling


class _WithoutPlaceholders(LogitsProcessorList):
    """Shows logits processors ids that exist (repetition penalties index the scores by them) and keeps placeholders from
    being generated."""

    def __init__(self, processors: LogitsProcessorList, placeholder_ids: list[int]):
        super().__init__(processors)
        self.placeholder_ids = placeholder_ids
        self._in_vocabulary: torch.Tensor | None = None

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs) -> torch.FloatTensor:
        if self._in_vocabulary is None:
            ids = [token_id for token_id in self.placeholder_ids if token_id < scores.shape[-1]]
            self._in_vocabulary = torch.tensor(ids, dtype=torch.long, device=scores.device)
        if len(self._in_vocabulary):
            scores = scores.index_fill(-1, self._in_vocabulary, -torch.inf)
        if not self:
            return scores
        return super().__call__(input_ids.masked_fill(input_ids >= scores.shape[-1], 0), scores, **kwargs)


class UniMoEGenerationMixin(GenerationMixin):
    """`generate` for a model whose `model` is a [`UniMoEModel`]."""

    def _maybe_prepare_encoder_kwargs_for_generation(
        self, inputs_tensor, model_kwargs: dict, model_input_name, generation_config
    ) -> dict:
        # Every tower runs here, once, whatever the cache, the beams and the number of steps.
        names = ("pixel_values", "pixel_values_videos", "video_frame_mask", "input_values", "input_values_mask")
        media = {name: model_kwargs.pop(name, None) for name in (*names, "input_features")}
        encoded = self.model.encode_media(**media)
        if encoded:
            model_kwargs["mm_encoder_outputs"] = {**(model_kwargs.get("mm_encoder_outputs") or {}), **encoded}
        return model_kwargs

    def _expand_multimodal_outputs(
        self, input_ids, mm_encoder_output: dict, expand_size: int = 1, inputs_embeds: torch.Tensor | None = None
    ) -> dict:
        """Repeats each row's items, as a group, for each of its beams."""
        if input_ids is not None and input_ids.numel() == 0:
            input_ids = None
        expanded = {}
        for modality, output in mm_encoder_output.items():
            features = output.pooler_output
            mask = self.model.placeholder_mask(modality, input_ids, inputs_embeds)
            counts = (mask.sum(dim=1) // features.shape[1]).tolist()
            items = torch.arange(features.shape[0], device=features.device).split(counts)
            order = torch.cat([row for row in items for _ in range(expand_size)])
            expanded[modality] = BaseModelOutputWithPooling(pooler_output=features[order])
        return expanded

    def _get_logits_processor(self, *args, **kwargs) -> LogitsProcessorList:
        processors = super()._get_logits_processor(*args, **kwargs)
        placeholder_ids = [getattr(self.config, f"{modality}_token_id") for modality in self.config.input_modalities]
        return _WithoutPlaceholders(processors, placeholder_ids) if placeholder_ids else processors
