"""Decoders that the LLaVA-like originals build on: their settings and their tensors under Transformers' names."""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import ConversionError
from .expressions import Concatenate, Expression, Rows, Stack

COMMON_FIELDS = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads hidden_act "
    "max_position_embeddings initializer_range use_cache pad_token_id bos_token_id eos_token_id attention_dropout"
).split()
MISTRAL_FIELDS = ["rms_norm_eps", "head_dim"]
MIXTRAL_FIELDS = [*MISTRAL_FIELDS, "num_local_experts", "num_experts_per_tok", "router_aux_loss_coef"]
STABLELM_FIELDS = ["layer_norm_eps", "use_qkv_bias", "qk_layernorm", "use_parallel_residual", "hidden_dropout"]
PHI_FIELDS = ["layer_norm_eps", "qk_layernorm", "resid_pdrop", "embd_pdrop"]
QWEN_FIELDS = ["rms_norm_eps", "head_dim", "first_generation"]
REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
# Within a decoder of the first Qwen generation: the original's names and Transformers'.
QWEN_NAMES = {
    r"wte\.": "embed_tokens.",
    r"ln_f\.": "norm.",
    r"h\.(\d+)\.ln_1\.": r"layers.\1.input_layernorm.",
    r"h\.(\d+)\.ln_2\.": r"layers.\1.post_attention_layernorm.",
    r"h\.(\d+)\.attn\.c_attn\.": r"layers.\1.self_attn.c_attn.",
    r"h\.(\d+)\.attn\.c_proj\.": r"layers.\1.self_attn.o_proj.",
    r"h\.(\d+)\.mlp\.(.*)w1\.": r"layers.\1.mlp.\2up_proj.",
    r"h\.(\d+)\.mlp\.(.*)w2\.": r"layers.\1.mlp.\2gate_proj.",
    r"h\.(\d+)\.mlp\.(.*)c_proj\.": r"layers.\1.mlp.\2down_proj.",
    r"h\.(\d+)\.": r"layers.\1.",
}


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
        root: What its tensors' names begin with.
        adapt: Changes to the settings beyond names, in place.
        fuse: What becomes of its tensors (names within the decoder).
    """

    name: str
    model_type: str
    fields: list[str]
    nullable: tuple[str, ...] = ()
    rename: dict[str, str] = field(default_factory=dict)
    rope_theta: float = 10000.0
    root: str = "model."
    adapt: Callable[[dict[str, Any]], None] = lambda config: None
    fuse: Callable[[dict[str, Expression]], dict[str, Expression]] = dict

    def config(self, config: dict[str, Any], file: Path) -> dict[str, Any]:
        """Its settings out of an original's `config.json`. Raises ConversionError where one is missing or not supported."""
        config = {self.rename.get(name, name): value for name, value in config.items()}
        if missing := [name for name in REQUIRED if not isinstance(config.get(name), int)]:
            raise ConversionError(
                f"{file}: {', '.join(missing)} missing; a decoder of type {self.model_type!r} needs them"
            )
        self.adapt(config)
        if config.get("rope_scaling"):
            raise ConversionError(f"{file}: rope_scaling={config['rope_scaling']!r}; no release has any")
        rope: dict[str, Any] = {
            "rope_type": "default",
            "rope_theta": float(config.get("rope_theta") or self.rope_theta),
        }
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
        inner = {name.removeprefix(self.root): weights[name] for name in weights if name not in head}
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


def adapt_qwen(config: dict[str, Any]) -> None:
    # The original's FFN has two halves of this width together.
    config["intermediate_size"] //= 2
    config["hidden_act"] = "silu"
    config["num_key_value_heads"] = config["num_attention_heads"]
    names = ("seq_length", "use_dynamic_ntk", "use_logn_attn")
    config["first_generation"] = {name: config[name] for name in names if name in config}


def rename_qwen(weights: dict[str, Expression]) -> dict[str, Expression]:
    """The first Qwen generation as the second, with queries, keys and values apart."""
    renamed: dict[str, Expression] = {}
    for name, weight in weights.items():
        for pattern, replacement in QWEN_NAMES.items():
            if re.match(pattern, name):
                name = re.sub(rf"^{pattern}", replacement, name)
                break
        if ".c_attn." not in name:
            renamed[name] = weight
            continue
        length = weight.shape[0] // 3
        for i, part in enumerate("qkv"):
            renamed[name.replace("c_attn", f"{part}_proj")] = Rows(weight, i * length, length)
    return renamed


def fuse_experts(experts: list[dict[str, Expression]], where: str) -> dict[str, Expression]:
    """Experts as the sparse block stacks them, from the tensors of each under the names of its dense FFN.

    Args:
        experts: `{gate,up,down}_proj.weight` of each, or `fc1` and `fc2` with weight and bias.
        where: The layer, for errors.

    Raises:
        ConversionError: The experts are of another kind, or one of them lacks a tensor.
    """
    names = set().union(*experts)
    kinds = {
        "gate_up_proj": ["gate_proj.weight", "up_proj.weight"],
        "up_proj": ["fc1.weight"],
        "up_proj_bias": ["fc1.bias"],
        "down_proj": ["down_proj.weight"] if "down_proj.weight" in names else ["fc2.weight"],
        "down_proj_bias": ["fc2.bias"],
    }
    fused: dict[str, Expression] = {}
    for target, sources in kinds.items():
        if not names & set(sources):
            continue
        for i, expert in enumerate(experts):
            if missing := [source for source in sources if source not in expert]:
                raise ConversionError(f"{where}: expert {i} has no {', '.join(missing)}; the checkpoint is incomplete")
        parts = [[expert[source] for source in sources] for expert in experts]
        fused[target] = Stack([part[0] if len(part) == 1 else Concatenate(part) for part in parts])
        names -= set(sources)
    if names:
        raise ConversionError(f"{where}: the experts have {', '.join(sorted(names))}, which belong nowhere")
    return fused


DECODERS = {
    "mistral": Decoder("Mistral", "mistral", MISTRAL_FIELDS, nullable=("sliding_window",)),
    "mixtral": Decoder("Mixtral", "mixtral", MIXTRAL_FIELDS, nullable=("sliding_window",), fuse=fuse_mixtral),
    "stablelm": Decoder(
        "StableLM",
        "stablelm",
        STABLELM_FIELDS,
        rename={"norm_eps": "layer_norm_eps", "rope_pct": "partial_rotary_factor"},
    ),
    "phi": Decoder("Phi", "phi", PHI_FIELDS),
    "qwen": Decoder(
        "Qwen",
        "qwen2",
        QWEN_FIELDS,
        rename={
            "layer_norm_epsilon": "rms_norm_eps",
            "rotary_emb_base": "rope_theta",
            "kv_channels": "head_dim",
            "attn_dropout_prob": "attention_dropout",
        },
        root="transformer.",
        adapt=adapt_qwen,
        fuse=rename_qwen,
    ),
}
