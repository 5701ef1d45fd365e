"""The parts of a model that a stage trains or freezes, and what that costs."""

from collections.abc import Iterable

from torch import nn
from transformers import PreTrainedModel

# Towers and connectors are named as they stand in `UniMoEModel`.
CONNECTORS = ("vision_connector", "audio_connector", "speech_connector")
TOWERS = ("vision_tower", "audio_tower", "speech_tower")
PARTS = ("connectors", *CONNECTORS, *TOWERS, "attention", "ffn", "experts", "routers", "language_model", "all")
# AdamW keeps two moments.
ADAM_MOMENTS = 2


def part_of(name: str) -> str:
    """The part that a parameter belongs to: a tower, a connector, or "attention", "ffn", "experts", "routers" or "rest" of
    the decoder.

    `name` is a parameter's name in a `UniMoEForConditionalGeneration`, also inside a PEFT model.
    """
    fields = name.split(".")
    for part in (*TOWERS, *CONNECTORS):
        if part in fields:
            return part
    if "self_attn" in fields:
        return "attention"
    if "mlp" in fields:
        inner = fields[fields.index("mlp") + 1 :]
        return "experts" if "experts" in inner else "routers" if "gate" in inner else "ffn"
    return "rest"


def can_change(parts: Iterable[str], media: Iterable[str]) -> bool:
    """Whether records with these kinds of media go through any of these parts, see `PARTS`; all records go through the
    decoder. Without parts, whatever is trained is in the decoder.
    """
    modalities = {"vision" if kind in ("image", "video") else kind for kind in media}
    reached = {f"{modality}_{kind}" for modality in modalities for kind in ("tower", "connector")}
    if modalities:
        reached.add("connectors")
    missed = {"connectors", *CONNECTORS, *TOWERS} - reached
    return not set(parts) or bool(set(parts) - missed)


def train_only(model: PreTrainedModel, parts: Iterable[str]) -> list[str]:
    """Freezes a model except for some parts.

    Args:
        model: a `UniMoEForConditionalGeneration`.
        parts: of `PARTS`: "connectors" stands for all of them, "language_model" for the decoder with its head. Routers and
            experts are those of the decoder; the ones of a tower or connector belong to it.

    Returns:
        The names of the parameters that are trained.

    Raises:
        ValueError: a part is unknown, or the model has none of its parameters.
    """
    chosen: dict[str, list[str]] = {part: [] for part in parts}
    unknown = sorted(chosen.keys() - set(PARTS))
    if unknown:
        raise ValueError(f"unknown part {', '.join(unknown)}; the parts are {', '.join(PARTS)}")
    for name, parameter in model.named_parameters():
        owner = part_of(name)
        groups = {owner, "all"}
        groups.add("connectors" if owner in CONNECTORS else owner if owner in TOWERS else "language_model")
        hit = groups & chosen.keys()
        parameter.requires_grad_(bool(hit))
        for part in hit:
            chosen[part].append(name)
    empty = [part for part, names in chosen.items() if not names]
    if empty:
        raise ValueError(f"this model has no {', '.join(empty)} to train")
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def training_report(model: nn.Module) -> str:
    """What is frozen and what is trained, a line a part, and an estimate of the memory that it takes.

    Weights, gradients and the moments of AdamW are counted, each in the dtype of its parameter, on one process without
    sharding; activations are not, since they depend on the data.
    """
    rows: dict[str, list[int]] = {}
    memory = {"weights": 0, "gradients": 0, "optimizer": 0}
    for name, parameter in model.named_parameters():
        row = rows.setdefault(part_of(name), [0, 0])
        row[0] += parameter.numel()
        size = parameter.numel() * parameter.element_size()
        memory["weights"] += size
        if parameter.requires_grad:
            row[1] += parameter.numel()
            memory["gradients"] += size
            memory["optimizer"] += ADAM_MOMENTS * size
    rows["all"] = [sum(column) for column in zip(*rows.values())]
    lines = [f"{'part':<20}{'parameters':>16}{'trained':>16}"]
    for part, (total, trained) in rows.items():
        lines.append(f"{part:<20}{total:>16,}{f'{trained:,}' if trained else 'frozen':>16}")
    sizes = ", ".join(f"{kind} {_bytes(size)}" for kind, size in memory.items())
    lines.append(f"memory without activations: {_bytes(sum(memory.values()))} ({sizes})")
    return "\n".join(lines)


def _bytes(size: float) -> str:
    for unit in ("B", "KB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"
