"""The router for CPUs without gradients, in one compiled kernel: linear map, top-k and softmax.

Shape suffixes: T tokens, H hidden size, E experts, K experts chosen for each token.
"""

import functools
import math
from typing import Any

import torch
import torch.nn.functional as F

from .llvm_kernels import Kernel, KernelBuilder, VectorUnit, is_recorded, vector_unit
from .products_llvm import BLOCK_ROWS, FEW_ROWS_COLUMNS, LEAST_WORK, sums_of_products

# Experts whose rows are multiplied at the same time. With more of them and more than a few tokens, PyTorch's linear map goes
# ahead of the kernel, as a product of large matrices.
EXPERTS_AT_ONCE = 8
FEW_TOKENS = 16
# The kernel holds the logits of a token in registers.
MOST_EXPERTS = 128


@functools.cache
def router_kernel(experts: int, top_k: int, normalised: bool, is_mapped: bool, unit: VectorUnit) -> Kernel:
    """Takes hidden float32 [T, H], weight float32 [E, H], logits float32 [T, E], weights float32 [T, K], index int64 [T, K]
    (addresses), T, H, and 0. Where it `is_mapped` already, it finds the logits instead of computing them.

    It gives back 1 where a choice hangs on the order of equal logits, or a logit is not a number; else 0.
    """
    k = KernelBuilder(unit, "router", 8)
    hidden, weight, logits, weights, index, tokens, width, _ = k.arguments

    def each_group(write_chunk):
        def group(first):
            # Experts that are missing repeat the last.
            numbers = [k.min(k.add(first, n), experts - 1) for n in range(min(EXPERTS_AT_ONCE, experts))]
            rows = [k.add(weight, k.mul(k.mul(width, 4), number)) for number in numbers]

            def sink(token, sums):
                for number, (value,) in zip(numbers, sums):
                    k.store(value, k.add(logits, k.mul(k.add(k.mul(token, experts), number), 4)))

            write_chunk(rows, sink, k.ir.icmp_signed("==", first, k.number(0)))

        k.loop(0, experts, EXPERTS_AT_ONCE, group)

    def choose(token):
        row = k.add(logits, k.mul(token, 4 * experts))
        choices = LargestFirst(k, row, experts)
        chosen = [choices.next() for _ in range(top_k)]
        exps = [k.exp(k.ir.fsub(value, chosen[0][0])) for value, _ in chosen]
        if normalised:
            total = functools.reduce(k.ir.fadd, exps)
        else:

            def add_next(expert, total):
                value = k.load(k.add(row, k.mul(expert, 4)), k.float32, 4)
                return [k.ir.fadd(total, k.exp(k.ir.fsub(value, chosen[0][0])))]

            (total,) = k.loop(0, experts, 1, add_next, [k.float_number(0.0)])
        for place, (exp, (_, expert)) in enumerate(zip(exps, chosen)):
            pair = k.add(k.mul(token, top_k), place)
            k.store(k.ir.fdiv(exp, total), k.add(weights, k.mul(pair, 4)))
            k.store(expert, k.add(index, k.mul(pair, 8)))
        with k.ir.if_then(choices.is_doubtful, likely=False):
            k.give_back(1)

    def block(start):
        stop = k.min(k.add(start, BLOCK_ROWS), end)
        if not is_mapped:
            sums_of_products(k, [hidden], width, (start, stop), tokens, each_group)
        k.loop(start, stop, 1, choose)

    begin, end = k.share_of_thread(tokens, BLOCK_ROWS)
    k.loop(begin, end, BLOCK_ROWS, block)
    return k.compile()


