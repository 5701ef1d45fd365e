"""The eight-expert Uni-MoE: its FFNs lie in expert files, outside of the base, and each has a LoRA of its own.

An expert is `W + lora_alpha / lora_r * B @ A`, with W from the folder of experts and A, B from `<slot>_mlp_experts.bin` of
the fine-tuned folder. The layers that are not sparse keep the base's FFN.
"""

import re
from pathlib import Path
from typing import Any

from . import uni_moe_config as config_map
from .errors import ConversionError
from .expressions import Concatenate, Expression, LowRankUpdate, Reshape, Stack
from .plan import Account
from .reader import SourceTensor, read_file, read_json

# Which file fills which of the eight slots, as the original's loader lists them.
SLOT_FILES = ("audiocap", "basev", "base", "base1", "base4", "base7", "base", "base7")
EXPERTS_ORIGIN = (
    "; download Uni-MoE-8e-Experts from https://huggingface.co/Uni-MoE or https://huggingface.co/VictorJsy"
)
FINE_TUNED_ORIGIN = "; download Uni-MoE-8e-e2 from https://huggingface.co/Uni-MoE or https://huggingface.co/VictorJsy"
PROJECTIONS = ("gate", "up", "down")
# Weights within the FFNs' own LoRA, which the original saves for experts alone.
OF_INTERNAL_LORA = re.compile(r".*_proj_lora_[AB]\.weight")


def is_eight_experts(checkpoint: Path) -> bool:
    """Whether a fine-tuned folder is one of the eight-expert model: it has a file for each expert."""
    return any(checkpoint.glob("*_mlp_experts.bin"))


def find_config(base: Path, checkpoint: Path) -> Path | None:
    """The configuration of the eight-expert model, which the base has as `8config.json` beside its own `config.json`."""
    for file in (base / "8config.json", base / "config.json", checkpoint / "config.json"):
        if file.is_file() and "moe_type" in read_json(file):
            return file
    return None


def stack_experts(prefix: str, experts: list[dict[str, Expression]]) -> dict[str, Expression]:
    """The fused tensors of a sparse layer from its experts' `gate`, `up` and `down` weights.

    Raises:
        ConversionError: An expert lacks one of the three, or their shapes differ.
    """
    for i, expert in enumerate(experts):
        if missing := [name for name in PROJECTIONS if name not in expert]:
            raise ConversionError(f"{prefix}: expert {i} has no {', '.join(f'{name}_proj' for name in missing)}")
    return {
        f"{prefix}.experts.gate_up_proj": Stack([Concatenate([expert["gate"], expert["up"]]) for expert in experts]),
        f"{prefix}.experts.down_proj": Stack([expert["down"] for expert in experts]),
    }


def place_eight_experts(
    checkpoint: Path,
    experts: Path | None,
    config: dict[str, Any],
    config_file: Path,
    weights: dict[str, Expression],
    account: Account,
) -> tuple[dict[str, Expression], dict[str, Any] | None]:
    """Takes gates and FFNs out of `weights`, and adds the experts.

    Returns:
        Target tensors (names within the decoder), and the settings of the sparse layers.

    Raises:
        ConversionError: An expert file is missing or does not fit, or the configuration lacks a field.
    """
    indices = _sparse_layers(config, config_file)
    slots = _read_slots(checkpoint, experts, config, config_file, indices, account)
    targets: dict[str, Expression] = {}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}.mlp."
        mlp = {name.removeprefix(prefix): weights.pop(name) for name in list(weights) if name.startswith(prefix)}
        gate = mlp.pop("deepspeed_moe.gate.wg.weight", None)
        maps = {name: mlp.pop(name) for name in list(mlp) if name.startswith("deepspeed_moe.fm_")}
        if layer not in indices:
            targets |= {f"layers.{layer}.mlp.{name}": weight for name, weight in mlp.items()}
            continue
        account.ignore(mlp.values(), "FFNs of the base in sparse layers; the experts have files of their own")
        if gate is not None:
            targets[f"layers.{layer}.mlp.gate.weight"] = gate
        targets |= _modality_maps(maps, f"layers.{layer}.mlp.gate.modality_maps")
        targets |= stack_experts(f"layers.{layer}.mlp", [slot[layer] for slot in slots])
    return targets, config_map.sparsity(config, indices, config_file, **_router_settings(config))


def _router_settings(config: dict[str, Any]) -> dict[str, Any]:
    """Precision, modality maps and losses of the routers. Their random choices are left out unless asked for later."""
    settings: dict[str, Any] = {"router_dtype": "float32", "router_modality_maps": bool(config.get("use_fm_block"))}
    for name, loss in (("aux", "balance"), ("modality", "multimodal"), ("divergence", "kl")):
        if config.get(f"aux_{loss}_loss"):
            settings[f"router_{name}_loss_coef"] = float(config.get(f"aux_{loss}_loss_coef") or 0.0)
    names = {"image": "image", "video": "video", "speech": "audio"}
    experts = {
        ours: config[f"{theirs}_expert_indices"]
        for ours, theirs in names.items()
        if config.get(f"{theirs}_expert_indices")
    }
    return {**settings, "modality_experts": experts or None}


