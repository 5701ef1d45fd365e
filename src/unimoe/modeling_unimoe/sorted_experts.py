"""The experts implementation "unimoe", registered with Transformers beside "eager", "grouped_mm" and "batched_mm".

On a CPU it sorts the pairs of token and expert once and runs each expert that was chosen on its own rows, with four things
that Transformers' implementations lack there:
- Weights are never copied: an expert's weight is a view, and with one token so are its rows.
- Few rows are multiplied by kernels that read a weight as fast as memory gives it (products_llvm.py), more rows as W @ x.T.
  Matrix libraries run x @ W.T at a fraction of that speed for 4 to 128 rows in float32, and in bfloat16 for any number where the
  processor has matrix instructions; preparing ("packing") the weights beforehand gains nothing over it.
- What stands between the projections is one pass, forward and backward (swiglu_llvm.py).
- The backward pass writes each expert's gradient once, into one buffer for all experts whose pages stay untouched where an
  expert had no token.

Elsewhere (on a GPU, under `torch.compile`, for experts of a layout of their own) it hands over to "grouped_mm", and to the
experts' own loop for shapes and weights that "grouped_mm" cannot take.

Shape suffixes: T tokens, K experts chosen for each, P = T * K pairs sorted by expert, N rows of one expert, E experts,
H hidden size, O output size, I intermediate size, F rows of the first projection (2 * I where gated, else I).
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import SiLUActivation
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from .few_tokens_llvm import compiled_experts
from .llvm_kernels import is_recorded
from .products_llvm import compiled_product, padded_rows
from .swiglu_llvm import compiled_swiglu, compiled_swiglu_backward

IMPLEMENTATION = "unimoe"

# In float32 a product with few rows runs as a batch of products with blocks of the weight, which are small enough for kernels
# that read them in place instead of copying them into a layout of their own. From MANY_ROWS the copy no longer matters.
BLOCK = 64
FEW_ROWS = 8
MANY_ROWS = 256
# Bytes from which fresh zeros are worth asking the operating system for.
LARGE_BUFFER = 1 << 20
ALIGNMENT = 64


class PrefersUnimoeExperts:
    """Mixin of models: "unimoe" runs their experts where nobody has chosen an implementation."""

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        if requested_experts is None and self._can_set_experts_implementation():
            return IMPLEMENTATION
        return super().get_correct_experts_implementation(requested_experts)


class ExpertOrder(NamedTuple):
    """The pairs of token and expert, sorted by expert.

    Attributes:
        pair_P: int64, the pair (token * K + choice) at each place; pairs of one expert stay in the order of tokens.
        counts: how many pairs each of the E experts has. Pairs of experts held elsewhere come last and are not counted.
    """

    pair_P: torch.Tensor
    counts: list[int]


def sort_by_expert(top_k_index_TK: torch.Tensor, num_experts: int) -> ExpertOrder:
    """One sort and one count for all that need the order. Ids of `num_experts` and above mark experts held elsewhere."""
    index_P = top_k_index_TK.reshape(-1)
    pair_P = index_P.sort(stable=True).indices
    return ExpertOrder(pair_P, torch.bincount(index_P, minlength=num_experts)[:num_experts].tolist())


class ExpertWeights(NamedTuple):
    """The parameters of all experts, read once: reading an adapted parameter merges its adapter anew."""

    first_EFH: torch.Tensor
    down_EOI: torch.Tensor
    first_bias_EF: torch.Tensor | None
    down_bias_EO: torch.Tensor | None

    @classmethod
    def read(cls, experts: nn.Module) -> "ExpertWeights":
        first = "gate_up_proj" if experts.has_gate else "up_proj"
        biases = (getattr(experts, f"{first}_bias"), experts.down_proj_bias) if experts.has_bias else (None, None)
        return cls(getattr(experts, first), experts.down_proj, *biases)

    def to(self, dtype: torch.dtype) -> "ExpertWeights":
        return ExpertWeights(*(None if tensor is None else tensor.to(dtype) for tensor in self))

    def of(self, expert: int) -> "ExpertWeights":
        return ExpertWeights(*(None if tensor is None else tensor[expert] for tensor in self))


def unimoe_experts_forward(
    experts: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """What Transformers calls where a config names "unimoe".

    Args:
        experts: any experts module of Transformers' experts interface.
        hidden_states: [T, H].
        top_k_index: int64 [T, K]; ids of `experts.num_experts` and above mark experts held by another process.
        top_k_weights: [T, K].

    Returns:
        [T, O] in the dtype of `hidden_states`. Two runs are equal to the last bit.

    Raises:
        RuntimeError: the hidden states are on the CPU, the experts or the routing are not.
    """
    if is_recorded(hidden_states) or hidden_states.device.type != "cpu" or not _has_known_layout(experts):
        return _grouped_mm(experts, hidden_states, top_k_index, top_k_weights)
    weights = ExpertWeights.read(experts)
    routing = (top_k_index, top_k_weights)
    for tensor in (*weights, *routing):
        if tensor is not None and not tensor.is_cpu:
            # The kernels would read at an address that is not theirs; and of weights on "meta" PyTorch makes zeros.
            raise RuntimeError(
                f"hidden states on cpu, but experts or routing on {tensor.device}: put them on one device, or load the weights"
            )
    if not all(type(tensor) in (torch.Tensor, nn.Parameter) for tensor in weights if tensor is not None):
        # Quantised weights know F.linear and indexing, not matmuls that write into a given place.
        return _loop(experts, hidden_states, *routing)
    if torch.is_autocast_enabled("cpu"):
        weights = weights.to(torch.get_autocast_dtype("cpu"))
        with torch.autocast("cpu", enabled=False):
            output_TO = _run_sorted(experts, hidden_states.to(weights.first_EFH.dtype), *routing, weights)
    else:
        output_TO = _run_sorted(experts, hidden_states.to(weights.first_EFH.dtype), *routing, weights)
    return output_TO.to(hidden_states.dtype)


def _run_sorted(
    experts: nn.Module,
    hidden_TH: torch.Tensor,
    top_k_index_TK: torch.Tensor,
    top_k_weights_TK: torch.Tensor,
    weights: ExpertWeights,
) -> torch.Tensor:
    activation, inputs = Activation(experts), (hidden_TH, top_k_weights_TK, *weights)
    needs_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)
    if not needs_grad and activation.is_swiglu and weights.first_bias_EF is weights.down_bias_EO is None:
        output_TO = compiled_experts(hidden_TH, weights.first_EFH, weights.down_EOI, top_k_index_TK, top_k_weights_TK)
        if output_TO is not None:
            return output_TO
    if hidden_TH.shape[0] == 1 and not needs_grad:
        return _run_one_token(activation, experts.num_experts, top_k_index_TK, hidden_TH, top_k_weights_TK, weights)
    order = sort_by_expert(top_k_index_TK, experts.num_experts)
    if needs_grad:
        return _SortedExperts.apply(activation, order, *inputs)
    return _run(activation, order, hidden_TH, top_k_weights_TK, weights)


def _has_known_layout(experts: nn.Module) -> bool:
    return not experts.is_transposed and not experts.has_post_expert_norm


def _grouped_mm(experts: nn.Module, hidden_states: torch.Tensor, *routing: torch.Tensor) -> torch.Tensor:
    supports = getattr(experts, "supports", None)
    if supports is not None and not supports("grouped_mm", hidden_states.dtype):
        return _loop(experts, hidden_states, *routing)
    # Without values PyTorch knows grouped products in bfloat16 alone.
    name = "batched_mm" if hidden_states.is_meta else "grouped_mm"
    return ALL_EXPERTS_FUNCTIONS[name](experts, hidden_states, *routing)


def _loop(experts: nn.Module, *inputs: torch.Tensor) -> torch.Tensor:
    # The decorator that makes implementations exchangeable keeps the class's own forward here.
    return type(experts).forward.__wrapped__(experts, *inputs)


class Activation:
    """What stands between the two projections: [N, F] to [N, I]."""

    def __init__(self, experts: nn.Module):
        self.function: Callable = experts._apply_gate if experts.has_gate else experts.act_fn
        gate_is_usual = experts.has_gate and type(experts)._apply_gate.__name__ == "_default_apply_gate"
        self.is_swiglu = gate_is_usual and type(experts.act_fn) in (SiLUActivation, nn.SiLU)

    def __call__(self, first_NF: torch.Tensor) -> torch.Tensor:
        return self.function(first_NF)

    def weighted(self, first_NF: torch.Tensor, scale_N1: torch.Tensor) -> torch.Tensor:
        """The output times the routing weights: what the second projection gets."""
        h_NI = compiled_swiglu(first_NF, scale_N1) if self.is_swiglu else None
        if h_NI is None:
            h_NI = self(first_NF)
            h_NI = (h_NI * scale_N1).to(h_NI.dtype)
        return h_NI

    def weighted_backward(
        self, first_NF: torch.Tensor, scale_N1: torch.Tensor, grad_NI: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`weighted` again, and from its gradient those of the input and, float32 [N], of the routing weights."""
        found = compiled_swiglu_backward(first_NF, scale_N1, grad_NI) if self.is_swiglu else None
        if found is None:
            h_NI, backward = self.with_backward(first_NF)
            grad_scale_N = (grad_NI * h_NI).sum(dim=-1, dtype=torch.float32)
            found = (h_NI * scale_N1).to(h_NI.dtype), backward(grad_NI.mul_(scale_N1)), grad_scale_N
        return found

    def with_backward(self, first_NF: torch.Tensor) -> tuple[torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]:
        """The output and a function from its gradient to that of the input."""
        if self.is_swiglu:
            gate_NI, up_NI = first_NF.chunk(2, dim=-1)
            silu_NI = F.silu(gate_NI)

            def backward(grad_NI: torch.Tensor) -> torch.Tensor:
                grad_NF = torch.empty_like(first_NF)
                grad_gate_NI, grad_up_NI = grad_NF.chunk(2, dim=-1)
                torch.mul(grad_NI, silu_NI, out=grad_up_NI)
                torch.ops.aten.silu_backward.grad_input(grad_NI * up_NI, gate_NI, grad_input=grad_gate_NI)
                return grad_NF

            return silu_NI * up_NI, backward
        first_NF = first_NF.detach().requires_grad_()
        with torch.enable_grad():
            output_NI = self.function(first_NF)
        return output_NI.detach(), lambda grad_NI: torch.autograd.grad(output_NI, first_NF, grad_NI)[0]


