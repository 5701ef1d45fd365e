"""How many tokens an expert takes, and which it turns away: DeepSpeed's gate (GShard, Lepikhin et al. 2020, algorithm 1).

Shape suffixes: T tokens, E experts, K experts chosen for each token.
"""

import torch
import torch.nn.functional as F

from .configuration_unimoe import check_capacities


def expert_capacity(num_tokens: int, num_experts: int, top_k: int, factor: float, minimum: int = 0) -> int:
    """Tokens that an expert takes: `ceil(T / E * K * factor)`, at least `minimum`; may exceed the number of tokens.

    Computed in float32, as the original does, since its ceiling depends on that where E is no power of two.
    """
    factor_of_mean = torch.tensor(float(top_k * factor), dtype=torch.float32, device="cpu")
    return max(int(torch.ceil(factor_of_mean * (num_tokens / num_experts))), minimum)


def keep_within_capacity(
    index_TK: torch.Tensor, num_experts: int, capacity: int, priority_T: torch.Tensor | None = None
) -> torch.Tensor:
    """Which choices find room in their expert.

    All first choices come before all second ones, as if none of them had been turned away; among equals earlier tokens come
    first, or those of higher priority.

    Args:
        index_TK: int64 [T, K], the chosen experts, the most probable first.
        num_experts: E.
        capacity: tokens that an expert takes.
        priority_T: float [T]; None: the order of the tokens.

    Returns:
        Bool [T, K].
    """
    num_tokens, top_k = index_TK.shape
    order_T = None if priority_T is None else priority_T.argsort(descending=True)
    ordered_TK = index_TK if order_T is None else index_TK[order_T]
    one_hot = F.one_hot(ordered_TK.T.reshape(-1), num_experts)
    place = (one_hot.cumsum(dim=0) - one_hot).gather(1, ordered_TK.T.reshape(-1, 1))
    kept_TK = (place < capacity).reshape(top_k, num_tokens).T
    if order_T is None:
        return kept_TK
    return torch.empty_like(kept_TK).index_copy_(0, order_T, kept_TK)


class ExpertCapacity:
    """The limits of one sparse block.

    Args:
        num_experts, top_k: of the block.
        train_factor, eval_factor: capacity factors in training and in evaluation; None: no limit.
        minimum: the least capacity.
        random_selection: whether chance decides who finds room, in training and evaluation alike, instead of the order.
        norm_topk_prob: whether the weights of a token's choices sum to one, and those that are left shall again.

    Raises:
        ValueError: a factor or the minimum is out of range; named as the block and the configuration name it.
    """

    def __init__(
        self,
        num_experts: int,
        top_k: int,
        train_factor: float | None,
        eval_factor: float | None,
        minimum: int = 0,
        random_selection: bool = False,
        norm_topk_prob: bool = True,
    ):
        check_capacities(train_factor, eval_factor, minimum)
        self.num_experts = num_experts
        self.top_k = top_k
        self.train_factor = train_factor
        self.eval_factor = eval_factor
        self.minimum = minimum
        self.random_selection = random_selection
        self.norm_topk_prob = norm_topk_prob

    @property
    def is_limited(self) -> bool:
        """Whether tokens can be turned away, in training or in evaluation."""
        return self.limits(True) or self.limits(False)

    def limits(self, training: bool) -> bool:
        """Whether any token can be turned away: none can where an expert has room for all."""
        factor = self.train_factor if training else self.eval_factor
        return factor is not None and factor * self.top_k < self.num_experts

    def sample_priority(self, index_TK: torch.Tensor) -> torch.Tensor | None:
        """Float32 [T], random; None where the order of tokens decides."""
        if not self.random_selection:
            return None
        return torch.rand(len(index_TK), dtype=torch.float32, device=index_TK.device)

    def apply(self, weights_TK: torch.Tensor, index_TK: torch.Tensor, training: bool) -> torch.Tensor:
        """The weights [T, K] with those of dropped choices at zero; with `norm_topk_prob` the rest sum to one again.

        A token whose every choice is dropped gets zeros: only the residual path around the block remains of it.
        """
        if not self.limits(training):
            return weights_TK
        factor = self.train_factor if training else self.eval_factor
        capacity = expert_capacity(len(index_TK), self.num_experts, self.top_k, factor, self.minimum)
        kept_TK = keep_within_capacity(index_TK, self.num_experts, capacity, self.sample_priority(index_TK))
        weights_TK = weights_TK * kept_TK
        if not self.norm_topk_prob:
            return weights_TK
        return weights_TK / weights_TK.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float32).eps)
