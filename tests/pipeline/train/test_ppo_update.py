"""Rollouts and updates of PPO against a plain loop: one completion at a time, no padding, formulas written out."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.lm.forward import Group
from pipeline.train.batches import Data
from pipeline.train.networks import Networks
from pipeline.train.ppo_update import (
    aim,
    backward,
    backward_ptx,
    make_learners,
    minibatches,
    objective_metrics,
    shaped_scores,
    update,
)
from pipeline.train.rollouts import Rollouts, draw_seed, roll_out
from tests.pipeline.train.ppo_jobs import opened, ppo_settings, save_pair

KL_COEF = 0.1


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return save_pair(tmp_path_factory.mktemp("models"))


def plain_logps(model: Any, prompt: list[int], completion: list[int], temperature: float = 1.0) -> torch.Tensor:
    logits = model(torch.tensor([prompt + completion]), use_cache=False).logits[0].float() / temperature
    logps = logits.log_softmax(-1)
    return torch.stack([logps[len(prompt) - 1 + t, token] for t, token in enumerate(completion)])


def plain_values(model: Any, prompt: list[int], completion: list[int]) -> torch.Tensor:
    hidden = model.model(torch.tensor([prompt + completion]), use_cache=False).last_hidden_state[0]
    return torch.stack([model.score(hidden[len(prompt) - 1 + t])[0] for t in range(len(completion))])


def episodes(rollouts: Rollouts) -> list[tuple[list[int], list[int]]]:
    """(prompt, completion) of all completions, as token ids."""
    groups = [rollouts.data.group(row) for row in range(len(rollouts.data))]
    return [(group.prompt.tolist(), completion.tolist()) for group in groups for completion in group.completions]


def some_rollouts(networks: Networks, chat: Any, prompts: Any, **options: Any) -> Rollouts:
    """Of a policy that has moved a little from its start."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in networks.policy.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    num = networks.settings.num_samples
    return roll_out(networks, chat, prompts, range(6), seed=[0, 0], num_samples=num, **options)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logps_values_and_scores_are_those_of_each_completion_alone(
    temperature: float, models: tuple[Path, Path]
) -> None:
    networks, chat, prompts, source = opened(*models, num_samples=2, temperature=temperature, microbatch_tokens=60)
    rollouts = some_rollouts(networks, chat, prompts)
    scores = source.score(rollouts)
    assert rollouts.completion_mask.sum(dim=1).min() >= 1
    with torch.no_grad():
        for n, (prompt, completion) in enumerate(episodes(rollouts)):
            length = len(completion)
            assert rollouts.completion_mask[n].tolist() == [t < length for t in range(rollouts.logps.shape[1])]
            expected = plain_logps(networks.policy, prompt, completion, temperature)
            assert torch.allclose(rollouts.logps[n, :length], expected, atol=1e-5)
            assert torch.allclose(rollouts.sampler_logps[n, :length], expected, atol=1e-4)
            expected = plain_logps(networks.reference, prompt, completion, temperature)
            assert torch.allclose(rollouts.ref_logps[n, :length], expected, atol=1e-5)
            expected = plain_values(networks.value_model, prompt, completion)
            assert torch.allclose(rollouts.values[n, :length], expected, atol=1e-5)
            whole = networks.value_model(torch.tensor([prompt + completion])).logits[0, 0]  # not trained yet
            assert math.isclose(scores[n], whole, abs_tol=1e-5)
            for padded in (rollouts.logps, rollouts.ref_logps, rollouts.values):
                assert not padded[n, length:].any()