def _linear(x_NC: torch.Tensor, weight_RC: torch.Tensor, bias_R: torch.Tensor | None) -> torch.Tensor:
    """x @ W.T + b, in whichever way is fastest; the result [N, R] may lie in memory as [R, N]."""
    rows, width = x_NC.shape[0], weight_RC.shape[0]
    y_NR = compiled_product(x_NC, weight_RC)
    if y_NR is not None:
        pass
    elif weight_RC.itemsize >= 4 and 2 < rows < MANY_ROWS and width % BLOCK == 0:
        blocks_BLC, x_CN = weight_RC.unflatten(0, (-1, BLOCK)), x_NC.t().contiguous()
        y_NR = torch.bmm(blocks_BLC, x_CN.expand(len(blocks_BLC), -1, -1)).view(width, rows).t()
    elif weight_RC.itemsize < 4 and _has_matrix_instructions():
        y_NR = torch.mm(weight_RC, x_NC.t()).t()
    else:
        y_NR = F.linear(x_NC, weight_RC)
    return y_NR if bias_R is None else y_NR + bias_R


@functools.cache
def _has_matrix_instructions() -> bool:
    """Whether products of 16-bit numbers have instructions of their own, with which W @ x.T is faster; else it is slower."""
    return torch.cpu._is_amx_tile_supported()


