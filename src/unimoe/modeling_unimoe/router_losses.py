"""Auxiliary losses on router logits.

Shape suffixes: T tokens (batch times length, flattened), E experts.
"""

from collections.abc import Sequence

import torch


def load_balancing_loss(
    router_logits: Sequence[torch.Tensor], attention_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Sum over layers of `E * sum_e(mean_t p_te * fraction of tokens whose first choice is e)`; 1 per layer if balanced.

    This is the loss of GShard (Lepikhin et al. 2020, algorithm 1) as Uni-MoE 8e, MoE-LLaVA and CuMo compute it: only first
    choices count, and no gradient flows through the counts.

    Args:
        router_logits: One tensor [T, E] per sparse layer; the number of experts may differ between layers.
        attention_mask: [B, S] with B * S == T, 1 for tokens that count; all count where it is None.

    Returns:
        A scalar, float32.
    """
    total = 0.0
    for logits_TE in router_logits:
        weight_T = _token_weights(logits_TE, attention_mask)
        num_experts = logits_TE.shape[-1]
        probabilities_TE = logits_TE.float().softmax(dim=-1)
        first_choice_TE = torch.nn.functional.one_hot(logits_TE.argmax(dim=-1), num_experts).float()
        mean_probability_E = weight_T @ probabilities_TE
        first_choice_fraction_E = weight_T @ first_choice_TE
        total = total + num_experts * (mean_probability_E * first_choice_fraction_E.detach()).sum()
    return total


def router_z_loss(router_logits: Sequence[torch.Tensor], attention_mask: torch.Tensor | None = None) -> torch.Tensor:
    """Sum over layers of the mean squared logsumexp of the logits (ST-MoE, Zoph et al. 2022, equation 5).

    Arguments and result are those of [`load_balancing_loss`].
    """
    total = 0.0
    for logits_TE in router_logits:
        weight_T = _token_weights(logits_TE, attention_mask)
        total = total + weight_T @ logits_TE.float().logsumexp(dim=-1).square()
    return total


def _token_weights(logits_TE: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """[T] float32 weights that sum to one over the tokens that count."""
    if attention_mask is None:
        num_tokens = logits_TE.shape[0]
        return logits_TE.new_full((num_tokens,), 1.0 / max(num_tokens, 1), dtype=torch.float32)
    weight_T = attention_mask.to(logits_TE.device).reshape(-1).float()
    return weight_T / weight_T.sum().clamp(min=1.0)
