"""Connectors: from a tower's features to the decoder's embedding space.

`build_connector` makes one of these, with the parameter names

    linear, mlp        layers.0, layers.1, ... (Linear layers with an activation between them)
    mlp with sparsity  gate.weight, experts.up_proj, experts.up_proj_bias, experts.down_proj, experts.down_proj_bias
    qformer            query_tokens, qformer (Transformers' Blip2QFormerModel), projector.layers.0, ...
    whisper_decoder    query_tokens, decoder (Transformers' WhisperDecoder, no `embed_tokens`), projector.layers.0, ...

Shapes: N media items or sound chunks, T features of each, D tower width, Q query tokens, H decoder width.
"""

import torch
from torch import nn
from transformers import Blip2QFormerModel, PreTrainedConfig
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.models.whisper.modeling_whisper import WhisperDecoder

from .configuration_unimoe import UniMoEConnectorConfig
from .sparse_moe import UniMoESparseMoeBlock


class UniMoEMLPConnector(nn.Module):
    """`num_layers` Linear layers with an activation between them: [..., D] in, [..., H] out.

    One layer is the "linear" projector of the originals, n layers their "mlp{n}x_gelu".
    """

    def __init__(self, input_size: int, hidden_size: int, output_size: int, num_layers: int, hidden_act: str):
        super().__init__()
        sizes = [input_size, *[hidden_size] * (num_layers - 1), output_size]
        self.layers = nn.ModuleList([nn.Linear(*pair) for pair in zip(sizes[:-1], sizes[1:])])
        self.act_fn = ACT2FN[hidden_act]

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        hidden_states = self.layers[0](features)
        for layer in self.layers[1:]:
            hidden_states = layer(self.act_fn(hidden_states))
        return hidden_states


class UniMoEQueryConnector(nn.Module):
    """Learned queries that read the tower's features: [N, T, D] in, [N, Q, H] out, whatever T.

    Padding is not masked: the towers' features of padded time are read like any other, as the originals were trained.
    """

    def __init__(self, config: UniMoEConnectorConfig, width: int, output_size: int):
        super().__init__()
        hidden_size = output_size if config.hidden_size is None else config.hidden_size
        self.query_tokens = nn.Parameter(torch.zeros(1, config.num_query_tokens, width))
        self.projector = UniMoEMLPConnector(
            width, hidden_size, output_size, config.projector_num_layers, config.hidden_act
        )

    def read(self, queries: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """Queries [N, Q, width] and features [N, T, D] to states [N, Q, width]."""
        raise NotImplementedError

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        queries = self.query_tokens.expand(len(features), -1, -1)
        return self.projector(self.read(queries, features))


class UniMoEQFormerConnector(UniMoEQueryConnector):
    """The audio aligner of Uni-MoE: a text-free Q-Former (BLIP-2, Li et al. 2023, arXiv 2301.12597), a projector."""

    def __init__(self, config: UniMoEConnectorConfig, input_size: int, output_size: int):
        backbone = config.backbone_config
        if backbone.encoder_hidden_size != input_size:
            raise ValueError(
                f"`backbone_config.encoder_hidden_size` ({backbone.encoder_hidden_size}) must be the width of the "
                f"tower's features ({input_size})"
            )
        if backbone.use_qformer_text_input:
            raise ValueError("`backbone_config.use_qformer_text_input` must be False: the connector reads no text")
        super().__init__(config, backbone.hidden_size, output_size)
        self.qformer = Blip2QFormerModel(backbone)

    def read(self, queries: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        return self.qformer(queries, encoder_hidden_states=features, return_dict=True).last_hidden_state


class UniMoEWhisperDecoderConnector(UniMoEQueryConnector):
    """The speech aligner of Uni-MoE: a Whisper decoder over learned queries instead of text, then a projector.

    Each query sees the queries before it and all encoder frames.
    """

    def __init__(self, config: UniMoEConnectorConfig, input_size: int, output_size: int):
        backbone = config.backbone_config
        if backbone.d_model != input_size:
            raise ValueError(
                f"`backbone_config.d_model` ({backbone.d_model}) must be the width of the tower's features "
                f"({input_size})"
            )
        if config.num_query_tokens > backbone.max_target_positions:
            raise ValueError(
                f"`num_query_tokens` ({config.num_query_tokens}) must not exceed the decoder's "
                f"`backbone_config.max_target_positions` ({backbone.max_target_positions})"
            )
        super().__init__(config, backbone.d_model, output_size)
        self.decoder = WhisperDecoder(backbone)
        # No text goes in; the embedding of the vocabulary would be the largest tensor and never used.
        self.decoder.embed_tokens = None

    def read(self, queries: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        return self.decoder(
            inputs_embeds=queries, encoder_hidden_states=features, use_cache=False, return_dict=True
        ).last_hidden_state


def build_connector(
    config: UniMoEConnectorConfig, input_size: int, output_size: int, model_config: PreTrainedConfig | None = None
) -> nn.Module:
    """The connector that `config` describes, from features of width `input_size` to embeddings of width `output_size`.

    `model_config`, the config of the model around it, tells a sparse connector which experts implementation to use.

    Its forward takes features [N, T, D] and returns embeddings: [N, T, H] for "linear" and "mlp", [N, Q, H] for
    "qformer" and "whisper_decoder".

    Raises:
        ValueError: `config.backbone_config` does not fit the features or the number of queries.
    """
    if config.type == "qformer":
        return UniMoEQFormerConnector(config, input_size, output_size)
    if config.type == "whisper_decoder":
        return UniMoEWhisperDecoderConnector(config, input_size, output_size)
    hidden_size = output_size if config.hidden_size is None else config.hidden_size
    if config.sparsity is None:
        num_layers = 1 if config.type == "linear" else config.num_layers
        return UniMoEMLPConnector(input_size, hidden_size, output_size, num_layers, config.hidden_act)
    return UniMoESparseMoeBlock(
        input_size,
        hidden_size,
        config.sparsity.num_experts,
        config.sparsity.top_k,
        hidden_act=config.hidden_act,
        gated=False,
        bias=True,
        output_size=output_size,
        config=model_config,
        **config.sparsity.block_options,
    )


def connector_router_logits(connector: nn.Module, features: torch.Tensor) -> torch.Tensor | None:
    """What the router of a sparse connector says of features [..., D]: [..., E]; None for any other connector.

    Computed a second time, which is a small map, rather than taken out of a forward pass that returns embeddings alone.
    """
    if not isinstance(connector, UniMoESparseMoeBlock):
        return None
    logits, *_ = connector.gate(features)
    return logits.unflatten(0, features.shape[:-1])


def init_connector_weights(module: nn.Module, std: float = 0.02) -> bool:
    """Initialises what a connector owns beside ordinary layers: its queries. For use in a model's `_init_weights`.

    Returns:
        True where `module` has queries; False, with nothing done, for any other module.
    """
    if isinstance(module, UniMoEQueryConnector):
        # Not zeros: equal queries would get equal gradients in a Q-Former, which has no positions.
        init.normal_(module.query_tokens, mean=0.0, std=std)
        return True
    return False


__all__ = ["build_connector", "init_connector_weights"]
