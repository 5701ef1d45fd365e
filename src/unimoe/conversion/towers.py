"""The towers, from their own public files: CLIP, SigLIP, Whisper and BEATs.

Each reader gives a [`Tower`]: the fields of its configuration and its tensors under this project's names.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING

from ..modeling_unimoe.configuration_unimoe import UniMoEAudioConfig
from .errors import ConversionError
from .expressions import Expression
from .plan import Account
from .reader import SourceTensor, read_file, read_pickle, read_weights
from .settings import OBJECT, naming, read_settings

CLIP_ORIGIN = "; download https://huggingface.co/openai/clip-vit-large-patch14-336"
WHISPER_ORIGIN = "; download https://huggingface.co/openai/whisper-small"
BEATS_ORIGIN = "; download BEATs_iter3_plus_AS2M.pt from https://github.com/microsoft/unilm/tree/master/beats"

CLIP_FIELDS = (
    "hidden_size intermediate_size num_hidden_layers num_attention_heads num_channels image_size patch_size hidden_act "
    "layer_norm_eps attention_dropout projection_dim initializer_range initializer_factor"
).split()
SIGLIP_FIELDS = (
    "hidden_size intermediate_size num_hidden_layers num_attention_heads num_channels image_size patch_size hidden_act "
    "layer_norm_eps attention_dropout vision_use_head"
).split()
WHISPER_FIELDS = (
    "vocab_size num_mel_bins d_model encoder_layers encoder_attention_heads encoder_ffn_dim decoder_layers "
    "decoder_attention_heads decoder_ffn_dim max_source_positions max_target_positions activation_function dropout "
    "attention_dropout activation_dropout encoder_layerdrop decoder_layerdrop init_std scale_embedding pad_token_id "
    "bos_token_id eos_token_id decoder_start_token_id"
).split()
# This project's name of each BEATs setting and the original's, with the original's default.
BEATS_FIELDS: dict[str, tuple[str, Any]] = {
    "patch_size": ("input_patch_size", 16),
    "patch_embed_dim": ("embed_dim", 512),
    "conv_bias": ("conv_bias", False),
    "num_hidden_layers": ("encoder_layers", 12),
    "hidden_size": ("encoder_embed_dim", 768),
    "intermediate_size": ("encoder_ffn_embed_dim", 3072),
    "num_attention_heads": ("encoder_attention_heads", 12),
    "hidden_act": ("activation_fn", "gelu"),
    "layer_norm_first": ("layer_norm_first", False),
    "deep_norm": ("deep_norm", False),
    "hidden_dropout": ("dropout", 0.1),
    "attention_dropout": ("attention_dropout", 0.1),
    "activation_dropout": ("activation_dropout", 0.0),
    "layerdrop": ("encoder_layerdrop", 0.0),
    "dropout_input": ("dropout_input", 0.0),
    "num_conv_pos_embeddings": ("conv_pos", 128),
    "num_conv_pos_embedding_groups": ("conv_pos_groups", 16),
    "relative_position_embedding": ("relative_position_embedding", False),
    "num_buckets": ("num_buckets", 320),
    "max_bucket_distance": ("max_distance", 1280),
    "gated_relative_position": ("gru_rel_pos", False),
}
BEATS_NAMES = {
    r"patch_embedding\.(.+)": r"patch_embedding.\1",
    r"layer_norm\.(.+)": r"feature_projection.layer_norm.\1",
    r"post_extract_proj\.(.+)": r"feature_projection.projection.\1",
    r"encoder\.pos_conv\.0\.weight_g": r"encoder.pos_conv_embed.conv.weight_magnitude",
    r"encoder\.pos_conv\.0\.weight_v": r"encoder.pos_conv_embed.conv.weight_direction",
    r"encoder\.pos_conv\.0\.bias": r"encoder.pos_conv_embed.conv.bias",
    r"encoder\.layer_norm\.(.+)": r"encoder.layer_norm.\1",
    r"(encoder\.layers\.\d+)\.self_attn\.([qkv]|out)_proj\.(.+)": r"\1.attention.\2_proj.\3",
    r"(encoder\.layers\.\d+)\.self_attn\.grep_linear\.(.+)": r"\1.attention.gru_rel_pos_linear.\2",
    r"(encoder\.layers\.\d+)\.self_attn\.grep_a": r"\1.attention.gru_rel_pos_const",
    r"(encoder\.layers\.\d+)\.self_attn_layer_norm\.(.+)": r"\1.layer_norm.\2",
    r"(encoder\.layers\.\d+)\.fc1\.(.+)": r"\1.feed_forward.intermediate_dense.\2",
    r"(encoder\.layers\.\d+)\.fc2\.(.+)": r"\1.feed_forward.output_dense.\2",
    r"(encoder\.layers\.\d+)\.final_layer_norm\.(.+)": r"\1.final_layer_norm.\2",
}


@dataclass(frozen=True)
class VisionKind:
    """A kind of vision tower: its name for people and the settings that are taken over."""

    name: str
    fields: list[str]


VISION_KINDS = {"clip": VisionKind("CLIP", CLIP_FIELDS), "siglip": VisionKind("SigLIP", SIGLIP_FIELDS)}


@dataclass(frozen=True)
class Tower:
    """A tower's settings (`config`, for its configuration class) and tensors (`targets`, names within the tower)."""

    config: dict[str, Any]
    targets: dict[str, Expression]

    def under(self, prefix: str) -> dict[str, Expression]:
        return {f"{prefix}.{name}": expression for name, expression in self.targets.items()}


