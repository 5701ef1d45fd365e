"""From dense checkpoints to a sparse one: the experts of stage 3 are the FFNs that stage 2 has tuned."""

import copy
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers.utils import logging

from ..modeling_unimoe.configuration_unimoe import LAYER_PATTERNS
from ..modeling_unimoe.dense_mlp import DenseMlp
from ..modeling_unimoe.modeling_unimoe import UniMoEForConditionalGeneration
from ..modeling_unimoe.sparsify import sparsify
from ..upcycling import sparsity_from_fields
from .parts import CONNECTORS, part_of

logger = logging.get_logger(__name__)

StrPath = str | os.PathLike


def open_weights(file: Path) -> Any:
    """A safetensors file for reading; raises ValueError where it was cut off or is something else."""
    try:
        return safe_open(file, "pt")
    except SafetensorError as error:
        raise ValueError(f"{file}: not a whole safetensors file ({error}); copy it again") from None


class Checkpoint:
    """The tensors of a folder that `save_pretrained` wrote, read one at a time.

    Raises:
        ValueError: the folder holds no safetensors, or one that is not whole.
    """

    def __init__(self, folder: StrPath):
        self.folder = Path(folder)
        index = self.folder / "model.safetensors.index.json"
        if index.is_file():
            files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        else:
            files = ["model.safetensors"]
        missing = [name for name in ["config.json", *files] if not (self.folder / name).is_file()]
        if missing:
            raise ValueError(f"{self.folder}: no {missing[0]} there; give the folder of a whole checkpoint")
        self._open = [open_weights(self.folder / name) for name in files]
        self._files = {key: file for file in self._open for key in file.keys()}

    def names(self) -> set[str]:
        return set(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._files[name].get_slice(name).get_shape())

    def read(self, name: str) -> torch.Tensor:
        return self._files[name].get_tensor(name)


def assemble_experts(
    base: StrPath,
    experts: Sequence[StrPath],
    *,
    layers: str | Sequence[int] = "even",
    top_k: int = 2,
    connectors: Mapping[str, StrPath] | None = None,
    router_aux_loss_coef: float = 0.0,
    router_z_loss_coef: float = 0.0,
    router_loss_scope: str = "batch",
    router_dtype: str | None = None,
    seed: int = 0,
    dtype: torch.dtype | str = "auto",
) -> UniMoEForConditionalGeneration:
    """A sparse model whose expert e is the FFN of checkpoint `experts[e]`, layer by layer; everything else is the base's.

    The routers are new. Uni-MoE (section 3.2) gives each expert another checkpoint; with the same folder several times this
    is MoE-LLaVA's and CuMo's upcycling.

    Args:
        base: folder of the dense checkpoint.
        experts: a folder for each expert; the base's own may be among them.
        layers: the layers that become sparse; the others keep the base's FFN.
        top_k: experts per token.
        connectors: `{"audio_connector": folder}`: connectors from other checkpoints than the base.
        router_aux_loss_coef, router_z_loss_coef, router_loss_scope, router_dtype: of the new `text_sparsity`. Experts that
            differ from the start do not profit from a balancing loss (table 5 of the paper), so it is off.
        seed: of the routers.
        dtype: of the model.

    Raises:
        ValueError: a folder is not whole or does not fit the base, the base is sparse already, or an argument is out of
            range. Names and shapes of all folders are compared before any weights are read.
    """
    if isinstance(experts, str | os.PathLike) or len(experts) < 2:
        raise ValueError(f"experts: a sparse layer needs at least two, each with its folder, got {experts!r}")
    if not isinstance(layers, Iterable):
        raise ValueError(f"layers: must be one of {LAYER_PATTERNS} or a list of indices, got {layers!r}")
    options = {
        "layers": layers if isinstance(layers, str) else list(layers),
        "num_experts": len(experts),
        "top_k": top_k,
        "router_dtype": router_dtype,
        "router_aux_loss_coef": router_aux_loss_coef,
        "router_z_loss_coef": router_z_loss_coef,
        "router_loss_scope": router_loss_scope,
    }
    sparsity = sparsity_from_fields("experts", options)
    sources = {
        str(folder): Checkpoint(folder) for folder in dict.fromkeys([base, *experts, *(connectors or {}).values()])
    }
    reference = sources[str(base)]
    for checkpoint in sources.values():
        _check_fits(reference, checkpoint)
    for name in connectors or {}:
        if name not in CONNECTORS:
            raise ValueError(f"connectors: {name!r} is unknown; they are {', '.join(CONNECTORS)}")
    for folder in dict.fromkeys(map(str, experts)):
        _warn_of_lost_tuning(reference, sources[folder])
    model = UniMoEForConditionalGeneration.from_pretrained(base, dtype=dtype)
    if model.config.text_sparsity is not None:
        raise ValueError(f"{base}: the base is sparse already; give a dense checkpoint")
    decoder = model.model.language_model
    indices = sparsity.layer_indices(len(decoder.layers))
    dense = {index: copy.deepcopy(decoder.layers[index].mlp) for index in indices}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        sparsify(decoder, layers=sparsity.layers, num_experts=len(experts), top_k=top_k, router_dtype=router_dtype)
    for index in indices:
        block = decoder.layers[index].mlp
        for expert, folder in enumerate(experts):
            _fill(block.experts, expert, dense[index], sources[str(folder)], index)
    for name, folder in (connectors or {}).items():
        module = getattr(model.model, name)
        module.load_state_dict({key: sources[str(folder)].read(f"model.{name}.{key}") for key in module.state_dict()})
    model.config.text_sparsity = sparsity
    return model


