"""Upcycling: dense FFNs become experts that are exact copies of them, under new routers (Komatsuzaki et al. 2022).

CuMo calls it co-upcycling when decoder, vision encoder and connector are upcycled together. Experts from different
checkpoints, as Uni-MoE has them, are in `unimoe.training.upcycling`.
"""

from collections.abc import Mapping
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from .modeling_unimoe.configuration_unimoe import UniMoESparsityConfig
from .modeling_unimoe.dense_mlp import DenseMlp
from .modeling_unimoe.modeling_unimoe import UniMoEForConditionalGeneration
from .modeling_unimoe.router import UniMoETopKRouter
from .modeling_unimoe.sparse_moe import UniMoESparseMoeBlock
from .modeling_unimoe.sparsify import plan_sparsify, sparsify

Sparsity = PreTrainedConfig | Mapping[str, Any]


def upcycle(
    model: UniMoEForConditionalGeneration,
    *,
    text: Sparsity | None = None,
    vision: Sparsity | None = None,
    connector: Sparsity | None = None,
    seed: int = 0,
) -> UniMoEForConditionalGeneration:
    """Makes parts of a dense model sparse, in place; what it computes stays the same until it is trained.

    Nothing is changed unless all of the named parts can be. `model.save_pretrained` then writes a folder that loads like any
    other.

    Args:
        model: A model in which the named parts are dense.
        text, vision: Which FFNs of the decoder and of the vision encoder become sparse, and how ([`UniMoESparsityConfig`] or
            its fields); None leaves the part as it is.
        connector: The same for the vision connector, whose one MLP must have two layers.
        seed: Of the new routers.

    Returns:
        `model` itself.

    Raises:
        ValueError: No part is named, its settings are none, have an unknown field or one out of range, the model lacks the
            part, it is sparse already or cannot be made so, or its weights would no longer sum to one (`norm_topk_prob`), so
            that copies would compute something else.
    """
    wanted = {"text": text, "vision": vision, "connector": connector}
    settings = {name: _read(name, value) for name, value in wanted.items() if value is not None}
    if not settings:
        raise ValueError("name a part to upcycle: text, vision or connector")
    for name, sparsity in settings.items():
        _check_dense(model, name)
        _check_fits(model, name, sparsity)
    devices = list({parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"})
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        for name, sparsity in settings.items():
            _upcycle_part(model, name, sparsity)
    return model


def _read(name: str, value: Sparsity) -> PreTrainedConfig:
    if isinstance(value, Mapping):
        sparsity = sparsity_from_fields(name, value)
    elif isinstance(value, PreTrainedConfig) and value.model_type == UniMoESparsityConfig.model_type:
        sparsity = value
    else:
        raise ValueError(
            f"{name} must be a UniMoESparsityConfig or a mapping of its fields such as {{'num_experts': 4, 'top_k': 2}}, "
            f"got {value!r}"
        )
    if not sparsity.norm_topk_prob and not sparsity.residual:
        raise ValueError(
            f"{name}: `norm_topk_prob` must be True, else equal experts do not compute what the FFN computed"
        )
    if sparsity.router_modality_maps:
        raise ValueError(f"{name}: `router_modality_maps` have no dense counterpart; leave them out")
    return sparsity


def sparsity_from_fields(name: str, fields: Mapping[str, Any]) -> UniMoESparsityConfig:
    """Raises ValueError, led in by `name`, for unknown fields and values that are out of range or of a wrong type."""
    # A saved configuration also holds the fields that every configuration has; they are no mistake.
    unknown = sorted(map(str, fields.keys() - UniMoESparsityConfig().to_dict().keys()))
    if unknown:
        known = ", ".join(UniMoESparsityConfig.__annotations__)
        raise ValueError(f"{name}: unknown fields {', '.join(unknown)}; known are {known}")
    try:
        return UniMoESparsityConfig(**fields)
    except (StrictDataclassError, ValueError) as error:
        # A value of a wrong type is no ValueError there, and told in several lines.
        raise ValueError(f"{name}: {' '.join(str(error).split())}") from None


def _check_dense(model: UniMoEForConditionalGeneration, name: str) -> None:
    config = model.config
    if name == "text":
        is_sparse = config.text_sparsity is not None or getattr(config.text_config, "num_local_experts", None)
    elif config.vision_config is None:
        raise ValueError(f"{name}: the model has no vision tower")
    elif name == "vision":
        is_sparse = config.vision_sparsity is not None
    else:
        settings = config.vision_connector_config
        is_sparse = settings.sparsity is not None
        if settings.type != "mlp" or settings.num_layers != 2:
            raise ValueError(
                f"connector: an MLP of two layers is needed, this is {settings.type!r} of {settings.num_layers}"
            )
    if is_sparse:
        raise ValueError(f"{name}: this part is sparse already; give a dense checkpoint")


def _check_fits(model: UniMoEForConditionalGeneration, name: str, sparsity: PreTrainedConfig) -> None:
    """Raises ValueError for all that `_upcycle_part` would refuse."""
    counts = (sparsity.num_experts, sparsity.top_k)
    try:
        if name == "connector":
            UniMoESparseMoeBlock.on_meta(DenseMlp.read(_connector_mlp(model)), *counts, **sparsity.block_options)
        else:
            plan_sparsify(_backbone(model, name), sparsity.layers, *counts, **sparsity.block_options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: {error}") from None


def _backbone(model: UniMoEForConditionalGeneration, name: str) -> PreTrainedModel:
    return model.model.language_model if name == "text" else model.model.vision_tower


def _connector_mlp(model: UniMoEForConditionalGeneration) -> nn.Module:
    mlp = model.model.vision_connector
    return nn.Sequential(mlp.layers[0], mlp.act_fn, mlp.layers[1]).train(mlp.training)


def _upcycle_part(model: UniMoEForConditionalGeneration, name: str, sparsity: PreTrainedConfig) -> None:
    counts, options = (sparsity.num_experts, sparsity.top_k), sparsity.block_options
    if name == "connector":
        part = UniMoESparseMoeBlock.from_dense(_connector_mlp(model), *counts, config=model.config, **options)
        model.model.vision_connector = part
        model.config.vision_connector_config.sparsity = sparsity
    else:
        part = _backbone(model, name)
        sparsify(part, sparsity.layers, *counts, **options)
        setattr(model.config, f"{name}_sparsity", sparsity)
    for router in part.modules():
        if isinstance(router, UniMoETopKRouter):
            router.noise = sparsity.router_noise