def _run_expert(
    activation: Activation, x_NH: torch.Tensor, scale_N1: torch.Tensor, weights: ExpertWeights
) -> tuple[torch.Tensor, torch.Tensor]:
    """One expert on its rows: the first projection [N, F], kept for the backward pass, and the weighted output [N, O]."""
    first_NF = _linear(x_NH, weights.first_EFH, weights.first_bias_EF)
    # Scaled before the second projection, so that the backward pass needs no output of it.
    y_NO = _linear(activation.weighted(first_NF, scale_N1), weights.down_EOI, None)
    if weights.down_bias_EO is not None:
        y_NO = y_NO + (scale_N1 * weights.down_bias_EO).to(y_NO.dtype)
    return first_NF, y_NO


def _run_one_token(
    activation: Activation,
    num_experts: int,
    top_k_index_1K: torch.Tensor,
    hidden_1H: torch.Tensor,
    top_k_weights_1K: torch.Tensor,
    weights: ExpertWeights,
) -> torch.Tensor:
    """Decoding, for inference: nothing to sort, a matrix-vector product for each weight, and one call of all else."""
    experts, scale_K1 = top_k_index_1K[0].tolist(), top_k_weights_1K.t()
    if max(experts) >= num_experts:
        here = [place for place, expert in enumerate(experts) if expert < num_experts]
        experts, scale_K1 = [experts[place] for place in here], scale_K1[here]
        if not here:
            return hidden_1H.new_zeros(1, weights.down_EOI.shape[1])
    first_KF = torch.cat([_matrix_vector_product(weights.first_EFH[expert], hidden_1H) for expert in experts])
    if weights.first_bias_EF is not None:
        first_KF += weights.first_bias_EF[experts]
    h_KI = activation.weighted(first_KF, scale_K1)
    output_1O, *others = (
        _matrix_vector_product(weights.down_EOI[expert], h_KI[place : place + 1])
        for place, expert in enumerate(experts)
    )
    for other_1O in others:
        output_1O += other_1O
    if weights.down_bias_EO is not None:
        output_1O += (scale_K1 * weights.down_bias_EO[experts]).sum(dim=0).to(output_1O.dtype)
    return output_1O