@torch.no_grad()
def _fill(experts: nn.Module, expert: int, mlp: nn.Module, source: Checkpoint, layer: int) -> None:
    prefix = f"model.language_model.layers.{layer}.mlp."
    mlp.load_state_dict({name: source.read(prefix + name) for name in mlp.state_dict()})
    dense = DenseMlp.read(mlp)
    first = "gate_up_proj" if experts.has_gate else "up_proj"
    getattr(experts, first)[expert] = torch.cat([linear.weight for linear in dense.first])
    experts.down_proj[expert] = dense.down.weight
    if experts.has_bias:
        getattr(experts, f"{first}_bias")[expert] = torch.cat([linear.bias for linear in dense.first])
        experts.down_proj_bias[expert] = dense.down.bias


def _check_fits(base: Checkpoint, other: Checkpoint) -> None:
    """Raises ValueError where a checkpoint's tensors have not the names and shapes of the base's."""
    absent = sorted(base.names() - other.names())
    surplus = sorted(other.names() - base.names())
    reshaped = [name for name in sorted(base.names() & other.names()) if base.shape(name) != other.shape(name)]
    if absent or surplus or reshaped:
        if reshaped:
            name = reshaped[0]
            reason = f"{name} is {list(other.shape(name))} there and {list(base.shape(name))} in the base"
        else:
            reason = f"no {absent[0]} there" if absent else f"{surplus[0]}, which the base has not"
        raise ValueError(f"{other.folder}: does not match the base {base.folder}: {reason}")


def _warn_of_lost_tuning(base: Checkpoint, expert: Checkpoint) -> None:
    """Says so where a checkpoint was tuned beyond what an expert can carry over."""
    if expert.folder == base.folder:
        return
    lost = []
    for name in sorted(base.names()):
        if part_of(name) in ("attention", "rest"):
            before, after = base.read(name), expert.read(name)
            if not torch.equal(before, after.to(before.dtype)):
                lost.append(name)
    if lost:
        logger.warning(
            f"{expert.folder}: {len(lost)} tensors outside FFNs and connectors differ from the base's ({lost[0]}, ...); "
            "only its FFNs become an expert"
        )
