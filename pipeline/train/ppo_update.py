"""A step of PPO after its rollouts: from scores to advantages, and from these to updates of policy and value function.

Every mean is over real tokens: of the batch in whitening and metrics, of the minibatch in the loss, however it is cut
into microbatches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipeline.config.settings import TrainPpoSettings
from pipeline.errors import DivergedError
from pipeline.lm.forward import completion_logps
from pipeline.train import ranks, shards
from pipeline.train.advantages import (
    generalised_advantages,
    group_relative,
    kl_estimates,
    leave_one_out,
    masked_mean,
    returns_to_go,
    token_rewards,
    whiten,
)
from pipeline.train.batches import Data, batch_at, own_microbatches, pass_tokens, steps_per_epoch
from pipeline.train.loop import Tally, Terms, autocast, enough_memory
from pipeline.train.losses import ppo_policy_loss, ppo_value_loss, sft_loss
from pipeline.train.networks import Networks, Parameters, Predictions
from pipeline.train.optimizer import make_optimizer
from pipeline.train.rollouts import Ahead, Rollouts, completions_of, take

ADAM_EPS = 1e-5
"""Huang et al., "The N implementation details of RLHF with PPO"."""


class Targets(NamedTuple):
    """What a step's updates aim at, (B, T) each. rewards: after the KL penalty. returns: of the value function."""

    rewards: Tensor
    advantages: Tensor
    returns: Tensor


class Learner(NamedTuple):
    """One network with its optimiser. learning_rate: before the schedule."""

    parameters: Parameters
    optimizer: torch.optim.AdamW
    learning_rate: float


def make_learners(networks: Networks) -> dict[str, Learner]:
    """By network: `policy`, and `value` where it is one of its own."""
    settings = networks.settings
    rates = {"policy": settings.learning_rate, "value": settings.value_learning_rate or settings.learning_rate}
    return {
        name: Learner(parameters, make_optimizer(parameters, settings.weight_decay, eps=ADAM_EPS), rates[name])
        for name, parameters in networks.parameters.items()
    }


def shaped_scores(raw: Tensor, has_ended: Tensor, settings: TrainPpoSettings) -> Tensor:
    """Scores within their bounds, less the penalty of completions that did not end. (B,)"""
    bound = settings.cliprange_reward
    scores = raw if bound is None else raw.clamp(-bound, bound)
    return scores - settings.missing_eos_penalty * ~has_ended


def aim(rollouts: Rollouts, scores: Tensor, settings: TrainPpoSettings, *, kl_coef: float) -> Targets:
    """The bandit's rewards and, by `settings.advantages`, what each token's probability is to be moved by."""
    mask, values = rollouts.completion_mask, rollouts.values
    kl = kl_estimates(rollouts.logps, rollouts.ref_logps, estimator=settings.kl_estimator)
    rewards = token_rewards(scores, kl, mask, kl_coef=kl_coef)
    if settings.whiten_rewards:
        rewards = whiten(rewards, mask, center=False)
    if settings.advantages == "gae":
        found = generalised_advantages(rewards, values, mask, gamma=settings.gamma, lam=settings.lam)
        return Targets(rewards, whiten(found.advantages, mask), found.returns)
    if settings.advantages == "policy-gradient":
        return Targets(rewards, whiten(returns_to_go(rewards, mask, gamma=settings.gamma), mask), values)
    compare = leave_one_out if settings.advantages == "rloo" else group_relative
    advantages = compare(rewards.sum(dim=1), num_samples=settings.num_samples)
    return Targets(rewards, advantages[:, None] * mask, values)


