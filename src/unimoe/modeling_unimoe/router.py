"""Top-k routing: the plain definition and the form that the model runs, side by side.

Shape suffixes: T tokens, H hidden size, E experts, K experts chosen for each token.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from .router_llvm import compiled_router
from .sorted_experts import ExpertOrder, sort_by_expert

# None: the choice of experts is deterministic.
ROUTER_NOISES = (None, "gumbel", "gumbel_choice")

# Tokens from which a softmax over a few choices costs more than its four steps, each over all tokens at once.
MANY_TOKENS = 128


class Routing(NamedTuple):
    """Where each token goes, and what the tokens do together; see `route`."""

    router_logits: torch.Tensor | None
    weights: torch.Tensor
    index: torch.Tensor
    order: ExpertOrder | None
    counts: torch.Tensor | None
    mean_probability: torch.Tensor | None
    mean_square_z: torch.Tensor | None


def naive_topk_router(
    hidden_states_TH: torch.Tensor,
    weight_EH: torch.Tensor,
    top_k: int,
    *,
    norm_topk_prob: bool = True,
    router_dtype: str | torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The definition, for tests and for reading: softmax over all experts, keep the top k, renormalise.

    Args:
        hidden_states_TH: float [T, H].
        weight_EH: float [E, H].
        top_k: experts per token, 1 to E.
        norm_topk_prob: whether the chosen weights are divided by their sum.
        router_dtype: dtype of the linear map, as a name or a `torch.dtype`; None keeps the dtype of `hidden_states_TH`.

    Returns:
        Router logits [T, E], weights [T, K] in the dtype of `hidden_states_TH`, expert ids int64 [T, K].
    """
    dtype = resolve_router_dtype(router_dtype) or hidden_states_TH.dtype
    logits_TE = hidden_states_TH.to(dtype) @ weight_EH.to(dtype).T
    probs_TE = logits_TE.float().softmax(dim=-1)
    weights_TK, index_TK = probs_TE.topk(top_k, dim=-1)
    if norm_topk_prob:
        weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True)
    return logits_TE, weights_TK.to(hidden_states_TH.dtype), index_TK


def fused_topk_router(
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    top_k: int,
    *,
    norm_topk_prob: bool = True,
    router_dtype: str | torch.dtype | None = None,
    return_logits: bool = True,
    noise: torch.Tensor | None = None,
    report_noise: bool = True,
) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
    """Top-k on the logits, then softmax over the chosen ones alone: equal to `naive_topk_router`, with less work.

    Softmax keeps the order and its denominator cancels in the renormalisation, so the [T, E] probabilities are never
    needed. Equal logits are ordered as `torch.topk` orders them.

    Args:
        hidden_states: float [T, H].
        weight: float [E, H].
        top_k: experts per token, 1 to E.
        norm_topk_prob: True: the weights sum to 1. False: they are the probabilities of the softmax over all experts.
        router_dtype: dtype of the linear map, as a name or a `torch.dtype`; None keeps the dtype of `hidden_states`. The softmax
            is always float32.
        return_logits: False returns None in place of the logits.
        noise: float [T, E]. The most probable expert stays; the others are chosen by the logits with the noise on them
            (the second choice of GShard, section 3.2). The weights come from the logits without it.
        report_noise: whether the logits that are returned have the noise on them.

    Returns:
        Router logits [T, E] (dtype of the linear map) or None,
        weights [T, K] in the dtype of `hidden_states`, expert ids int64 [T, K], the most probable expert first.
    """
    if router_dtype is not None:
        router_dtype = resolve_router_dtype(router_dtype)
    if noise is None:
        if hidden_states.is_cuda:
            fused = _route_on_gpu(hidden_states, weight, top_k, norm_topk_prob, router_dtype, False)
        elif router_dtype is None or router_dtype is hidden_states.dtype:
            fused = compiled_router(hidden_states, weight, top_k, norm_topk_prob)
        else:
            fused = None
        if fused is not None:
            return fused[0] if return_logits else None, fused[1], fused[2]
    if router_dtype is not None:
        logits_TE = F.linear(hidden_states.to(router_dtype), weight.to(router_dtype))
    else:
        logits_TE = F.linear(hidden_states, weight)
    reported_TE = logits_TE
    if noise is None:
        chosen_TK, index_TK = torch.topk(logits_TE, top_k)
    else:
        noisy_TE = logits_TE + noise.to(logits_TE.dtype)
        reported_TE = noisy_TE if report_noise else logits_TE
        first_T1 = logits_TE.argmax(dim=-1, keepdim=True)
        others_TE = noisy_TE.scatter(-1, first_T1, -torch.inf)
        index_TK = torch.cat([first_T1, others_TE.topk(top_k - 1, dim=-1).indices], dim=-1)
        chosen_TK = logits_TE.gather(-1, index_TK)
    if norm_topk_prob:
        weights_TK = _softmax(chosen_TK)
    else:
        weights_TK = torch.exp(chosen_TK.float() - torch.logsumexp(logits_TE.float(), dim=-1, keepdim=True))
    if weights_TK.dtype != hidden_states.dtype:
        weights_TK = weights_TK.to(hidden_states.dtype)
    return reported_TE if return_logits else None, weights_TK, index_TK