def _matrix_vector_product(weight_RC: torch.Tensor, x_1C: torch.Tensor) -> torch.Tensor:
    """x @ W.T, [1, R]."""
    y_1R = compiled_product(x_1C, weight_RC)
    return torch.mv(weight_RC, x_1C[0])[None] if y_1R is None else y_1R


def _segments(order: ExpertOrder, top_k: int):
    """The experts that have rows, each with its pairs and their tokens."""
    start = 0
    for expert, count in enumerate(order.counts):
        if count:
            pair_N = order.pair_P[start : start + count]
            yield expert, pair_N, pair_N // top_k
            start += count


def _sum_over_choices(rows: list[torch.Tensor], order: ExpertOrder, like_TX: torch.Tensor, width: int) -> torch.Tensor:
    """From rows in the order of experts to a sum for each token: [T, width]."""
    tokens, pairs = len(like_TX), len(order.pair_P)
    if not rows:
        return like_TX.new_zeros(tokens, width)
    rows_X, place_P = _places(rows, order)
    if torch.is_grad_enabled() and rows_X.requires_grad:
        return rows_X.index_select(0, place_P).view(tokens, pairs // tokens, width).sum(dim=1)
    # The same in one pass, which cannot be differentiated twice.
    return F.embedding_bag(place_P.view(tokens, pairs // tokens), rows_X, mode="sum")


def _by_pair(rows: list[torch.Tensor], order: ExpertOrder) -> torch.Tensor:
    """Rows in the order of experts, put into the order of pairs; zero for experts held elsewhere."""
    rows_X, place_P = _places(rows, order)
    return rows_X.index_select(0, place_P)


def _places(rows: list[torch.Tensor], order: ExpertOrder) -> tuple[torch.Tensor, torch.Tensor]:
    """All rows one after another, with one of zeros for experts held elsewhere, and where that of each pair is."""
    pairs, present = len(order.pair_P), sum(order.counts)
    place_P = torch.empty_like(order.pair_P)
    place_P[order.pair_P] = torch.arange(pairs, device=place_P.device)
    if present < pairs:
        rows = [*rows, rows[0].new_zeros(1, *rows[0].shape[1:])]
        place_P = place_P.clamp(max=present)
    return torch.cat(rows), place_P


def _run(
    activation: Activation,
    order: ExpertOrder,
    hidden_TH: torch.Tensor,
    top_k_weights_TK: torch.Tensor,
    weights: ExpertWeights,
    first: list[torch.Tensor] | None = None,
) -> torch.Tensor:
    """All experts on their rows, [T, O]. `first` collects the first projections of each."""
    scale_P1 = top_k_weights_TK.reshape(-1, 1)
    outputs = []
    top_k = top_k_weights_TK.shape[1]
    for expert, pair_N, token_N in _segments(order, top_k):
        count, weight = len(pair_N), weights.of(expert)
        rows = padded_rows(count, weight.first_EFH)
        if rows > count:
            # Rows that fill vectors: any pair will do.
            pair_N = F.pad(pair_N, (0, rows - count))
            token_N = pair_N // top_k
        x_NH, scale_N1 = hidden_TH.index_select(0, token_N), scale_P1.index_select(0, pair_N)
        first_NF, y_NO = _run_expert(activation, x_NH, scale_N1, weight)
        outputs.append(y_NO[:count])
        if first is not None:
            first.append(first_NF[:count])
    return _sum_over_choices(outputs, order, hidden_TH, weights.down_EOI.shape[1])


class _SortedExperts(torch.autograd.Function):
    """`_run` with a backward pass that touches each weight and each weight's gradient once."""

    @staticmethod
    def forward(ctx, activation, order, hidden_TH, top_k_weights_TK, *weights):
        first: list[torch.Tensor] = []
        output_TO = _run(activation, order, hidden_TH, top_k_weights_TK, ExpertWeights(*weights), first)
        ctx.activation, ctx.order = activation, order
        ctx.save_for_backward(hidden_TH, top_k_weights_TK, *weights, *first)
        return output_TO

    @staticmethod
    def backward(ctx, grad_TO):
        # Read once: activation checkpointing gives them out a single time.
        saved = ctx.saved_tensors
        inputs, first = saved[:6], saved[6:]
        needed = ctx.needs_input_grad[2:]
        if torch.is_grad_enabled():
            return None, None, *_differentiable_backward(ctx.activation, ctx.order, inputs, needed, grad_TO)
        return None, None, *_backward(ctx.activation, ctx.order, inputs, first, needed, grad_TO)


def _backward(
    activation: Activation,
    order: ExpertOrder,
    inputs: tuple[torch.Tensor | None, ...],
    first: tuple[torch.Tensor, ...],
    needed: tuple[bool, ...],
    grad_TO: torch.Tensor,
) -> list[torch.Tensor | None]:
    """The gradients of hidden states, routing weights and the four parameters, None for those that are not `needed`."""
    hidden_TH, top_k_weights_TK, *parameters = inputs
    weights = ExpertWeights(*parameters)
    needs_hidden, needs_scale, *needs_weights = needed
    grads = ExpertWeights(*(_fresh_zeros(p) if wanted else None for p, wanted in zip(parameters, needs_weights)))
    scale_P1 = top_k_weights_TK.reshape(-1, 1)
    grad_x, grad_scale = [], []
    for (expert, pair_N, token_N), first_NF in zip(_segments(order, top_k_weights_TK.shape[1]), first):
        weight, grad = weights.of(expert), grads.of(expert)
        scale_N1 = scale_P1.index_select(0, pair_N)
        grad_NO = grad_TO.index_select(0, token_N)
        grad_NI = torch.mm(grad_NO, weight.down_EOI)
        h_NI, grad_NF, grad_scale_N = activation.weighted_backward(first_NF.contiguous(), scale_N1, grad_NI)
        if needs_scale:
            if weight.down_bias_EO is not None:
                grad_scale_N = grad_scale_N + torch.mv(grad_NO, weight.down_bias_EO)
            grad_scale.append(grad_scale_N)
        if grad.down_EOI is not None:
            _outer_product(grad_NO, h_NI, out=grad.down_EOI)
        if grad.down_bias_EO is not None:
            grad.down_bias_EO.copy_((scale_N1 * grad_NO).sum(dim=0))
        if needs_hidden:
            grad_x.append(torch.mm(grad_NF, weight.first_EFH))
        if grad.first_EFH is not None:
            _outer_product(grad_NF, hidden_TH.index_select(0, token_N), out=grad.first_EFH)
        if grad.first_bias_EF is not None:
            grad.first_bias_EF.copy_(grad_NF.sum(dim=0))
    grad_hidden_TH = grad_weights_TK = None
    if needs_hidden:
        grad_hidden_TH = _sum_over_choices(grad_x, order, hidden_TH, hidden_TH.shape[1])
    if needs_scale:
        grad_weights_TK = torch.zeros_like(top_k_weights_TK)
        if grad_scale:
            grad_weights_TK = _by_pair(grad_scale, order).view_as(grad_weights_TK).to(grad_weights_TK.dtype)
    return [grad_hidden_TH, grad_weights_TK, *grads]


def _differentiable_backward(
    activation: Activation,
    order: ExpertOrder,
    inputs: tuple[torch.Tensor | None, ...],
    needed: tuple[bool, ...],
    grad_TO: torch.Tensor,
) -> list[torch.Tensor | None]:
    """The same gradients by automatic differentiation, for who wants to differentiate them again."""
    hidden_TH, top_k_weights_TK, *parameters = inputs
    output_TO = _run(activation, order, hidden_TH, top_k_weights_TK, ExpertWeights(*parameters))
    wanted = [tensor for tensor, is_needed in zip(inputs, needed) if is_needed]
    if not output_TO.requires_grad:
        found = iter([torch.zeros_like(tensor) for tensor in wanted])
    else:
        found = iter(torch.autograd.grad(output_TO, wanted, grad_TO, create_graph=True, materialize_grads=True))
    return [next(found) if is_needed else None for is_needed in needed]


def _outer_product(left_NR: torch.Tensor, right_NC: torch.Tensor, out: torch.Tensor) -> None:
    """left.T @ right, written into `out` [R, C]."""
    rows, width = left_NR.shape
    if left_NR.itemsize >= 4 and FEW_ROWS < rows < MANY_ROWS and width % BLOCK == 0:
        blocks_BLN = left_NR.t().contiguous().unflatten(0, (-1, BLOCK))
        torch.bmm(blocks_BLN, right_NC.expand(len(blocks_BLN), -1, -1), out=out.unflatten(0, (-1, BLOCK)))
    else:
        # The bfloat16 kernels lose half of their speed on a transposed operand.
        torch.mm(left_NR.t() if left_NR.itemsize >= 4 else left_NR.t().contiguous(), right_NC, out=out)


def _fresh_zeros(like: torch.Tensor) -> torch.Tensor:
    """Zeros in the shape of `like`. Large ones take no memory before they are written to, and then by large pages."""
    size = like.numel() * like.itemsize
    if size < LARGE_BUFFER:
        return torch.zeros_like(like, memory_format=torch.contiguous_format)
    buffer = np.zeros(size + ALIGNMENT, dtype=np.uint8)
    start = -buffer.ctypes.data % ALIGNMENT
    return torch.from_numpy(buffer[start : start + size]).view(like.dtype).view(like.shape)


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, unimoe_experts_forward)