def read_clip(folder: Path, account: Account) -> Tower:
    """The vision part of a CLIP folder.

    Raises:
        ConversionError: A file is missing or damaged, or the folder holds something else.
    """
    config = read_vision_settings(folder, ("clip",))
    return Tower(config, read_vision_weights(folder, account))


def read_vision_settings(folder: Path, kinds: tuple[str, ...] = ("clip", "siglip")) -> dict[str, Any]:
    """The settings of the vision encoder in a folder of CLIP or SigLIP; its weights are not looked for.

    Raises:
        ConversionError: config.json or preprocessor_config.json is missing or damaged, or the folder holds another model.
    """
    names = " or ".join(VISION_KINDS[kind].name for kind in kinds)
    _require_folder(folder, "--vision-tower", CLIP_ORIGIN)
    config = read_settings(folder / "config.json")
    kind = next((kind for kind in kinds if config.get("model_type") in (kind, f"{kind}_vision_model")), None)
    if kind is None:
        raise ConversionError(
            f"{folder}: model_type {config.get('model_type')!r}; --vision-tower must be a {names} folder{CLIP_ORIGIN}"
        )
    if not (folder / "preprocessor_config.json").is_file():
        raise ConversionError(f"{folder}: preprocessor_config.json is missing{CLIP_ORIGIN}")
    vision = config["vision_config"] if "vision_config" in config else config
    if not OBJECT.accepts(vision):
        raise ConversionError(
            f"{folder / 'config.json'}: vision_config={vision!r}; {OBJECT.words} is needed{CLIP_ORIGIN}"
        )
    return _settings(f"{kind}_vision_model", vision, VISION_KINDS[kind].fields, folder)


def read_vision_weights(folder: Path, account: Account) -> dict[str, Expression]:
    """The tensors of the vision encoder in such a folder, by their names within it. Raises ConversionError without any."""
    weights = account.add(read_weights(folder, CLIP_ORIGIN))
    targets: dict[str, Expression] = {}
    for name, tensor in weights.items():
        if not name.startswith("vision_model."):
            account.ignore([tensor], "the text part of CLIP or SigLIP, which the model has not")
        elif name.endswith(".position_ids"):
            account.ignore([tensor], "position indices, which follow from the configuration")
        else:
            targets[name.removeprefix("vision_model.")] = tensor
    if not targets:
        raise ConversionError(f"{folder}: no tensors of a vision encoder there{CLIP_ORIGIN}")
    return targets