def update(
    networks: Networks,
    learners: dict[str, Learner],
    rollouts: Rollouts,
    targets: Targets,
    *,
    ptx: Data | None,
    step: int,
    seed: int,
    rate: float,
    where: str,
) -> dict[str, float]:
    """Several epochs over a batch, shuffled anew in each. Returns means over all tokens of all minibatches.

    rate: of the schedule, 1 its peak. ptx: rows whose log-likelihood is kept up, a second backward pass.
    Raises DivergedError if a loss or gradient is not finite.
    """
    settings, data, tally, norms = networks.settings, rollouts.data, Tally(), []
    for learner in learners.values():
        for group in learner.optimizer.param_groups:
            group["lr"] = rate * learner.learning_rate
    for number, rows in enumerate(minibatches(len(data), settings, seed=[seed, step])):
        for learner in learners.values():
            learner.optimizer.zero_grad(set_to_none=True)
        own = Tally()
        ahead = rollouts.ahead if number == 0 else ()
        act = partial(backward, networks, rollouts, targets, rows, own.add, where=where, ahead=ahead)
        shards.by_itself(networks.policy, act)
        approxkl = own.means()["policy/approxkl"]
        if settings.max_approxkl is not None and approxkl > settings.max_approxkl:
            break
        if ptx is not None:
            most = steps_per_epoch(settings.batch_size, settings.minibatch_size) * settings.num_inner_epochs
            act = partial(backward_ptx, networks, ptx, step * most + number, seed, tally.add, where=where)
            shards.by_itself(networks.policy, act)
        if not shards.is_sharded(networks.policy):  # FSDP has done it
            for learner in learners.values():
                ranks.add_up([p.grad for p in learner.parameters.values() if p.grad is not None])
        norms.append({name: _clip(learner, settings) for name, learner in learners.items()})
        check_finite(where, {"loss": own.means()["loss"]})
        check_finite(f"{where}: norm of the gradient", norms[-1])
        for learner in learners.values():
            learner.optimizer.step()
        tally.join(own)
    means = tally.means() if norms else own.means()
    return {
        **means,
        "num_updates": len(norms),
        **{f"{name}/grad_norm": float(np.mean([norm[name] for norm in norms] or [0.0])) for name in learners},
    }


def minibatches(num_rows: int, settings: TrainPpoSettings, *, seed: Sequence[int]) -> Iterator[list[int]]:
    for epoch in range(settings.num_inner_epochs):
        order = np.random.default_rng([*seed, epoch]).permutation(num_rows).tolist()
        for start in range(0, num_rows, settings.minibatch_size):
            yield order[start : start + settings.minibatch_size]


def backward(
    networks: Networks,
    rollouts: Rollouts,
    targets: Targets,
    rows: Sequence[int],
    note: Callable[[Terms], None],
    *,
    where: str,
    ahead: Sequence[Ahead] = (),
) -> None:
    """Adds the gradient of a minibatch's loss: policy, value and entropy terms, each its mean over the tokens.

    Of several processes each adds its share. ahead: its forward pass, where that is done already.
    """
    data, settings = rollouts.data, networks.settings
    num_tokens = int(rollouts.completion_mask[completions_of(data, rows)].sum())
    size = pass_tokens(settings.microbatch_tokens, rollouts.completion_mask.device)
    fresh = ((*part, None) for part in own_microbatches(data, rows, max_tokens=size))
    parts: Iterable[tuple[list[int], bool, Predictions | None]] = ahead or fresh
    for part, counts, found in parts:
        with enough_memory(where, data, part):
            if found is None:
                groups = [data.group(row) for row in part]
                found = networks.predict(groups, with_entropies=settings.entropy_coef > 0)
            ends = found.cut_off()
            terms = ppo_terms(settings, ends, rollouts, targets, part)
            (counts * terms.losses.sum() / num_tokens).backward()
            networks.backward(found, ends)
        if counts:
            note(terms)


