"""MoE-LLaVA (Lin et al. 2024, arXiv 2401.15947): experts in every other layer of a small decoder, chosen by DeepSpeed's gate.

Three kinds of checkpoint, told apart by their files: the final one (`moe_llava_*`), the dense one of the second stage
(`llava_*`), and the projector of the first (`mm_projector.bin` alone), which needs the decoder's own folder beside it.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..processing.chat_template import MOE_LLAVA_CHAT_TEMPLATE
from .decoders import DECODERS, Decoder, fuse_experts
from .errors import ConversionError
from .expressions import Expression
from .family import Conversion
from .llava import build, complete, layer_pattern, projector, select_layer, select_strategy, sequential_targets
from .plan import Account
from .reader import WEIGHT_FILES, read_file, read_weights
from .settings import naming, read_settings, require
from .towers import read_vision_settings, read_vision_weights

ORIGIN = "; download the whole folder from https://huggingface.co/LanguageBind"
MODEL_TYPE = re.compile(r"(moe_)?llava_(\w+)")
PROJECTOR_FILE = "mm_projector.bin"
PROJECTOR = "mm_projector.image_spatial_proj"
TOWER = "image_tower.image_tower.vision_model."
GENERATION = {"do_sample": True, "temperature": 0.2, "max_new_tokens": 1024}
# How far a decoder with dynamic NTK reads beyond the length that it was trained with (Qwen technical report, table 3).
NTK_FACTOR = 8
LICENCE = (
    "The MoE-LLaVA weights are for research use only. They build on a language model (StableLM 2, Qwen, Phi-2, OpenChat or "
    "Mistral) and on CLIP or SigLIP, whose licences apply to them and to whatever is made from them, and were trained on data "
    "with licences of their own. Check that your use is allowed before you share or deploy them."
)


@dataclass(frozen=True)
class MoELLaVAPaths:
    """The folders of a release.

    Args:
        checkpoint: The final checkpoint, that of the second stage, or the first stage's projector with its config.json.
        vision_tower: The CLIP or SigLIP folder that `mm_image_tower` names; its weights are read where the checkpoint has
            none.
        base: The decoder's own folder, for a first-stage projector; its tokenizer is taken then.
        tokenizer: A folder with tokenizer files, which is taken instead of any other.
    """

    checkpoint: Path
    vision_tower: Path
    base: Path | None = None
    tokenizer: Path | None = None


def plan_moe_llava(paths: MoELLaVAPaths) -> Conversion:
    """Reads configurations and the names and shapes of all tensors, and plans the conversion; reads no weights.

    Raises:
        ConversionError: A file is missing or damaged, is of another family, or does not fit the others.
    """
    if not paths.checkpoint.is_dir():
        raise ConversionError(f"{paths.checkpoint}: no such folder, given as --checkpoint{ORIGIN}")
    file = paths.checkpoint / "config.json"
    with naming(file):
        return _plan(paths, file)


def _plan(paths: MoELLaVAPaths, file: Path) -> Conversion:
    config, decoder = _read_config(file)
    account = Account()
    weights = _load(paths, decoder, account)
    vision_config = read_vision_settings(paths.vision_tower)
    targets = _tower_targets(weights, vision_config, config, paths.vision_tower, account)
    targets |= sequential_targets(weights, f"{decoder.root}{PROJECTOR}", "model.vision_connector")
    sparse, weights = _place_experts(decoder.targets(weights, "model.language_model"))
    targets |= weights
    text_config = decoder.config(config, file)
    model_config = build(
        {
            "text_config": text_config,
            "text_sparsity": _sparsity(config, sparse, text_config["num_hidden_layers"], file),
            "vision_config": vision_config,
            "vision_connector_config": projector(config, "image_projector_type", file),
            "vision_feature_layer": select_layer(config),
            "vision_feature_select_strategy": select_strategy(config, file),
        },
        file,
    )
    plan = complete(account, targets, model_config, file, str(paths.checkpoint))
    stage = (
        "" if sparse else f" after its {'second stage (dense)' if paths.base is None else 'first stage (projector)'}"
    )
    ntk = config.get("seq_length") if config.get("use_dynamic_ntk") else None
    return Conversion(
        config=model_config,
        plan=plan,
        title=f"MoE-LLaVA with {decoder.name}{stage}",
        inputs={name: path for name, path in vars(paths).items() if path is not None},
        licence=LICENCE,
        tokenizer_folder=paths.tokenizer or paths.base or paths.checkpoint,
        tokenizer_required=paths.tokenizer is not None,
        image_processor_folder=paths.vision_tower,
        generation=GENERATION,
        chat_template=MOE_LLAVA_CHAT_TEMPLATE,
        image_aspect_ratio="pad" if config.get("image_aspect_ratio") == "pad" else "square",
        max_length=None if ntk is None else NTK_FACTOR * ntk,
    )


def _read_config(file: Path) -> tuple[dict[str, Any], Decoder]:
    if not file.is_file():
        raise ConversionError(f"{file.parent}: config.json is missing{ORIGIN}")
    config = read_settings(file)
    kind = str(config.get("model_type"))
    match = MODEL_TYPE.fullmatch(kind)
    if "scales" in config or "mm_audio_tower" in config:
        other = "cumo" if "scales" in config else "uni-moe"
        raise ConversionError(f"{file}: a {kind!r} checkpoint, not a MoE-LLaVA one; use `unimoe convert {other}`")
    if match is None or "mm_image_tower" not in config:
        raise ConversionError(
            f"{file}: model_type {kind!r}; a MoE-LLaVA checkpoint has one as 'moe_llava_stablelm'{ORIGIN}"
        )
    if match[2] not in DECODERS:
        raise ConversionError(f"{file}: model_type {kind!r}; supported decoders are {', '.join(DECODERS)}")
    if config.get("mm_video_tower"):
        raise ConversionError(
            f"{file}: mm_video_tower={config['mm_video_tower']!r}; no release has one, and none is supported"
        )
    return config, DECODERS[match[2]]


def _load(paths: MoELLaVAPaths, decoder: Decoder, account: Account) -> dict[str, Expression]:
    stage_1 = paths.checkpoint / PROJECTOR_FILE
    has_weights = any(
        (paths.checkpoint / f"{name}{suffix}").is_file() for name in WEIGHT_FILES for suffix in ("", ".index.json")
    )
    if has_weights or not stage_1.is_file():
        if paths.base is not None:
            raise ConversionError(f"{paths.checkpoint}: a whole checkpoint, which has no use for --base")
        return dict(account.add(read_weights(paths.checkpoint, ORIGIN)))
    if paths.base is None:
        raise ConversionError(
            f"{paths.checkpoint}: only the projector of the first stage ({PROJECTOR_FILE}); pass the decoder's folder as --base"
        )
    if not paths.base.is_dir():
        raise ConversionError(f"{paths.base}: no such folder, given as --base")
    weights: dict[str, Expression] = dict(account.add(read_weights(paths.base)))
    if "lm_head.bias" in weights:
        account.ignore([weights.pop("lm_head.bias")], "the head's bias, which MoE-LLaVA leaves out")
    tensors = account.add(read_file(stage_1))
    newer = {
        f"{decoder.root}mm_projector.{name.rpartition('mm_projector.')[2]}": part for name, part in tensors.items()
    }
    return account.overlay(weights, newer, f"replaced by {PROJECTOR_FILE}")


def _tower_targets(
    weights: dict[str, Expression], vision: dict[str, Any], config: dict[str, Any], folder: Path, account: Account
) -> dict[str, Expression]:
    """Takes the vision tower out of `weights`, or reads it from its folder where they have none."""
    wanted = config.get("mm_hidden_size")
    if wanted is not None and vision.get("hidden_size", wanted) != wanted:
        raise ConversionError(
            f"{folder}: a tower of width {vision['hidden_size']}, given as --vision-tower; this checkpoint was made for "
            f"{config['mm_image_tower']}, of width {wanted}"
        )
    tower: dict[str, Expression] = {}
    for name in [name for name in weights if TOWER in name]:
        inner = name.partition(TOWER)[2]
        if inner.endswith(".position_ids"):
            account.ignore([weights.pop(name)], "position indices, which follow from the configuration")
        else:
            tower[inner] = weights.pop(name)
    tower = tower or read_vision_weights(folder, account)
    return {f"model.vision_tower.{name}": weight for name, weight in tower.items()}


def _place_experts(weights: dict[str, Expression]) -> tuple[list[int], dict[str, Expression]]:
    """Which layers are sparse, and the decoder's tensors with DeepSpeed's experts as the sparse block's."""
    targets: dict[str, Expression] = {}
    experts: dict[str, dict[int, dict[str, Expression]]] = {}
    residual: dict[str, dict[str, Expression]] = {}
    for name, weight in weights.items():
        match = re.fullmatch(r"(.+\.layers\.\d+\.mlp)\.(?:deepspeed_moe\.)?(.+)", name)
        if match is None:
            targets[name] = weight
        elif match[2].startswith("mlp."):
            residual.setdefault(match[1], {})[match[2].removeprefix("mlp.")] = weight
        elif match[2].startswith("coefficient."):
            targets[f"{match[1]}.residual.{match[2]}"] = weight
        elif match[2] == "gate.wg.weight":
            targets[f"{match[1]}.gate.weight"] = weight
        elif expert := re.fullmatch(r"experts\.deepspeed_experts\.(\d+)\.(.+)", match[2]):
            experts.setdefault(match[1], {}).setdefault(int(expert[1]), {})[expert[2]] = weight
        else:
            targets[name] = weight
    for mlp, parts in experts.items():
        fused = fuse_experts([parts[i] for i in sorted(parts)], mlp)
        targets |= {f"{mlp}.experts.{name}": weight for name, weight in fused.items()}
    for mlp, part in residual.items():
        targets |= {f"{mlp}.residual.experts.{name}": weight for name, weight in fuse_experts([part], mlp).items()}
    return sorted(int(mlp.split(".")[-2]) for mlp in experts), targets


