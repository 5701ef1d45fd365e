"""The originals' JSON settings: what kind of value each field has, and one place that says which of them is bad.

Fields have the same names in many of the families, so that one table does for all. It lists what readers compute with, or what
a model is built from; a field that is absent or null is left to its reader, and fields that nobody reads may hold anything.
"""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers.activations import ACT2FN

from .errors import ConversionError
from .reader import read_json


@dataclass(frozen=True)
class Kind:
    """What a field may hold, in words and as a test."""

    words: str
    accepts: Callable[[Any], bool]


def _is_whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_token(value: Any) -> bool:
    return isinstance(value.get("content") if isinstance(value, dict) else value, str)


def _is_list(value: Any, accepts: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and all(accepts(item) for item in value)


SIZE = Kind("a positive whole number", lambda value: _is_whole(value, 1))
COUNT = Kind("a whole number that is not negative", lambda value: _is_whole(value, 0))
COUNTS = Kind("a whole number or a list of them", lambda value: COUNT.accepts(value) or _is_list(value, COUNT.accepts))
INDEX = Kind("a whole number", lambda value: _is_whole(value, -(10**9)))
INDICES = Kind("a list of whole numbers", lambda value: _is_list(value, COUNT.accepts))
NUMBER = Kind("a number", _is_number)
TEXT = Kind("a text", lambda value: isinstance(value, str))
ACTIVATION = Kind("the name of an activation in Transformers", lambda value: TEXT.accepts(value) and value in ACT2FN)
OBJECT = Kind("a JSON object", lambda value: isinstance(value, dict))
TOKEN = Kind("a text, or an object with a text as 'content'", _is_token)
TOKENS = Kind("a list of tokens", lambda value: _is_list(value, _is_token))
SIDE = Kind("'left' or 'right'", lambda value: value in ("left", "right"))

_FIELDS = {
    SIZE: "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
    "kv_channels max_position_embeddings num_channels image_size patch_size num_mel_bins d_model encoder_layers "
    "encoder_attention_heads encoder_ffn_dim decoder_layers decoder_attention_heads decoder_ffn_dim max_source_positions "
    "max_target_positions mm_hidden_size mm_audio_hidden_size seq_length tokenizer_model_max_length",
    COUNT: "num_selected num_local_experts num_experts_per_tok top_k_experts min_capacity query_tokens_size moe_stride",
    COUNTS: "num_experts",
    INDEX: "mm_vision_select_layer",
    INDICES: "moe_layers_idx image_expert_indices video_expert_indices audio_expert_indices",
    NUMBER: "rms_norm_eps layer_norm_eps norm_eps layer_norm_epsilon initializer_range rope_theta rotary_emb_base rope_pct "
    "partial_rotary_factor attention_dropout attn_dropout_prob capacity_factor eval_capacity_factor router_aux_loss_coef "
    "balance_loss_coef router_z_loss_coef aux_balance_loss_coef aux_multimodal_loss_coef aux_kl_loss_coef lora_r lora_alpha "
    "model_max_length",
    TEXT: "model_type mm_projector_type image_projector_type audio_projector_type mm_vision_select_feature moe_type",
    ACTIVATION: "hidden_act activation_function",
    OBJECT: "vision_config rope_scaling added_tokens_decoder",
    TOKEN: "bos_token eos_token unk_token pad_token",
    TOKENS: "additional_special_tokens",
    SIDE: "padding_side",
}
FIELDS = {name: kind for kind, names in _FIELDS.items() for name in names.split()}
# Objects with fields of their own. Uni-MoE's `moe` is a text, which is not looked at.
NESTED = ("vision_config", "moe", "rope_scaling")


def read_settings(file: Path) -> dict[str, Any]:
    """A JSON object whose known fields hold what they should.

    Raises:
        ConversionError: The file is missing or damaged, or a field has a value of another kind; the message names it.
    """
    settings = read_json(file)
    _check(settings, file)
    return settings


def _check(settings: Mapping[str, Any], file: Path, inside: str = "") -> None:
    for name, value in settings.items():
        if name in NESTED and isinstance(value, dict):
            _check(value, file, f"{inside}{name}.")
        kind = FIELDS.get(name)
        if value is not None and kind is not None and not kind.accepts(value):
            raise ConversionError(f"{file}: {inside}{name}={_short(value)}; {kind.words} is needed")


def require(settings: Mapping[str, Any], names: Iterable[str], file: Path, why: str, inside: str = "") -> None:
    """Raises ConversionError, which ends in `why`, where a field is absent, null or 0."""
    if missing := [f"{inside}{name}" for name in names if settings.get(name) in (None, 0)]:
        raise ConversionError(f"{file}: {' and '.join(missing)} missing, {why}")


@contextlib.contextmanager
def naming(file: Path) -> Iterator[None]:
    """Whatever goes wrong within for its settings' sake becomes a ConversionError that names `file`.

    This is for all that the table of fields cannot know: values that do not fit one another, or not the tensors.
    """
    try:
        yield
    except ConversionError:
        raise
    except (StrictDataclassError, ValueError) as error:
        # Transformers' configurations say which field, and what it may be.
        raise ConversionError(f"{file}: {_line(error)}") from None
    except (TypeError, LookupError, AttributeError, ArithmeticError, AssertionError, RuntimeError) as error:
        raise ConversionError(
            f"{file}: its settings do not fit together ({type(error).__name__}: {_line(error)}); download it again"
        ) from None


def _line(error: Exception) -> str:
    return _short(" ".join(str(error).split()), limit=300, quote=False)


def _short(value: Any, limit: int = 60, quote: bool = True) -> str:
    text = repr(value) if quote else str(value)
    return text if len(text) <= limit else f"{text[:limit]}..."