def read_whisper(folder: Path, account: Account) -> Tower:
    """The encoder of a Whisper folder; its configuration keeps the decoder's settings.

    Raises:
        ConversionError: A file is missing or damaged, or the folder holds something else.
    """
    _require_folder(folder, "--speech-tower", WHISPER_ORIGIN)
    config = read_settings(folder / "config.json")
    if config.get("model_type") != "whisper":
        raise ConversionError(
            f"{folder}: model_type {config.get('model_type')!r}; --speech-tower must be a Whisper folder{WHISPER_ORIGIN}"
        )
    weights = account.add(read_weights(folder, WHISPER_ORIGIN))
    targets = {}
    for name, tensor in weights.items():
        inner = name.removeprefix("model.")
        if inner.startswith("encoder."):
            targets[inner.removeprefix("encoder.")] = tensor
        else:
            account.ignore([tensor], "the decoder of Whisper, which the aligner replaces")
    if not targets:
        raise ConversionError(f"{folder}: no tensors of a Whisper encoder there{WHISPER_ORIGIN}")
    return Tower(_settings("whisper", config, WHISPER_FIELDS, folder), targets)


def read_beats(file: Path, account: Account) -> Tower:
    """A BEATs file: a dict with the settings under 'cfg' and the tensors under 'model'.

    Raises:
        ConversionError: The file is missing or damaged, holds something else, or a fine-tuned classifier.
    """
    if not file.is_file():
        raise ConversionError(f"{file}: --audio-tower must be a BEATs file, and there is none{BEATS_ORIGIN}")
    content = read_file(file) if file.suffix == ".safetensors" else read_pickle(file)
    if (
        not isinstance(content, dict)
        or not isinstance(content.get("cfg"), dict)
        or not _is_weights(content.get("model"))
    ):
        raise ConversionError(f"{file}: not a BEATs file, which has a 'cfg' and a 'model'{BEATS_ORIGIN}")
    settings = content["cfg"]
    if settings.get("finetuned_model"):
        raise ConversionError(
            f"{file}: a BEATs classifier fine-tuned on AudioSet; the pre-trained one is needed{BEATS_ORIGIN}"
        )
    weights = account.add(content["model"])
    targets: dict[str, Expression] = {}
    for name, tensor in weights.items():
        if name.endswith(".relative_attention_bias.weight"):
            # The file repeats one table for every layer, and the original's loader keeps the last.
            table = "encoder.relative_attention_bias.weight"
            if table in targets:
                account.ignore(
                    [targets[table]], "the table of relative positions, which the file repeats for every layer"
                )
            targets[table] = tensor
        elif renamed := _rename(name, BEATS_NAMES):
            targets[renamed] = tensor
    config = {ours: settings.get(theirs, default) for ours, (theirs, default) in BEATS_FIELDS.items()}
    with naming(file):
        UniMoEAudioConfig(**config)
    return Tower(config, targets)


def _rename(name: str, patterns: dict[str, str]) -> str | None:
    for pattern, replacement in patterns.items():
        if match := re.fullmatch(pattern, name):
            return match.expand(replacement)
    return None


def _settings(model_type: str, config: dict[str, Any], fields: list[str], folder: Path) -> dict[str, Any]:
    """Those of `fields` that are set. Raises ConversionError, which names the tower's file, where they do not fit together."""
    settings = {field: config[field] for field in fields if config.get(field) is not None}
    with naming(folder / "config.json"):
        CONFIG_MAPPING[model_type](**settings)
    return {"model_type": model_type, **settings}


def _is_weights(value: Any) -> bool:
    return isinstance(value, dict) and bool(value) and all(isinstance(item, SourceTensor) for item in value.values())


def _require_folder(folder: Path, option: str, origin: str) -> None:
    if not folder.is_dir():
        raise ConversionError(f"{folder}: no such folder, given as {option}{origin}")
    if not (folder / "config.json").is_file():
        raise ConversionError(f"{folder}: config.json is missing, from the folder given as {option}{origin}")
