"""What the fields of an original Uni-MoE `config.json` become."""

from pathlib import Path
from typing import Any

from .errors import ConversionError
from .llava import layer_pattern
from .settings import require

LLAMA_FIELDS = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads hidden_act "
    "max_position_embeddings initializer_range rms_norm_eps use_cache pad_token_id bos_token_id eos_token_id pretraining_tp "
    "attention_bias mlp_bias"
).split()
# LLaMA's, which the originals' code has as a constant.
ROPE_THETA = 10000.0


def text_config(config: dict[str, Any], file: Path) -> dict[str, Any]:
    """The decoder's settings. Raises ConversionError where the original asks for what cannot be done alike."""
    needed = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    require(config, needed, file, "which every Uni-MoE release has")
    fields = {name: config[name] for name in LLAMA_FIELDS if config.get(name) is not None}
    scaling = config.get("rope_scaling")
    rope = {"rope_type": "default", "rope_theta": config.get("rope_theta") or ROPE_THETA}
    if scaling:
        require(scaling, ("factor",), file, "though there is scaling", inside="rope_scaling.")
        rope.update(rope_type=scaling.get("rope_type", scaling.get("type")), factor=float(scaling["factor"]))
    if config.get("tie_word_embeddings"):
        raise ConversionError(f"{file}: tie_word_embeddings is true, which no Uni-MoE release has")
    return {"model_type": "llama", **fields, "rope_parameters": rope, "tie_word_embeddings": False}


def sparsity(config: dict[str, Any], indices: list[int], file: Path, **more: Any) -> dict[str, Any] | None:
    """Settings of the sparse layers; None for a decoder that has none."""
    if not indices:
        return None
    missing = [name for name in ("num_experts", "num_experts_per_tok") if not isinstance(config.get(name), int)]
    if missing:
        raise ConversionError(f"{file}: {' and '.join(missing)} missing, though the weights have experts")
    return {
        "layers": layer_pattern(indices, config["num_hidden_layers"]),
        "num_experts": config["num_experts"],
        "top_k": config["num_experts_per_tok"],
        "norm_topk_prob": True,
        **more,
    }