def test_a_whole_update_equals_a_plain_loop(models: tuple[Path, Path]) -> None:
    """Two epochs of one minibatch each, in microbatches, with a reward that came at the end and a KL at every token."""
    keys = {"minibatch_size": 6, "num_samples": 2, "max_grad_norm": 0.5, "gamma": 0.9, "microbatch_tokens": 50}
    networks, chat, prompts, source = opened(*models, **keys)
    rollouts = some_rollouts(networks, chat, prompts)
    policy, value_model = copy.deepcopy(networks.policy), copy.deepcopy(networks.value_model)
    settings = networks.settings
    scores = shaped_scores(source.score(rollouts), rollouts.has_ended, settings)
    targets = aim(rollouts, scores, settings, kl_coef=KL_COEF)
    learners = make_learners(networks)
    update(networks, learners, rollouts, targets, ptx=None, step=0, seed=0, rate=1.0, where="")

    drawn = episodes(rollouts)
    advantages, returns = plain_targets(rollouts, scores.tolist())
    plain_update(policy, value_model, drawn, advantages, returns, rollouts)
    for ours, plain in ((networks.policy, policy), (networks.value_model, value_model)):
        for (name, a), b in zip(ours.named_parameters(), plain.parameters(), strict=True):
            assert torch.allclose(a, b, atol=2e-5), name  # Adam moves a weight by up to 1e-3 a step


def plain_targets(rollouts: Rollouts, scores: list[float]) -> tuple[list[list[float]], list[list[float]]]:
    """Rewards, generalised advantages and whitening with Python numbers: γ 0.9, λ 0.95."""
    gamma, lam = 0.9, 0.95
    advantages, returns = [], []
    for n, (_, completion) in enumerate(episodes(rollouts)):
        length = len(completion)
        values = rollouts.values[n].tolist()[:length]
        kl = (rollouts.logps - rollouts.ref_logps)[n].tolist()
        rewards = [-KL_COEF * kl[t] + (scores[n] if t == length - 1 else 0.0) for t in range(length)]
        deltas = [rewards[t] + gamma * (values[t + 1] if t + 1 < length else 0.0) - values[t] for t in range(length)]
        own = [sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, length)) for t in range(length)]
        advantages.append(own)
        returns.append([a + v for a, v in zip(own, values, strict=True)])
    flat = [a for own in advantages for a in own]
    mean = sum(flat) / len(flat)
    spread = math.sqrt(sum((a - mean) ** 2 for a in flat) / len(flat) + 1e-8)
    return [[(a - mean) / spread for a in own] for own in advantages], returns


def plain_update(
    policy: Any,
    value_model: Any,
    drawn: list[tuple[list[int], list[int]]],
    advantages: list[list[float]],
    returns: list[list[float]],
    rollouts: Rollouts,
) -> None:
    optimizers = [
        torch.optim.AdamW(m.parameters(), lr=1e-3, eps=1e-5, weight_decay=0.0, foreach=False)
        for m in (policy, value_model)
    ]
    num_tokens = sum(len(completion) for _, completion in drawn)
    for _ in range(2):
        policy_loss = value_loss = torch.zeros(())
        for n, (prompt, completion) in enumerate(drawn):
            logps, values = plain_logps(policy, prompt, completion), plain_values(value_model, prompt, completion)
            for t in range(len(completion)):
                ratio = (logps[t] - rollouts.logps[n, t]).exp()
                policy_loss = policy_loss - torch.minimum(
                    ratio * advantages[n][t], ratio.clamp(0.8, 1.2) * advantages[n][t]
                )
                old = rollouts.values[n, t]
                near = old + (values[t] - old).clamp(-0.2, 0.2)
                value_loss = value_loss + 0.5 * torch.maximum(
                    (values[t] - returns[n][t]) ** 2, (near - returns[n][t]) ** 2
                )
        for optimizer in optimizers:
            optimizer.zero_grad()
        (policy_loss / num_tokens + 0.1 * value_loss / num_tokens).backward()
        for model, optimizer in zip((policy, value_model), optimizers, strict=True):
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()


class PtxRows(Data):
    """Rows of unequal length, two tokens of prompt each, and which of them were read."""

    def __init__(self, num_rows: int) -> None:
        super().__init__()
        self.drawn: list[int] = []
        for row in range(num_rows):
            self.add_tokens(str(row), [5 + row, 7], [[(11 * row + 3 * t) % 300 for t in range(3 + 5 * row % 17)]])

    def group(self, index: int) -> Group:
        self.drawn.append(index)
        return super().group(index)