def _softmax(chosen_TK: torch.Tensor) -> torch.Tensor:
    """Softmax in float32 over a few choices, of which the first is the largest."""
    if chosen_TK.is_cuda or torch.compiler.is_compiling() or chosen_TK.shape[0] < MANY_TOKENS:
        return torch.softmax(chosen_TK, -1, dtype=torch.float32)
    exp_TK = torch.exp((chosen_TK - chosen_TK[:, :1].detach()).float())
    return exp_TK / exp_TK.sum(dim=-1, keepdim=True)


def route(
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    top_k: int,
    *,
    norm_topk_prob: bool = True,
    router_dtype: str | torch.dtype | None = None,
    return_order: bool = False,
    return_statistics: bool = False,
) -> Routing:
    """`fused_topk_router` and, on request, what experts, losses and reports need besides; on a GPU by the same kernel.

    With f the fraction of choices that each expert gets (`counts / counts.sum()`), `E * (mean_probability * f).sum()` is a
    balance loss (Switch Transformer, Fedus et al. 2022, equation 4); `mean_square_z` is ST-MoE's z loss (Zoph et al. 2022,
    equation 5). Gradients flow through `mean_probability` and `mean_square_z`.

    Args:
        hidden_states, weight, top_k, norm_topk_prob, router_dtype: as for `fused_topk_router`.
        return_order: whether to sort the choices by expert, as the experts do.
        return_statistics: whether to count and average.

    Returns:
        `router_logits` [T, E], `weights` [T, K] and `index` int64 [T, K]; `order` (see `ExpertOrder`); `counts` int64 [E],
        the choices of each expert, `mean_probability` float32 [E] and `mean_square_z`, a float32 scalar. None for what was
        not asked for.
    """
    counts_E = probability_E = mean_square_z = fused = None
    router_dtype = resolve_router_dtype(router_dtype)
    if hidden_states.is_cuda:
        fused = _route_on_gpu(hidden_states, weight, top_k, norm_topk_prob, router_dtype, return_statistics)
    if fused is not None:
        logits_TE, weights_TK, index_TK, *found = fused
        if return_statistics:
            counts_E, probability_E, mean_square_z = found
    else:
        logits_TE, weights_TK, index_TK = fused_topk_router(
            hidden_states, weight, top_k, norm_topk_prob=norm_topk_prob, router_dtype=router_dtype
        )
        if return_statistics:
            tokens = max(len(logits_TE), 1)
            z_T1 = torch.logsumexp(logits_TE.float(), dim=-1, keepdim=True)
            counts_E = torch.bincount(index_TK.reshape(-1), minlength=weight.shape[0])
            probability_E = torch.exp(logits_TE.float() - z_T1).sum(dim=0) / tokens
            mean_square_z = z_T1.square().sum() / tokens
    order = sort_by_expert(index_TK, weight.shape[0]) if return_order else None
    return Routing(logits_TE, weights_TK, index_TK, order, counts_E, probability_E, mean_square_z)


