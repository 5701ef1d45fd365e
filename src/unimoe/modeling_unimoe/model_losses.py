"""The router losses of a whole model: which of its sparse parts have which, and their weighted sum."""

from collections.abc import Callable

import torch
from transformers import PreTrainedConfig
from transformers.modeling_outputs import ModelOutput

from .configuration_unimoe import UniMoEConfig, UniMoESparsityConfig
from .router_losses import balance_and_z_losses, modality_divergence_loss, modality_expert_loss, step_share

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


def router_losses(
    config: UniMoEConfig,
    outputs: ModelOutput,
    attention_mask: torch.Tensor | None,
    token_types: Callable[[], torch.Tensor],
    sample_weight_B: torch.Tensor | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor | float]:
    """The decoder's load-balancing loss, unweighted, and the weighted sum of all router losses of the model.

    Args:
        outputs: Of `UniMoEModel`, with router logits. A part without any (no image was given) adds nothing.
        attention_mask: Int [B, S] of the decoder's tokens, or None.
        token_types: Gives int [B, S], the modality of each of them; called only where a loss needs it.
        sample_weight_B: Float [B], the part of an optimiser step that each sample is, where the step is computed in pieces;
            the sum of losses is then what these samples add to it. None: the batch is the whole step.
    """
    num_samples, device = len(outputs.last_hidden_state), outputs.last_hidden_state.device
    aux_loss, total = None, 0.0
    for name, sparsity in sparse_parts(config).items():
        router_logits = outputs.get(name)
        if not router_logits:
            continue
        is_decoder = name == "router_logits"
        mask = attention_mask if is_decoder else None
        balance, z = balance_and_z_losses(sparsity, router_logits, num_samples, mask)
        share = 1.0 if sample_weight_B is None else sample_weight_B.sum().to(balance.device)
        if is_decoder:
            aux_loss = balance
        if is_decoder and sample_weight_B is not None:
            balance, z = step_share(sparsity, router_logits, sample_weight_B, mask)
        else:
            balance, z = share * balance, share * z
        weighted = sparsity.router_aux_loss_coef * balance + sparsity.router_z_loss_coef * z
        if is_decoder:
            if sparsity.router_modality_loss_coef:
                value = modality_expert_loss(router_logits, token_types(), sparsity.modality_experts)
                weighted = weighted + share * sparsity.router_modality_loss_coef * value
            if sparsity.router_divergence_loss_coef:
                value = modality_divergence_loss(router_logits, token_types())
                weighted = weighted + share * sparsity.router_divergence_loss_coef * value
        total = total + weighted.to(device)
    return aux_loss, total
