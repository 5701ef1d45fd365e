"""What the models return. Shape letters as in `modeling_unimoe`; E experts."""

from dataclasses import dataclass

import torch
from transformers import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast, ModelOutput


@dataclass
class UniMoEModelOutputWithPast(BaseModelOutputWithPast):
    r"""
    Args:
        router_logits (`tuple` of float [B * S, E], one per sparse decoder layer): With `output_router_logits=True`.
        vision_router_logits, connector_router_logits (`tuple` of float [N, tokens, E]): Likewise, of a sparse vision tower and a
            sparse connector; see [`UniMoEVisionOutput`]. One per pass through the connector.
        image_hidden_states (float [N, P, H]), video_hidden_states (float [N, P, H]), audio_hidden_states (float [N, Q, H]),
            speech_hidden_states (float [N, Q, H]): The embeddings that replaced the placeholders; None without such items.
    """

    router_logits: tuple[torch.Tensor, ...] | None = None
    vision_router_logits: tuple[torch.Tensor, ...] | None = None
    connector_router_logits: tuple[torch.Tensor, ...] | None = None
    image_hidden_states: torch.Tensor | None = None
    video_hidden_states: torch.Tensor | None = None
    audio_hidden_states: torch.Tensor | None = None
    speech_hidden_states: torch.Tensor | None = None


@dataclass
class UniMoECausalLMOutputWithPast(ModelOutput):
    r"""
    Args:
        loss (float scalar): Next-token cross entropy over labels other than -100, plus the weighted auxiliary losses.
        logits (float [B, S or `logits_to_keep`, vocabulary]): Scores before softmax.
        aux_loss (float scalar): The unweighted load-balancing loss, with `output_router_logits=True` or where the
            configuration gives an auxiliary loss a weight.
        past_key_values, hidden_states, attentions: As in every Transformers decoder.
        router_logits and the `*_hidden_states` of the media: See [`UniMoEModelOutputWithPast`].
    """

    loss: torch.Tensor | None = None
    aux_loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    router_logits: tuple[torch.Tensor, ...] | None = None
    vision_router_logits: tuple[torch.Tensor, ...] | None = None
    connector_router_logits: tuple[torch.Tensor, ...] | None = None
    image_hidden_states: torch.Tensor | None = None
    video_hidden_states: torch.Tensor | None = None
    audio_hidden_states: torch.Tensor | None = None
    speech_hidden_states: torch.Tensor | None = None
