"""Auxiliary losses on router logits.

Shape suffixes: T tokens (batch times length, flattened), E experts, G groups of tokens whose statistics are taken apart.
"""

from collections.abc import Sequence

import torch
from transformers import PreTrainedConfig

from .modality_routing import TOKEN_TYPES


def load_balancing_loss(
    router_logits: Sequence[torch.Tensor],
    attention_mask: torch.Tensor | None = None,
    group_weight_G: torch.Tensor | None = None,
) -> torch.Tensor:
    """Sum over layers of `E * sum_e(mean_t p_te * fraction of tokens whose first choice is e)`; 1 per layer if balanced.

    This is the loss of GShard (Lepikhin et al. 2020, algorithm 1) as Uni-MoE 8e, MoE-LLaVA and CuMo compute it: only first
    choices count, and no gradient flows through the counts.

    Args:
        router_logits: One tensor per sparse layer: [T, E], or [G, T, E] for a mean over G samples with statistics of their
            own. The number of experts may differ between layers.
        attention_mask: [B, S] with as many tokens, 1 for those that count; all count where it is None.
        group_weight_G: [G] for a weighted sum over the samples instead of their mean.

    Returns:
        A scalar, float32.
    """
    total = 0.0
    for logits in router_logits:
        logits_GTE = logits if logits.ndim == 3 else logits[None]
        weight_GT1 = _token_weights(logits_GTE, attention_mask)
        num_experts = logits_GTE.shape[-1]
        probabilities_GTE = logits_GTE.float().softmax(dim=-1)
        first_choice_GTE = torch.nn.functional.one_hot(logits_GTE.argmax(dim=-1), num_experts).float()
        mean_probability_GE = (weight_GT1 * probabilities_GTE).sum(dim=1)
        first_choice_fraction_GE = (weight_GT1 * first_choice_GTE).sum(dim=1)
        loss_G = num_experts * (mean_probability_GE * first_choice_fraction_GE.detach()).sum(dim=-1)
        total = total + _over_groups(loss_G, group_weight_G)
    return total


def router_z_loss(
    router_logits: Sequence[torch.Tensor],
    attention_mask: torch.Tensor | None = None,
    group_weight_G: torch.Tensor | None = None,
) -> torch.Tensor:
    """Sum over layers of the mean squared logsumexp of the logits (ST-MoE, Zoph et al. 2022, equation 5).

    Arguments and result are those of [`load_balancing_loss`].
    """
    total = 0.0
    for logits in router_logits:
        logits_GTE = logits if logits.ndim == 3 else logits[None]
        weight_GT1 = _token_weights(logits_GTE, attention_mask)
        loss_G = (weight_GT1[..., 0] * logits_GTE.float().logsumexp(dim=-1).square()).sum(dim=1)
        total = total + _over_groups(loss_G, group_weight_G)
    return total


# Pairs of modalities whose routing the eight-expert Uni-MoE keeps apart; image and video are not a pair in it.
DIVERGENT_PAIRS = (("image", "sound"), ("image", "text"), ("sound", "text"), ("sound", "video"), ("video", "text"))


def modality_expert_loss(
    router_logits: Sequence[torch.Tensor],
    token_types: torch.Tensor,
    experts: dict[str, list[int]],
    lengths_B: torch.Tensor | None = None,
) -> torch.Tensor:
    """Sum over layers and samples of the distance between routing probabilities and the experts meant for a modality.

    For every token of a modality in `experts`: the absolute differences between the probabilities of all E experts and a
    vector that is 1 at the listed ones, summed and divided by E and by the length S (the eight-expert Uni-MoE).

    Args:
        router_logits: One tensor [B * S, E] per sparse layer.
        token_types: Int [B, S], indices into `TOKEN_TYPES`. Padding counts as text in the original; -1 leaves a token out.
        experts: The experts of each modality, by its name in `TOKEN_TYPES`.
        lengths_B: [B], the length of each sample; S, the padded one, where it is None.

    Returns:
        A scalar, float32.
    """
    total = 0.0
    for logits_TE in router_logits:
        types_BS = token_types.to(logits_TE.device)
        lengths = types_BS.shape[1] if lengths_B is None else lengths_B.to(logits_TE.device)
        probabilities_TE = logits_TE.float().softmax(dim=-1)
        for name, indices in experts.items():
            target_E = torch.zeros_like(probabilities_TE[0])
            target_E[indices] = 1.0
            distance_BS = (probabilities_TE - target_E).abs().mean(dim=-1).view(types_BS.shape)
            total = total + ((distance_BS * (types_BS == TOKEN_TYPES.index(name))).sum(dim=1) / lengths).sum()
    return total


def modality_divergence_loss(router_logits: Sequence[torch.Tensor], token_types: torch.Tensor) -> torch.Tensor:
    """Sum over layers and samples of how alike the modalities of a sample are routed (the eight-expert Uni-MoE).

    A sample's value is the mean of `1 - KL(b || a) / E` over those `DIVERGENT_PAIRS` that occur in it, where a and b are
    softmaxes of the two modalities' mean routing probabilities; 0 where none occurs.

    Arguments and result are those of [`modality_expert_loss`].
    """
    masks_BS = {name: token_types == TOKEN_TYPES.index(name) for name in ("text", "image", "video")}
    masks_BS["sound"] = (token_types == TOKEN_TYPES.index("audio")) | (token_types == TOKEN_TYPES.index("speech"))
    # Looked up once for all layers, since a GPU is waited for each time.
    places = [
        {name: mask_BS[sample].nonzero()[:, 0] for name, mask_BS in masks_BS.items()}
        for sample in range(len(token_types))
    ]
    places = [{name: place for name, place in of_sample.items() if len(place)} for of_sample in places]
    total = torch.zeros((), device=token_types.device)
    for logits_TE in router_logits:
        num_experts = logits_TE.shape[-1]
        probabilities_BSE = logits_TE.float().softmax(dim=-1).reshape(*token_types.shape, num_experts)
        for present, probabilities_SE in zip(places, probabilities_BSE):
            log_means = {
                name: probabilities_SE[place.to(logits_TE.device)].mean(dim=0).log_softmax(dim=-1)
                for name, place in present.items()
            }
            pairs = [(log_means[a], log_means[b]) for a, b in DIVERGENT_PAIRS if a in present and b in present]
            alike = [1 - (b.exp() * (b - a)).sum() / num_experts for a, b in pairs]
            if alike:
                total = total.to(logits_TE.device) + torch.stack(alike).mean()
    return total


