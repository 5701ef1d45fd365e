"""The plan of a conversion: every tensor of the model as an expression, and what became of every source tensor."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import PreTrainedConfig

from ..modeling_unimoe.modeling_unimoe import UniMoEForConditionalGeneration
from .errors import ConversionError
from .expressions import Expression
from .reader import SourceTensor


def model_shapes(config: PreTrainedConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that a checkpoint of this configuration holds; allocates no weights."""
    with torch.device("meta"):
        model = UniMoEForConditionalGeneration(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        shapes.pop("lm_head.weight")
    return shapes


@dataclass
class Plan:
    """What to write, and an account of what was given.

    Args:
        targets: An expression for every tensor of the model, in the order in which they are written.
        ignored: Why a source tensor is left out.
        known: All source tensors.
    """

    targets: dict[str, Expression]
    ignored: dict[SourceTensor, str] = field(default_factory=dict)
    known: list[SourceTensor] = field(default_factory=list)

    @property
    def used(self) -> list[SourceTensor]:
        """Source tensors that are read, each once."""
        return list(dict.fromkeys(source for target in self.targets.values() for source in target.sources))

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Compares the plan with what the model needs (`model_shapes`).

        Raises:
            ConversionError: Model tensors are missing or misshapen, the plan fills some that the model has not, or a source
                tensor is neither used nor ignored; the message names them.
        """
        problems = []
        if missing := [name for name in shapes if name not in self.targets]:
            problems.append(f"{len(missing)} tensors of the model are in none of the files: {_some(missing)}")
        wrong = [name for name in self.targets if name in shapes and tuple(self.targets[name].shape) != shapes[name]]
        if wrong:
            found = [f"{name} is {list(self.targets[name].shape)} instead of {list(shapes[name])}" for name in wrong]
            problems.append(f"{len(wrong)} tensors have another shape than the configuration says: {_some(found)}")
        if surplus := [name for name in self.targets if name not in shapes]:
            problems.append(f"{len(surplus)} tensors have no place in the model: {_some(surplus)}")
        used = set(self.used)
        if lost := [source for source in self.known if source not in used and source not in self.ignored]:
            names = [f"{source.name} in {source.file.name}" for source in lost]
            problems.append(f"{len(lost)} source tensors belong nowhere: {_some(names)}")
        if problems:
            raise ConversionError("; ".join(problems))

    def num_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of all targets in `dtype`."""
        return sum(torch.Size(target.shape).numel() for target in self.targets.values()) * dtype.itemsize

    def describe(self, dtype: torch.dtype) -> str:
        """A text for people: files read, what is ignored and why, what is written."""
        used = Counter(source.file for source in self.used)
        total = Counter(source.file for source in self.known)
        sizes = Counter()
        for source in self.used:
            sizes[source.file] += source.nbytes
        lines = ["reads:"]
        for file in total:
            lines.append(f"  {file}: {used[file]} of {total[file]} tensors, {format_bytes(sizes[file])}")
        reasons = Counter(self.ignored.values())
        if reasons:
            lines.append("ignores:")
            lines += [f"  {count} tensors: {reason}" for reason, count in reasons.most_common()]
        lines.append(f"writes: {len(self.targets)} tensors, {format_bytes(self.num_bytes(dtype))} in {str(dtype)[6:]}")
        return "\n".join(lines)


class Account:
    """Collects a plan: source tensors come in, each leaves as part of a target or with a reason."""

    def __init__(self) -> None:
        self.known: list[SourceTensor] = []
        self.ignored: dict[SourceTensor, str] = {}

    def add(self, tensors: Mapping[str, SourceTensor]) -> dict[str, SourceTensor]:
        """Registers a file's tensors and hands them back."""
        self.known += tensors.values()
        return dict(tensors)

    def ignore(self, tensors: Iterable[Expression], reason: str) -> None:
        for tensor in tensors:
            for source in tensor.sources:
                self.ignored.setdefault(source, reason)

    def overlay(
        self, weights: dict[str, Expression], newer: Mapping[str, Expression], reason: str
    ) -> dict[str, Expression]:
        """`weights` with those of `newer` in their places; what is replaced counts as ignored for `reason`."""
        self.ignore((weights[name] for name in newer if name in weights), reason)
        return {**weights, **newer}

    def plan(self, targets: dict[str, Expression]) -> Plan:
        plan = Plan(targets, known=self.known)
        # What was replaced in one place may still be read in another, such as a file that fills two experts.
        used = set(plan.used)
        plan.ignored = {source: reason for source, reason in self.ignored.items() if source not in used}
        return plan


def files_of(plan: Plan) -> list[Path]:
    """The files that hold any of the plan's source tensors."""
    return list(dict.fromkeys(source.file for source in plan.known))


def format_bytes(count: int) -> str:
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000 or unit == "GB":
            break
        value /= 1000
    return f"{value:.0f} B" if unit == "B" else f"{value:.2f} {unit}"


def _some(names: list[str], limit: int = 4) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
