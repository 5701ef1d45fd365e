"""Uni-MoE v1 (Li et al. 2024, arXiv 2405.11273): the audio, speech and eight-expert releases.

A release is spread over folders that the originals put on top of one another, the later the stronger:

    base shards < non_lora_trainables.bin < adapter, merged < mm_audio_aligner.bin < mlp_gates.bin

Towers in the base are ignored; they come from CLIP's, Whisper's and BEATs' own files. Which release it is, is told by the
tensors and config.json: a Q-Former aligner makes an audio model, a Whisper decoder a speech model, expert files of their own
an eight-expert model.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import uni_moe_config as config_map
from .errors import ConversionError
from .expressions import Expression
from .family import Conversion
from .llava import build, complete, projector, select_layer, select_strategy, sequential_targets
from .lora import read_adapter
from .plan import Account
from .reader import SourceTensor, read_file, read_weights
from .settings import naming, read_settings
from .towers import read_beats, read_clip, read_whisper
from .uni_moe_experts import OF_INTERNAL_LORA, find_config, is_eight_experts, place_eight_experts, stack_experts

HUB = "https://huggingface.co/Uni-MoE and https://huggingface.co/VictorJsy"
BASE_ORIGIN = f"; download the whole base folder from {HUB}"
CHECKPOINT_ORIGIN = f"; download the whole fine-tuned folder from {HUB}"
OTHER_FAMILIES = {"moe_llava": "moe-llava", "moe-llava": "moe-llava", "cumo": "cumo", "llava_mistral": "cumo"}
GENERATION = {"do_sample": True, "temperature": 0.2, "top_k": 50, "top_p": 1.0, "max_new_tokens": 1024}
LICENCE = (
    "The Uni-MoE weights are for research use only. They build on Vicuna and LLaMA, whose terms (the Llama 2 Community "
    "License and its acceptable use policy) apply to them and to whatever is made from them, and were trained on data with "
    "licences of their own. Check that your use is allowed before you share or deploy them."
)
TOWER_PREFIXES = ("model.vision_tower.", "model.audio_tower.")
LAYER_MLP = re.compile(r"model\.layers\.(\d+)\.mlp\.(.+)")


@dataclass(frozen=True)
class UniMoEPaths:
    """The folders and files of a release.

    Args:
        base: The pre-trained decoder, with the tokenizer.
        checkpoint: The fine-tuned folder (adapter, gates, aligner).
        vision_tower: A CLIP folder.
        audio_tower: A BEATs file, for audio models.
        speech_tower: A Whisper folder, for speech models.
        experts: The folder of expert files, for eight-expert models.
        qformer_num_attention_heads: Heads of the Q-Former, the only size that no file tells; by default its width / 64.
        tokenizer: A folder with tokenizer files, which is taken instead of the base's.
    """

    base: Path
    checkpoint: Path
    vision_tower: Path
    audio_tower: Path | None = None
    speech_tower: Path | None = None
    experts: Path | None = None
    qformer_num_attention_heads: int | None = None
    tokenizer: Path | None = None


def plan_uni_moe(paths: UniMoEPaths) -> Conversion:
    """Reads configurations and the names and shapes of all tensors, and plans the conversion; reads no weights.

    Raises:
        ConversionError: A file is missing or damaged, is of another family, or does not fit the others.
    """
    _require_folder(paths.base, "--base", BASE_ORIGIN)
    _require_folder(paths.checkpoint, "--checkpoint", CHECKPOINT_ORIGIN)
    eight_experts = is_eight_experts(paths.checkpoint)
    config_file = (
        find_config(paths.base, paths.checkpoint) if eight_experts else None
    ) or paths.checkpoint / "config.json"
    with naming(config_file):
        return _plan(paths, config_file, eight_experts)


def _plan(paths: UniMoEPaths, config_file: Path, eight_experts: bool) -> Conversion:
    config = _read_config(config_file)
    account = Account()
    weights = _load(paths, eight_experts, account)
    if eight_experts:
        mlps, sparsity = place_eight_experts(paths.checkpoint, paths.experts, config, config_file, weights, account)
    else:
        mlps, indices = _place_mlps(weights, config, config_file)
        sparsity = config_map.sparsity(config, indices, config_file)

    vision = read_clip(paths.vision_tower, account)
    _check_width(vision.config.get("hidden_size"), config, "mm_hidden_size", "--vision-tower", paths.vision_tower)
    targets = vision.under("model.vision_tower")
    targets |= sequential_targets(weights, "model.mm_projector", "model.vision_connector")
    sound = _read_sound(paths, config, config_file, weights, account)
    targets |= sound.targets
    targets |= _decoder_targets(weights, mlps)
    model_config = build(
        {
            "text_config": config_map.text_config(config, config_file),
            "text_sparsity": sparsity,
            "vision_config": vision.config,
            "vision_connector_config": projector(config, "mm_projector_type", config_file),
            "vision_feature_layer": select_layer(config),
            "vision_feature_select_strategy": select_strategy(config, config_file),
            **sound.fields,
        },
        config_file,
    )
    plan = complete(account, targets, model_config, config_file, f"{paths.checkpoint} with {paths.base}")
    speech = model_config.speech_config
    return Conversion(
        config=model_config,
        plan=plan,
        title=f"Uni-MoE {'eight-expert ' if eight_experts else ''}{sound.kind}",
        inputs={name: path for name, path in vars(paths).items() if isinstance(path, Path)},
        licence=LICENCE,
        tokenizer_folder=paths.tokenizer or paths.base,
        tokenizer_required=paths.tokenizer is not None,
        image_processor_folder=paths.vision_tower,
        feature_extractor={} if speech is None else {"speech_feature_size": speech.num_mel_bins},
        generation=GENERATION,
    )


def _read_config(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise ConversionError(f"{file.parent}: config.json is missing{CHECKPOINT_ORIGIN}")
    config = read_settings(file)
    kind = str(config.get("model_type"))
    for start, command in OTHER_FAMILIES.items():
        if kind.startswith(start):
            raise ConversionError(f"{file}: a {kind!r} checkpoint, not a Uni-MoE one; use `unimoe convert {command}`")
    if kind not in ("llava", "llava_llama") or "mm_audio_tower" not in config:
        raise ConversionError(
            f"{file}: model_type {kind!r} without the fields of a Uni-MoE release (mm_audio_tower, moe); give the fine-tuned "
            f"folder of one{CHECKPOINT_ORIGIN}"
        )
    return config


def _load(paths: UniMoEPaths, eight_experts: bool, account: Account) -> dict[str, Expression]:
    """The originals' loading order: decoder, connectors and gates, under their names in the original model."""
    weights: dict[str, Expression] = {}
    if paths.base != paths.checkpoint:
        # The loaders of the originals read these two in training alone; they fill what the shards may lack.
        for name in ("mm_projector.bin", "mm_audio_aligner.bin"):
            if (paths.base / name).is_file():
                weights |= account.add(_strip(read_file(paths.base / name)))
    shards = account.add(read_weights(paths.base, BASE_ORIGIN))
    for name in [name for name in shards if name.startswith(TOWER_PREFIXES)]:
        account.ignore([shards.pop(name)], "towers in the base; they are taken from their own folders")
    for name in [name for name in shards if name.endswith(".rotary_emb.inv_freq")]:
        account.ignore([shards.pop(name)], "rotary frequencies, which follow from the configuration")
    weights = account.overlay(weights, shards, "copies of what the base's shards hold")

    def load(name: str, required: bool = False) -> None:
        nonlocal weights
        file = paths.checkpoint / name
        if not file.is_file():
            if required:
                raise ConversionError(f"{paths.checkpoint}: {name} is missing{CHECKPOINT_ORIGIN}")
            return
        newer = account.add(_strip(read_file(file)))
        adapters = [newer.pop(key) for key in list(newer) if ".lora_" in key]
        account.ignore(adapters, "adapters of the gates, which the originals' loader leaves out")
        weights = account.overlay(weights, newer, f"replaced by {name}")

    adapter = read_adapter(paths.checkpoint)
    if adapter is None:
        if any((paths.checkpoint / name).is_file() for name in ("non_lora_trainables.bin", "mlp_gates.bin")):
            raise ConversionError(
                f"{paths.checkpoint}: adapter_config.json and adapter_model.bin are missing{CHECKPOINT_ORIGIN}"
            )
        load("mm_projector.bin")
        load("mm_audio_aligner.bin")
        return weights
    load("non_lora_trainables.bin", required=True)
    if eight_experts:
        load("mlp_gates.bin", required=True)
        load("fm_adapter.bin")
    account.add({half.name: half for pair in adapter.pairs.values() for half in pair})
    adapter, adapters = adapter.without(OF_INTERNAL_LORA)
    account.ignore(adapters, "adapters of maps that the original sets to random values whenever it is loaded")
    weights = adapter.merge(weights)
    load("mm_audio_aligner.bin", required=True)
    if not eight_experts:
        load("mlp_gates.bin")
    return weights


