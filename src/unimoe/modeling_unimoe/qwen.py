"""First-generation Qwen as Qwen2 with its two means of reading past the length that it was trained with.

Below that length the two are the same function. Past it (`seq_length`), in evaluation alone:
- dynamic NTK: the rotary base grows by `alpha ** (d / (d - 2))` with `alpha = 2 ** ceil(log2(L / seq_length) + 1) - 1`, where L
  is a row's number of real tokens at the first pass; later passes over the same cache keep that alpha;
- log-n attention: a query at position i (from 1, padding counted) is multiplied by `log_seq_length(i)` where that exceeds one.

Shape suffixes: B batch, S new tokens, D head size.
"""

import math

import torch
from transformers import AutoModel, Cache, DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen2.modeling_qwen2 import (
    Qwen2Attention,
    Qwen2Model,
    apply_rotary_pos_emb,
    eager_attention_forward,
)


def build_decoder(config: PreTrainedConfig) -> PreTrainedModel:
    """A stock model from its config; a Qwen2 whose config has `first_generation` as [`UniMoEQwenModel`]."""
    if getattr(config, "first_generation", None):
        return UniMoEQwenModel._from_config(config)
    return AutoModel.from_config(config)


def ntk_alpha(lengths: torch.Tensor, seq_length: int) -> torch.Tensor:
    """How far the rotary base is stretched for sequences of `lengths` (any shape); 1 up to `seq_length`."""
    doublings = torch.ceil(torch.log2(lengths.float() / seq_length) + 1)
    return (2**doublings - 1).clamp(min=1)


def logn_scale(positions: torch.Tensor, seq_length: int) -> torch.Tensor:
    """Factors of queries at `positions`, counted from 0."""
    return (torch.log((positions + 1).float()) / math.log(seq_length)).clamp(min=1)


class UniMoEQwenAttention(Qwen2Attention):
    """Qwen2's attention; `query_scale_S` multiplies the queries."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None,
        past_key_values: Cache | None = None,
        ntk_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        query_scale_S: torch.Tensor | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        heads = (*hidden_states.shape[:-1], -1, self.head_dim)
        query, key, value = (
            projection(hidden_states).view(heads).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = apply_rotary_pos_emb(query, key, *(ntk_embeddings or position_embeddings))
        if query_scale_S is not None:
            query = query * query_scale_S[:, None].to(query.dtype)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        output, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **kwargs,
        )
        return self.o_proj(output.flatten(2)), weights


class UniMoEQwenModel(Qwen2Model):
    """Qwen2Model whose config has `first_generation`: `seq_length`, `use_dynamic_ntk` and `use_logn_attn`."""

    def __init__(self, config: PreTrainedConfig):
        super().__init__(config)
        for index, layer in enumerate(self.layers):
            layer.self_attn = UniMoEQwenAttention(config, index)
        self.post_init()

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ):
        """As [`Qwen2Model.forward`], but `position_ids` have no effect past `seq_length`: positions count all columns."""
        if use_cache is None:
            use_cache = self.config.use_cache
        if use_cache and past_key_values is None:
            # Made here, since it carries alpha from the first pass to the later ones.
            past_key_values = DynamicCache(config=self.config)
        if not self.training:
            tokens = input_ids if inputs_embeds is None else inputs_embeds
            kwargs |= self._long_context(tokens, attention_mask, past_key_values)
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )

    @torch.no_grad()
    def _long_context(
        self, tokens: torch.Tensor, attention_mask: torch.Tensor | None, cache: Cache | None
    ) -> dict[str, torch.Tensor | tuple[torch.Tensor, torch.Tensor]]:
        """What the attention layers need beside Qwen2's arguments."""
        settings = self.config.first_generation
        seq_length = settings["seq_length"]
        past = cache.get_seq_length() if cache is not None else 0
        positions_S = torch.arange(tokens.shape[1], device=tokens.device) + past
        extra: dict[str, torch.Tensor | tuple[torch.Tensor, torch.Tensor]] = {}
        if settings.get("use_logn_attn"):
            extra["query_scale_S"] = logn_scale(positions_S, seq_length)
        if settings.get("use_dynamic_ntk"):
            alpha = getattr(cache, "ntk_alpha", None)
            if alpha is None or past == 0:
                length = past + tokens.shape[1]
                has_rows = isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2
                rows = attention_mask.sum(dim=-1) if has_rows else torch.tensor([length], device=tokens.device)
                alpha = ntk_alpha(rows, seq_length) if length > seq_length else rows.new_ones(1, dtype=torch.float32)
                if cache is not None:
                    cache.ntk_alpha = alpha
            extra["ntk_embeddings"] = self._ntk_embeddings(alpha, positions_S, tokens.shape[0])
        return extra

    def _ntk_embeddings(
        self, alpha: torch.Tensor, positions_S: torch.Tensor, batch_size: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines [B, S, D] of the stretched rotary embedding."""
        head_dim = self.layers[0].self_attn.head_dim
        base = self.config.rope_parameters["rope_theta"] * alpha ** (head_dim / (head_dim - 2))
        base_B = base.repeat_interleave(batch_size // len(base))
        exponents = torch.arange(0, head_dim, 2, device=base.device).float() / head_dim
        inverse_frequencies = base_B[:, None] ** -exponents
        angles = positions_S.float()[None, :, None] * inverse_frequencies[:, None, :]
        angles = torch.cat([angles, angles], dim=-1)
        dtype = self.embed_tokens.weight.dtype
        return angles.cos().to(dtype), angles.sin().to(dtype)


__all__ = ["UniMoEQwenModel"]
