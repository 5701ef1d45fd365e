"""Upcycling: dense FFNs become experts that are exact copies of them, under new routers (Komatsuzaki et al. 2022).

CuMo calls it co-upcycling when decoder, vision encoder and connector are upcycled together. Experts from different
checkpoints, as Uni-MoE has them, are in `unimoe.training.upcycling`.
"""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from .modeling_unimoe.configuration_unimoe import UniMoESparsityConfig
from .modeling_unimoe.modeling_unimoe import UniMoEForConditionalGeneration
from .modeling_unimoe.router import UniMoETopKRouter
from .modeling_unimoe.sparse_moe import UniMoESparseMoeBlock
from .modeling_unimoe.sparsify import sparsify

Sparsity = PreTrainedConfig | dict[str, Any]


def upcycle(
    model: UniMoEForConditionalGeneration,
    *,
    text: Sparsity | None = None,
    vision: Sparsity | None = None,
    connector: Sparsity | None = None,
    seed: int = 0,
) -> UniMoEForConditionalGeneration:
    """Makes parts of a dense model sparse, in place; what it computes stays the same until it is trained.

    `model.save_pretrained` then writes a folder that loads like any other.

    Args:
        model: A model in which the named parts are dense.
        text, vision: Which FFNs of the decoder and of the vision encoder become sparse, and how ([`UniMoESparsityConfig`] or
            its fields); None leaves the part as it is.
        connector: The same for the vision connector, whose one MLP must have two layers.
        seed: Of the new routers.

    Returns:
        `model` itself.

    Raises:
        ValueError: No part is named, the model lacks it, it is sparse already or cannot be made so, or its weights would no
            longer sum to one (`norm_topk_prob`), so that copies would compute something else.
    """
    wanted = {"text": text, "vision": vision, "connector": connector}
    settings = {name: _read(name, value) for name, value in wanted.items() if value is not None}
    if not settings:
        raise ValueError("name a part to upcycle: text, vision or connector")
    for name in settings:
        _check_dense(model, name)
    devices = list({parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"})
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        for name, sparsity in settings.items():
            _upcycle_part(model, name, sparsity)
    return model


def _read(name: str, value: Sparsity) -> PreTrainedConfig:
    sparsity = UniMoESparsityConfig(**value) if isinstance(value, dict) else value
    if not sparsity.norm_topk_prob and not sparsity.residual:
        raise ValueError(
            f"{name}: `norm_topk_prob` must be True, else equal experts do not compute what the FFN computed"
        )
    if sparsity.router_modality_maps:
        raise ValueError(f"{name}: `router_modality_maps` have no dense counterpart; leave them out")
    return sparsity


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


def _upcycle_part(model: UniMoEForConditionalGeneration, name: str, sparsity: PreTrainedConfig) -> None:
    inner, config = model.model, model.config
    if name == "connector":
        mlp = inner.vision_connector
        dense = nn.Sequential(mlp.layers[0], mlp.act_fn, mlp.layers[1]).train(mlp.training)
        inner.vision_connector = UniMoESparseMoeBlock.from_dense(
            dense, sparsity.num_experts, sparsity.top_k, config=config, **sparsity.block_options
        )
        part = inner.vision_connector
        config.vision_connector_config.sparsity = sparsity
    else:
        part = inner.language_model if name == "text" else inner.vision_tower
        options = sparsity.block_options
        sparsify(part, sparsity.layers, sparsity.num_experts, sparsity.top_k, **options)
        setattr(config, f"{name}_sparsity", sparsity)
    for router in part.modules():
        if isinstance(router, UniMoETopKRouter):
            router.noise = sparsity.router_noise