def _strip(tensors: dict[str, SourceTensor]) -> dict[str, SourceTensor]:
    """PEFT's prefixes removed as the originals' loaders remove them."""
    stripped = {name.removeprefix("base_model."): tensor for name, tensor in tensors.items()}
    if any(name.startswith("model.model.") for name in stripped):
        stripped = {name.removeprefix("model."): tensor for name, tensor in stripped.items()}
    return stripped


def _place_mlps(
    weights: dict[str, Expression], config: dict[str, Any], file: Path
) -> tuple[dict[str, Expression], list[int]]:
    """Takes the FFNs out of `weights`: as target tensors (names within the decoder), and which layers are sparse."""
    mlps = {name: weights.pop(name) for name in list(weights) if LAYER_MLP.match(name)}
    targets: dict[str, Expression] = {}
    experts: dict[int, dict[int, dict[str, Expression]]] = {}
    for name, weight in mlps.items():
        layer, inner = LAYER_MLP.match(name).groups()
        if match := re.fullmatch(r"experts\.(\d+)\.(gate|up|down)_proj\.weight", inner):
            experts.setdefault(int(layer), {}).setdefault(int(match[1]), {})[match[2]] = weight
        else:
            targets[f"layers.{layer}.mlp.{inner}"] = weight
    for layer, by_index in experts.items():
        if sorted(by_index) != list(range(config.get("num_experts") or len(by_index))):
            raise ConversionError(
                f"{file}: num_experts={config.get('num_experts')}, but layer {layer} has the experts {sorted(by_index)}"
            )
        targets |= stack_experts(f"layers.{layer}.mlp", [by_index[i] for i in sorted(by_index)])
    return targets, sorted(experts)