def test_the_gradient_of_ptx_equals_a_plain_loop(models: tuple[Path, Path]) -> None:
    """Seven of nine rows, in microbatches; the temperature of rollouts has no part in it."""
    keys = {"batch_size": 7, "minibatch_size": 7, "ptx_coef": 0.3, "microbatch_tokens": 30, "temperature": 0.5}
    networks, *_ = opened(*models, **keys)
    ptx, noted = PtxRows(9), list[Any]()
    backward_ptx(networks, ptx, 0, 0, noted.append, where="here")
    found = [p.grad.clone() for p in networks.policy.parameters()]
    assert len(noted) > 1
    assert len(set(ptx.drawn)) == len(ptx.drawn) == 7

    networks.policy.zero_grad()
    total, num_tokens = torch.zeros(()), 0
    for row in ptx.drawn:
        prompt, (completion,) = super(PtxRows, ptx).group(row)
        total = total - plain_logps(networks.policy, prompt.tolist(), completion.tolist()).sum()
        num_tokens += len(completion)
    (0.3 * total / num_tokens).backward()
    for ours, parameter in zip(found, networks.policy.parameters(), strict=True):
        assert (ours - parameter.grad).norm() <= 1e-5 * parameter.grad.norm()
    losses = torch.cat([terms.metrics["loss/ptx"] for terms in noted])
    assert losses.mean().item() == pytest.approx(total.item() / num_tokens, rel=1e-5)


@pytest.mark.parametrize(("last", "num_rows"), [(3, 16), (2, 64)])
def test_ptx_takes_every_row_before_any_again(last: int, num_rows: int, models: tuple[Path, Path]) -> None:
    """Four epochs of two steps. A last batch of two prompts has fewer updates than one of three."""
    keys = {"batch_size": 3, "minibatch_size": 2, "num_inner_epochs": 2, "ptx_coef": 0.1}
    networks, chat, prompts, _ = opened(*models, **keys)
    learners, ptx = make_learners(networks), PtxRows(num_rows)
    for step in range(8):
        batch = range(3, 3 + last) if step % 2 else range(3)
        rollouts = roll_out(networks, chat, prompts, batch, seed=[0, step], num_samples=1)
        targets = aim(rollouts, torch.zeros(len(batch)), networks.settings, kl_coef=KL_COEF)
        update(networks, learners, rollouts, targets, ptx=ptx, step=step, seed=0, rate=1.0, where="")
    assert len(ptx.drawn) == 4 * 2 * 2 * (2 + (2 if last == 3 else 1))
    for start in range(0, len(ptx.drawn), num_rows):
        part = ptx.drawn[start : start + num_rows]
        assert len(set(part)) == len(part)


@pytest.mark.parametrize("value", ["separate", "joint"])
def test_at_the_first_update_every_ratio_is_1_and_the_kl_is_0(value: str, models: tuple[Path, Path]) -> None:
    networks, chat, prompts, source = opened(*models, value=value)
    rollouts = roll_out(networks, chat, prompts, range(6), seed=[0, 0], num_samples=1)
    scores = source.score(rollouts)
    targets = aim(rollouts, scores, networks.settings, kl_coef=KL_COEF)
    assert rollouts.kl.abs().max() <= 1e-5
    found: list[Any] = []
    backward(networks, rollouts, targets, range(6), found.append, where="here")
    assert torch.allclose(torch.cat([terms.metrics["policy/ratio"] for terms in found]), torch.ones(()), atol=1e-5)
    assert not torch.cat([terms.metrics["policy/clipfrac"] for terms in found]).any()
    metrics = objective_metrics(rollouts, scores, targets, kl_coef=KL_COEF, has_values=True)
    assert metrics["objective/rlhf_reward"] == pytest.approx(metrics["objective/scores"], abs=1e-5)


def test_a_value_model_of_its_own_may_have_a_learning_rate_of_its_own(models: tuple[Path, Path]) -> None:
    networks, *_ = opened(*models, learning_rate=1e-3, value_learning_rate=5e-3)
    assert {name: learner.learning_rate for name, learner in make_learners(networks).items()} == {
        "policy": 1e-3,
        "value": 5e-3,
    }


