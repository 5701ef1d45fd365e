"""The router losses of a whole model: the weighted sum of those of its sparse parts.

A loss is taken in one of two ways. Of a batch that stands for itself it is the originals' formula. Of a piece of an optimiser
step, a micro-batch or what one process has of it, it is what the piece adds to the loss of the step, however the step is cut.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.modeling_outputs import ModelOutput

from .configuration_unimoe import UniMoEConfig
from .router_losses import (
    balance_and_z_losses,
    balance_share,
    modality_divergence_loss,
    modality_expert_loss,
    step_share,
)
from .sparse_parts import sparse_parts
from .step_statistics import KINDS, by_kind, needs_statistics, over_processes, piece_statistics


@dataclass
class PieceOfStep:
    """A batch as a part of an optimiser step.

    Args:
        sample_weight_B: Float [B], the part of the step that each sample is, by predicted tokens.
        piece: The statistics of the batch (`step_statistics`).
        step: Those of the whole step.
    """

    sample_weight_B: torch.Tensor
    piece: dict[str, torch.Tensor]
    step: dict[str, torch.Tensor]


def piece_of_step(
    config: UniMoEConfig,
    inputs: dict[str, Any],
    outputs: ModelOutput,
    sample_weight_B: torch.Tensor,
    step_statistics: dict[str, torch.Tensor] | None = None,
) -> PieceOfStep:
    """A batch as a part of the step that `step_statistics` are of, or else of what all processes have at hand.

    `Trainer` divides the cross entropy by the tokens of the whole step and adds up its micro-batches; router losses, which are
    means over a batch, have to be scaled likewise, lest they count once per micro-batch and process.

    Args:
        inputs, outputs: Of the model, with router logits.
        sample_weight_B: Float [B], the part of the step that each sample is.
    """
    if step_statistics is not None:
        piece = piece_statistics(config, inputs, sample_weight_B.sum())
    else:
        piece = piece_statistics(config, inputs, sample_weight_B.sum(), outputs)
        gathers = torch.is_grad_enabled() and needs_statistics(config)
        step_statistics = over_processes(piece) if gathers else piece
    return PieceOfStep(sample_weight_B, piece, step_statistics)


def router_losses(
    config: UniMoEConfig,
    outputs: ModelOutput,
    attention_mask: torch.Tensor | None,
    token_types: Callable[[], torch.Tensor],
    piece: PieceOfStep | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor | float]:
    """The decoder's load-balancing loss, unweighted, and the weighted sum of all router losses of the model.

    Args:
        outputs: Of `UniMoEModel`, with router logits. A part without any (no image was given) adds nothing.
        attention_mask: Int [B, S] of the decoder's tokens, or None.
        token_types: Gives int [B, S], the modality of each of them; called only where a loss needs it.
        piece: Says that the batch is a piece of a step; the sum of losses is then what it adds to that of the step. None: it
            stands for itself.
    """
    num_samples, device = len(outputs.last_hidden_state), outputs.last_hidden_state.device
    aux_loss, total = None, 0.0
    for name, sparsity in sparse_parts(config).items():
        router_logits = outputs.get(name)
        if not router_logits:
            continue
        if name != "router_logits":
            if piece is None:
                balance, z = balance_and_z_losses(sparsity, router_logits, num_samples)
            else:
                balance, z = _share_of_media(name, sparsity, router_logits, piece)
            modality = 0.0
        else:
            aux_loss, z = balance_and_z_losses(sparsity, router_logits, num_samples, attention_mask)
            balance = aux_loss
            if piece is not None:
                choices = piece.step.get(name)
                balance, z = step_share(
                    sparsity, router_logits, piece.sample_weight_B, attention_mask, choices, piece.step["weight"]
                )
            modality = _modality_losses(sparsity, router_logits, attention_mask, token_types, piece)
        weighted = sparsity.router_aux_loss_coef * balance + sparsity.router_z_loss_coef * z + modality
        total = total + weighted.to(device)
    return aux_loss, total


def _share_of_media(
    name: str, sparsity: PreTrainedConfig, router_logits: tuple[torch.Tensor, ...], piece: PieceOfStep
) -> tuple[torch.Tensor, torch.Tensor]:
    """The balance and z losses of a tower or connector: each image and each frame counts alike in its mean over the step."""
    step, balance, z = piece.step, 0.0, 0.0
    passes = by_kind(router_logits, piece.piece)
    if not passes:
        # The media came encoded, so nothing tells images from frames.
        share = piece.sample_weight_B.sum().to(router_logits[0].device)
        return tuple(share * loss for loss in balance_and_z_losses(sparsity, router_logits, len(router_logits[0])))
    for kind, logits in passes.items():
        share = (step["weight"] * piece.piece[kind] / step[kind]).squeeze().to(logits[0].device, torch.float32)
        kind_balance, kind_z = balance_and_z_losses(sparsity, logits, len(logits[0]))
        kind_balance = share * kind_balance
        choices = step.get(f"{name}.{kind}")
        if choices is not None:
            kind_balance = balance_share([part.flatten(0, -2) for part in logits], None, choices, step["weight"])
            if sparsity.router_loss_reduction == "mean":
                kind_balance = kind_balance / len(logits)
        balance, z = balance + kind_balance, z + share * kind_z
    # A mean over passes is one over those of the whole step.
    num_kinds = sum(bool(step[kind] > 0) for kind in KINDS)
    scale = 1.0 / num_kinds if sparsity.router_loss_reduction == "mean" else 1.0
    return scale * balance, scale * z


def _modality_losses(
    sparsity: PreTrainedConfig,
    router_logits: tuple[torch.Tensor, ...],
    attention_mask: torch.Tensor | None,
    token_types: Callable[[], torch.Tensor],
    piece: PieceOfStep | None,
) -> torch.Tensor | float:
    """The eight-expert Uni-MoE's two losses, weighted: sums over samples, so pieces of a step add up by themselves.

    The originals count padding as text and divide by the padded length, which depends on what stands together in a batch; in
    pieces of a step, padding is left out of both.
    """
    total = 0.0
    if not (sparsity.router_modality_loss_coef or sparsity.router_divergence_loss_coef):
        return total
    types_BS, lengths_B = token_types(), None
    if piece is not None and attention_mask is not None:
        types_BS, lengths_B = types_BS.masked_fill(attention_mask == 0, -1), attention_mask.sum(dim=1)
    if sparsity.router_modality_loss_coef:
        value = modality_expert_loss(router_logits, types_BS, sparsity.modality_experts, lengths_B)
        total = total + sparsity.router_modality_loss_coef * value
    if sparsity.router_divergence_loss_coef:
        total = total + sparsity.router_divergence_loss_coef * modality_divergence_loss(router_logits, types_BS)
    return total