def ppo_terms(
    settings: TrainPpoSettings, found: Predictions, rollouts: Rollouts, targets: Targets, rows: Sequence[int]
) -> Terms:
    """The loss of every token of these rows, (M,), and what is measured of it. found: of them, now."""
    mask = rollouts.completion_mask
    numbers = completions_of(rollouts.data, rows)

    def of(padded: Tensor) -> Tensor:
        return take(padded, numbers, mask)

    old_logps = of(rollouts.logps)
    policy = ppo_policy_loss(found.logps, old_logps, of(targets.advantages), cliprange=settings.cliprange)
    losses = policy.losses
    log_ratios = (found.logps - old_logps).detach()
    metrics = {
        "loss/policy": policy.losses,
        "policy/approxkl": 0.5 * log_ratios**2,
        "policy/clipfrac": policy.is_clipped.float(),
        "policy/ratio": log_ratios.exp(),
    }
    if found.values is not None:
        value = ppo_value_loss(
            found.values, of(rollouts.values), of(targets.returns), cliprange_value=settings.cliprange_value
        )
        losses = losses + settings.vf_coef * value.losses
        metrics |= {"loss/value": value.losses, "val/clipfrac": value.is_clipped.float()}
    if found.entropies is not None:
        losses = losses - settings.entropy_coef * found.entropies
        metrics["policy/entropy"] = found.entropies
    return Terms(losses, metrics)


def backward_ptx(
    networks: Networks,
    ptx: Data,
    number: int,
    seed: int,
    note: Callable[[Terms], None],
    *,
    where: str,
) -> None:
    """PPO-ptx: adds ptx_coef times the gradient of the mean negative log-likelihood of other data's tokens.

    Ouyang et al. 2022 (arXiv 2203.02155), eq. 2. number: of the update, from the first step on, as if every batch were
    full. Each has as many rows, and numbers in a row take all of them before any comes again.
    """
    settings = networks.settings
    size = min(min(settings.minibatch_size, settings.batch_size) * settings.ptx_per_prompt, len(ptx))
    rows = batch_at(number, num_rows=len(ptx), batch_size=size, seed=seed)
    num_tokens = sum(map(ptx.num_completion_tokens, rows))
    for part, counts in own_microbatches(ptx, rows, max_tokens=settings.microbatch_tokens):
        groups = [ptx.group(row) for row in part]
        with enough_memory(where, ptx, part), autocast(networks.policy, settings):
            found = shards.compute(networks.policy, partial(completion_logps, networks.policy, groups))
            losses = sft_loss(found.tokens)
            (counts * settings.ptx_coef * losses.sum() / num_tokens).backward()
        if counts:
            note(Terms(losses.new_zeros(0), {"loss/ptx": losses}))


def _clip(learner: Learner, settings: TrainPpoSettings) -> float:
    norm = torch.nn.utils.clip_grad_norm_(learner.parameters.values(), settings.max_grad_norm)
    return shards.undivided(norm).item()


def check_finite(where: str, found: dict[str, float]) -> None:
    """Of values that all processes have."""
    if bad := [f"{name} {value}" for name, value in found.items() if not math.isfinite(value)]:
        said = f"{where}: {', '.join(bad)}; lower the learning rate, or look at the scores"
        raise ranks.shared(DivergedError(said))


def objective_metrics(
    rollouts: Rollouts, scores: Tensor, targets: Targets, *, kl_coef: float, has_values: bool
) -> dict[str, float]:
    """Of the rollouts, before any update: means over completions, and over real tokens where a token is the unit."""
    mask = rollouts.completion_mask
    found = {
        "objective/kl": rollouts.kl.mean(),
        "objective/entropy": -rollouts.logps.sum(dim=1).mean(),
        "objective/scores": scores.mean(),
        "objective/non_score_reward": -kl_coef * rollouts.kl.mean(),
        "objective/rlhf_reward": (scores - kl_coef * rollouts.kl).mean(),
        "rollout/length": mask.sum(dim=1).float().mean(),
        "rollout/ended": rollouts.has_ended.float().mean(),
        "rollout/mismatch": masked_mean((rollouts.logps - rollouts.sampler_logps).abs(), mask),
    }
    if has_values:
        errors, returns = (targets.returns - rollouts.values)[mask], targets.returns[mask]
        unexplained, whole = (each.var(correction=0) for each in (errors, returns))
        found["val/explained_variance"] = 1 - unexplained / whole.clamp(min=1e-8)
        found["val/mean"] = rollouts.values[mask].mean()
    return dict(zip(found, torch.stack(list(found.values())).tolist(), strict=True))