def test_a_step_of_a_single_token_has_finite_metrics(models: tuple[Path, Path]) -> None:
    networks, chat, prompts, source = opened(*models, max_tokens=1)
    rollouts = roll_out(networks, chat, prompts, [0], seed=[0, 0], num_samples=1)
    scores = source.score(rollouts)
    targets = aim(rollouts, scores, networks.settings, kl_coef=KL_COEF)
    metrics = objective_metrics(rollouts, scores, targets, kl_coef=KL_COEF, has_values=True)
    assert all(math.isfinite(value) for value in metrics.values())


def test_padding_changes_neither_targets_nor_metrics(models: tuple[Path, Path]) -> None:
    networks, chat, prompts, source = opened(*models)
    rollouts = some_rollouts(networks, chat, prompts)
    wide = rollouts._replace(
        completion_mask=torch.nn.functional.pad(rollouts.completion_mask, (0, 5)),
        **{
            name: torch.nn.functional.pad(getattr(rollouts, name), (0, 5), value=0.0)
            for name in ("sampler_logps", "logps", "ref_logps", "values")
        },
    )
    scores = source.score(rollouts)
    narrow_targets, wide_targets = (aim(each, scores, networks.settings, kl_coef=KL_COEF) for each in (rollouts, wide))
    for a, b in zip(narrow_targets, wide_targets, strict=True):
        assert torch.allclose(a, b[:, : a.shape[1]], atol=1e-6)
        assert not b[:, a.shape[1] :].any()
    found = [
        objective_metrics(each, scores, targets, kl_coef=KL_COEF, has_values=True)
        for each, targets in ((rollouts, narrow_targets), (wide, wide_targets))
    ]
    assert found[0] == pytest.approx(found[1], abs=1e-6)


def test_the_loss_of_a_minibatch_does_not_depend_on_its_microbatches(models: tuple[Path, Path]) -> None:
    gradients = []
    for tokens in (10_000, 40):
        networks, chat, prompts, source = opened(*models, microbatch_tokens=tokens, value="joint", entropy_coef=0.1)
        rollouts = some_rollouts(networks, chat, prompts)
        targets = aim(rollouts, source.score(rollouts), networks.settings, kl_coef=KL_COEF)
        backward(networks, rollouts, targets, range(6), lambda terms: None, where="here")
        gradients.append(torch.cat([p.grad.flatten() for p in networks.parameters["policy"].values()]))
    assert (gradients[0] - gradients[1]).norm() <= 1e-5 * gradients[0].norm()


@pytest.mark.parametrize("value", ["separate", "joint"])
def test_the_pass_over_rollouts_that_fit_is_their_first_update_s_too(value: str, models: tuple[Path, Path]) -> None:
    gradients, passes = [], list[Any]()
    for keep_graph in (True, False):
        networks, chat, prompts, source = opened(*models, value=value, entropy_coef=0.1)
        networks.policy.base_model.register_forward_hook(lambda *found: passes.append(found))
        rollouts = some_rollouts(networks, chat, prompts, keep_graph=keep_graph)
        targets = aim(rollouts, source.score(rollouts), networks.settings, kl_coef=KL_COEF)
        passes.clear()
        backward(networks, rollouts, targets, range(6), lambda terms: None, where="here", ahead=rollouts.ahead)
        assert len(passes) == (0 if keep_graph else 1)
        gradients.append([p.grad.clone() for own in networks.parameters.values() for p in own.values()])
    for ahead, again in zip(*gradients, strict=True):
        assert (ahead - again).norm() <= 1e-5 * again.norm()


def test_no_graph_is_kept_of_rollouts_beyond_a_microbatch(models: tuple[Path, Path]) -> None:
    networks, chat, prompts, _ = opened(*models, microbatch_tokens=40)
    assert some_rollouts(networks, chat, prompts, keep_graph=True).ahead == ()


def test_the_entropy_bonus_raises_the_entropy(models: tuple[Path, Path]) -> None:
    """Its gradient alone: advantages are 0 and there is no value function."""
    networks, chat, prompts, _ = opened(*models, entropy_coef=1.0, advantages="policy-gradient")
    rollouts = some_rollouts(networks, chat, prompts)
    nothing = torch.zeros_like(rollouts.logps)
    targets = aim(rollouts, torch.zeros(6), networks.settings, kl_coef=0.0)._replace(advantages=nothing)
    means = [
        update(networks, make_learners(networks), rollouts, targets, ptx=None, step=n, seed=0, rate=1.0, where="")
        for n in range(2)
    ]
    assert means[1]["policy/entropy"] > means[0]["policy/entropy"] + 0.01


