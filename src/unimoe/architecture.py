"""Counts what a configuration describes: towers, tokens per item, sparse layers, total and activated parameters."""

from dataclasses import dataclass

import torch

from .modeling_unimoe.configuration_unimoe import UniMoEConfig
from .modeling_unimoe.modeling_unimoe import UniMoEForConditionalGeneration

PARTS = (
    "vision_tower",
    "vision_connector",
    "audio_tower",
    "audio_connector",
    "speech_tower",
    "speech_connector",
    "language_model",
)


@dataclass(frozen=True)
class PartSize:
    """Parameters of one part of the model; `activated` counts, of each sparse block, only the experts one token visits."""

    total: int
    activated: int

    def __add__(self, other: "PartSize") -> "PartSize":
        return PartSize(self.total + other.total, self.activated + other.activated)


def count_parameters(config: UniMoEConfig) -> dict[str, PartSize]:
    """Parameters of each part that the configuration has, `lm_head` with the language model; allocates no weights."""
    with torch.device("meta"):
        model = UniMoEForConditionalGeneration(config)
    sizes = {name: _size(module) for name in PARTS if (module := getattr(model.model, name, None)) is not None}
    if not config.tie_word_embeddings:
        sizes["language_model"] += _size(model.lm_head)
    return sizes


def _size(module: torch.nn.Module) -> PartSize:
    total = sum(parameter.numel() for parameter in module.parameters())
    idle = 0
    # Our block and those of stock sparse decoders (Mixtral) share these names.
    for block in module.modules():
        experts, gate = getattr(block, "experts", None), getattr(block, "gate", None)
        if experts is not None and hasattr(gate, "top_k"):
            expert = sum(parameter.numel() for parameter in experts.parameters()) // experts.num_experts
            idle += expert * (experts.num_experts - gate.top_k)
    return PartSize(total, total - idle)


def describe(config: UniMoEConfig) -> str:
    """A text for people: one line a fact."""
    lines = [f"UniMoE: text{''.join(', ' + name for name in config.input_modalities)} -> text", ""]
    tokens = {
        "image": config.num_image_tokens,
        "video": config.num_image_tokens,
        "audio": config.num_audio_tokens,
        "speech": config.num_speech_tokens,
    }
    for modality in config.input_modalities:
        unit = "chunk" if modality in ("audio", "speech") else modality
        lines.append(f"{'tokens per ' + modality + (' chunk' if unit == 'chunk' else ''):<28}{tokens[modality]}")
    text = config.text_config
    lines.append(f"{'decoder':<28}{text.model_type}, {text.num_hidden_layers} layers, width {text.hidden_size}")
    lines.append(f"{'decoder experts':<28}{_sparsity(config.text_sparsity, text)}")
    if config.vision_config is not None:
        vision = config.vision_config
        lines.append(
            f"{'vision tower':<28}{vision.model_type}, {vision.num_hidden_layers} layers, image {vision.image_size}"
        )
        lines.append(f"{'vision experts':<28}{_sparsity(config.vision_sparsity, vision)}")
    sizes = count_parameters(config)
    lines += ["", f"{'parameters':<28}{'total':>16}{'activated':>16}"]
    for name, size in [*sizes.items(), ("all", sum(sizes.values(), PartSize(0, 0)))]:
        lines.append(f"{name:<28}{size.total:>16,}{size.activated:>16,}")
    return "\n".join(lines)


def _sparsity(sparsity, stack_config) -> str:
    if sparsity is None:
        native = getattr(stack_config, "num_local_experts", None)
        return f"{native} in every layer, top-{stack_config.num_experts_per_tok}" if native else "none (dense)"
    indices = sparsity.layer_indices(stack_config.num_hidden_layers)
    return f"{sparsity.num_experts} in {len(indices)} layers ({', '.join(map(str, indices))}), top-{sparsity.top_k}"