def _route_on_gpu(
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    top_k: int,
    norm_topk_prob: bool,
    router_dtype: torch.dtype | None,
    statistics: bool,
) -> tuple[torch.Tensor, ...] | None:
    """The results of `triton_topk_router`, or None where Triton is missing or does not take these inputs.

    Numbers of experts that there are not are left to `torch.topk` to refuse, a weight elsewhere to the linear map.
    """
    # Importing Triton takes a while, so only a GPU does it.
    from .router_triton import can_route, triton_topk_router

    if not can_route(hidden_states, router_dtype or hidden_states.dtype) or not 0 < top_k <= weight.shape[0]:
        return None
    if weight.device != hidden_states.device:
        return None
    options = {"norm_topk_prob": norm_topk_prob, "linear_dtype": router_dtype, "statistics": statistics}
    return triton_topk_router(hidden_states, weight, top_k, **options)


class UniMoETopKRouter(nn.Module):
    """A linear router without bias: `weight` [E, H].

    Other routers are subclasses with a `forward` of their own (see `UniMoESparseMoeBlock.set_router`). One that gives some tokens
    fewer than `top_k` experts sets `chooses_fewer` and, for a choice that falls away, the id E and the weight zero.

    Args:
        hidden_size: H.
        num_experts: E.
        top_k: experts per token, 1 to E.
        norm_topk_prob: whether the chosen weights sum to 1.
        router_dtype: dtype of the linear map, as a name ("float32") or a `torch.dtype`; None keeps the working dtype.
        noise: "gumbel" chooses all experts but the first with Gumbel noise on the logits, in training and in inference
            alike, so that outputs are random; "gumbel_choice" does so too, but returns the logits without it; None does not.

    Raises:
        ValueError: an argument is out of range; the message names it.
    """

    chooses_fewer = False

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        norm_topk_prob: bool = True,
        router_dtype: str | torch.dtype | None = None,
        noise: str | None = None,
    ):
        super().__init__()
        if noise not in ROUTER_NOISES:
            raise ValueError(f"noise must be one of {ROUTER_NOISES}, got {noise!r}")
        if num_experts < 1:
            raise ValueError(f"num_experts must be at least 1, got {num_experts}")
        if not 1 <= top_k <= num_experts:
            raise ValueError(f"top_k must lie between 1 and num_experts={num_experts}, got {top_k}")
        self.hidden_size = hidden_size
        self.num_experts = num_experts
        self.top_k = top_k
        self.norm_topk_prob = norm_topk_prob
        self.router_dtype = resolve_router_dtype(router_dtype)
        self.noise = noise
        # Set by a model whose routers treat modalities differently.
        self.modality_maps: nn.Module | None = None
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))

    def sample_noise(self, num_tokens: int) -> torch.Tensor | None:
        """What is added to the logits of this call: float32 [T, E] or None."""
        if self.noise is None:
            return None
        shape = (num_tokens, self.num_experts)
        return -torch.empty(shape, dtype=torch.float32, device=self.weight.device).exponential_().log()

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Hidden states [..., H] to (router logits [T, E], weights [T, K], expert ids [T, K]): Transformers' order."""
        hidden_states_TH = hidden_states if hidden_states.ndim == 2 else hidden_states.reshape(-1, self.hidden_size)
        if self.modality_maps is not None:
            hidden_states_TH = self.modality_maps(hidden_states_TH)
        return fused_topk_router(
            hidden_states_TH,
            self.weight,
            self.top_k,
            norm_topk_prob=self.norm_topk_prob,
            router_dtype=self.router_dtype,
            noise=self.sample_noise(hidden_states_TH.shape[0]),
            report_noise=self.noise != "gumbel_choice",
        )

    def extra_repr(self) -> str:
        return f"hidden_size={self.hidden_size}, num_experts={self.num_experts}, top_k={self.top_k}"


def resolve_router_dtype(router_dtype: str | torch.dtype | None) -> torch.dtype | None:
    """A floating `torch.dtype` of two bytes or more from its name, or None. Raises ValueError for anything else."""
    if router_dtype is None:
        return None
    dtype = getattr(torch, router_dtype, None) if isinstance(router_dtype, str) else router_dtype
    # There is no choosing among numbers of one byte.
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point or dtype.itemsize == 1:
        raise ValueError(f'router_dtype must be None or a floating dtype such as "float32", got {router_dtype!r}')
    return dtype
