"""The router for GPUs: one Triton kernel forward (linear map, top-k, softmax, counts, statistics), one backward.

Imported only where a GPU asks for it, so nothing needs Triton to be installed.

Shape suffixes: T tokens, H hidden size, E experts, K experts chosen for each token; B tokens and P experts (a power of two)
of one program; C a slice of H.
"""

import torch

from .llvm_kernels import is_recorded

try:
    import triton
    import triton.language as tl

    HAS_TRITON = True
except ImportError:
    HAS_TRITON = False

BLOCK_TOKENS = 32
BLOCK_HIDDEN = 64
# tl.dot multiplies nothing smaller.
LEAST_EXPERTS = 16
# Less than 2 ** 31, and so for the rows with which the last program goes on behind the end.
MOST_NUMBERS = 1 << 30

if HAS_TRITON:

    @triton.jit
    def _forward_kernel(
        hidden,
        weight,
        logits,
        chosen_weights,
        chosen_index,
        counts,
        probability_sums,
        z_sums,
        num_tokens,
        hidden_size: tl.constexpr,
        num_experts: tl.constexpr,
        top_k: tl.constexpr,
        normalised: tl.constexpr,
        statistics: tl.constexpr,
        linear_dtype: tl.constexpr,
        B: tl.constexpr,
        P: tl.constexpr,
        C: tl.constexpr,
    ):
        token_B = tl.program_id(0) * B + tl.arange(0, B)
        expert_P = tl.arange(0, P)
        is_token_B = token_B < num_tokens
        is_expert_P = expert_P < num_experts
        sum_BP = tl.zeros((B, P), dtype=tl.float32)
        for start in range(0, hidden_size, C):
            column_C = start + tl.arange(0, C)
            is_column_C = column_C < hidden_size
            x_BC = tl.load(
                hidden + token_B[:, None] * hidden_size + column_C[None, :],
                mask=is_token_B[:, None] & is_column_C[None, :],
                other=0.0,
            )
            w_PC = tl.load(
                weight + expert_P[:, None] * hidden_size + column_C[None, :],
                mask=is_expert_P[:, None] & is_column_C[None, :],
                other=0.0,
            )
            sum_BP = tl.dot(x_BC.to(linear_dtype), tl.trans(w_PC.to(linear_dtype)), sum_BP, input_precision="ieee")
        # Rounded as the linear map alone would be, so that the choice follows the logits that are returned.
        logits_BP = sum_BP.to(linear_dtype)
        inside_BP = is_token_B[:, None] & is_expert_P[None, :]
        tl.store(logits + token_B[:, None] * num_experts + expert_P[None, :], logits_BP, mask=inside_BP)

        values_BP = tl.where(is_expert_P[None, :], logits_BP.to(tl.float32), float("-inf"))
        largest_B = tl.max(values_BP, axis=1)
        exp_BP = tl.where(is_expert_P[None, :], tl.exp(values_BP - largest_B[:, None]), 0.0)
        total_B = tl.sum(exp_BP, axis=1)

        left_BP = values_BP
        kept_BP = tl.zeros((B, P), dtype=tl.int32)
        denominator_B = tl.zeros((B,), dtype=tl.float32)
        for _ in tl.static_range(top_k):
            # The first of equals; where a row holds nothing comparable, experts still differ from choice to choice.
            best_B = tl.argmax(tl.where(kept_BP == 1, float("-inf"), left_BP), axis=1, tie_break_left=True)
            is_best_BP = expert_P[None, :] == best_B[:, None]
            kept_BP = tl.where(is_best_BP, 1, kept_BP)
            denominator_B += tl.sum(tl.where(is_best_BP, exp_BP, 0.0), axis=1)
        if not normalised:
            denominator_B = total_B
        taken_BP = tl.zeros((B, P), dtype=tl.int32)
        for choice in tl.static_range(top_k):
            best_B = tl.argmax(tl.where(taken_BP == 1, float("-inf"), left_BP), axis=1, tie_break_left=True)
            is_best_BP = expert_P[None, :] == best_B[:, None]
            taken_BP = tl.where(is_best_BP, 1, taken_BP)
            share_B = tl.sum(tl.where(is_best_BP, exp_BP, 0.0), axis=1) / denominator_B
            place_B = token_B * top_k + choice
            tl.store(chosen_weights + place_B, share_B.to(chosen_weights.dtype.element_ty), mask=is_token_B)
            tl.store(chosen_index + place_B, best_B.to(tl.int64), mask=is_token_B)
        if statistics:
            # Sums of this program alone: added up afterwards in a fixed order, so that runs are equal to the last bit.
            row = tl.program_id(0) * num_experts + expert_P
            here_BP = tl.where(inside_BP, kept_BP, 0)
            tl.store(counts + row, tl.sum(here_BP, axis=0).to(tl.int64), mask=is_expert_P)
            probability_BP = tl.where(inside_BP, exp_BP / total_B[:, None], 0.0)
            tl.store(probability_sums + row, tl.sum(probability_BP, axis=0), mask=is_expert_P)
            z_B = tl.log(total_B) + largest_B
            tl.store(z_sums + tl.program_id(0), tl.sum(tl.where(is_token_B, z_B * z_B, 0.0), axis=0))

    @triton.jit
    def _backward_kernel(
        logits,
        chosen_index,
        grad_weights,
        grad_logits,
        grad_probability,
        grad_z,
        result,
        num_tokens,
        num_experts: tl.constexpr,
        top_k: tl.constexpr,
        normalised: tl.constexpr,
        statistics: tl.constexpr,
        has_grad_logits: tl.constexpr,
        B: tl.constexpr,
        P: tl.constexpr,
    ):
        token_B = tl.program_id(0) * B + tl.arange(0, B)
        expert_P = tl.arange(0, P)
        is_token_B = token_B < num_tokens
        is_expert_P = expert_P < num_experts
        inside_BP = is_token_B[:, None] & is_expert_P[None, :]
        place_BP = token_B[:, None] * num_experts + expert_P[None, :]
        values_BP = tl.load(logits + place_BP, mask=inside_BP, other=float("-inf")).to(tl.float32)
        values_BP = tl.where(is_token_B[:, None], values_BP, 0.0)
        largest_B = tl.max(values_BP, axis=1)
        exp_BP = tl.exp(values_BP - largest_B[:, None])
        total_B = tl.sum(exp_BP, axis=1)

        grad_BP = tl.zeros((B, P), dtype=tl.float32)
        kept_BP = tl.zeros((B, P), dtype=tl.float32)
        for choice in tl.static_range(top_k):
            place_B = token_B * top_k + choice
            expert_B = tl.load(chosen_index + place_B, mask=is_token_B, other=-1)
            grad_B = tl.load(grad_weights + place_B, mask=is_token_B, other=0.0).to(tl.float32)
            is_chosen_BP = expert_P[None, :] == expert_B[:, None]
            grad_BP = tl.where(is_chosen_BP, grad_B[:, None], grad_BP)
            kept_BP = tl.where(is_chosen_BP, 1.0, kept_BP)
        if normalised:
            chosen_BP = exp_BP * kept_BP
            # Padding rows chose nothing.
            share_BP = chosen_BP / tl.maximum(tl.sum(chosen_BP, axis=1), 1e-38)[:, None]
        else:
            share_BP = exp_BP / total_B[:, None]
        result_BP = share_BP * (grad_BP - tl.sum(share_BP * grad_BP, axis=1)[:, None])
        if statistics:
            probability_BP = exp_BP / total_B[:, None]
            outer_P = tl.load(grad_probability + expert_P, mask=is_expert_P, other=0.0)
            inner_B = tl.sum(probability_BP * outer_P[None, :], axis=1)
            result_BP += probability_BP * (outer_P[None, :] - inner_B[:, None])
            z_B = tl.log(total_B) + largest_B
            result_BP += 2.0 * tl.load(grad_z) * z_B[:, None] * probability_BP
        if has_grad_logits:
            result_BP += tl.load(grad_logits + place_BP, mask=inside_BP, other=0.0).to(tl.float32)
        tl.store(result + place_BP, result_BP.to(result.dtype.element_ty), mask=inside_BP)


