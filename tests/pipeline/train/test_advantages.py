"""The arithmetic of PPO by hand, and against the sums of the papers written out."""

from __future__ import annotations

import math

import pytest
import torch

from pipeline.train.advantages import (
    adapted_kl_coef,
    generalised_advantages,
    group_relative,
    kl_estimates,
    leave_one_out,
    returns_to_go,
    token_rewards,
    whiten,
)

MASK = torch.tensor([[True, True, True], [True, True, False]])


def test_kl_estimators_by_hand() -> None:
    logps, ref_logps = torch.tensor([math.log(0.5), math.log(0.2)]), torch.tensor([math.log(0.25), math.log(0.4)])
    k1 = kl_estimates(logps, ref_logps, estimator="k1")
    assert k1.tolist() == pytest.approx([math.log(2), -math.log(2)])
    # r - 1 - log r with r = reference / policy: 0.5 - 1 + log 2, and 2 - 1 - log 2.
    k3 = kl_estimates(logps, ref_logps, estimator="k3")
    assert k3.tolist() == pytest.approx([0.5 - 1 + math.log(2), 1 - math.log(2)], rel=1e-5)


def test_both_kl_estimators_average_to_the_kl_of_the_distributions() -> None:
    policy, reference = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.3, 0.3, 0.4])
    exact = sum(p * math.log(p / q) for p, q in zip(policy.tolist(), reference.tolist(), strict=True))
    for estimator in ("k1", "k3"):
        found = kl_estimates(policy.log(), reference.log(), estimator=estimator)
        assert float((policy * found).sum()) == pytest.approx(exact, rel=1e-5)


def test_the_score_stands_at_the_last_real_token_and_the_penalty_at_every_one() -> None:
    kl = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 99.0]])
    rewards = token_rewards(torch.tensor([10.0, 20.0]), kl, MASK, kl_coef=0.1)
    assert torch.allclose(rewards, torch.tensor([[-0.1, -0.2, 9.7], [-0.4, 19.5, 0.0]]))


def test_advantages_by_hand() -> None:
    """gamma 0.5, lam 0.5, so each step back weighs what follows by a quarter."""
    rewards, values = torch.tensor([[1.0, 0.0, 2.0]]), torch.tensor([[0.5, 1.0, 4.0]])
    found = generalised_advantages(rewards, values, torch.ones(1, 3, dtype=torch.bool), gamma=0.5, lam=0.5)
    # deltas: 1 + 0.5 - 0.5 = 1; 0 + 2 - 1 = 1; 2 - 4 = -2. Backwards: -2; 1 - 0.5 = 0.5; 1 + 0.125 = 1.125.
    assert found.advantages.tolist() == [[1.125, 0.5, -2.0]]
    assert found.returns.tolist() == [[1.625, 1.5, 2.0]]


def written_out(rewards: list[float], values: list[float], gamma: float, lam: float) -> list[float]:
    """Equation 16 as its double sum."""
    length, after = len(rewards), [*values, 0.0]
    deltas = [rewards[t] + gamma * after[t + 1] - values[t] for t in range(length)]
    return [sum((gamma * lam) ** n * deltas[t + n] for n in range(length - t)) for t in range(length)]


def test_advantages_are_the_papers_sum_for_rows_of_unequal_length_whatever_stands_in_the_padding() -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = [1, 4, 7, 3]
    mask = torch.arange(7) < torch.tensor(lengths)[:, None]
    rewards, values = torch.randn(2, 4, 7, generator=generator)
    found = generalised_advantages(rewards, values, mask, gamma=0.9, lam=0.8)
    other = torch.where(mask, 0.0, 1e6)
    again = generalised_advantages(rewards + other, values - other, mask, gamma=0.9, lam=0.8)
    assert torch.equal(found.advantages, again.advantages)
    for n, length in enumerate(lengths):
        expected = written_out(rewards[n, :length].tolist(), values[n, :length].tolist(), 0.9, 0.8)
        assert found.advantages[n, :length].tolist() == pytest.approx(expected, abs=1e-5)
        assert not found.advantages[n, length:].any()


def test_without_a_value_function_the_advantage_is_the_sum_of_the_rewards_to_come() -> None:
    found = returns_to_go(torch.tensor([[1.0, 2.0, 4.0], [1.0, 2.0, 99.0]]), MASK, gamma=1.0)
    assert found.tolist() == [[7.0, 6.0, 4.0], [3.0, 2.0, 0.0]]


def test_whitening_ignores_padding() -> None:
    values = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 1e6]])
    found = whiten(values, MASK)
    # Mean 3 and variance 2 of 1, 2, 3, 4, 5.
    expected = [(n - 3) / math.sqrt(2) for n in (1, 2, 3, 4, 5)]
    assert found[MASK].tolist() == pytest.approx(expected)
    assert found[~MASK].tolist() == [0.0]


def test_whitening_without_centring_leaves_the_mean() -> None:
    values = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 1e6]])
    found = whiten(values, MASK, center=False)[MASK]
    assert float(found.mean()) == pytest.approx(3.0)
    assert float(found.std(correction=0)) == pytest.approx(1.0)


def test_leave_one_out_by_hand() -> None:
    found = leave_one_out(torch.tensor([1.0, 2.0, 6.0, 0.0, 0.0, 3.0]), num_samples=3)
    assert found.tolist() == [-3.0, -1.5, 4.5, -1.5, -1.5, 3.0]


def test_group_relative_advantages_by_hand() -> None:
    found = group_relative(torch.tensor([1.0, 3.0, 5.0, 5.0]), num_samples=2)
    # Mean 2 and sample deviation sqrt(2); equal returns give nothing.
    assert found.tolist() == pytest.approx([-1 / math.sqrt(2), 1 / math.sqrt(2), 0.0, 0.0], abs=1e-4)


@pytest.mark.parametrize(("kl", "expected"), [(6.0, 0.2), (6.6, 0.2 * 1.01), (60.0, 0.2 * 1.02), (0.0, 0.2 * 0.98)])
def test_the_controller_follows_the_error_and_no_more_than_a_fifth_of_it(kl: float, expected: float) -> None:
    found = adapted_kl_coef(0.2, kl, target=6.0, horizon=1000, num_episodes=100)
    assert found == pytest.approx(expected)