@dataclass(frozen=True)
class _Sound:
    """The sound tower and its aligner: what kind, fields of the configuration, tensors."""

    kind: str
    fields: dict[str, Any]
    targets: dict[str, Expression]


def _read_sound(
    paths: UniMoEPaths, config: dict[str, Any], file: Path, weights: dict[str, Expression], account: Account
) -> _Sound:
    """Takes the aligner out of `weights` and reads the tower that belongs to it."""
    aligner = {name: weights.pop(name) for name in list(weights) if name.startswith("model.mm_audio_aligner.")}
    if "model.query_tokens" in weights:
        aligner["model.mm_audio_aligner.query_tokens"] = weights.pop("model.query_tokens")
    aligner = {name.removeprefix("model.mm_audio_aligner."): weight for name, weight in aligner.items()}
    queries = aligner.get("query_tokens")
    kinds = {"audio": "qformer.qformer.", "speech": "decoder.audio_decoder."}
    kind = next((kind for kind, start in kinds.items() if any(name.startswith(start) for name in aligner)), None)
    if kind is None or queries is None:
        raise ConversionError(
            f"{paths.checkpoint}: no audio aligner with query tokens (model.mm_audio_aligner.*) there or in the base"
            f"{CHECKPOINT_ORIGIN}"
        )
    option, tower_path = f"--{kind}-tower", getattr(paths, f"{kind}_tower")
    other = "speech" if kind == "audio" else "audio"
    if getattr(paths, f"{other}_tower") is not None:
        raise ConversionError(f"{paths.checkpoint}: a Uni-MoE {kind} model, which has no use for --{other}-tower")
    if tower_path is None:
        needed = "the BEATs file" if kind == "audio" else "the Whisper folder"
        raise ConversionError(f"{paths.checkpoint}: a Uni-MoE {kind} model, which needs {option}, {needed}")
    tower = read_beats(tower_path, account) if kind == "audio" else read_whisper(tower_path, account)
    width = tower.config.get("hidden_size" if kind == "audio" else "d_model")
    _check_width(width, config, "mm_audio_hidden_size", option, tower_path)
    connector: dict[str, Any] = {
        "type": "qformer" if kind == "audio" else "whisper_decoder",
        "num_query_tokens": config.get("query_tokens_size") or queries.shape[1],
        "projector_num_layers": projector(config, "audio_projector_type", file)["num_layers"],
    }
    targets = sequential_targets(aligner, "projector", f"model.{kind}_connector.projector")
    if kind == "audio":
        connector["backbone_config"] = _qformer_config(aligner, paths.qformer_num_attention_heads)
    else:
        connector["backbone_config"] = _whisper_decoder_config(aligner, tower.config)
        embedding = aligner.pop("decoder.audio_decoder.embed_tokens.weight", None)
        account.ignore(
            [embedding] if embedding else [], "the vocabulary of the Whisper decoder, in place of which are queries"
        )
    backbone = "qformer" if kind == "audio" else "decoder"
    for name, weight in aligner.items():
        inner = f"{backbone}.{name.removeprefix(kinds[kind])}" if name.startswith(kinds[kind]) else name
        targets[f"model.{kind}_connector.{inner}"] = weight
    fields = {f"{kind}_config": tower.config, f"{kind}_connector_config": connector}
    return _Sound(kind, fields, {**tower.under(f"model.{kind}_tower"), **targets})


