"""The UniMoE model: towers and connectors turn media into embeddings, which replace placeholders in front of a decoder.

Shape letters in docstrings: B batch, S text length with placeholders expanded, H decoder width, N media items (or sound
chunks) of the whole batch in reading order, P tokens per image, Q tokens per sound chunk, F video frames, R image side.
"""

import inspect
from collections.abc import Iterable

import torch
from torch import nn
from transformers import Cache, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling, ModelOutput
from transformers.modeling_utils import slice_logits_to_keep
from transformers.models.whisper.modeling_whisper import WhisperEncoder
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.output_capturing import select_hidden_states

from .beats import UniMoEAudioModel
from .configuration_unimoe import MODALITIES, UniMoEConfig
from .connectors import build_connector
from .generation_unimoe import UniMoEGenerationMixin
from .modality_routing import TokenTypes, set_router_options, token_types_of
from .model_losses import piece_of_step, router_losses
from .outputs_unimoe import UniMoECausalLMOutputWithPast, UniMoEModelOutputWithPast
from .pretrained_unimoe import UniMoEPreTrainedModel
from .qwen import build_decoder
from .sparse_parts import has_router_losses
from .sparsify import sparsify
from .step_statistics import attention_mask_of, step_weights
from .vision_features import UniMoEVisionOutput, encode_images, encode_videos

# The input that carries each modality, as `forward` names it.
MEDIA_INPUTS = {
    "image": "pixel_values",
    "video": "pixel_values_videos",
    "audio": "input_values",
    "speech": "input_features",
}


def _features(
    selected: torch.Tensor, embeddings: torch.Tensor, tower_outputs: ModelOutput
) -> BaseModelOutputWithPooling:
    """What the `get_*_features` methods return: the tower's selected layer, what the connector made of it, and the rest."""
    return BaseModelOutputWithPooling(
        last_hidden_state=selected,
        pooler_output=embeddings,
        hidden_states=tower_outputs.hidden_states,
        attentions=tower_outputs.attentions,
    )


def _build_backbone(
    config: UniMoEConfig, sub_config: PreTrainedConfig, sparsity: PreTrainedConfig | None
) -> PreTrainedModel:
    """A stock Transformers model from its config, its FFNs made sparse where `sparsity` says so and they are not already."""
    requested = sub_config._experts_implementation or config._experts_implementation
    backbone = build_decoder(_without_experts_request(sub_config))
    has_own_experts = getattr(sub_config, "num_local_experts", None)
    if sparsity is not None and not has_own_experts:
        sparsify(
            backbone,
            layers=sparsity.layers,
            num_experts=sparsity.num_experts,
            top_k=sparsity.top_k,
            copy_weights=False,
            **sparsity.block_options,
        )
    if backbone._can_set_experts_implementation():
        backbone.set_experts_implementation(requested)
    return backbone


def _without_experts_request(sub_config: PreTrainedConfig) -> PreTrainedConfig:
    """`from_pretrained(experts_implementation=...)` writes into every sub-config, but dense classes refuse a request."""
    sub_config._experts_implementation_internal = None
    for name in sub_config.sub_configs:
        if getattr(sub_config, name) is not None:
            _without_experts_request(getattr(sub_config, name))
    return sub_config


