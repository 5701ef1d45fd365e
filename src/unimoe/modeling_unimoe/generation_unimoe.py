"""What generation with media needs beyond Transformers' own: towers run once, beams keep their items, placeholders stay out."""

import torch
from torch.nn import functional
from transformers import GenerationMixin
from transformers.generation import LogitsProcessorList
from transformers.generation.candidate_generator import CandidateGenerator, PromptLookupCandidateGenerator
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


class _WithPlaceholderColumns:
    """Logits processors for scores that go on with columns of placeholders beyond the vocabulary, which none may choose."""

    def __init__(self, processors: LogitsProcessorList, vocab_size: int):
        self.processors = processors
        self.vocab_size = vocab_size

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs) -> torch.FloatTensor:
        words = self.processors(input_ids, scores[:, : self.vocab_size], **kwargs)
        return functional.pad(words, (0, scores.shape[-1] - self.vocab_size), value=-torch.inf)


def _kept_length(model_kwargs: dict) -> int:
    """How many tokens a cache from an earlier turn holds; their items were placed there."""
    cache = model_kwargs.get("past_key_values")
    return 0 if cache is None else int(cache.get_seq_length())


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
        if model_input_name == "input_ids":
            new_ids = inputs_tensor[:, _kept_length(model_kwargs) :]
            given = model_kwargs.get("mm_encoder_outputs") or {}
            for modality in self.config.input_modalities:
                # Placeholders inside the vocabulary have embeddings, so that the forward pass takes them for words.
                if modality not in given:
                    self.model.check_count(modality, self.model.placeholder_mask(modality, new_ids, None), 0)
        return model_kwargs

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: torch.LongTensor | None = None,
        **model_kwargs,
    ) -> tuple[torch.LongTensor | None, dict]:
        encoded = model_kwargs.pop("mm_encoder_outputs", None)
        if encoded and expand_size > 1:
            start = _kept_length(model_kwargs)
            new_ids = None if input_ids is None else input_ids[:, start:]
            embeds = model_kwargs.get("inputs_embeds")
            new_embeds = None if embeds is None else embeds[:, start:]
            encoded = self._expand_multimodal_outputs(new_ids, encoded, expand_size, new_embeds)
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size, is_encoder_decoder, input_ids, **model_kwargs
        )
        if encoded is not None:
            model_kwargs["mm_encoder_outputs"] = encoded
        return input_ids, model_kwargs

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
            self.model.check_count(modality, mask, features.shape[0] * features.shape[1])
            counts = (mask.sum(dim=1) // features.shape[1]).tolist()
            items = torch.arange(features.shape[0], device=features.device).split(counts)
            order = torch.cat([row for row in items for _ in range(expand_size)])
            expanded[modality] = BaseModelOutputWithPooling(pooler_output=features[order])
        return expanded

    def _get_logits_processor(self, *args, **kwargs) -> LogitsProcessorList:
        processors = super()._get_logits_processor(*args, **kwargs)
        return _WithoutPlaceholders(processors, self._placeholder_ids) if self._placeholder_ids else processors

    def _get_candidate_generator(self, *args, **kwargs) -> CandidateGenerator:
        generator = super()._get_candidate_generator(*args, **kwargs)
        if isinstance(generator, PromptLookupCandidateGenerator):
            # It looks up the scores of what follows in the prompt, which may be a placeholder without a score.
            generator.logits_processor = _WithPlaceholderColumns(generator.logits_processor, generator.vocab_size)
            generator.vocab_size = max([generator.vocab_size, *(token_id + 1 for token_id in self._placeholder_ids)])
        return generator

    @property
    def _placeholder_ids(self) -> list[int]:
        return [getattr(self.config, f"{modality}_token_id") for modality in self.config.input_modalities]