def _qformer_config(aligner: dict[str, Expression], num_heads: int | None) -> dict[str, Any]:
    """The Q-Former's sizes, which are constants of the original's code, from its tensors."""
    layers = "qformer.qformer.encoder.layer"
    depth = 1 + max(int(name.split(".")[4]) for name in aligner if name.startswith(layers))
    crossing = [i for i in range(depth) if f"{layers}.{i}.crossattention.attention.key.weight" in aligner]
    width = aligner["query_tokens"].shape[-1]
    intermediate = aligner.get(f"{layers}.0.intermediate_query.dense.weight")
    if not crossing or intermediate is None:
        raise ConversionError("the audio aligner's Q-Former has no cross-attention or no FFN: its file is incomplete")
    if num_heads is None and width % 64:
        raise ConversionError(
            f"the Q-Former is {width} wide, and no file tells its number of attention heads: pass "
            "--qformer-num-attention-heads"
        )
    if num_heads is not None and (num_heads < 1 or width % num_heads):
        raise ConversionError(
            f"--qformer-num-attention-heads {num_heads} does not divide the Q-Former's width, {width}"
        )
    return {
        "hidden_size": width,
        "encoder_hidden_size": aligner[f"{layers}.{crossing[0]}.crossattention.attention.key.weight"].shape[1],
        "intermediate_size": intermediate.shape[0],
        "num_hidden_layers": depth,
        "num_attention_heads": num_heads or width // 64,
        "cross_attention_frequency": crossing[1] - crossing[0] if len(crossing) > 1 else depth,
        "layer_norm_eps": 1e-12,
    }


def _whisper_decoder_config(aligner: dict[str, Expression], tower: dict[str, Any]) -> dict[str, Any]:
    """The settings of the tower's own decoder, of which the aligner is a trained copy, with the aligner's sizes."""
    start = "decoder.audio_decoder."
    depth = 1 + max((int(name.split(".")[3]) for name in aligner if name.startswith(f"{start}layers.")), default=-1)
    fc1 = aligner.get(f"{start}layers.0.fc1.weight")
    positions = aligner.get(f"{start}embed_positions.weight")
    if fc1 is None or positions is None:
        raise ConversionError(
            "the audio aligner's Whisper decoder has no layers or no positions: its file is incomplete"
        )
    return {
        **tower,
        "decoder_layers": depth,
        "decoder_ffn_dim": fc1.shape[0],
        "max_target_positions": positions.shape[0],
    }


def _decoder_targets(weights: dict[str, Expression], mlps: dict[str, Expression]) -> dict[str, Expression]:
    targets = {}
    for name, weight in weights.items():
        inner = name.removeprefix("model.")
        targets[inner if inner == "lm_head.weight" else f"model.language_model.{inner}"] = weight
    return targets | {f"model.language_model.{name}": weight for name, weight in mlps.items()}


def _check_width(found: int | None, config: dict[str, Any], field: str, option: str, path: Path) -> None:
    wanted = config.get(field)
    if wanted is not None and found != wanted:
        raise ConversionError(
            f"{path}: a tower of width {found}, given as {option}; this release needs {field}={wanted}"
        )


def _require_folder(folder: Path, option: str, origin: str) -> None:
    if not folder.is_dir():
        raise ConversionError(f"{folder}: no such folder, given as {option}{origin}")