class _Router(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_TH, weight_EH, top_k, normalised, linear_dtype, statistics):
        hidden_TH, weight_EH = hidden_TH.contiguous(), weight_EH.contiguous()
        (num_tokens, hidden_size), num_experts = hidden_TH.shape, weight_EH.shape[0]
        programs = triton.cdiv(num_tokens, BLOCK_TOKENS)
        new = hidden_TH.new_empty
        logits_TE = new(num_tokens, num_experts, dtype=linear_dtype)
        weights_TK = new(num_tokens, top_k)
        index_TK = new(num_tokens, top_k, dtype=torch.int64)
        rows = programs if statistics else 0
        counts = new(rows, num_experts, dtype=torch.int64)
        probability_sums = new(rows, num_experts, dtype=torch.float32)
        z_sums = new(rows, dtype=torch.float32)
        padded = max(LEAST_EXPERTS, triton.next_power_of_2(num_experts))
        if programs:
            # Triton launches on the current device, whatever device the tensors are on.
            with torch.cuda.device_of(hidden_TH):
                _forward_kernel[(programs,)](
                    hidden_TH,
                    weight_EH,
                    logits_TE,
                    weights_TK,
                    index_TK,
                    counts,
                    probability_sums,
                    z_sums,
                    num_tokens,
                    hidden_size,
                    num_experts,
                    top_k,
                    normalised,
                    statistics,
                    _TRITON_DTYPES[linear_dtype],
                    BLOCK_TOKENS,
                    padded,
                    BLOCK_HIDDEN,
                )
        count_E = counts.sum(dim=0)
        probability_E = probability_sums.sum(dim=0) / max(num_tokens, 1)
        z = z_sums.sum() / max(num_tokens, 1)
        ctx.save_for_backward(hidden_TH, weight_EH, logits_TE, index_TK)
        ctx.settings = (normalised, statistics, padded)
        ctx.mark_non_differentiable(index_TK, count_E)
        ctx.set_materialize_grads(False)
        return logits_TE, weights_TK, index_TK, count_E, probability_E, z

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_logits_TE, grad_weights_TK, _index, _counts, grad_probability_E, grad_z):
        hidden_TH, weight_EH, logits_TE, index_TK = ctx.saved_tensors
        normalised, statistics, padded = ctx.settings
        num_tokens, num_experts = logits_TE.shape
        if grad_weights_TK is None:
            grad_weights_TK = torch.zeros_like(index_TK, dtype=torch.float32)
        result_TE = torch.empty_like(logits_TE)
        if num_tokens:
            zero = logits_TE.new_zeros(num_experts, dtype=torch.float32)
            with torch.cuda.device_of(hidden_TH):
                _backward_kernel[(triton.cdiv(num_tokens, BLOCK_TOKENS),)](
                    logits_TE,
                    index_TK,
                    grad_weights_TK.contiguous(),
                    result_TE if grad_logits_TE is None else grad_logits_TE.contiguous(),
                    zero if grad_probability_E is None else grad_probability_E / num_tokens,
                    zero if grad_z is None else grad_z / num_tokens,
                    result_TE,
                    num_tokens,
                    num_experts,
                    index_TK.shape[1],
                    normalised,
                    statistics,
                    grad_logits_TE is not None,
                    BLOCK_TOKENS,
                    padded,
                )
        grad_hidden = grad_weight = None
        # The two matrix products are the matmul library's, which splits the sum over tokens without atomic additions.
        if ctx.needs_input_grad[0]:
            grad_hidden = (result_TE @ weight_EH.to(result_TE.dtype)).to(hidden_TH.dtype)
        if ctx.needs_input_grad[1]:
            grad_weight = (result_TE.t() @ hidden_TH.to(result_TE.dtype)).to(weight_EH.dtype)
        return grad_hidden, grad_weight, None, None, None, None


