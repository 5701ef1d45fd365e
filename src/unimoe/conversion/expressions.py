"""What a target tensor is made of, as an expression over source tensors that computes nothing until it is written.

An expression has a `shape`, the `sources` that it reads and `write(out)`, which fills a tensor of that shape in any dtype
and needs little memory beside it. [`SourceTensor`] is the plainest expression: a copy.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch

from .errors import ConversionError
from .reader import SourceTensor


class Expression(Protocol):
    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def sources(self) -> list[SourceTensor]: ...

    def write(self, out: torch.Tensor) -> None: ...


class _Composite:
    parts: list[Expression]
    shape: tuple[int, ...]

    @property
    def sources(self) -> list[SourceTensor]:
        return [source for part in self.parts for source in part.sources]


class Stack(_Composite):
    """Parts of one shape along a new first dimension: experts."""

    def __init__(self, parts: Sequence[Expression]):
        self.parts = list(parts)
        shapes = {tuple(part.shape) for part in self.parts}
        if len(shapes) != 1:
            raise ConversionError(f"{_names(self.parts)}: tensors of one shape are needed, found {sorted(shapes)}")
        self.shape = (len(self.parts), *shapes.pop())

    def write(self, out: torch.Tensor) -> None:
        for i, part in enumerate(self.parts):
            part.write(out[i])


class Concatenate(_Composite):
    """Parts along an existing dimension: the gate and up rows of an expert."""

    def __init__(self, parts: Sequence[Expression], dim: int = 0):
        self.parts = list(parts)
        self.dim = dim
        shapes = [tuple(part.shape) for part in self.parts]
        rests = {shape[:dim] + shape[dim + 1 :] for shape in shapes}
        if len(rests) != 1:
            raise ConversionError(f"{_names(self.parts)}: the shapes {shapes} do not fit together")
        total = sum(shape[dim] for shape in shapes)
        self.shape = (*shapes[0][:dim], total, *shapes[0][dim + 1 :])

    def write(self, out: torch.Tensor) -> None:
        start = 0
        for part in self.parts:
            length = part.shape[self.dim]
            part.write(out.narrow(self.dim, start, length))
            start += length


class Reshape(_Composite):
    """The same values in another shape."""

    def __init__(self, part: Expression, shape: Sequence[int]):
        self.parts = [part]
        self.shape = tuple(shape)
        if math.prod(part.shape) != math.prod(self.shape):
            raise ConversionError(f"{_names(self.parts)}: shape {tuple(part.shape)} cannot become {self.shape}")

    def write(self, out: torch.Tensor) -> None:
        self.parts[0].write(out.view(self.parts[0].shape))


class Rows(_Composite):
    """Some rows of a tensor: the queries of a map that makes queries, keys and values at once."""

    def __init__(self, part: Expression, start: int, length: int):
        self.parts = [part]
        self.start = start
        self.shape = (length, *part.shape[1:])
        if not 0 <= start <= start + length <= part.shape[0]:
            raise ConversionError(
                f"{_names(self.parts)}: rows {start} to {start + length} of shape {tuple(part.shape)}"
            )

    def write(self, out: torch.Tensor) -> None:
        whole = evaluate(self.parts[0], out.dtype)
        out.copy_(whole[self.start : self.start + self.shape[0]])


class LowRankUpdate(_Composite):
    """`base + scale * b @ a`, computed in float32: a merged LoRA adapter.

    Args:
        base: [out, in].
        a, b: [rank, in] and [out, rank].
    """

    def __init__(self, base: Expression, a: Expression, b: Expression, scale: float):
        self.parts = [base, a, b]
        self.scale = scale
        self.shape = tuple(base.shape)
        fits = (
            len(a.shape) == len(b.shape) == 2 and (b.shape[0], a.shape[1]) == self.shape and a.shape[0] == b.shape[1]
        )
        if not fits:
            raise ConversionError(
                f"{_names(self.parts)}: an adapter of shapes {tuple(a.shape)} and {tuple(b.shape)} does not fit a weight of "
                f"shape {self.shape}"
            )

    def row_blocks(self) -> Iterator[tuple[int, torch.Tensor]]:
        """Some rows of the result at a time: the first row's number, and the rows in float32."""
        base, a, b = self.parts[0], *(evaluate(part, torch.float32) for part in self.parts[1:])
        blocks = base.row_blocks() if has_row_blocks(base) else [(0, evaluate(base, torch.float32))]
        for start, rows in blocks:
            yield start, torch.addmm(rows.float(), b[start : start + len(rows)], a, alpha=self.scale)

    def write(self, out: torch.Tensor) -> None:
        for start, rows in self.row_blocks():
            out[start : start + len(rows)].copy_(rows)


class Constant:
    """A tensor that no file holds, because the original has no use for it: the same value everywhere."""

    def __init__(self, shape: Sequence[int], value: float):
        self.shape = tuple(shape)
        self.value = value
        self.sources: list[SourceTensor] = []

    def write(self, out: torch.Tensor) -> None:
        out.fill_(self.value)


def has_row_blocks(expression: Expression) -> bool:
    """Whether an expression can be had some rows at a time."""
    if isinstance(expression, SourceTensor):
        return expression.is_contiguous and bool(expression.shape)
    return isinstance(expression, LowRankUpdate)


def stream(expression: Expression, dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """New tensors whose bytes, one after the other, are those of the value: a stack of experts need never be whole."""
    if isinstance(expression, Stack | Reshape) or (isinstance(expression, Concatenate) and expression.dim == 0):
        for part in expression.parts:
            yield from stream(part, dtype)
    elif has_row_blocks(expression):
        for _, rows in expression.row_blocks():
            yield rows.to(dtype, copy=True)
    else:
        yield evaluate(expression, dtype)


def evaluate(expression: Expression, dtype: torch.dtype) -> torch.Tensor:
    """The value as a new tensor."""
    out = torch.empty(expression.shape, dtype=dtype)
    expression.write(out)
    return out


def _names(parts: Sequence[Expression]) -> str:
    sources = [source for part in parts for source in part.sources]
    names = [f"{source.name} ({source.file.name})" for source in sources[:3]]
    return ", ".join(names) + (" ..." if len(sources) > 3 else "")
