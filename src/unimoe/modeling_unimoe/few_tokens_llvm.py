"""Experts on a few tokens, as in decoding, on a CPU and without gradients: compiled kernels from hidden states to their output.

Between the layers of a model, the caches of a processor hold neither weights nor programs, so that every further operation costs
the time of some thousand numbers, for each expert again. Here the gathering of rows, the activation, the routing weights and the
sum over experts happen in the kernels.

Shape letters: T tokens, K experts chosen for each, P = T * K pairs of token and expert, E experts, C hidden size, I intermediate
size, O output size.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .llvm_kernels import Kernel, KernelBuilder, VectorUnit, vector_unit
from .products_llvm import BLOCK_ROWS, DTYPES, FEW_ROWS_COLUMNS, LEAST_WORK, most_few_rows, sums_of_products

# Rows of an expert in use, on average, in multiples of those which are multiplied at a time: beyond, products that share the work
# on a weight between more rows are faster, though they cost more calls.
MOST_CHUNKS = 2


@functools.cache
def sort_kernel(unit: VectorUnit) -> Kernel:
    """Takes index int64 [P], pairs int64 [P], tokens int64 [P], starts int64 [E + 1] (addresses), P, K and E: pairs sorted by
    expert, the token of each, and from where on those of each expert are. `starts` must be zeros. Ids of E and above are left
    out. It gives back how many experts have pairs.
    """
    k = KernelBuilder(unit, "sort", 7)
    index, pairs, tokens, starts, num_pairs, top_k, experts = k.arguments

    def each_pair(act: Callable[[Any, Any], None]) -> None:
        def body(pair):
            expert = k.load(k.add(index, k.mul(pair, 8)), k.int64, 8)
            with k.ir.if_then(k.ir.icmp_unsigned("<", expert, experts)):
                act(pair, k.add(starts, k.mul(expert, 8)))

        k.loop(0, num_pairs, 1, body)

    def count(_, address):
        k.store(k.add(k.load(address, k.int64, 8), 1), address)

    def place(pair, address):
        position = k.load(address, k.int64, 8)
        k.store(pair, k.add(pairs, k.mul(position, 8)))
        k.store(k.div(pair, top_k), k.add(tokens, k.mul(position, 8)))
        k.store(k.add(position, 1), address)

    def start_here(expert, before, used):
        address = k.add(starts, k.mul(expert, 8))
        here = k.load(address, k.int64, 8)
        k.store(before, address)
        return [k.add(before, here), k.add(used, k.min(here, 1))]

    def move_back(number):
        # Placing has moved each start to the next expert's.
        address = k.add(starts, k.mul(k.sub(experts, number), 8))
        k.store(k.load(k.sub(address, 8), k.int64, 8), address)

    each_pair(count)
    _, used = k.loop(0, experts, 1, start_here, [k.number(0), k.number(0)])
    k.give_back(used)
    each_pair(place)
    k.loop(0, experts, 1, move_back)
    k.store(k.number(0), starts)
    return k.compile()


class _Chunks:
    """The pairs of an expert, up to `most_rows` at a time.

    Args:
        k: the kernel that is being written.
        starts: its argument.
        expert: whose pairs.
        share: the rows of the expert's weights that a thread has. `self.share` is none of them if the expert has no pairs.
    """

    def __init__(self, k: KernelBuilder, starts: Any, expert: Any, share: tuple[Any, Any], most_rows: int):
        self.k, self.most_rows = k, most_rows
        self.start, self.stop = (k.load(k.add(starts, k.mul(k.add(expert, n), 8)), k.int64, 8) for n in (0, 1))
        has_pairs = k.ir.icmp_signed("<", self.start, self.stop)
        self.share = share[0], k.ir.select(has_pairs, share[1], share[0])

    def each(self, write: Callable[[Sequence[Any], Any], None]) -> None:
        """Writes `write(places, is_first)` for 1, 2, 4, ... places; where they are fewer, the last is there several times."""
        k = self.k

        def chunk(first):
            count, rows = k.min(k.sub(self.stop, first), self.most_rows), 1
            is_first = k.ir.icmp_signed("==", first, self.start)
            while rows <= self.most_rows:
                fits = k.ir.icmp_signed("<=", count, k.number(rows))
                with k.ir.if_then(k.ir.and_(fits, k.ir.icmp_signed(">", count, k.number(rows // 2)))):
                    write([k.add(first, k.min(row, k.sub(count, 1))) for row in range(rows)], is_first)
                rows *= 2

        k.loop(self.start, self.stop, self.most_rows, chunk)

    def at(self, array: Any, places: Sequence[Any]) -> list[Any]:
        """Integers of an array."""
        return [self.k.load(self.k.add(array, self.k.mul(place, 8)), self.k.int64, 8) for place in places]


@functools.cache
def first_kernel(dtype: torch.dtype, most_rows: int, unit: VectorUnit) -> Kernel:
    """Takes x float32 [T, C], gate_up_proj [E, 2 * I, C] of `dtype`, pairs, tokens and starts (see `sort_kernel`), routing
    weights float32 [P] and the result float32 [P, I] (addresses), E, C and I. The result is silu(gate) * up * weight.
    """
    k = KernelBuilder(unit, "first", 10)
    x, gate_up, pairs, tokens, starts, scale, h, experts, width, intermediate = k.arguments
    share = k.share_of_thread(intermediate, BLOCK_ROWS)
    weight_size = k.mul(k.mul(intermediate, width), dtype.itemsize)

    def of_expert(expert):
        chunks = _Chunks(k, starts, expert, share, most_rows)
        gate = k.add(gate_up, k.mul(k.mul(weight_size, 2), expert))

        def each_chunk(write_chunk):
            def write(places, is_first):
                own_pairs = chunks.at(pairs, places)

                def sink(row, sums):
                    for pair, (gate_value, up_value) in zip(own_pairs, sums):
                        divisor = k.ir.fadd(k.float_number(1.0), k.exp(k.ir.fneg(gate_value)))
                        weight = k.load(k.add(scale, k.mul(pair, 4)), k.float32, 4)
                        value = k.ir.fmul(k.ir.fmul(k.ir.fdiv(gate_value, divisor), up_value), weight)
                        k.store(value, k.add(h, k.mul(k.add(k.mul(pair, intermediate), row), 4)))

                x_rows = [k.add(x, k.mul(k.mul(width, 4), token)) for token in chunks.at(tokens, places)]
                write_chunk(x_rows, sink, is_first)

            chunks.each(write)

        weights = [gate, k.add(gate, weight_size)]
        sums_of_products(k, weights, width, chunks.share, intermediate, each_chunk, dtype)

    k.loop(0, experts, 1, of_expert)
    return k.compile()


@functools.cache
def second_kernel(dtype: torch.dtype, most_rows: int, unit: VectorUnit) -> Kernel:
    """Takes h float32 [P, I], down_proj [E, O, I] of `dtype`, pairs and starts, y float32 [P, O], result float32 [T, O]
    (addresses), T, K, E, I and O. y must be zeros where an expert is held elsewhere.
    """
    k = KernelBuilder(unit, "second", 11)
    h, down, pairs, starts, y, result, tokens, top_k, experts, intermediate, out_width = k.arguments
    share = k.share_of_thread(out_width, BLOCK_ROWS)

    def of_expert(expert):
        chunks = _Chunks(k, starts, expert, share, most_rows)
        weight = k.add(down, k.mul(k.mul(k.mul(out_width, intermediate), dtype.itemsize), expert))

        def each_chunk(write_chunk):
            def write(places, is_first):
                own_pairs = chunks.at(pairs, places)

                def sink(row, sums):
                    for pair, (value,) in zip(own_pairs, sums):
                        k.store(value, k.add(y, k.mul(k.add(k.mul(pair, out_width), row), 4)))

                h_rows = [k.add(h, k.mul(k.mul(intermediate, 4), pair)) for pair in own_pairs]
                write_chunk(h_rows, sink, is_first)

            chunks.each(write)

        sums_of_products(k, [weight], intermediate, chunks.share, out_width, each_chunk, dtype)

    def sum_of_token(token):
        y_row = k.add(y, k.mul(k.mul(k.mul(token, top_k), out_width), 4))
        result_row = k.add(result, k.mul(k.mul(token, out_width), 4))

        def sum_of_column(column):
            address = k.add(y_row, k.mul(column, 4))

            def add(choice, total):
                value = k.load(k.add(address, k.mul(k.mul(choice, out_width), 4)), k.float32, 4)
                return [k.ir.fadd(total, value)]

            (total,) = k.loop(0, top_k, 1, add, [k.float_number(0.0)])
            k.store(total, k.add(result_row, k.mul(column, 4)))

        k.loop(*share, 1, sum_of_column)

    k.loop(0, experts, 1, of_expert)
    # Of its columns, each thread has all that it sums.
    k.loop(0, tokens, 1, sum_of_token)
    return k.compile()


def compiled_experts(
    x_TC: torch.Tensor,
    gate_up_EFC: torch.Tensor,
    down_EOI: torch.Tensor,
    top_k_index_TK: torch.Tensor,
    top_k_weights_TK: torch.Tensor,
) -> torch.Tensor | None:
    """SwiGLU experts without biases, without gradients; None where the kernels do not take these tensors, or too many tokens for
    the experts that are chosen.

    Args:
        x_TC, gate_up_EFC, down_EOI: of one dtype, float32, bfloat16 or float16, on a CPU; F is 2 * I.
        top_k_index_TK: integers; ids of E and above mark experts held elsewhere.
        top_k_weights_TK: float.

    Returns:
        [T, O] in the dtype of `x_TC`, computed in float32 throughout.
    """
    unit, dtype = vector_unit(), gate_up_EFC.dtype
    (tokens, top_k), (experts, out_width, intermediate) = top_k_index_TK.shape, down_EOI.shape
    width = x_TC.shape[1]
    if unit is None:
        return None
    most_rows = most_few_rows(dtype, unit)
    if (
        dtype not in DTYPES
        or not x_TC.dtype == dtype == down_EOI.dtype
        or width % FEW_ROWS_COLUMNS
        or intermediate % FEW_ROWS_COLUMNS
        or not 0 < tokens * top_k <= MOST_CHUNKS * most_rows * experts
        or not (gate_up_EFC.is_contiguous() and down_EOI.is_contiguous())
        # Sizes that do not fit are PyTorch's to refuse.
        or gate_up_EFC.shape != (experts, 2 * intermediate, width)
        or x_TC.shape[0] != tokens
        or top_k_weights_TK.shape != top_k_index_TK.shape
    ):
        return None
    x_TC, index_TK = x_TC.float().contiguous(), top_k_index_TK.long().contiguous()
    weights_TK, pairs = top_k_weights_TK.float().contiguous(), tokens * top_k
    pair_P, token_P = index_TK.new_empty((2, pairs))
    starts = index_TK.new_zeros((experts + 1,))
    used = sort_kernel(unit)(
        index_TK.data_ptr(),
        pair_P.data_ptr(),
        token_P.data_ptr(),
        starts.data_ptr(),
        pairs,
        top_k,
        experts,
        parallel=False,
    )
    if pairs > MOST_CHUNKS * most_rows * max(used, 1):
        return None
    h_PI, y_PO = x_TC.new_empty((pairs, intermediate)), x_TC.new_zeros((pairs, out_width))
    result_TO = x_TC.new_empty((tokens, out_width))
    # An expert has each token at most once.
    most_rows = min(most_rows, 1 << (tokens - 1).bit_length())
    parallel = pairs * intermediate * width >= LEAST_WORK
    first_kernel(dtype, most_rows, unit)(
        x_TC.data_ptr(),
        gate_up_EFC.data_ptr(),
        pair_P.data_ptr(),
        token_P.data_ptr(),
        starts.data_ptr(),
        weights_TK.data_ptr(),
        h_PI.data_ptr(),
        experts,
        width,
        intermediate,
        parallel=parallel,
    )
    second_kernel(dtype, most_rows, unit)(
        h_PI.data_ptr(),
        down_EOI.data_ptr(),
        pair_P.data_ptr(),
        starts.data_ptr(),
        y_PO.data_ptr(),
        result_TO.data_ptr(),
        tokens,
        top_k,
        experts,
        intermediate,
        out_width,
        parallel=parallel,
    )
    return result_TO.to(dtype)
