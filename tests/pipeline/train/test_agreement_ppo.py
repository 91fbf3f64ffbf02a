"""Our PPO beside TRL 1.12's on one step of it, kept by benchmarks/agreement_ppo.py.

Where the definition is the same, so are the numbers; each difference is a test that turns ours into theirs. The first
of them explains most: TRL takes a response that ended early to be one token longer, `longer` here.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.config.settings import TrainPpoSettings
from pipeline.lm.forward import prepare
from pipeline.train import ppo_update
from pipeline.train.advantages import generalised_advantages, masked_mean, token_rewards, whiten
from pipeline.train.losses import ppo_policy_loss, ppo_value_loss
from pipeline.train.networks import Networks, open_networks
from pipeline.train.ppo_update import Targets, aim, make_learners, objective_metrics, shaped_scores, update
from pipeline.train.rollouts import put
from pipeline.train.scorers import reward_scores
from tests.pipeline.train.agreed import END, PAD
from tests.pipeline.train.agreed_ppo import BATCH_SIZE, CASES, Step, make_networks, make_prompts

TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}
every_case = pytest.mark.parametrize("case", CASES)


@pytest.fixture(scope="module")
def steps() -> dict[str, Step]:
    return {case: Step(case) for case in CASES}


@pytest.fixture
def step(case: str, steps: dict[str, Step]) -> Step:
    return steps[case]


def opened(settings: TrainPpoSettings) -> tuple[Networks, Any]:
    """And the reward model."""
    models = make_networks()
    for model in models.values():
        prepare(model)
    networks = open_networks(models["policy"], "", models["value_model"], settings, device="cpu")
    return dataclasses.replace(networks, reference=models["reference"]), models["reward_model"]


# The same


@every_case
def test_the_step_has_what_is_to_be_compared(step: Step) -> None:
    """Prompts padded on the left, responses that end at once, early and not at all."""
    prompts = sorted(query[query != PAD].tolist() for query in step["queries"])
    assert prompts == sorted(make_prompts())
    lengths = step.mask.sum(dim=1)
    assert lengths.min() <= 2
    assert 4 <= step.ended_early.sum() <= BATCH_SIZE - 4
    assert not (step["responses"] == END).any(dim=1).all()
    assert not (step["responses"][step.mask] == PAD).any()
    assert torch.equal(step.mask, ~step["padding_mask"])
    assert len(step.minibatches) == 4


@every_case
def test_log_probabilities_values_scores_and_entropies_are_those_of_the_same_tokens(step: Step) -> None:
    (networks, reward_model), data = opened(step.settings), step.data
    groups, rows = [data.group(row) for row in range(BATCH_SIZE)], list(range(BATCH_SIZE))
    with torch.no_grad():
        found = networks.predict(groups, with_entropies=True)
        references, raw = networks.reference_logps(groups), reward_scores(reward_model, groups)
    scores = shaped_scores(raw, step.rollouts.has_ended, step.settings)
    assert torch.allclose(scores, step["scores"], **TOLERANCE)
    first = step.minibatches[0]
    for ours, theirs in ((found.logps, "logprobs"), (references, "ref_logprobs"), (found.values, "values")):
        assert torch.allclose(ours, step[theirs][step.mask], **TOLERANCE)
    entropies = torch.zeros(step.mask.shape)
    put(entropies, rows, step.mask, found.entropies)
    assert torch.allclose(entropies[first.found["rows"]][first.mask], first.found["entropies"][first.mask], **TOLERANCE)


@every_case
def test_the_kl_of_every_token_is_the_same(step: Step) -> None:
    assert step["kl"].abs().max() > 0.1
    assert torch.allclose(step.kl, step["kl"], **TOLERANCE)
    assert torch.allclose(-step.settings.kl_coef * step.kl, step["non_score_reward"], **TOLERANCE)


@every_case
def test_policy_loss_and_its_clipping_are_the_same_in_every_minibatch(step: Step) -> None:
    """Ratios are 1 at first and far from it later."""
    clipped = []
    for each in step.minibatches:
        ours = ppo_policy_loss(
            each.found["new_logprobs"],
            each.of_step["logprobs"],
            each.of_step["advantages"],
            cliprange=step.settings.cliprange,
        )
        assert torch.allclose(ours.losses[each.mask], each.found["pg_loss_max"][each.mask], **TOLERANCE)
        assert masked_mean(ours.losses, each.mask).item() == pytest.approx(each.stat(step, "pg_loss"), abs=1e-6)
        clipped.append(masked_mean(ours.is_clipped.float(), each.mask).item())
        assert clipped[-1] == pytest.approx(each.stat(step, "pg_clipfrac"), abs=1e-6)
    assert clipped[0] == 0.0
    assert clipped[-1] > 0.05


def test_with_lam_and_gamma_1_advantages_and_returns_are_the_same(steps: dict[str, Step]) -> None:
    """Then nothing depends on where after a response its score stands. All that is left is Bessel's correction."""
    step = steps["k3"]
    assert step.settings.lam == step.settings.gamma == 1.0
    targets = aim(step.rollouts, step["scores"], step.settings, kl_coef=step.settings.kl_coef)
    assert torch.allclose(targets.returns[step.mask], step["returns"][step.mask], **TOLERANCE)
    assert torch.allclose(targets.advantages * bessel(step.mask), step["advantages"], **TOLERANCE)


