"""From scores to advantages: the arithmetic between a rollout and its policy update, as pure functions.

A batch of rollouts is B completions of up to T tokens; `completion_mask` is True at their tokens, which begin at
column 0 without gaps. What stands behind a completion's end is 0 in every result and changes nothing.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

Estimator = Literal["k1", "k3"]

KL_ERROR = 0.2
"""Bound of the proportional error in the adaptive controller (Ziegler et al. 2019, section 2.2)."""


class Advantages(NamedTuple):
    """advantages, returns: (B, T); returns are what the value function should have said."""

    advantages: Tensor
    returns: Tensor


def kl_estimates(logps: Tensor, ref_logps: Tensor, *, estimator: Estimator) -> Tensor:
    """Estimates of KL(policy ‖ reference) at each drawn token (Schulman, "Approximating KL divergence").

    logps, ref_logps: in nats. k1, the log-ratio: unbiased, also negative. k3 = e^-k1 - 1 + k1: unbiased, never
    negative. Same shape as the inputs.
    """
    log_ratios = logps - ref_logps
    if estimator == "k1":
        return log_ratios
    return torch.expm1(-log_ratios) + log_ratios


def token_rewards(scores: Tensor, kl: Tensor, completion_mask: Tensor, *, kl_coef: float) -> Tensor:
    """Per-token rewards of a bandit with a KL penalty: -kl_coef·KL, and the score at the last real token.

    Ouyang et al. 2022 (arXiv 2203.02155), section 3.5. scores: (B,). kl: (B, T). Returns (B, T).
    """
    rewards = -kl_coef * kl.masked_fill(~completion_mask, 0.0)
    last = completion_mask.sum(dim=1, keepdim=True) - 1
    return rewards.scatter_add(1, last, scores[:, None].to(rewards.dtype))


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over what counts; (), 0 if nothing does."""
    return values.masked_fill(~mask, 0.0).sum() / mask.sum().clamp(min=1)


def whiten(values: Tensor, mask: Tensor, *, center: bool = True) -> Tensor:
    """Scales to unit variance over what counts; center: to mean 0 too, else the mean stays where it was.

    The variance is that of the population. Same shape, 0 where the mask is False.
    """
    mean = masked_mean(values, mask)
    variance = masked_mean((values - mean) ** 2, mask)
    whitened = (values - mean) * torch.rsqrt(variance + 1e-8)
    return (whitened if center else whitened + mean).masked_fill(~mask, 0.0)


def generalised_advantages(
    rewards: Tensor, values: Tensor, completion_mask: Tensor, *, gamma: float, lam: float
) -> Advantages:
    """Generalised advantage estimation: Schulman et al. 2016 (arXiv 1506.02438), eq. 16.

    Nothing follows a completion's last token. rewards, values: (B, T); values[:, t] is that of the state in which
    token t is drawn.
    """
    values = values.masked_fill(~completion_mask, 0.0)
    advantages = torch.zeros_like(values)
    following, next_values = torch.zeros_like(values[:, 0]), torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_values - values[:, t]
        following = (delta + gamma * lam * following).masked_fill(~completion_mask[:, t], 0.0)
        advantages[:, t] = following
        next_values = values[:, t]
    return Advantages(advantages, advantages + values)


def returns_to_go(rewards: Tensor, completion_mask: Tensor, *, gamma: float) -> Tensor:
    """Discounted sum of the rewards from each token on: the advantages of plain policy gradient. (B, T)."""
    zeros = torch.zeros_like(rewards)
    return generalised_advantages(rewards, zeros, completion_mask, gamma=gamma, lam=1.0).advantages


def leave_one_out(returns: Tensor, *, num_samples: int) -> Tensor:
    """RLOO: each sample's return minus the mean of its prompt's others (Ahmadian et al. 2024, arXiv 2402.14740, eq. 8).

    returns: (B,), the num_samples > 1 of a prompt one after the other. Returns (B,).
    """
    grouped = returns.view(-1, num_samples)
    others = (grouped.sum(dim=1, keepdim=True) - grouped) / (num_samples - 1)
    return (grouped - others).flatten()


def group_relative(returns: Tensor, *, num_samples: int) -> Tensor:
    """GRPO: returns standardised within each prompt's samples (Shao et al. 2024, arXiv 2402.03300, section 4.1.2).

    returns: (B,), the num_samples > 1 of a prompt one after the other. Returns (B,), 0 where all are equal.
    """
    grouped = returns.view(-1, num_samples)
    centred = grouped - grouped.mean(dim=1, keepdim=True)
    return (centred / (grouped.std(dim=1, keepdim=True) + 1e-4)).flatten()


def adapted_kl_coef(kl_coef: float, kl: float, *, target: float, horizon: float, num_episodes: int) -> float:
    """The KL coefficient after a batch (Ziegler et al. 2019, arXiv 1909.08593, section 2.2).

    kl: mean over the batch's episodes, in nats a completion. horizon: episodes in which a steady error of KL_ERROR
    multiplies the coefficient by e^KL_ERROR.
    """
    error = min(max(kl / target - 1, -KL_ERROR), KL_ERROR)
    return kl_coef * (1 + error * num_episodes / horizon)
