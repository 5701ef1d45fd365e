"""BEATs, the audio-event encoder of Uni-MoE's audio model (Chen et al. 2022, "BEATs: Audio Pre-Training with Acoustic
Tokenizers", arXiv 2212.09058).

Parameter names, against those of an original BEATs file (`N` counts layers):

    here                                                original
    patch_embedding                                     patch_embedding
    feature_projection.layer_norm                       layer_norm
    feature_projection.projection                       post_extract_proj
    encoder.pos_conv_embed.conv.weight_magnitude        encoder.pos_conv.0.weight_g
    encoder.pos_conv_embed.conv.weight_direction        encoder.pos_conv.0.weight_v
    encoder.pos_conv_embed.conv.bias                    encoder.pos_conv.0.bias
    encoder.layer_norm                                  encoder.layer_norm
    encoder.relative_attention_bias (once)              encoder.layers.N.self_attn.relative_attention_bias (one tensor)
    encoder.layers.N.attention.{q,k,v,out}_proj         encoder.layers.N.self_attn.{q,k,v,out}_proj
    encoder.layers.N.attention.gru_rel_pos_linear       encoder.layers.N.self_attn.grep_linear
    encoder.layers.N.attention.gru_rel_pos_const        encoder.layers.N.self_attn.grep_a
    encoder.layers.N.layer_norm                         encoder.layers.N.self_attn_layer_norm
    encoder.layers.N.feed_forward.intermediate_dense    encoder.layers.N.fc1
    encoder.layers.N.feed_forward.output_dense          encoder.layers.N.fc2
    encoder.layers.N.final_layer_norm                   encoder.layers.N.final_layer_norm

Layer names follow Transformers' WavLM, whose attention BEATs shares. Shapes below: N chunks, F frames, T tokens, C
hidden size, A attention heads.
"""

import math
import re
from collections.abc import Callable

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, logging
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_unimoe import UniMoEAudioConfig

logger = logging.get_logger(__name__)


def relative_position_buckets(relative_position: torch.Tensor, num_buckets: int, max_distance: int) -> torch.Tensor:
    """The bucket, in `[0, num_buckets)`, of each signed distance key minus query (int64, any shape).

    Half of the buckets serve each direction. Of a half, the first half holds one distance each; the rest grow
    logarithmically up to `max_distance`, beyond which all distances share the last one (the rule of T5, in float32).
    """
    per_direction = num_buckets // 2
    num_exact = per_direction // 2
    distance = relative_position.abs()
    growth = torch.log(distance.clamp(min=1).float() / num_exact) / math.log(max_distance / num_exact)
    logarithmic = num_exact + (growth * (per_direction - num_exact)).long()
    bucket = torch.where(distance < num_exact, distance, logarithmic.clamp(max=per_direction - 1))
    return bucket + per_direction * (relative_position > 0)


