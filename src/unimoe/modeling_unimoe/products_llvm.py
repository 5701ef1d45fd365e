"""Products x @ W.T of some rows with a large weight on a CPU: the weight is read once, in place, as fast as memory gives it.

Matrix libraries first copy parts of a weight into a layout of their own, which pays for many rows; an expert often has few. The
two kernels here keep the sums of a tile, some rows of W by all rows of x, in registers instead:

- "few rows": both operands are read along their rows, as vectors; a sum is a vector, added up at the end.
- "some rows": x is transposed, so that a vector holds the same column of many rows, and W is read number by number. float32
  only: for narrower types, processors have better instructions than these.

Processors fetch ahead within a page of memory and in a few places at once, which does not keep the memory busy. So each turn of
the inner loops asks for one cache line of each of the next rows of W.

Shape letters: N rows of x, C columns of x and of W, R rows of W, L lanes: N, and zeros up to whole vectors.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .llvm_kernels import LINE, Kernel, KernelBuilder, VectorUnit, vector_unit

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Products of numbers from which several threads are worth waking.
LEAST_WORK = 1 << 18
# Below this many bytes, a weight stays in a cache, and PyTorch's own products do as well.
LARGE_WEIGHT = 1 << 20
# Columns that a turn of the inner loop handles.
FEW_ROWS_COLUMNS = 64
SOME_ROWS_COLUMNS = 8
WriteChunk = Callable[..., None]

# With few rows of x, each turn asks for a line of this many of the next rows of all weights; the unit of threads' shares, too.
BLOCK_ROWS = 8
# Rows of W in a tile of some rows, at most.
MOST_OUTPUTS = 8


def sums_of_products(
    k: KernelBuilder,
    weights: Sequence[Any],
    width: Any,
    share: tuple[Any, Any],
    num_rows: Any,
    each_chunk: Callable[[WriteChunk], None],
    dtype: torch.dtype = torch.float32,
) -> None:
    """Writes the loops over rows of W, and in them over chunks of rows of x: each row of W is fetched from memory once.

    Args:
        k: the kernel that is being written.
        weights: addresses of one or several weights of the same shape and of `dtype`, walked through at the same time.
        width: C, a multiple of FEW_ROWS_COLUMNS.
        share: from which row of the weights to which.
        num_rows: how many rows the weights have.
        each_chunk: is called once, with a function that it shall call for each chunk of rows of x that it wants written. That
            takes the addresses of these rows (float32), a sink, and whether this is the first chunk (None: surely). The sink is
            called with the number of a row of W and, for each row of x, the sums with that row of each weight.
    """
    stride, turns = k.mul(width, dtype.itemsize), k.div(width, FEW_ROWS_COLUMNS)
    steps = FEW_ROWS_COLUMNS // k.unit.width
    block_rows = BLOCK_ROWS // len(weights)
    # The tiles of a block have as many turns together as a row has lines.
    tile_size = block_rows * LINE // FEW_ROWS_COLUMNS // dtype.itemsize

    def tile(first, block_start, x_rows, sink, fetches):
        # The first turn of the block's first tile asks for the first line of each row of the next block. Where that is not
        # wanted, it asks for what is there already.
        turns_before = k.mul(k.div(k.sub(first, block_start), tile_size), turns)
        ahead = k.add(k.mul(stride, k.add(block_start, block_rows)), k.mul(turns_before, LINE))
        ahead, ahead_stride = (k.ir.select(fetches, value, k.number(0)) for value in (ahead, stride))
        # Rows that are missing repeat the last.
        rows = [k.min(k.add(first, n), k.sub(num_rows, 1)) for n in range(tile_size)]
        tile_rows = [k.add(weight, k.mul(stride, row)) for row in rows for weight in weights]

        def turn(index, *sums):
            sums = list(sums)
            lines = [k.add(k.add(weight, ahead), k.mul(index, LINE)) for weight in weights]
            for step in range(steps):
                column = k.add(k.mul(index, FEW_ROWS_COLUMNS), step * k.unit.width)
                w_vectors = [k.load_vector(k.add(row, k.mul(column, dtype.itemsize)), dtype) for row in tile_rows]
                for _ in range(block_rows * step // steps, block_rows * (step + 1) // steps):
                    for line in lines:
                        k.prefetch(line)
                    lines = [k.add(line, ahead_stride) for line in lines]
                for r, x_row in enumerate(x_rows):
                    x_vector = k.load_vector(k.add(x_row, k.mul(column, 4)))
                    for n, w_vector in enumerate(w_vectors):
                        place = r * len(w_vectors) + n
                        sums[place] = k.multiply_add(x_vector, w_vector, sums[place])
            return sums

        sums = k.loop(0, turns, 1, turn, [k.zeros()] * (len(x_rows) * len(tile_rows)))
        sums = iter([k.sum_of(vector) for vector in sums])
        by_x = [[[next(sums) for _ in weights] for _ in rows] for _ in x_rows]
        for n, row in enumerate(rows):
            sink(row, [by_row[n] for by_row in by_x])

    def block_of_rows(start):
        stop = k.min(k.add(start, block_rows), end)
        has_next = k.ir.icmp_signed("<=", k.add(start, 2 * block_rows), num_rows)

        def write_chunk(x_rows, sink, is_first=None):
            fetches = has_next if is_first is None else k.ir.and_(has_next, is_first)
            k.loop(start, stop, tile_size, lambda first: tile(first, start, x_rows, sink, fetches))

        each_chunk(write_chunk)

    begin, end = share
    k.loop(begin, end, block_rows, block_of_rows)


@functools.cache
def few_rows_kernel(dtype: torch.dtype, rows: int, unit: VectorUnit) -> Kernel:
    """For up to `rows` rows of x.

    The kernel takes x float32 [N, C], W [R, C] of `dtype` and y float32 [N, R] (addresses), N, C and R.
    """
    k = KernelBuilder(unit, "few_rows", 6)
    x, weight, y, num_rows, width, out_width = k.arguments
    # Rows that are missing repeat the last.
    rows_of_x = [k.min(row, k.sub(num_rows, 1)) for row in range(rows)]

    def sink(column, sums):
        for row, (value,) in zip(rows_of_x, sums):
            k.store(value, k.add(y, k.mul(k.add(k.mul(row, out_width), column), 4)))

    x_rows = [k.add(x, k.mul(k.mul(width, 4), row)) for row in rows_of_x]
    share = k.share_of_thread(out_width, BLOCK_ROWS)
    sums_of_products(k, [weight], width, share, out_width, lambda write: write(x_rows, sink), dtype)
    return k.compile()


@functools.cache
def some_rows_kernel(vectors: int, outputs: int, unit: VectorUnit) -> Kernel:
    """For rows of x that fill `vectors` vectors, in tiles of `outputs` rows of W, an even number.

    The kernel takes x float32 [C, L], W float32 [R, C] and y float32 [R, L] (addresses), C and R.
    """
    k = KernelBuilder(unit, "some_rows", 5)
    x, weight, y, width, out_width = k.arguments
    weight_stride, x_stride = k.mul(width, 4), vectors * unit.width * 4
    # A cache line of W lasts for some turns, each of which asks for its part of the next rows' lines.
    turns_of_line = LINE // 4 // SOME_ROWS_COLUMNS
    part = outputs // turns_of_line

    def tile(first):
        first = k.min(first, k.sub(out_width, outputs))
        weight_rows = [k.add(weight, k.mul(weight_stride, k.add(first, n))) for n in range(outputs)]
        next_rows = k.add(weight_rows[0], k.mul(weight_stride, outputs))

        def turn(index, *sums):
            sums, row = list(sums), k.mul(k.ir.urem(index, k.number(turns_of_line)), part)
            line = k.add(next_rows, k.add(k.mul(row, weight_stride), k.mul(k.div(index, turns_of_line), LINE)))
            lines = 0
            for step in range(SOME_ROWS_COLUMNS):
                column = k.add(k.mul(index, SOME_ROWS_COLUMNS), step)
                x_column = k.add(x, k.mul(column, x_stride))
                x_vectors = [k.load_vector(k.add(x_column, v * unit.width * 4)) for v in range(vectors)]
                while lines < part * (step + 1) // SOME_ROWS_COLUMNS:
                    k.prefetch(line)
                    line, lines = k.add(line, weight_stride), lines + 1
                for n, w in enumerate(weight_rows):
                    number = k.broadcast(k.load(k.add(w, k.mul(column, 4)), k.float32, 4))
                    for v, x_vector in enumerate(x_vectors):
                        place = n * vectors + v
                        sums[place] = k.multiply_add(x_vector, number, sums[place])
            return sums

        sums = k.loop(0, k.div(width, SOME_ROWS_COLUMNS), 1, turn, [k.zeros()] * (vectors * outputs))
        for place, total in enumerate(sums):
            row = k.add(first, place // vectors)
            k.store(total, k.add(k.add(y, k.mul(row, x_stride)), place % vectors * unit.width * 4))

    begin, end = k.share_of_thread(out_width, outputs)
    k.loop(begin, end, outputs, tile)
    return k.compile()


def compiled_product(x_NC: torch.Tensor, weight_RC: torch.Tensor) -> torch.Tensor | None:
    """x @ W.T by one of the kernels, without gradients; None where none of them takes these tensors.

    Args:
        x_NC, weight_RC: [N, C] and [R, C] of one dtype: float32, bfloat16 or float16, on a CPU.

    Returns:
        [N, R] in that dtype, summed in float32. It may lie in memory as [R, N].
    """
    unit = vector_unit()
    if unit is None or not _is_taken(x_NC, weight_RC):
        return None
    (rows, width), out_width = x_NC.shape, weight_RC.shape[0]
    if rows <= most_few_rows(weight_RC.dtype, unit):
        # There are kernels for powers of two.
        kernel = few_rows_kernel(weight_RC.dtype, 1 << (rows - 1).bit_length(), unit)
        x_NC, y_NR = x_NC.float().contiguous(), x_NC.new_empty((rows, out_width), dtype=torch.float32)
        kernel(x_NC.data_ptr(), weight_RC.data_ptr(), y_NR.data_ptr(), rows, width, out_width)
        return y_NR.to(weight_RC.dtype)
    lanes = _lanes(rows, weight_RC.dtype, unit)
    if lanes is None:
        return None
    vectors = lanes // unit.width
    if rows < lanes:
        x_CL = x_NC.new_zeros((width, lanes))
        x_CL[:, :rows] = x_NC.t()
    else:
        x_CL = x_NC.t().contiguous()
    y_RL = x_NC.new_empty((out_width, lanes))
    # Registers for the sums, a column of x, and a number of W.
    outputs = min(MOST_OUTPUTS, (unit.registers - vectors - 1) // vectors // 2 * 2)
    kernel = some_rows_kernel(vectors, outputs, unit)
    kernel(x_CL.data_ptr(), weight_RC.data_ptr(), y_RL.data_ptr(), width, out_width)
    return y_RL[:, :rows].t()


def most_few_rows(dtype: torch.dtype, unit: VectorUnit) -> int:
    """Up to how many rows are few: as long as reading the weight takes longer than computing."""
    return 4 if dtype == torch.bfloat16 or unit.registers < 32 else 8


def padded_rows(rows: int, weight_RC: torch.Tensor) -> int:
    """How many rows to multiply in the place of `rows`, if they can be had: those that fill vectors take no longer, and what
    follows need not step over gaps."""
    unit = vector_unit()
    if unit is None or not _takes_weight(weight_RC) or rows <= most_few_rows(weight_RC.dtype, unit):
        return rows
    return _lanes(rows, weight_RC.dtype, unit) or rows


def _lanes(rows: int, dtype: torch.dtype, unit: VectorUnit) -> int | None:
    """L for this many rows, or None where they are too many, or of a type, for the kernel of some rows."""
    vectors = -(-rows // unit.width)
    return vectors * unit.width if dtype == torch.float32 and vectors <= unit.registers // 8 else None


def _is_taken(x_NC: torch.Tensor, weight_RC: torch.Tensor) -> bool:
    """Whether there is a kernel for a product of this kind, and a reason to use it."""
    rows, width = x_NC.shape
    return (
        _takes_weight(weight_RC)
        and x_NC.dtype == weight_RC.dtype
        and width == weight_RC.shape[1]
        and rows > 0
        and not (torch.is_grad_enabled() and (x_NC.requires_grad or weight_RC.requires_grad))
    )


def _takes_weight(weight_RC: torch.Tensor) -> bool:
    return (
        weight_RC.dtype in DTYPES
        and weight_RC.shape[1] % FEW_ROWS_COLUMNS == 0
        and weight_RC.shape[0] >= MOST_OUTPUTS
        and weight_RC.numel() * weight_RC.itemsize >= LARGE_WEIGHT
        and weight_RC.is_contiguous()
    )
