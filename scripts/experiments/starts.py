"""The models that the conditions start from, all made from the dense checkpoint of stage 1."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

import unimoe
from unimoe.modeling_unimoe.configuration_unimoe import resolve_layers
from unimoe.modeling_unimoe.sparse_moe import init_sparse_moe_weights
from unimoe.training.upcycling import assemble_experts

from .conditions import CONNECTORS, TOP_K, Condition

COPIES = 4


def starting_model(
    condition: Condition, layers: str, aligned: Path, tuned: Sequence[Path], seed: int
) -> unimoe.UniMoEForConditionalGeneration:
    """The model of a condition before its training.

    Args:
        aligned: Folder of the dense checkpoint of stage 1.
        tuned: Folders of stage 2, one for each of `condition.experts`; read by conditions with tuned experts only.
        seed: Of new weights.
    """
    if condition.start == "wide":
        model = unimoe.UniMoEForConditionalGeneration.from_pretrained(aligned)
        return widened(model, layers, seed)
    folders = list(tuned) if condition.start == "tuned" else [aligned] * COPIES
    model = assemble_experts(
        aligned,
        folders,
        layers=layers,
        top_k=TOP_K,
        connectors=_tuned_connectors(condition, tuned) if condition.start == "tuned" else None,
        router_aux_loss_coef=condition.aux_loss,
        router_loss_scope="batch",
        seed=seed,
    )
    model.set_experts_implementation("unimoe")
    return with_fresh_experts(model, seed) if condition.start == "fresh" else model


def _tuned_connectors(condition: Condition, tuned: Sequence[Path]) -> dict[str, Path]:
    """Each connector from where it was tuned; images and videos share theirs, and that of the images is kept."""
    found: dict[str, Path] = {}
    for group, folder in zip(condition.experts, tuned):
        for modality in group:
            found.setdefault(CONNECTORS[modality], folder)
    return found


def with_fresh_experts(
    model: unimoe.UniMoEForConditionalGeneration, seed: int
) -> unimoe.UniMoEForConditionalGeneration:
    """Random experts in the place of those of the decoder, as a decoder that is trained from nothing has them."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for layer in model.model.language_model.layers:
            if hasattr(layer.mlp, "experts"):
                # Transformers skips weights that it has loaded unless the mark is taken off.
                for parameter in layer.mlp.experts.parameters():
                    parameter._is_hf_initialized = False
                init_sparse_moe_weights(layer.mlp.experts, model.config.text_config.initializer_range)
    return model


@torch.no_grad()
def widened(
    model: unimoe.UniMoEForConditionalGeneration, layers: str, seed: int
) -> unimoe.UniMoEForConditionalGeneration:
    """FFNs of twice the width that compute what they computed before.

    The new half has random first maps and a last map of zeros. Two halves with the same weights would get the same updates
    for ever, and so be no wider than one.
    """
    decoder, std = model.model.language_model, model.config.text_config.initializer_range
    generator = torch.Generator().manual_seed(seed)
    for index in resolve_layers(layers, len(decoder.layers)):
        mlp = decoder.layers[index].mlp
        for name in ("gate_proj", "up_proj"):
            old = getattr(mlp, name).weight
            new = torch.randn(old.shape, generator=generator) * std
            setattr(mlp, name, _linear(torch.cat([old, new])))
        mlp.down_proj = _linear(torch.cat([mlp.down_proj.weight, torch.zeros_like(mlp.down_proj.weight)], dim=1))
        mlp.intermediate_size *= 2
    return model


def _linear(weight: torch.Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight.copy_(weight)
    return linear


def decoder_parameters(model: unimoe.UniMoEForConditionalGeneration) -> tuple[int, int]:
    """Of the decoder's FFNs, experts and routers: parameters that a token activates, and all of them."""
    activated = total = 0
    for layer in model.model.language_model.layers:
        experts = getattr(layer.mlp, "experts", None)
        for name, parameter in layer.mlp.named_parameters():
            total += parameter.numel()
            is_expert = experts is not None and name.startswith("experts.")
            activated += parameter.numel() * TOP_K // experts.num_experts if is_expert else parameter.numel()
    return activated, total