def token_padding_mask(frame_mask: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """Which tokens are padding: bool [N, num_tokens] from a frame mask [N, F] (1 or True for a real frame).

    The reference spreads frames evenly over the FLATTENED tokens (time step, then frequency band), so in a time step
    that is partly padding some bands count as padding and others do not. Checkpoints were trained with it; it is kept.
    """
    frames_per_token = frame_mask.shape[1] // num_tokens
    is_padding = frame_mask[:, : num_tokens * frames_per_token] == 0
    return is_padding.view(-1, num_tokens, frames_per_token).all(dim=-1)


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    # BEATs has large logits: those divided by 32 fit float16, and a power of two costs no precision.
    weights = torch.matmul(query * (scaling / 32), key.transpose(2, 3)).float() * 32
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = nn.functional.softmax(weights, dim=-1).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


class UniMoEAudioWeightNormConv1d(nn.Module):
    """Grouped Conv1d with `weight = magnitude * direction / ||direction||`, the norm taken per kernel position.

    Two plain parameters rather than a parametrization: it can be pickled and built on the meta device, and the names
    stay clear of Transformers' renaming of `weight_g` and `weight_v` on load.
    """

    def __init__(self, channels: int, kernel_size: int, groups: int):
        super().__init__()
        self.groups = groups
        self.weight_magnitude = nn.Parameter(torch.empty(1, 1, kernel_size))
        self.weight_direction = nn.Parameter(torch.empty(channels, channels // groups, kernel_size))
        self.bias = nn.Parameter(torch.empty(channels))

    def direction_norm(self) -> torch.Tensor:
        direction = self.weight_direction
        direction = direction.to(torch.promote_types(direction.dtype, torch.float32))
        return torch.linalg.vector_norm(direction, dim=(0, 1), keepdim=True)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        weight = self.weight_magnitude * self.weight_direction / self.direction_norm()
        options = {"padding": weight.shape[-1] // 2, "groups": self.groups}
        dtype = hidden_states.dtype
        if hidden_states.device.type != "cpu":
            return nn.functional.conv1d(hidden_states, weight.to(dtype), self.bias, **options)
        # On CPUs with bfloat16 units, oneDNN's grouped bfloat16 convolution is plainly wrong (relative error 0.76 with
        # torch 2.13) for an even kernel on groups of 8 or 12 channels.
        with torch.autocast("cpu", enabled=False):
            precise = weight.dtype
            return nn.functional.conv1d(hidden_states.to(precise), weight, self.bias.to(precise), **options).to(dtype)


class UniMoEAudioPositionalConvEmbedding(nn.Module):
    def __init__(self, config: UniMoEAudioConfig):
        super().__init__()
        self.conv = UniMoEAudioWeightNormConv1d(
            config.hidden_size, config.num_conv_pos_embeddings, config.num_conv_pos_embedding_groups
        )

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        positions = self.conv(hidden_states.transpose(1, 2))
        # An even kernel gives one output too many.
        positions = positions[..., : hidden_states.shape[1]]
        return nn.functional.gelu(positions).transpose(1, 2)


class UniMoEAudioFeatureProjection(nn.Module):
    def __init__(self, config: UniMoEAudioConfig):
        super().__init__()
        self.layer_norm = nn.LayerNorm(config.patch_embed_dim, eps=config.layer_norm_eps)
        same = config.patch_embed_dim == config.hidden_size
        self.projection = nn.Identity() if same else nn.Linear(config.patch_embed_dim, config.hidden_size)
        self.dropout = nn.Dropout(config.dropout_input)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        return self.dropout(self.projection(self.layer_norm(patches)))


class UniMoEAudioAttention(nn.Module):
    """Self-attention with the gated relative position bias of WavLM (Chen et al. 2021, arXiv 2110.13900, eq. 4-6)."""

    def __init__(self, config: UniMoEAudioConfig):
        super().__init__()
        self.config = config
        self.num_heads = config.num_attention_heads
        self.head_dim = config.hidden_size // self.num_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = False
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.is_gated = config.relative_position_embedding and config.gated_relative_position
        if self.is_gated:
            self.gru_rel_pos_linear = nn.Linear(self.head_dim, 8)
            self.gru_rel_pos_const = nn.Parameter(torch.ones(1, self.num_heads, 1, 1))

    def position_gate(self, query: torch.Tensor) -> torch.Tensor:
        """The factor [N, A, T, 1] on each query's row of the bias; `query` [N, A, T, head_dim] is not yet scaled."""
        logits = self.gru_rel_pos_linear(query).unflatten(-1, (2, 4)).sum(-1)
        update, reset = torch.sigmoid(logits).split(1, dim=-1)
        return update * (reset * self.gru_rel_pos_const - 1.0) + 2.0

    def additive_mask(
        self, query: torch.Tensor, position_bias: torch.Tensor | None, padding_mask: torch.Tensor | None
    ) -> torch.Tensor | None:
        """What is added to the logits: the bias and, for padded keys, the lowest finite value (a chunk that is all
        padding must not give NaN). [N, A, T, T] or a shape that broadcasts to it."""
        mask = None
        if position_bias is not None:
            gate = self.position_gate(query) if self.is_gated else 1.0
            mask = (gate * position_bias).to(query.dtype)
        if padding_mask is not None:
            lowest = torch.finfo(query.dtype).min
            mask = query.new_zeros(1) if mask is None else mask
            mask = mask.masked_fill(padding_mask[:, None, None, :], lowest)
        return mask

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_bias: torch.Tensor | None = None,
        padding_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        shape = (*hidden_states.shape[:-1], self.num_heads, self.head_dim)
        query = self.q_proj(hidden_states).view(shape).transpose(1, 2)
        key = self.k_proj(hidden_states).view(shape).transpose(1, 2)
        value = self.v_proj(hidden_states).view(shape).transpose(1, 2)
        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, weights = attention_interface(
            self,
            query,
            key,
            value,
            self.additive_mask(query, position_bias, padding_mask),
            scaling=self.scaling,
            dropout=self.config.attention_dropout if self.training else 0.0,
            **kwargs,
        )
        return self.out_proj(output.reshape(hidden_states.shape)), weights


class UniMoEAudioFeedForward(nn.Module):
    def __init__(self, config: UniMoEAudioConfig):
        super().__init__()
        self.intermediate_dense = nn.Linear(config.hidden_size, config.intermediate_size)
        self.intermediate_act_fn = ACT2FN[config.hidden_act]
        self.intermediate_dropout = nn.Dropout(config.activation_dropout)
        self.output_dense = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_states = self.intermediate_act_fn(self.intermediate_dense(hidden_states))
        return self.output_dense(self.intermediate_dropout(hidden_states))


class UniMoEAudioEncoderLayer(GradientCheckpointingLayer):
    def __init__(self, config: UniMoEAudioConfig):
        super().__init__()
        self.is_pre_norm = config.layer_norm_first
        depth = config.num_hidden_layers
        self.residual_scale = (2 * depth) ** 0.25 if config.deep_norm else 1.0
        self.attention = UniMoEAudioAttention(config)
        self.layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.feed_forward = UniMoEAudioFeedForward(config)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout)
        if config.deep_norm:
            # DeepNet (Wang et al. 2022, arXiv 2203.00555), encoder only: what feeds the residual stream starts small.
            # The gain sits on the Linear because initialisation visits only modules with parameters of their own.
            small = (8 * depth) ** -0.25
            attention, feed_forward = self.attention, self.feed_forward
            attention.q_proj.init_gain = attention.k_proj.init_gain = 1.0
            attention.v_proj.init_gain = attention.out_proj.init_gain = small
            feed_forward.intermediate_dense.init_gain = feed_forward.output_dense.init_gain = small

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_bias: torch.Tensor | None = None,
        padding_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        residual = hidden_states
        if self.is_pre_norm:
            hidden_states = self.layer_norm(hidden_states)
        hidden_states, _ = self.attention(hidden_states, position_bias, padding_mask, **kwargs)
        hidden_states = residual * self.residual_scale + self.dropout(hidden_states)
        if not self.is_pre_norm:
            hidden_states = self.layer_norm(hidden_states)

        residual = hidden_states
        if self.is_pre_norm:
            hidden_states = self.final_layer_norm(hidden_states)
        hidden_states = residual * self.residual_scale + self.dropout(self.feed_forward(hidden_states))
        if not self.is_pre_norm:
            hidden_states = self.final_layer_norm(hidden_states)
        return hidden_states


class UniMoEAudioEncoder(nn.Module):
    def __init__(self, config: UniMoEAudioConfig):
        super().__init__()
        self.config = config
        self.pos_conv_embed = UniMoEAudioPositionalConvEmbedding(config)
        self.layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.relative_attention_bias = None
        if config.relative_position_embedding:
            self.relative_attention_bias = nn.Embedding(config.num_buckets, config.num_attention_heads)
        self.layers = nn.ModuleList([UniMoEAudioEncoderLayer(config) for _ in range(config.num_hidden_layers)])

    def position_bias(self, num_tokens: int, device: torch.device | None = None) -> torch.Tensor | None:
        """The bias [1, A, T, T] before gating, the same for all chunks and layers; None where the config has none.

        `device` is where the tokens are. The table's own device says nothing of it while an offloaded table is away.
        """
        if self.relative_attention_bias is None:
            return None
        # Only 2T-1 distances exist: look those up, then slide a window over them instead of looking up T*T pairs.
        # Falling distances, because a window can only move towards higher indices as the query does.
        distance = torch.arange(num_tokens - 1, -num_tokens, -1, device=device)
        buckets = relative_position_buckets(distance, self.config.num_buckets, self.config.max_bucket_distance)
        windows = self.relative_attention_bias(buckets).transpose(0, 1).unfold(-1, num_tokens, 1)
        return windows.flip(-1).unsqueeze(0)

    def forward(
        self,
        hidden_states: torch.Tensor,
        padding_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        if padding_mask is not None:
            hidden_states = hidden_states.masked_fill(padding_mask.unsqueeze(-1), 0.0)
        hidden_states = hidden_states + self.pos_conv_embed(hidden_states)
        if not self.config.layer_norm_first:
            hidden_states = self.layer_norm(hidden_states)
        hidden_states = self.dropout(hidden_states)

        position_bias = self.position_bias(hidden_states.shape[1], hidden_states.device)
        for layer in self.layers:
            # LayerDrop (Fan et al. 2019, arXiv 1909.11556)
            if self.training and self.config.layerdrop > 0 and torch.rand([]) < self.config.layerdrop:
                continue
            hidden_states = layer(hidden_states, position_bias, padding_mask, **kwargs)

        return self.layer_norm(hidden_states) if self.config.layer_norm_first else hidden_states


class UniMoEAudioModel(PreTrainedModel):
    """The BEATs encoder: a filterbank, cut into square patches, through a transformer."""

    config: UniMoEAudioConfig
    config_class = UniMoEAudioConfig
    base_model_prefix = "audio_model"
    main_input_name = "input_values"
    input_modalities = ("audio",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["UniMoEAudioEncoderLayer"]
    _supports_sdpa = True
    # Flash kernels take no additive bias, and a gated one depends on the query.
    _supports_flash_attn = False
    _supports_flex_attn = False
    _can_record_outputs = {"hidden_states": UniMoEAudioEncoderLayer, "attentions": UniMoEAudioAttention}

    def __init__(self, config: UniMoEAudioConfig):
        super().__init__(config)
        self.patch_embedding = nn.Conv2d(
            1, config.patch_embed_dim, kernel_size=config.patch_size, stride=config.patch_size, bias=config.conv_bias
        )
        self.feature_projection = UniMoEAudioFeatureProjection(config)
        self.encoder = UniMoEAudioEncoder(config)
        self.post_init()

    def _check_and_adjust_attn_implementation(self, attn_implementation: str | None, *args, **kwargs) -> str:
        """As Transformers', but what is asked of a whole model that cannot work here becomes SDPA, with a warning."""
        if attn_implementation is not None and re.search("flash|flex", attn_implementation):
            logger.warning_once(
                f"BEATs adds a bias to its attention scores, which {attn_implementation} cannot take: its layers use sdpa"
            )
            attn_implementation = "sdpa"
        return super()._check_and_adjust_attn_implementation(attn_implementation, *args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, nn.Linear) and hasattr(module, "init_gain"):
            init.xavier_normal_(module.weight, gain=module.init_gain)
        elif isinstance(module, UniMoEAudioWeightNormConv1d):
            channels, _, kernel_size = module.weight_direction.shape
            init.normal_(module.weight_direction, mean=0.0, std=2 / math.sqrt(kernel_size * channels))
            init.copy_(module.weight_magnitude, module.direction_norm())
            init.zeros_(module.bias)
        elif isinstance(module, UniMoEAudioAttention) and module.is_gated:
            init.ones_(module.gru_rel_pos_const)

    def get_input_embeddings(self) -> nn.Module:
        return self.patch_embedding

    def num_tokens(self, num_frames: int) -> int:
        """Tokens that a chunk of `num_frames` frames gives: 1496 for the 2998 frames of 30 s."""
        patch_size = self.config.patch_size
        return (num_frames // patch_size) * (self.config.num_mel_bins // patch_size)

    def _check_inputs(self, input_values: torch.Tensor, attention_mask: torch.Tensor | None):
        mel, patch = self.config.num_mel_bins, self.config.patch_size
        if input_values.ndim != 3 or input_values.shape[-1] != mel:
            raise ValueError(
                f"`input_values` must have the shape [chunks, frames, {mel}], got {list(input_values.shape)}; "
                "the processor makes it from a waveform"
            )
        if input_values.shape[1] < patch:
            raise ValueError(
                f"`input_values` has {input_values.shape[1]} frames, fewer than the {patch} of a patch; pad the sound"
            )
        if attention_mask is not None and attention_mask.shape != input_values.shape[:2]:
            raise ValueError(
                "`attention_mask` (`input_values_mask` of a model around this one) must have one entry per frame, "
                f"{list(input_values.shape[:2])}, got {list(attention_mask.shape)}"
            )

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_values: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutput:
        """
        Args:
            input_values: Normalised log-mel filterbank, float [N, F, 128], F >= 16 frames of 10 ms.
            attention_mask: Which frames are real (1) and which padding (0), int64 or bool [N, F]; None if all are
                real. Padded tokens are hidden from attention, but their own outputs are returned too.

        Returns:
            `last_hidden_state` [N, T, C] with T = (F // 16) * 8 tokens, time step by time step; `hidden_states` (the
            encoder's input and each layer's output) and `attentions` if asked for. Layers that `layerdrop` skips in
            training are absent from both.

        Raises:
            ValueError: The shape of an input is wrong; the message names it.
        """
        self._check_inputs(input_values, attention_mask)
        image = input_values.to(self.patch_embedding.weight.dtype).unsqueeze(1)
        patches = self.patch_embedding(image).flatten(2).transpose(1, 2)
        hidden_states = self.feature_projection(patches)
        padding_mask = None
        if attention_mask is not None:
            padding_mask = token_padding_mask(attention_mask, hidden_states.shape[1]).to(hidden_states.device)
        return BaseModelOutput(last_hidden_state=self.encoder(hidden_states, padding_mask, **kwargs))


__all__ = ["UniMoEAudioModel"]
