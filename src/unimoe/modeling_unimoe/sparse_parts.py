"""Which parts of a model are sparse, and which of them have router losses."""

from transformers import PreTrainedConfig

from .configuration_unimoe import UniMoEConfig, UniMoESparsityConfig

COEFFICIENTS = (
    "router_aux_loss_coef",
    "router_z_loss_coef",
    "router_modality_loss_coef",
    "router_divergence_loss_coef",
)


def decoder_sparsity(config: UniMoEConfig) -> PreTrainedConfig | None:
    """How the decoder's router losses are taken: as `text_sparsity` says, or as a decoder that is sparse by itself does."""
    text = config.text_config
    if config.text_sparsity is not None or not getattr(text, "num_local_experts", None):
        return config.text_sparsity
    # Stock sparse decoders apply their coefficient only when asked to return router logits.
    coef = text.router_aux_loss_coef if getattr(text, "output_router_logits", False) else 0.0
    return UniMoESparsityConfig(
        num_experts=text.num_local_experts, top_k=text.num_experts_per_tok, router_aux_loss_coef=coef
    )


def sparse_parts(config: UniMoEConfig) -> dict[str, PreTrainedConfig]:
    """The sparse parts of a model, by the output that holds their router logits."""
    connector = config.vision_connector_config
    parts = {
        "connector_router_logits": None if connector is None else connector.sparsity,
        "vision_router_logits": config.vision_sparsity,
        "router_logits": decoder_sparsity(config),
    }
    return {name: sparsity for name, sparsity in parts.items() if sparsity is not None}


def has_router_losses(config: UniMoEConfig) -> bool:
    """Whether any part gives a router loss a weight."""
    return any(getattr(sparsity, name) for sparsity in sparse_parts(config).values() for name in COEFFICIENTS)