def test_a_completion_without_an_end_pays_and_scores_stay_within_their_bounds() -> None:
    raw, has_ended = torch.tensor([3.0, -3.0, 0.5]), torch.tensor([True, False, False])
    settings = ppo_settings(missing_eos_penalty=0.25, cliprange_reward=2.0)
    assert shaped_scores(raw, has_ended, settings).tolist() == [2.0, -2.25, 0.25]


def test_baselines_give_every_token_its_completions_advantage(models: tuple[Path, Path]) -> None:
    networks, chat, prompts, _ = opened(*models, advantages="rloo", num_samples=2)
    rollouts = some_rollouts(networks, chat, prompts)
    assert networks.value_model is None
    scores = torch.arange(12.0) ** 2
    targets = aim(rollouts, scores, networks.settings, kl_coef=KL_COEF)
    whole = scores - KL_COEF * rollouts.kl
    for n in range(12):
        length = int(rollouts.completion_mask[n].sum())
        expected = (whole[n] - whole[n ^ 1]).item()  # the other sample of the prompt
        assert targets.advantages[n, :length].tolist() == pytest.approx([expected] * length, abs=1e-4)
        assert not targets.advantages[n, length:].any()


def test_a_step_ends_early_when_the_policy_has_moved_too_far(models: tuple[Path, Path]) -> None:
    counts = []
    for bound in (None, 1e-6):
        networks, chat, prompts, source = opened(*models, num_inner_epochs=4, minibatch_size=6, max_approxkl=bound)
        rollouts = some_rollouts(networks, chat, prompts)
        targets = aim(rollouts, source.score(rollouts), networks.settings, kl_coef=KL_COEF)
        learners = make_learners(networks)
        done = update(networks, learners, rollouts, targets, ptx=None, step=0, seed=0, rate=1.0, where="")
        counts.append(done["num_updates"])
    assert counts == [4, 1]  # the first update sees no distance yet


def test_minibatches_take_every_prompt_once_an_epoch_in_a_new_order() -> None:
    settings = ppo_settings(num_inner_epochs=2, minibatch_size=4)
    found = list(minibatches(10, settings, seed=[1, 2]))
    assert [len(part) for part in found] == [4, 4, 2] * 2
    epochs = [[row for part in parts for row in part] for parts in (found[:3], found[3:])]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(10))
    assert epochs[0] != epochs[1]
    assert found == list(minibatches(10, settings, seed=[1, 2]))
    assert found != list(minibatches(10, settings, seed=[1, 3]))


def test_a_completion_depends_on_its_seed_and_not_on_its_batch(models: tuple[Path, Path]) -> None:
    networks, chat, prompts, _ = opened(*models)
    many = roll_out(networks, chat, prompts, [0, 1, 2], seed=[5, 1], num_samples=2)
    one = roll_out(networks, chat, prompts, [0], seed=[5, 1], num_samples=1)
    later = roll_out(networks, chat, prompts, [0, 1, 2], seed=[5, 2], num_samples=2)
    assert one.texts[0] == many.texts[0]
    assert len(set(many.texts)) == 6
    assert many.texts != later.texts
    assert draw_seed(1, 23) != draw_seed(12, 3)


def test_rollouts_after_an_update_are_those_of_the_new_weights(models: tuple[Path, Path]) -> None:
    """A prefix kept from before it would show as a distance between the sampler and the policy."""
    networks, chat, prompts, source = opened(*models, learning_rate=1e-2)
    for step in range(2):
        rollouts = roll_out(networks, chat, prompts, range(6), seed=[0, step], num_samples=1)
        assert (rollouts.logps - rollouts.sampler_logps).abs().max() < 1e-4
        targets = aim(rollouts, source.score(rollouts), networks.settings, kl_coef=KL_COEF)
        update(networks, make_learners(networks), rollouts, targets, ptx=None, step=step, seed=0, rate=1.0, where="")
    assert rollouts.kl.abs().max() > 0.1