_TRITON_DTYPES = (
    {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16} if HAS_TRITON else {}
)


def can_route(hidden_states: torch.Tensor, linear_dtype: torch.dtype) -> bool:
    """Whether the kernels take these inputs: on a GPU, recorded by nobody, in one of their dtypes, and not too many."""
    return (
        HAS_TRITON
        and hidden_states.is_cuda
        and not is_recorded(hidden_states)
        and linear_dtype in _TRITON_DTYPES
        and hidden_states.dtype in _TRITON_DTYPES
        # Places in the kernels are 32-bit numbers.
        and hidden_states.numel() <= MOST_NUMBERS
    )


def triton_topk_router(
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    top_k: int,
    *,
    norm_topk_prob: bool = True,
    linear_dtype: torch.dtype | None = None,
    statistics: bool = False,
) -> tuple[torch.Tensor, ...]:
    """Router of the kernels above. Among equal logits the expert of the lower number comes first.

    Args:
        hidden_states: float [T, H], on a GPU (or anywhere under Triton's interpreter).
        weight: float [E, H].
        top_k: experts per token, 1 to E.
        norm_topk_prob: whether the weights sum to 1; else they are the softmax over all experts.
        linear_dtype: dtype of the linear map and the logits; None keeps that of `hidden_states`. Sums are float32.
        statistics: whether to fill the last three results, which are empty or zero without.

    Returns:
        Logits [T, E], weights [T, K] in the dtype of `hidden_states`, expert ids int64 [T, K], the number of choices of
        each expert int64 [E], the mean probability of each float32 [E], and the mean squared logsumexp float32.
    """
    return _Router.apply(hidden_states, weight, top_k, norm_topk_prob, linear_dtype or hidden_states.dtype, statistics)