@pytest.mark.parametrize("case", ["k1", "whitened"])
def test_with_the_k1_estimator_the_metrics_of_the_rollouts_are_the_same(step: Step) -> None:
    ours, theirs = our_objective(step), step.metrics
    for name in ("kl", "entropy", "scores", "non_score_reward", "rlhf_reward"):
        assert ours[f"objective/{name}"] == pytest.approx(theirs[f"objective/{name}"], abs=1e-5), name
    assert ours["rollout/ended"] * BATCH_SIZE == theirs["val/num_eos_tokens"]


def our_objective(step: Step) -> dict[str, float]:
    nothing = torch.zeros_like(step.kl)
    return objective_metrics(
        step.rollouts,
        step["scores"],
        Targets(nothing, nothing, nothing),
        kl_coef=step.settings.kl_coef,
        has_values=False,
    )


@every_case
def test_our_updates_take_the_policy_where_theirs_do(step: Step, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four of them, with TRL's advantages and minibatches; the later ones see what the earlier ones have done."""
    networks, _ = opened(step.settings)
    order = [each.found["rows"].tolist() for each in step.minibatches]
    monkeypatch.setattr(ppo_update, "minibatches", lambda *_, **__: iter(order))
    targets = Targets(step["rewards"], step["advantages"], step["returns"])
    learners = make_learners(networks)
    found = update(networks, learners, step.rollouts, targets, ptx=None, step=0, seed=0, rate=1.0, where="")
    passes = step.minibatches
    log_ratios = torch.cat([(each.found["new_logprobs"] - each.of_step["logprobs"])[each.mask] for each in passes])
    assert log_ratios.abs().max() > 0.5
    assert found["policy/approxkl"] == pytest.approx(0.5 * (log_ratios**2).mean().item(), rel=1e-5)
    assert found["policy/ratio"] == pytest.approx(log_ratios.exp().mean().item(), rel=1e-5)
    losses = torch.cat([each.found["pg_loss_max"][each.mask] for each in passes])
    assert found["loss/policy"] == pytest.approx(losses.mean().item(), abs=1e-5)


# TRL takes a response that ended early to be one token longer.


@every_case
def test_their_score_stands_one_token_after_the_end(step: Step) -> None:
    """Ours stands at the end itself. So does theirs at the limit, where there is no room."""
    theirs = step["rewards_before" if step.settings.whiten_rewards else "rewards"]
    ours = token_rewards(step["scores"], step.kl, step.mask, kl_coef=step.settings.kl_coef)
    assert torch.allclose(ours[~step.ended_early], theirs[~step.ended_early], **TOLERANCE)
    last = step.mask.sum(dim=1)[step.ended_early] - 1
    moved, scores = ours[step.ended_early], step["scores"][step.ended_early]
    rows = torch.arange(len(moved))
    moved[rows, last] -= scores
    moved[rows, last + 1] += scores
    assert torch.allclose(moved, theirs[step.ended_early], **TOLERANCE)
    longer = token_rewards(step["scores"], step.kl, step.longer, kl_coef=step.settings.kl_coef)
    assert torch.allclose(longer, theirs, **TOLERANCE)


@every_case
def test_their_values_and_advantages_are_ours_of_responses_one_token_longer(step: Step) -> None:
    assert torch.equal(step.longer, ~step["padding_mask_p1"])
    assert step["values"][step.longer & ~step.mask].all()
    settings = step.settings
    found = generalised_advantages(step["rewards"], step["values"], step.longer, gamma=settings.gamma, lam=settings.lam)
    assert torch.allclose(found.advantages, step["advantages_before"], **TOLERANCE)
    assert torch.allclose(found.returns, step["returns"], **TOLERANCE)


def test_their_advantages_are_ours_and_what_the_value_after_the_end_says(steps: dict[str, Step]) -> None:
    """With S the score and V the value one token after the end: γ(1 - λ)V - (1 - γλ)S more there, less by γλ before."""
    step, settings = steps["k1"], steps["k1"].settings
    decay = settings.gamma * settings.lam
    ours = generalised_advantages(
        token_rewards(step["scores"], step.kl, step.mask, kl_coef=settings.kl_coef),
        step["values"],
        step.mask,
        gamma=settings.gamma,
        lam=settings.lam,
    ).advantages
    assert torch.allclose(ours[~step.ended_early], step["advantages_before"][~step.ended_early], **TOLERANCE)
    early = torch.nonzero(step.ended_early)[:, 0].tolist()
    for n in early:
        length = int(step.mask[n].sum())
        after = settings.gamma * (1 - settings.lam) * step["values"][n, length] - (1 - decay) * step["scores"][n]
        steps_before = torch.arange(length - 1, -1, -1)
        theirs = step["advantages_before"][n, :length]
        assert torch.allclose(ours[n, :length] + after * decay**steps_before, theirs, **TOLERANCE)
        assert not torch.allclose(ours[n, :length], theirs, atol=1e-3)


@every_case
def test_their_value_loss_and_its_clipping_count_the_token_after_the_end(step: Step) -> None:
    gaps, clipped = [], []
    for each in step.minibatches:
        ours = ppo_value_loss(
            each.found["vpred"],
            each.of_step["values"],
            each.of_step["returns"],
            cliprange_value=step.settings.cliprange_value,
        )
        assert torch.allclose(2 * ours.losses[each.mask], each.found["vf_loss_max"][each.mask], **TOLERANCE)
        theirs = each.stat(step, "vf_loss")
        assert masked_mean(ours.losses, each.longer).item() == pytest.approx(theirs, abs=1e-6)
        gaps.append(abs(masked_mean(ours.losses, each.mask).item() - theirs))
        clipped.append(masked_mean(ours.is_clipped.float(), each.longer).item())
        assert clipped[-1] == pytest.approx(each.stat(step, "vf_clipfrac"), abs=1e-6)
    assert max(gaps) > 1e-3
    assert max(clipped) > 0.05


# TRL's variance has Bessel's correction.


def bessel(mask: Tensor) -> float:
    """What ours is to be multiplied by."""
    return ((mask.sum() - 1) / mask.sum()).sqrt().item()


@every_case
def test_their_whitened_advantages_are_ours_less_bessels_correction(step: Step) -> None:
    ours = whiten(step["advantages_before"], step.mask)
    assert torch.allclose(ours * bessel(step.mask), step["advantages"], **TOLERANCE)
    assert not torch.allclose(ours, step["advantages"], atol=1e-3)


def test_their_whitened_rewards_are_ours_less_bessels_correction(steps: dict[str, Step]) -> None:
    """Of responses one token longer; the mean stays."""
    step = steps["whitened"]
    ours = whiten(step["rewards_before"], step.longer, center=False)
    mean = masked_mean(step["rewards_before"], step.longer)
    theirs = ((ours - mean) * bessel(step.longer) + mean).masked_fill(~step.longer, 0.0)
    assert torch.allclose(theirs, step["rewards"], **TOLERANCE)
    assert not torch.allclose(ours, step["rewards"], atol=1e-3)


# TRL's means count padding.


@every_case
def test_their_approxkl_ratio_and_entropy_are_means_over_padding_too(step: Step) -> None:
    """Where it counts as a distance of 0, a ratio of 1, and the entropy of what the policy says after the end."""
    for each in step.minibatches:
        log_ratios = each.found["new_logprobs"] - each.of_step["logprobs"]
        ours = {
            "approxkl": masked_mean(0.5 * log_ratios**2, each.mask).item(),
            "ratio": masked_mean(log_ratios.exp(), each.mask).item(),
            "entropy": masked_mean(each.found["entropies"], each.mask).item(),
        }
        of_padding = {"approxkl": 0.0, "ratio": 1.0, "entropy": masked_mean(each.found["entropies"], ~each.mask).item()}
        share = each.mask.float().mean().item()
        assert share < 0.9
        for name, value in ours.items():
            theirs = share * value + (1 - share) * of_padding[name]
            assert theirs == pytest.approx(each.stat(step, name), abs=1e-5), name


# Averages, and what the KL is


@every_case
def test_their_averages_are_of_minibatches_and_ours_of_tokens(step: Step) -> None:
    """What `update` gives, above. They are the same where all minibatches have as many tokens."""
    passes = step.minibatches
    losses = [masked_mean(each.found["pg_loss_max"], each.mask).item() for each in passes]
    assert sum(losses) / len(losses) == pytest.approx(step.metrics["loss/policy_avg"], abs=1e-6)
    for logged, name in (
        ("policy/approxkl_avg", "approxkl"),
        ("policy/clipfrac_avg", "pg_clipfrac"),
        ("loss/value_avg", "vf_loss"),
        ("val/clipfrac_avg", "vf_clipfrac"),
        ("policy/entropy_avg", "entropy"),
        ("val/ratio", "ratio"),
    ):
        mean = sum(each.stat(step, name) for each in passes) / len(passes)
        assert mean == pytest.approx(step.metrics[logged], abs=1e-6), name
    counts = [int(each.mask.sum()) for each in passes]
    assert len(set(counts)) > 1
    ours = torch.cat([each.found["pg_loss_max"][each.mask] for each in passes]).mean().item()
    weighted = sum(loss * count for loss, count in zip(losses, counts, strict=True)) / sum(counts)
    assert ours == pytest.approx(weighted, abs=1e-6)
    assert abs(ours - step.metrics["loss/policy_avg"]) > 1e-4


def test_with_the_k3_estimator_their_kl_is_its_sum_and_ours_stays_the_log_ratio(steps: dict[str, Step]) -> None:
    step, ours, theirs = steps["k3"], our_objective(steps["k3"]), steps["k3"].metrics
    kl = step.kl.sum(dim=1).mean().item()
    assert kl == pytest.approx(theirs["objective/kl"], abs=1e-5)
    assert -step.settings.kl_coef * kl == pytest.approx(theirs["objective/non_score_reward"], abs=1e-5)
    assert ours["objective/scores"] - step.settings.kl_coef * kl == pytest.approx(
        theirs["objective/rlhf_reward"], abs=1e-5
    )
    assert abs(ours["objective/kl"] - theirs["objective/kl"]) > 0.01
    for name in ("entropy", "scores"):
        assert ours[f"objective/{name}"] == pytest.approx(theirs[f"objective/{name}"], abs=1e-5), name