def balance_and_z_losses(
    sparsity: PreTrainedConfig,
    router_logits: Sequence[torch.Tensor],
    num_samples: int,
    attention_mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Both losses of one stack of sparse layers, unweighted, taken as `sparsity` says (`router_loss_*`).

    Args:
        router_logits: One tensor [..., E] per sparse layer, sample after sample.
        num_samples: Samples in the batch, for statistics of each of them; a tensor [samples, tokens, E] tells it itself.
        attention_mask: [B, S]; see [`load_balancing_loss`].
    """
    if sparsity.router_loss_scope == "sample":
        grouped = [logits if logits.ndim == 3 else logits.unflatten(0, (num_samples, -1)) for logits in router_logits]
    else:
        grouped = [logits.flatten(0, -2) for logits in router_logits]
    mask = None if sparsity.router_loss_counts_padding else attention_mask
    scale = 1.0 / len(grouped) if sparsity.router_loss_reduction == "mean" else 1.0
    return scale * load_balancing_loss(grouped, mask), scale * router_z_loss(grouped, mask)


def step_share(
    sparsity: PreTrainedConfig,
    router_logits: Sequence[torch.Tensor],
    sample_weight_B: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    first_choices: torch.Tensor | None = None,
    step_weight: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What these samples add to the balance and z losses of an optimiser step that is computed piece by piece, unweighted.

    Each sample counts with its weight, or, in a balancing loss over whole batches, by its part in the mean probabilities of
    the step; so the sum over the pieces does not depend on how the step is cut.

    Args:
        router_logits: One tensor [T, E] per sparse layer of the decoder, sample after sample.
        sample_weight_B: [B], the part of the step that each sample is.
        attention_mask: [B, S]; see [`load_balancing_loss`].
        first_choices, step_weight: As for [`balance_share`], with `router_loss_scope="batch"`.
    """
    flat = [logits.flatten(0, -2) for logits in router_logits]
    by_sample = [logits.unflatten(0, (len(sample_weight_B), -1)) for logits in flat]
    mask = None if sparsity.router_loss_counts_padding else attention_mask
    weight_B = sample_weight_B.to(flat[0].device)
    if first_choices is None:
        balance = load_balancing_loss(by_sample, mask, weight_B)
    else:
        balance = balance_share(flat, mask, first_choices, step_weight)
    scale = 1.0 / len(flat) if sparsity.router_loss_reduction == "mean" else 1.0
    return scale * balance, scale * router_z_loss(by_sample, mask, weight_B)


def balance_share(
    router_logits: Sequence[torch.Tensor],
    attention_mask: torch.Tensor | None,
    first_choices: torch.Tensor,
    step_weight: torch.Tensor,
) -> torch.Tensor:
    """What these tokens add to the [`load_balancing_loss`] of a whole optimiser step.

    The loss is linear in the probabilities, so once the choices of the whole step are known, each piece adds its own tokens'
    part. Processes that were given the same rows (tensor parallelism) are counted twice, in tokens and weight alike.

    Args:
        router_logits: One tensor [T, E] per sparse layer.
        first_choices: [sum of E over layers], how many tokens of the step chose each expert first.
        step_weight: [1], the weights of all samples of the step together.
    """
    device = router_logits[0].device
    counts = first_choices.to(device).split([logits.shape[-1] for logits in router_logits])
    total = torch.zeros((), device=device)
    for logits_TE, counts_E in zip(router_logits, counts):
        probability_TE = logits_TE.float().softmax(dim=-1)
        if attention_mask is not None:
            probability_TE = attention_mask.reshape(-1, 1).to(probability_TE) * probability_TE
        # Every token has one first choice.
        num_tokens = counts_E.sum().clamp(min=1.0)
        weight_E = (step_weight.to(device) * counts_E / num_tokens.square()).float()
        total = total + len(counts_E) * (probability_TE.sum(dim=0).to(device) * weight_E).sum()
    return total


def _over_groups(loss_G: torch.Tensor, weight_G: torch.Tensor | None) -> torch.Tensor:
    return loss_G.mean() if weight_G is None else (loss_G * weight_G).sum()


def _token_weights(logits_GTE: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """[G, T, 1] float32 weights that sum to one over the tokens of a group that count."""
    num_groups, num_tokens, _ = logits_GTE.shape
    if attention_mask is None:
        return logits_GTE.new_full((num_groups, num_tokens, 1), 1.0 / max(num_tokens, 1), dtype=torch.float32)
    weight_GT1 = attention_mask.to(logits_GTE.device).reshape(num_groups, num_tokens, 1).float()
    return weight_GT1 / weight_GT1.sum(dim=1, keepdim=True).clamp(min=1.0)
