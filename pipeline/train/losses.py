"""The losses of all trainers, as pure functions of log-probabilities and scores.

Each returns one loss for every element; what is averaged over the optimiser's whole batch is the caller's affair.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def sft_loss(logps: Tensor) -> Tensor:
    """Negative log-likelihood of each completion token. logps: (M,) in nats. Returns (M,)."""
    return -logps


def pairwise_loss(score_gaps: Tensor, probability: Tensor) -> Tensor:
    """Bradley-Terry loss of each comparison under a soft label: -q·log σ(Δ) - (1 - q)·log σ(-Δ).

    score_gaps: (C,) score of the first minus score of the second. probability: (C,) in [0, 1] that the first is better;
    with 1 it is the loss of Ouyang et al. 2022 (arXiv 2203.02155), eq. 1. Returns (C,).
    """
    return -probability * logsigmoid(score_gaps) - (1 - probability) * logsigmoid(-score_gaps)


def ranking_loss(scores: Tensor, first: Tensor, second: Tensor, probability: Tensor) -> Tensor:
    """Mean Bradley-Terry loss over the comparisons of one prompt, all C(K, 2) of them in one element (eq. 1, ibid.).

    scores: (K,) of a prompt's completions. first, second: (C,) which completions are compared. Returns ().
    """
    return pairwise_loss(scores[first] - scores[second], probability).mean()


def centering_loss(scores: Tensor) -> Tensor:
    """Square of the mean score of a prompt's completions, so that rewards stay near 0. scores: (K,). Returns ().

    For pairs a quarter of (r₁ + r₂)² of Eisenstein et al. 2023 (arXiv 2312.09244), eq. 2.
    """
    return scores.mean() ** 2


def dpo_loss(
    policy_logps: Tensor, ref_logps: Tensor, chosen_probability: Tensor, *, beta: float, label_smoothing: float = 0.0
) -> Tensor:
    """Preference loss of each pair under a soft label.

    policy_logps, ref_logps: (B, 2) completion log-probabilities in nats, column 0 chosen, 1 rejected: summed, or
    divided by the length (then length-normalised DPO, as in Tülu 3, arXiv 2411.15124, eq. 6).
    chosen_probability: (B,) in [0, 1]; 1 gives the loss of Rafailov et al. 2023 (arXiv 2305.18290), eq. 7.
    label_smoothing: share of flipped labels, ε of conservative DPO (Mitchell 2023). Returns (B,).
    """
    probability = chosen_probability * (1 - label_smoothing) + (1 - chosen_probability) * label_smoothing
    return pairwise_loss(beta * _gaps(policy_logps - ref_logps), probability)


def ipo_loss(policy_logps: Tensor, ref_logps: Tensor, chosen_probability: Tensor, *, beta: float) -> Tensor:
    """(h - 1/(2τ))² of each pair, h its log-ratio gap, τ = beta; Azar et al. 2023 (arXiv 2310.12036), eq. 17.

    policy_logps, ref_logps: (B, 2) as in `dpo_loss`. A soft label mixes both directions. Returns (B,).
    """
    gaps, target = _gaps(policy_logps - ref_logps), 1 / (2 * beta)
    return chosen_probability * (gaps - target) ** 2 + (1 - chosen_probability) * (gaps + target) ** 2


def _gaps(log_ratios: Tensor) -> Tensor:
    return log_ratios[:, 0] - log_ratios[:, 1]


def rrhf_loss(means: Tensor, sums: Tensor, scores: Tensor, *, rrhf_weight: float) -> Tensor:
    """rrhf_weight · Σ_{r_i < r_j} max(0, p_i - p_j) + NLL of the best completion.

    Yuan et al. 2023 (arXiv 2304.05302), eq. 2-4.

    means: (K,) p, log-probability per token of each of a prompt's completions. sums: (K,) in all. scores: (K,).
    The paper adds both terms unweighted; its published code takes 100 × the first and a mean NLL. Returns ().
    """
    is_worse = scores[:, None] < scores[None, :]
    gaps = (means[:, None] - means[None, :]).clamp(min=0)
    return rrhf_weight * torch.where(is_worse, gaps, 0).sum() - sums[scores.argmax()]


class Clipped(NamedTuple):
    """losses: one for every token. is_clipped: where the clipped branch is the larger, so that no gradient flows."""

    losses: Tensor
    is_clipped: Tensor


def ppo_policy_loss(logps: Tensor, old_logps: Tensor, advantages: Tensor, *, cliprange: float) -> Clipped:
    """Clipped surrogate of each token: Schulman et al. 2017 (arXiv 1707.06347), eq. 7, with its sign changed.

    logps, old_logps: in nats, of the drawn tokens, under the policy and under what drew them. Any one shape.
    """
    ratios = torch.exp(logps - old_logps)
    plain = -advantages * ratios
    clipped = -advantages * ratios.clamp(1 - cliprange, 1 + cliprange)
    return Clipped(torch.maximum(plain, clipped), clipped > plain)


def ppo_value_loss(values: Tensor, old_values: Tensor, returns: Tensor, *, cliprange_value: float) -> Clipped:
    """Half the squared error of each value, the larger of plain and clipped around the old value.

    Huang et al., "The N implementation details of RLHF with PPO"; the half is in their code too. Any one shape.
    """
    clipped = values.clamp(old_values - cliprange_value, old_values + cliprange_value)
    plain_errors, clipped_errors = (values - returns) ** 2, (clipped - returns) ** 2
    return Clipped(0.5 * torch.maximum(plain_errors, clipped_errors), clipped_errors > plain_errors)
