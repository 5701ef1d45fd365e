"""CuMo (Li et al. 2024, arXiv 2405.05949): experts in the vision encoder and the connector, and with Mixtral in the decoder.

The final checkpoint and the dense one of the second stage are folders of the same kind. Beside the decoder they hold the vision
tower (without the norm behind its last layer, which CuMo never computes) and the connector; where the second stage left these
out of its shards, they lie in `clip.bin` and `mm_projector.bin`.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..processing.chat_template import CUMO_CHAT_TEMPLATE
from .decoders import DECODERS
from .errors import ConversionError
from .expressions import Constant, Expression, Stack
from .family import Conversion
from .llava import build, complete, projector, select_strategy, sequential_targets
from .plan import Account
from .reader import read_file, read_weights
from .settings import naming, read_settings, require
from .towers import read_vision_settings

ORIGIN = "; download the whole folder from https://huggingface.co/shi-labs"
MODEL_TYPES = {"llava_mistral": "mistral", "llava_mixtral": "mixtral"}
# Files of the second stage, with what their tensors' names lack.
STAGE_2_FILES = {"clip.bin": "model.vision_tower.", "mm_projector.bin": ""}
TOWER = "model.vision_tower.vision_model."
CONNECTOR = "model.mm_projector."
GENERATION = {"do_sample": True, "temperature": 0.2, "max_new_tokens": 512}
LICENCE = (
    "The CuMo weights are licensed under CC BY-NC 4.0: they may not be used commercially, and whoever shares them or what is "
    "made from them names their authors. They build on Mistral or Mixtral and on CLIP, and were trained on data with licences of "
    "their own. Check that your use is allowed before you share or deploy them."
)


@dataclass(frozen=True)
class CuMoPaths:
    """The folders of a release.

    Args:
        checkpoint: The final checkpoint, or that of the second stage (`*-pft`).
        vision_tower: The CLIP folder that `mm_vision_tower` names, for its settings; its weights are not read.
        tokenizer: A folder with tokenizer files, which is taken instead of the checkpoint's.
    """

    checkpoint: Path
    vision_tower: Path
    tokenizer: Path | None = None


def plan_cumo(paths: CuMoPaths) -> Conversion:
    """Reads configurations and the names and shapes of all tensors, and plans the conversion; reads no weights.

    Raises:
        ConversionError: A file is missing or damaged, is of another family, or does not fit the others.
    """
    if not paths.checkpoint.is_dir():
        raise ConversionError(f"{paths.checkpoint}: no such folder, given as --checkpoint{ORIGIN}")
    file = paths.checkpoint / "config.json"
    with naming(file):
        return _plan(paths, file)


def _plan(paths: CuMoPaths, file: Path) -> Conversion:
    config = _read_config(file)
    account = Account()
    weights = _load(paths.checkpoint, account)
    decoder = DECODERS[MODEL_TYPES[config["model_type"]]]
    vision_config = read_vision_settings(paths.vision_tower, ("clip",))
    _check_width(vision_config, config, paths.vision_tower)
    targets = _tower_targets(weights, vision_config)
    connector, connector_targets = _read_connector(weights, config, file)
    targets |= connector_targets
    targets |= decoder.targets(weights, "model.language_model")
    model_config = build(
        {
            "text_config": decoder.config(config, file),
            "text_sparsity": _decoder_sparsity(config, file),
            "vision_config": vision_config,
            "vision_sparsity": _sparsity(config, file) if config.get("clip_smoe") else None,
            "vision_connector_config": connector,
            "vision_feature_layer": -2,
            "vision_feature_select_strategy": select_strategy(config, file),
            "vision_scales": _scales(config, file),
        },
        file,
    )
    plan = complete(account, targets, model_config, file, str(paths.checkpoint))
    stage = "" if config.get("clip_smoe") or config.get("mlp_smoe") else " after its second stage (dense)"
    return Conversion(
        config=model_config,
        plan=plan,
        title=f"CuMo with {decoder.name}{stage}",
        inputs={name: path for name, path in vars(paths).items() if path is not None},
        licence=LICENCE,
        licence_id="cc-by-nc-4.0",
        tokenizer_folder=paths.tokenizer or paths.checkpoint,
        tokenizer_required=paths.tokenizer is not None,
        image_processor_folder=paths.vision_tower,
        generation=GENERATION,
        chat_template=CUMO_CHAT_TEMPLATE,
        image_aspect_ratio="pad" if config.get("image_aspect_ratio") == "pad" else "square",
        max_length=config.get("tokenizer_model_max_length"),
    )


def _read_config(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise ConversionError(f"{file.parent}: config.json is missing{ORIGIN}")
    config = read_settings(file)
    kind = config.get("model_type")
    if kind not in MODEL_TYPES or "scales" not in config:
        other = _other_family(str(kind), config)
        raise ConversionError(
            f"{file}: model_type {kind!r}{'' if kind in MODEL_TYPES else ' is none of ' + ', '.join(MODEL_TYPES)}"
            f"{'' if 'scales' in config else ', and no scales'}: not a CuMo checkpoint"
            f"{f'; use `unimoe convert {other}`' if other else ORIGIN}"
        )
    return config


def _other_family(kind: str, config: dict[str, Any]) -> str | None:
    if "mm_audio_tower" in config:
        return "uni-moe"
    return "moe-llava" if kind.startswith("moe_llava") or "mm_image_tower" in config else None


def _load(folder: Path, account: Account) -> dict[str, Expression]:
    weights: dict[str, Expression] = account.add(read_weights(folder, ORIGIN))
    for name, prefix in STAGE_2_FILES.items():
        if (folder / name).is_file():
            tensors = {f"{prefix}{key}": tensor for key, tensor in read_file(folder / name).items()}
            account.add(tensors)
            # The loader of the original reads the shards.
            account.ignore((tensors[key] for key in tensors if key in weights), "copies of what the shards hold")
            weights = {**tensors, **weights}
    return weights


def _check_width(vision: dict[str, Any], config: dict[str, Any], folder: Path) -> None:
    if vision.get("hidden_size") != config.get("mm_hidden_size"):
        raise ConversionError(
            f"{folder}: a tower of width {vision.get('hidden_size')}, given as --vision-tower; this checkpoint was made for "
            f"{config.get('mm_vision_tower')}, of width {config.get('mm_hidden_size')}"
        )


def _scales(config: dict[str, Any], file: Path) -> list[int] | None:
    scales = config["scales"]
    if not isinstance(scales, list) or not scales or not all(isinstance(n, int) and n > 0 for n in scales):
        raise ConversionError(f"{file}: scales={scales!r}; a list of positive whole numbers is needed, as [1, 3]")
    # The original takes the image as it is for the first of them, whatever that says.
    return [1, *scales[1:]] if len(scales) > 1 else None


def _sparsity(config: dict[str, Any], file: Path) -> dict[str, Any]:
    """Vision encoder and connector have the same number of experts, and statistics of every image or tile of its own."""
    require(config, ("num_experts", "num_selected"), file, "though vision encoder or connector have experts")
    return {
        "layers": "all",
        "num_experts": config["num_experts"],
        "top_k": config["num_selected"],
        "router_loss_scope": "sample",
        **_losses(config),
    }


def _decoder_sparsity(config: dict[str, Any], file: Path) -> dict[str, Any] | None:
    """Only losses, for Mixtral has its own experts; and only where the vision part is sparse, as in the original."""
    if config.get("num_local_experts") is None or not (config.get("clip_smoe") or config.get("mlp_smoe")):
        return None
    require(config, ("num_local_experts", "num_experts_per_tok"), file, "though the decoder has experts")
    counts = {"num_experts": config["num_local_experts"], "top_k": config["num_experts_per_tok"]}
    return {"layers": "all", **counts, "router_loss_counts_padding": True, **_losses(config)}


def _losses(config: dict[str, Any]) -> dict[str, Any]:
    return {
        "router_loss_reduction": "mean",
        "router_aux_loss_coef": float(config.get("balance_loss_coef") or 0.0),
        "router_z_loss_coef": float(config.get("router_z_loss_coef") or 0.0),
    }


def _tower_targets(weights: dict[str, Expression], vision: dict[str, Any]) -> dict[str, Expression]:
    targets: dict[str, Expression] = {}
    experts: dict[str, dict[int, Expression]] = {}
    for name in [name for name in weights if name.startswith(TOWER)]:
        inner = name.removeprefix(TOWER)
        layer = re.fullmatch(r"(encoder\.layers\.\d+)\.(gate\.weight|experts\.(\d+)\.fc([12])\.(weight|bias))", inner)
        if layer is None:
            targets[f"model.vision_tower.{inner}"] = weights.pop(name)
        elif layer[3] is None:
            targets[f"model.vision_tower.{layer[1]}.mlp.gate.weight"] = weights.pop(name)
        else:
            target = f"model.vision_tower.{layer[1]}.mlp.experts.{_fused(layer[4] == '1', layer[5])}"
            experts.setdefault(target, {})[int(layer[3])] = weights.pop(name)
    for norm, value in (("weight", 1.0), ("bias", 0.0)):
        targets.setdefault(
            f"model.vision_tower.post_layernorm.{norm}", Constant((vision.get("hidden_size") or 0,), value)
        )
    return targets | _stacked(experts)


def _read_connector(
    weights: dict[str, Expression], config: dict[str, Any], file: Path
) -> tuple[dict[str, Any], dict[str, Expression]]:
    """Takes the connector out of `weights`: its settings and its tensors."""
    if config.get("mm_projector_type") != "smoe_mlp":
        targets = sequential_targets(weights, "model.mm_projector", "model.vision_connector")
        return projector(config, "mm_projector_type", file), targets
    targets, experts = {}, {}
    for name in [name for name in weights if name.startswith(CONNECTOR)]:
        inner = name.removeprefix(CONNECTOR)
        if inner == "gate.weight":
            targets["model.vision_connector.gate.weight"] = weights.pop(name)
        elif match := re.fullmatch(r"experts\.(\d+)\.([02])\.(weight|bias)", inner):
            target = f"model.vision_connector.experts.{_fused(match[2] == '0', match[3])}"
            experts.setdefault(target, {})[int(match[1])] = weights.pop(name)
    connector = {"type": "mlp", "num_layers": 2, "hidden_act": "gelu", "sparsity": _sparsity(config, file)}
    return connector, targets | _stacked(experts)


def _fused(first: bool, kind: str) -> str:
    return f"{'up' if first else 'down'}_proj{'_bias' if kind == 'bias' else ''}"


def _stacked(experts: dict[str, dict[int, Expression]]) -> dict[str, Expression]:
    return {target: Stack([parts[i] for i in sorted(parts)]) for target, parts in experts.items()}