class UniMoEModel(UniMoEPreTrainedModel):
    """Towers, connectors and decoder without the language-modelling head.

    Submodules, each present only if the configuration has it: `vision_tower`, `audio_tower`, `speech_tower`,
    `vision_connector`, `audio_connector`, `speech_connector`; always: `language_model`.
    """

    # A checkpoint with a head serves the model without one.
    _keys_to_ignore_on_load_unexpected = [r"^lm_head\."]

    def __init__(self, config: UniMoEConfig):
        super().__init__(config)
        width = config.text_config.hidden_size
        if config.vision_config is not None:
            self.vision_tower = _build_backbone(config, config.vision_config, config.vision_sparsity)
            self.vision_connector = build_connector(
                config.vision_connector_config, config.vision_feature_size, width, model_config=config
            )
        if config.audio_config is not None:
            self.audio_tower = UniMoEAudioModel._from_config(_without_experts_request(config.audio_config))
            self.audio_connector = build_connector(
                _without_experts_request(config.audio_connector_config), config.audio_config.hidden_size, width
            )
        if config.speech_config is not None:
            self.speech_tower = WhisperEncoder._from_config(_without_experts_request(config.speech_config))
            self.speech_connector = build_connector(
                _without_experts_request(config.speech_connector_config), config.speech_config.d_model, width
            )
        self.language_model = _build_backbone(config, config.text_config, config.text_sparsity)
        if config.text_sparsity is not None:
            self.routed_token_types = TokenTypes()
            set_router_options(
                self.language_model, config.text_sparsity, config.input_modalities, self.routed_token_types
            )
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module):
        self.language_model.set_input_embeddings(value)

    @can_return_tuple
    @select_hidden_states(lambda model: [model.config.vision_feature_layer])
    def get_image_features(
        self, pixel_values: torch.Tensor, **kwargs: Unpack[TransformersKwargs]
    ) -> UniMoEVisionOutput:
        """Embeddings of images.

        Args:
            pixel_values: Float [N, 3, R, R], normalised as the vision tower expects.
            kwargs: `output_router_logits=True` asks for the routers of a sparse tower and of a sparse connector.

        Returns:
            `pooler_output` [N, P, H] replaces the placeholders; `last_hidden_state` is the tower's selected layer, that of
            all `vision_scales` side by side, [N, P, width]; `hidden_states` and `attentions` are those of the tower for
            the images at its own size.

        Raises:
            ValueError: The model has no vision tower, or the images have another size than it takes.
        """
        self._require_tower("image", pixel_values)
        side = self.config.vision_config.image_size
        if pixel_values.ndim != 4 or pixel_values.shape[1:] != (3, side, side):
            raise ValueError(f"`pixel_values` must be [N, 3, {side}, {side}], got {list(pixel_values.shape)}")
        return encode_images(self.config, self.vision_tower, self.vision_connector, pixel_values, **kwargs)

    @can_return_tuple
    def get_video_features(
        self,
        pixel_values_videos: torch.Tensor,
        video_frame_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        """Embeddings of videos: the mean over frames of the projected frame features (Uni-MoE, section 3.1 of the paper).

        Args:
            pixel_values_videos: Float [N, F, 3, R, R].
            video_frame_mask: Int [N, F], 1 for real frames; all are real where it is None.

        Returns:
            `pooler_output` [N, P, H]; a video costs as many tokens as an image, and the order of its frames is lost.
            `last_hidden_state` is the tower's selected layer, [N, F, P, tower width], zero for frames that are not real;
            `hidden_states` and `attentions` are those of the tower, one row per real frame.

        Raises:
            ValueError: The model has no vision tower, a video has no frame, frames have another size than it takes, or the mask
                has another shape than stated.
        """
        self._require_tower("video", pixel_values_videos)
        return encode_videos(self.get_image_features, pixel_values_videos, video_frame_mask, **kwargs)

    @can_return_tuple
    def get_audio_features(
        self,
        input_values: torch.Tensor,
        input_values_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        """Embeddings of chunks of audio.

        Args:
            input_values: Float [N, frames, mel bins], normalised log filterbanks.
            input_values_mask: Int [N, frames], 1 for real frames; all are real where it is None.

        Returns:
            `pooler_output` [N, Q, H]; `last_hidden_state`, `hidden_states` and `attentions` are those of BEATs.

        Raises:
            ValueError: The model has no audio tower.
        """
        self._require_tower("audio", input_values)
        outputs = self.audio_tower(
            input_values.to(self.audio_tower.dtype), attention_mask=input_values_mask, return_dict=True, **kwargs
        )
        return _features(outputs.last_hidden_state, self.audio_connector(outputs.last_hidden_state), outputs)

    @can_return_tuple
    def get_speech_features(
        self, input_features: torch.Tensor, **kwargs: Unpack[TransformersKwargs]
    ) -> BaseModelOutputWithPooling:
        """Embeddings of 30 s chunks of speech.

        Args:
            input_features: Float [N, mel bins, frames], Whisper log-mel spectrograms.

        Returns:
            `pooler_output` [N, Q, H]; `last_hidden_state`, `hidden_states` and `attentions` are those of the Whisper
            encoder.

        Raises:
            ValueError: The model has no speech tower, or the spectrograms have another shape than it takes.
        """
        self._require_tower("speech", input_features)
        shape = (self.config.speech_config.num_mel_bins, 2 * self.config.speech_config.max_source_positions)
        if input_features.ndim != 3 or input_features.shape[1:] != shape:
            raise ValueError(f"`input_features` must be [N, {shape[0]}, {shape[1]}], got {list(input_features.shape)}")
        outputs = self.speech_tower(input_features.to(self.speech_tower.dtype), return_dict=True, **kwargs)
        return _features(outputs.last_hidden_state, self.speech_connector(outputs.last_hidden_state), outputs)

    def _require_tower(self, modality: str, value: torch.Tensor):
        if modality not in self.config.input_modalities:
            takes = ", ".join(("text", *self.config.input_modalities))
            raise ValueError(
                f"`{MEDIA_INPUTS[modality]}` given, but this model has no tower for {modality}; it takes: {takes}"
            )
        if not isinstance(value, torch.Tensor) or value.shape[:1] == (0,):
            raise ValueError(
                f"`{MEDIA_INPUTS[modality]}` must be a tensor with at least one item; for none, leave it out"
            )

    def encode_media(
        self,
        pixel_values: torch.Tensor | None = None,
        pixel_values_videos: torch.Tensor | None = None,
        video_frame_mask: torch.Tensor | None = None,
        input_values: torch.Tensor | None = None,
        input_values_mask: torch.Tensor | None = None,
        input_features: torch.Tensor | None = None,
        output_router_logits: bool = False,
    ) -> dict[str, BaseModelOutputWithPooling]:
        """Runs every tower that has an input. Keys are modalities; the result may be passed to `forward` or `generate`
        as `mm_encoder_outputs` instead of the raw media. `output_router_logits` concerns images and videos."""
        encoded = {}
        vision = {"return_dict": True, "output_router_logits": output_router_logits}
        if pixel_values is not None:
            encoded["image"] = self.get_image_features(pixel_values, **vision)
        if pixel_values_videos is not None:
            encoded["video"] = self.get_video_features(pixel_values_videos, video_frame_mask, **vision)
        if input_values is not None:
            encoded["audio"] = self.get_audio_features(input_values, input_values_mask, return_dict=True)
        if input_features is not None:
            encoded["speech"] = self.get_speech_features(input_features, return_dict=True)
        return encoded

    def placeholder_mask(
        self, modality: str, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None
    ) -> torch.Tensor:
        """Bool [B, S], True at the placeholders of `modality`.

        Raises:
            ValueError: Only embeddings are given and the placeholder's id has none.
        """
        token_id = getattr(self.config, f"{modality}_token_id")
        if input_ids is not None:
            return input_ids == token_id
        if self._beyond_vocabulary([modality]):
            raise ValueError(
                f"{modality} inputs cannot be placed by `inputs_embeds` alone, since `{modality}_token_id` ({token_id}) has "
                "no embedding in this model: pass `input_ids`, or embeddings into which the features are already put"
            )
        # The table is called, not read: its weight may be offloaded, and adapters and scales act in its forward pass. For each
        # place anew, since an adapter's products may round otherwise for another number of rows.
        placeholders = torch.full(inputs_embeds.shape[:2], token_id, device=inputs_embeds.device)
        return (inputs_embeds == self.get_input_embeddings()(placeholders)).all(dim=-1)

    def _beyond_vocabulary(self, modalities: Iterable[str]) -> list[str]:
        """Those of `modalities` whose placeholder has no embedding, as in checkpoints that keep the original's table."""
        # Resizing keeps the configuration's number right; an adapter around the table has none.
        size = self.config.text_config.vocab_size
        return [modality for modality in modalities if getattr(self.config, f"{modality}_token_id") >= size]

    def _splice(
        self,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        encoded: dict[str, BaseModelOutputWithPooling],
    ) -> torch.Tensor:
        """[B, S, H] embeddings in which the k-th placeholder of a modality, in reading order, is its k-th feature."""
        # A step of generation has nothing to place.
        is_step = not encoded and input_ids is not None and input_ids.shape[1] == 1
        modalities = () if is_step else MODALITIES
        beyond = self._beyond_vocabulary(modalities)
        if input_ids is not None:
            ids = input_ids
            for modality in beyond:
                # Overwritten below, or refused, so any row of the table will do.
                ids = ids.masked_fill(self.placeholder_mask(modality, input_ids, None), 0)
            inputs_embeds = self.get_input_embeddings()(ids)
        text_embeds = inputs_embeds
        for modality in modalities:
            if encoded.get(modality) is None:
                if input_ids is not None and modality in beyond:
                    self.check_count(modality, self.placeholder_mask(modality, input_ids, None), 0)
                continue
            features = encoded[modality].pooler_output
            mask = self.placeholder_mask(modality, input_ids, text_embeds)
            self.check_count(modality, mask, features.shape[0] * features.shape[1])
            features = features.to(inputs_embeds.device, inputs_embeds.dtype)
            inputs_embeds = inputs_embeds.masked_scatter(mask.unsqueeze(-1), features)
        return inputs_embeds

    def token_types(self, input_ids: torch.Tensor) -> torch.Tensor:
        """The modality of each token of `input_ids` [B, S], as an index into `TOKEN_TYPES`; int [B, S]."""
        names = self.config.input_modalities
        return token_types_of(input_ids, {name: getattr(self.config, f"{name}_token_id") for name in names})

    def check_count(self, modality: str, mask: torch.Tensor, num_features: int):
        """Raises ValueError where `mask` does not have as many placeholders of `modality` as there are features."""
        if torch.compiler.is_compiling():
            return
        num_placeholders = int(mask.sum())
        if num_placeholders != num_features:
            raise ValueError(
                f"The text has {num_placeholders} {modality} placeholder tokens (id "
                f"{getattr(self.config, f'{modality}_token_id')}), but `{MEDIA_INPUTS[modality]}` gives {num_features} "
                "embeddings. Let the processor expand the text together with its items."
            )

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        pixel_values_videos: torch.Tensor | None = None,
        video_frame_mask: torch.Tensor | None = None,
        input_values: torch.Tensor | None = None,
        input_values_mask: torch.Tensor | None = None,
        input_features: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> UniMoEModelOutputWithPast:
        """
        Args:
            input_ids: Int [B, S], in which each item is as many placeholders as it has features.
            attention_mask: Int [B, S], 1 for real tokens; padding may be on either side.
            pixel_values, pixel_values_videos, video_frame_mask, input_values, input_values_mask, input_features: See
                `get_image_features`, `get_video_features`, `get_audio_features` and `get_speech_features`.
            inputs_embeds: Float [B, S, H] instead of `input_ids`.
            mm_encoder_outputs: What [`encode_media`] returned, instead of the raw media.

        Raises:
            ValueError: Neither or both of `input_ids` and `inputs_embeds`; a modality without a tower; or a number of
                placeholders that is not the number of features.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Pass exactly one of `input_ids` and `inputs_embeds`")
        if kwargs.get("output_router_logits") is None and self.config.output_router_logits:
            # The decoder would ask its own configuration.
            kwargs["output_router_logits"] = True
        encoded = dict(mm_encoder_outputs or {})
        unknown = ", ".join(sorted(encoded.keys() - set(MODALITIES)))
        if unknown:
            raise ValueError(f"`mm_encoder_outputs` has {unknown}; its keys are among {', '.join(MODALITIES)}")
        encoded |= self.encode_media(
            pixel_values,
            pixel_values_videos,
            video_frame_mask,
            input_values,
            input_values_mask,
            input_features,
            output_router_logits=bool(kwargs.get("output_router_logits")),
        )
        sparsity = self.config.text_sparsity
        if sparsity is not None and sparsity.router_modality_maps:
            self.routed_token_types.value_BS = None if input_ids is None else self.token_types(input_ids)
        spliced = self._splice(input_ids, inputs_embeds, encoded)
        counts_padding = sparsity is not None and sparsity.router_loss_counts_padding
        if counts_padding and attention_mask is not None and attention_mask.shape == spliced.shape[:2]:
            # What padding is matters here: it takes part in losses and capacities, and the originals pad with zeros.
            spliced = spliced * attention_mask.unsqueeze(-1).to(spliced.dtype)
        outputs = self.language_model(
            inputs_embeds=spliced,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            **kwargs,
        )
        features = {f"{modality}_hidden_states": output.pooler_output for modality, output in encoded.items()}
        return UniMoEModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.get("router_logits"),
            vision_router_logits=sum((output.get("router_logits") or () for output in encoded.values()), ()) or None,
            connector_router_logits=tuple(
                output.connector_router_logits
                for output in encoded.values()
                if output.get("connector_router_logits") is not None
            )
            or None,
            **features,
        )


class UniMoEForConditionalGeneration(UniMoEPreTrainedModel, UniMoEGenerationMixin):
    """A UniMoE model with its language-modelling head: text, image, video, audio and speech in, text out."""

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: UniMoEConfig):
        super().__init__(config)
        self.model = UniMoEModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module):
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def get_image_features(self, pixel_values: torch.Tensor, **kwargs: Unpack[TransformersKwargs]):
        """See [`UniMoEModel.get_image_features`]."""
        return self.model.get_image_features(pixel_values, **kwargs)

    def get_video_features(
        self,
        pixel_values_videos: torch.Tensor,
        video_frame_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ):
        """See [`UniMoEModel.get_video_features`]."""
        return self.model.get_video_features(pixel_values_videos, video_frame_mask, **kwargs)

    def get_audio_features(
        self,
        input_values: torch.Tensor,
        input_values_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ):
        """See [`UniMoEModel.get_audio_features`]."""
        return self.model.get_audio_features(input_values, input_values_mask, **kwargs)

    def get_speech_features(self, input_features: torch.Tensor, **kwargs: Unpack[TransformersKwargs]):
        """See [`UniMoEModel.get_speech_features`]."""
        return self.model.get_speech_features(input_features, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        pixel_values_videos: torch.Tensor | None = None,
        video_frame_mask: torch.Tensor | None = None,
        input_values: torch.Tensor | None = None,
        input_values_mask: torch.Tensor | None = None,
        input_features: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        labels: torch.LongTensor | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        step_statistics: dict[str, torch.Tensor] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> UniMoECausalLMOutputWithPast:
        """
        Args:
            labels: Int [B, S], the ids to predict, aligned with `input_ids`; -100 is left out of the loss.
            output_router_logits: Return the decoder's router logits and `aux_loss`. Default: `config.output_router_logits`.
            logits_to_keep: Compute logits for this many last positions only (0: all), or for these positions.
            step_statistics: What router losses need to know of the whole optimiser step (see `step_statistics.py`), where
                `num_items_in_batch` says that the batch is a piece of one. Default: the batches that all processes have at
                hand are taken for the step.
            The other arguments and errors are those of [`UniMoEModel.forward`].
        """
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits
        adds_losses = labels is not None and has_router_losses(self.config)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            pixel_values=pixel_values,
            pixel_values_videos=pixel_values_videos,
            video_frame_mask=video_frame_mask,
            input_values=input_values,
            input_values_mask=input_values_mask,
            input_features=input_features,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            mm_encoder_outputs=mm_encoder_outputs,
            output_router_logits=bool(output_router_logits or adds_losses),
            **kwargs,
        )
        logits = self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
        loss = aux_loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.text_config.vocab_size, **kwargs
            )
        if output_router_logits or adds_losses:
            mask = attention_mask_of(outputs.last_hidden_state[..., 0], attention_mask)
            piece = None
            if adds_losses and kwargs.get("num_items_in_batch") is not None:
                inputs = {
                    "inputs_embeds": outputs.last_hidden_state,
                    "attention_mask": attention_mask,
                    "pixel_values": pixel_values,
                    "pixel_values_videos": pixel_values_videos,
                    "video_frame_mask": video_frame_mask,
                }
                weights = step_weights(labels, kwargs["num_items_in_batch"])
                piece = piece_of_step(self.config, inputs, outputs, weights, step_statistics)
            aux_loss, weighted = router_losses(self.config, outputs, mask, lambda: self._token_types(input_ids), piece)
            if adds_losses:
                loss = loss + weighted
        return UniMoECausalLMOutputWithPast(
            loss=loss,
            aux_loss=aux_loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits if output_router_logits else None,
            vision_router_logits=outputs.vision_router_logits if output_router_logits else None,
            connector_router_logits=outputs.connector_router_logits if output_router_logits else None,
            image_hidden_states=outputs.image_hidden_states,
            video_hidden_states=outputs.video_hidden_states,
            audio_hidden_states=outputs.audio_hidden_states,
            speech_hidden_states=outputs.speech_hidden_states,
        )

    def _token_types(self, input_ids: torch.Tensor | None) -> torch.Tensor:
        if input_ids is None:
            raise ValueError(
                "`router_modality_loss_coef` and `router_divergence_loss_coef` need `input_ids`, which tell the modalities "
                "apart; `inputs_embeds` do not"
            )
        return self.model.token_types(input_ids)


# `generate` asks for the signature at every step of a model that is not Transformers' own; reading it anew is slow.
UniMoEForConditionalGeneration.forward.__signature__ = inspect.signature(UniMoEForConditionalGeneration.forward)


__all__ = ["UniMoEForConditionalGeneration", "UniMoEModel", "UniMoEPreTrainedModel"]