class LargestFirst:
    """Writes the choice of the largest of a row of numbers, one after the other.

    `is_doubtful` says, at last, whether one of the chosen has an equal, or there is one that is not a number.
    """

    def __init__(self, k: KernelBuilder, row: Any, count: int):
        self.k, self.count = k, count
        self.values = k.load(row, k.vector_of(count), 4)
        self.left = self.values
        self.is_doubtful = self._any(k.ir.fcmp_unordered("uno", self.values, self.values))

    def next(self) -> tuple[Any, Any]:
        """The largest that is left, and its place."""
        k, ir = self.k, self.k.ir
        largest = k.largest_of(self.left, self.count)
        mask = ir.fcmp_ordered("==", self.left, k.broadcast(largest, self.count))
        bits = self._bits(mask)
        place = ir.cttz(bits, k.truth(False))
        self.is_doubtful = ir.or_(self.is_doubtful, ir.icmp_unsigned("!=", ir.ctpop(bits), bits.type(1)))
        self.left = ir.select(mask, k.broadcast(k.float_number(-math.inf), self.count), self.left)
        return largest, k.to_int64(place)

    def _bits(self, mask: Any) -> Any:
        return self.k.ir.bitcast(mask, self.k.integer(self.count))

    def _any(self, mask: Any) -> Any:
        bits = self._bits(mask)
        return self.k.ir.icmp_unsigned("!=", bits, bits.type(0))


def compiled_router(
    hidden_TH: torch.Tensor, weight_EH: torch.Tensor, top_k: int, norm_topk_prob: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
    """Logits [T, E], weights [T, K] and expert ids int64 [T, K], without gradients; None where the kernel does not take these
    tensors, which must be float32 on a CPU, and where the choice hangs on the order of equal logits.
    """
    if not _are_plain(hidden_TH, weight_EH) or is_recorded(hidden_TH):
        return None
    unit = vector_unit()
    if unit is None or torch.is_autocast_enabled("cpu"):
        return None
    (tokens, width), (experts, weight_width) = hidden_TH.shape, weight_EH.shape
    if width % FEW_ROWS_COLUMNS or width != weight_width or not tokens or experts > MOST_EXPERTS:
        return None
    # `torch.topk` refuses other numbers, and knows those of NumPy.
    if type(top_k) is not int or not 0 < top_k <= experts:
        return None
    is_mapped = experts > EXPERTS_AT_ONCE and tokens > FEW_TOKENS
    if tokens == 1:
        logits_TE, weights_TK, index_TK = map(torch.empty_like, _results_of_one_token(experts, top_k))
    else:
        logits_TE = F.linear(hidden_TH, weight_EH) if is_mapped else hidden_TH.new_empty((tokens, experts))
        weights_TK = hidden_TH.new_empty((tokens, top_k))
        index_TK = hidden_TH.new_empty((tokens, top_k), dtype=torch.int64)
    is_doubtful = router_kernel(experts, top_k, norm_topk_prob, is_mapped, unit)(
        hidden_TH.data_ptr(),
        weight_EH.data_ptr(),
        logits_TE.data_ptr(),
        weights_TK.data_ptr(),
        index_TK.data_ptr(),
        tokens,
        width,
        0,
        parallel=tokens * experts * width >= LEAST_WORK,
    )
    return None if is_doubtful else (logits_TE, weights_TK, index_TK)


@functools.cache
def _results_of_one_token(experts: int, top_k: int) -> tuple[torch.Tensor, ...]:
    """Logits, weights and ids to make new ones after: a tensor like another takes half the time of one from its shape."""
    index_TK = torch.empty(1, top_k, dtype=torch.int64, device="cpu")
    return *(torch.empty(1, size, dtype=torch.float32, device="cpu") for size in (experts, top_k)), index_TK


def _are_plain(hidden_TH: torch.Tensor, weight_EH: torch.Tensor) -> bool:
    return (
        hidden_TH.dtype is weight_EH.dtype is torch.float32
        and hidden_TH.ndim == weight_EH.ndim == 2
        and hidden_TH.is_cpu
        and weight_EH.is_cpu
        and hidden_TH.is_contiguous()
        and weight_EH.is_contiguous()
        and not (torch.is_grad_enabled() and (hidden_TH.requires_grad or weight_EH.requires_grad))
    )