def _sparsity(config: dict[str, Any], sparse: list[int], num_layers: int, file: Path) -> dict[str, Any] | None:
    """The settings of the sparse layers from the nested `moe`; None for a dense decoder."""
    if not sparse:
        return None
    moe = config["moe"] if isinstance(config.get("moe"), dict) else {}
    require(moe, ("num_experts", "top_k_experts"), file, "though the weights have experts", inside="moe.")
    layers = moe.get("moe_layers_idx") or sparse
    counts = moe["num_experts"] if isinstance(moe["num_experts"], list) else [moe["num_experts"]]
    if len(counts) == 1:
        counts = counts * len(layers)
    if sorted(layers) != sparse or len(counts) != len(layers):
        raise ConversionError(
            f"{file}: moe.moe_layers_idx={layers} with moe.num_experts={counts}, but the layers {sparse} have experts"
        )
    by_layer = dict(zip(layers, counts))
    return {
        "layers": layer_pattern(sparse, num_layers),
        "num_experts": counts[0] if len(set(counts)) == 1 else [by_layer[layer] for layer in sparse],
        "top_k": moe["top_k_experts"],
        # DeepSpeed's gate divides two weights by their sum, and leaves a single one as it is.
        "norm_topk_prob": moe["top_k_experts"] > 1,
        "router_dtype": "float32",
        "capacity_factor": moe.get("capacity_factor"),
        "eval_capacity_factor": moe.get("eval_capacity_factor"),
        "min_capacity": moe.get("min_capacity") or 0,
        "residual": bool(moe.get("use_residual")),
        "router_aux_loss_coef": float(moe.get("router_aux_loss_coef") or 0.0),
        "router_loss_counts_padding": True,
    }
