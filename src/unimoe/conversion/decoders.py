"""Decoders that the LLaVA-like originals build on: their settings and their tensors under Transformers' names."""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import ConversionError
from .expressions import Concatenate, Expression, Stack

COMMON_FIELDS = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads hidden_act "
    "max_position_embeddings initializer_range use_cache pad_token_id bos_token_id eos_token_id attention_dropout"
).split()
MISTRAL_FIELDS = ["rms_norm_eps", "head_dim"]
MIXTRAL_FIELDS = [*MISTRAL_FIELDS, "num_local_experts", "num_experts_per_tok", "router_aux_loss_coef"]
REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


@dataclass(frozen=True)
class Decoder:
    """A decoder of one model type.

    Args:
        name: For people.
        model_type: Transformers' name of it.
        fields: Settings that it has beside `COMMON_FIELDS`, by Transformers' names.
        nullable: Settings whose absence is a value of its own.
        rename: From settings to Transformers' names for them.
        rope_theta: The default of the original.
        fuse: What becomes of its tensors (names within the decoder) beyond the prefix `model.`.
    """

    name: str
    model_type: str
    fields: list[str]
    nullable: tuple[str, ...] = ()
    rename: dict[str, str] = field(default_factory=dict)
    rope_theta: float = 10000.0
    fuse: Callable[[dict[str, Expression]], dict[str, Expression]] = dict

    def config(self, config: dict[str, Any], file: Path) -> dict[str, Any]:
        """Its settings out of an original's `config.json`. Raises ConversionError where one is missing or not supported."""
        config = {self.rename.get(name, name): value for name, value in config.items()}
        if missing := [name for name in REQUIRED if not isinstance(config.get(name), int)]:
            raise ConversionError(f"{file}: {', '.join(missing)} missing; a decoder of type {self.model_type!r} needs them")
        if config.get("rope_scaling"):
            raise ConversionError(f"{file}: rope_scaling={config['rope_scaling']!r}; no release has any")
        rope: dict[str, Any] = {"rope_type": "default", "rope_theta": float(config.get("rope_theta") or self.rope_theta)}
        if config.get("partial_rotary_factor") is not None:
            rope["partial_rotary_factor"] = config["partial_rotary_factor"]
        picked = {name: config[name] for name in (*COMMON_FIELDS, *self.fields) if config.get(name) is not None}
        return {
            "model_type": self.model_type,
            **picked,
            **{name: config.get(name) for name in self.nullable},
            "rope_parameters": rope,
            "tie_word_embeddings": bool(config.get("tie_word_embeddings")),
        }

    def targets(self, weights: dict[str, Expression], prefix: str) -> dict[str, Expression]:
        """All of `weights`, which no other part of the model has taken, under Transformers' names."""
        head = {name: weights[name] for name in weights if name.startswith("lm_head.")}
        inner = {name.removeprefix("model."): weights[name] for name in weights if name not in head}
        return {**head, **{f"{prefix}.{name}": weight for name, weight in self.fuse(inner).items()}}


def fuse_mixtral(weights: dict[str, Expression]) -> dict[str, Expression]:
    """Mixtral's experts, w1 (gate), w3 (up) and w2 (down) of each, as Transformers stacks them."""
    fused: dict[str, Expression] = {}
    experts: dict[str, dict[tuple[int, str], Expression]] = {}
    for name, weight in weights.items():
        if match := re.fullmatch(r"(layers\.\d+)\.block_sparse_moe\.experts\.(\d+)\.w([123])\.weight", name):
            experts.setdefault(match[1], {})[int(match[2]), match[3]] = weight
        else:
            fused[name.replace(".block_sparse_moe.gate.", ".mlp.gate.")] = weight
    for layer, parts in experts.items():
        indices = sorted({index for index, _ in parts})
        _require(layer, parts, [(i, part) for i in indices for part in "123"])
        up = [Concatenate([parts[i, "1"], parts[i, "3"]]) for i in indices]
        fused[f"{layer}.mlp.experts.gate_up_proj"] = Stack(up)
        fused[f"{layer}.mlp.experts.down_proj"] = Stack([parts[i, "2"] for i in indices])
    return fused


def _require(layer: str, parts: dict[tuple[int, str], Expression], keys: Iterable[tuple[int, str]]) -> None:
    if missing := [f"experts.{i}.w{part}" for i, part in keys if (i, part) not in parts]:
        raise ConversionError(f"{layer}: {', '.join(missing[:3])} missing; the checkpoint is incomplete")


DECODERS = {
    "mistral": Decoder("Mistral", "mistral", MISTRAL_FIELDS, nullable=("sliding_window",)),
    "mixtral": Decoder("Mixtral", "mixtral", MIXTRAL_FIELDS, nullable=("sliding_window",), fuse=fuse_mixtral),
}
