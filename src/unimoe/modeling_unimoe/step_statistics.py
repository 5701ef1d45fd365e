"""What router losses need to know of a whole optimiser step that is computed in pieces: micro-batches, processes.

A loss that is a mean over images needs their number in the step, one that is a product of two means over a batch needs its
counts. Statistics are a dict of float64 vectors, additive over the pieces; every process has the same keys and sizes, whatever
media its piece has:

- `weight`: the part of the step that the piece is, by predicted tokens;
- `image`, `video`: how many images and frames of videos it has;
- `router_logits`, `vision_router_logits.image`, ...: for a balancing loss over whole batches, how many tokens chose each expert
  first, layer after layer.

Shape suffixes: T tokens, E experts.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from transformers.modeling_outputs import ModelOutput

from .configuration_unimoe import UniMoEConfig
from .sparse_parts import sparse_parts

KINDS = ("image", "video")


def step_weights(labels: torch.Tensor, num_items_in_batch: torch.Tensor | int) -> torch.Tensor:
    """[B], the part of the optimiser step that each row of `labels` [B, S] is, by predicted tokens."""
    return (labels[:, 1:] != -100).sum(dim=1) / num_items_in_batch


def has_batch_statistics(config: UniMoEConfig) -> bool:
    """Whether a loss needs counts of choices, which only a forward pass can tell."""
    return any(_takes_batch(sparsity) for sparsity in sparse_parts(config).values())


def needs_statistics(config: UniMoEConfig) -> bool:
    """Whether a loss needs any; those that are sums over the decoder's samples add up by themselves."""
    parts = sparse_parts(config)
    media = (sparsity for name, sparsity in parts.items() if name != "router_logits")
    return has_batch_statistics(config) or any(part.router_aux_loss_coef or part.router_z_loss_coef for part in media)


def piece_statistics(
    config: UniMoEConfig, inputs: dict[str, Any], weight: torch.Tensor, outputs: ModelOutput | None = None
) -> dict[str, torch.Tensor]:
    """The statistics of one piece.

    Args:
        inputs: The arguments of `forward`.
        weight: Scalar, the part of the step that the piece is.
        outputs: Of the model, with router logits; without them the choices are left out.
    """
    tokens = inputs["input_ids"] if inputs.get("input_ids") is not None else inputs["inputs_embeds"][..., 0]
    images, videos, frames = (inputs.get(name) for name in ("pixel_values", "pixel_values_videos", "video_frame_mask"))
    if frames is None and videos is not None:
        frames = videos.new_ones(videos.shape[:2])
    statistics = {
        "weight": weight.detach(),
        "image": torch.tensor(0 if images is None else len(images)),
        "video": torch.tensor(0) if frames is None else frames.sum(),
    }
    if outputs is not None:
        mask = attention_mask_of(tokens, inputs.get("attention_mask"))
        for name, sparsity in sparse_parts(config).items():
            if not _takes_batch(sparsity):
                continue
            if name == "router_logits":
                counted = None if sparsity.router_loss_counts_padding else mask
                statistics[name] = first_choices(outputs[name], counted)
                continue
            passes = by_kind(outputs.get(name), statistics)
            empty = torch.zeros(sum(_expert_counts(config, name)))
            for kind in KINDS:
                statistics[f"{name}.{kind}"] = first_choices(passes[kind]) if passes.get(kind) else empty
    return {name: value.double().view(-1).to(tokens.device) for name, value in statistics.items()}


def attention_mask_of(tokens: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor | None:
    """The mask, if it says which of these tokens [B, S] are padding; a 4-D one, or one of cached tokens too, does not."""
    usable = attention_mask is not None and attention_mask.ndim == 2 and attention_mask.numel() == tokens.numel()
    return attention_mask if usable else None


def by_kind(router_logits: Sequence[torch.Tensor] | None, statistics: dict[str, torch.Tensor]) -> dict[str, Sequence]:
    """The router logits of a tower or connector, those of images and those of frames: first the former, if any."""
    present = [kind for kind in KINDS if statistics[kind] > 0]
    if not router_logits or not present:
        return {}
    size = len(router_logits) // len(present)
    return {kind: router_logits[start * size :][:size] for start, kind in enumerate(present)}


def first_choices(router_logits: Sequence[torch.Tensor], attention_mask: torch.Tensor | None = None) -> torch.Tensor:
    """[sum of E over layers], how many tokens chose each expert first."""
    real_T = None if attention_mask is None else attention_mask.reshape(-1).bool()
    counts = []
    for logits in router_logits:
        logits_TE = logits.detach().flatten(0, -2)
        chosen_T = logits_TE.argmax(dim=-1)
        if real_T is not None:
            chosen_T = chosen_T[real_T.to(chosen_T.device)]
        counts.append(torch.bincount(chosen_T, minlength=logits_TE.shape[-1]).to(router_logits[0].device))
    return torch.cat(counts)


def sum_of_pieces(pieces: Iterable[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The statistics of several pieces together."""
    pieces = list(pieces)
    return {name: torch.stack([piece[name] for piece in pieces]).sum(dim=0) for name in pieces[0]}


def over_processes(statistics: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The statistics of the pieces of all processes together; each has to call this."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return statistics
    total = torch.cat(list(statistics.values()))
    torch.distributed.all_reduce(total)
    return dict(zip(statistics, total.split([len(value) for value in statistics.values()])))


def _takes_batch(sparsity: Any) -> bool:
    return bool(sparsity.router_aux_loss_coef) and sparsity.router_loss_scope == "batch"


def _expert_counts(config: UniMoEConfig, name: str) -> list[int]:
    """Experts of each layer that a pass through the tower or the connector records."""
    if name == "connector_router_logits":
        counts = config.vision_connector_config.sparsity.num_experts
        return counts if isinstance(counts, list) else [counts]
    sparsity = config.vision_sparsity
    layers = sparsity.layer_indices(config.vision_config.num_hidden_layers)
    counts = sparsity.num_experts if isinstance(sparsity.num_experts, list) else [sparsity.num_experts] * len(layers)
    return counts * len(config.vision_scales or [1])