def _modality_maps(maps: dict[str, Expression], prefix: str) -> dict[str, Expression]:
    """`fm_<modality>` convolutions of width 1, which are linear maps; the original calls speech audio."""
    targets: dict[str, Expression] = {}
    for name, weight in maps.items():
        modality, kind = name.removeprefix("deepspeed_moe.fm_").split(".")
        modality = "speech" if modality == "audio" else modality
        targets[f"{prefix}.maps.{modality}.{kind}"] = Reshape(weight, weight.shape[:2]) if kind == "weight" else weight
    return targets


def _sparse_layers(config: dict[str, Any], file: Path) -> list[int]:
    missing = [
        name
        for name in ("moe_type", "lora_r", "lora_alpha", "num_experts", "num_hidden_layers")
        if not config.get(name)
    ]
    if missing:
        raise ConversionError(
            f"{file}: {', '.join(missing)} missing; it is not the configuration of the eight-expert model"
        )
    if config["num_experts"] != len(SLOT_FILES):
        raise ConversionError(
            f"{file}: num_experts={config['num_experts']}; the model of expert files has {len(SLOT_FILES)}"
        )
    if config.get("num_experts_per_tok") != 2:
        raise ConversionError(f"{file}: num_experts_per_tok={config.get('num_experts_per_tok')}; only 2 is supported")
    stride = {"dense": 1, "sparse": config.get("moe_stride")}.get(config["moe_type"])
    if not isinstance(stride, int) or stride < 1:
        raise ConversionError(
            f"{file}: moe_type={config['moe_type']!r} with moe_stride={config.get('moe_stride')!r}; known are 'dense', and "
            "'sparse' with a stride of at least 1"
        )
    return list(range(0, config["num_hidden_layers"], stride))


def _read_slots(
    checkpoint: Path, experts: Path | None, config: dict[str, Any], file: Path, indices: list[int], account: Account
) -> list[dict[int, dict[str, Expression]]]:
    """Of every slot, of every sparse layer, the three weights of the expert with its LoRA merged."""
    if experts is None:
        raise ConversionError(f"{checkpoint}: the eight-expert model, which needs --experts{EXPERTS_ORIGIN}")
    if not experts.is_dir():
        raise ConversionError(f"{experts}: no such folder, given as --experts{EXPERTS_ORIGIN}")
    scale = config["lora_alpha"] / config["lora_r"]
    bases: dict[str, dict[tuple[int, str], SourceTensor]] = {}
    for name in dict.fromkeys(SLOT_FILES):
        path = experts / f"mlp_{name}.bin"
        if not path.is_file():
            raise ConversionError(f"{experts}: {path.name} is missing{EXPERTS_ORIGIN}")
        bases[name] = _by_layer(account.add(read_file(path)))
    slots = []
    for slot, name in enumerate(SLOT_FILES):
        path = checkpoint / f"{slot}_mlp_experts.bin"
        if not path.is_file():
            raise ConversionError(f"{checkpoint}: {path.name} is missing{FINE_TUNED_ORIGIN}")
        tuned = _by_layer(account.add(read_file(path)))
        by_layer: dict[int, dict[str, Expression]] = {}
        for layer in indices:
            by_layer[layer] = {}
            for projection in PROJECTIONS:
                key = (layer, f"{projection}_proj")
                a, b = (tuned.pop((layer, f"{projection}_proj_lora_{side}"), None) for side in "AB")
                weight: Expression | None = bases[name].get(key, tuned.get(key))
                if weight is None or a is None or b is None:
                    raise ConversionError(
                        f"{path}: layer {layer} has no whole {projection}_proj with its LoRA, though "
                        f"{file.name} says that the layer is sparse"
                    )
                by_layer[layer][projection] = LowRankUpdate(weight, a, b, scale)
        account.ignore(tuned.values(), "copies of experts; the expert files win, and other layers have no experts")
        slots.append(by_layer)
    for tensors in bases.values():
        account.ignore(tensors.values(), "experts for layers that are not sparse")
    return slots


def _by_layer(tensors: dict[str, SourceTensor]) -> dict[tuple[int, str], SourceTensor]:
    """`model.layers.<layer>. ... .<projection>.weight`: the original's loader goes by these two fields alone."""
    keyed = {}
    for name, tensor in tensors.items():
        fields = name.split(".")
        if len(fields) < 5 or not fields[2].isdigit():
            raise ConversionError(f"{tensor.file}: {name} is not a tensor of an expert file")
        keyed[int(fields[2]), fields[-2]] = tensor
    return keyed
