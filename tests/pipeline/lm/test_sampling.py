"""Drawing tokens: the distribution, the nucleus, the numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pipeline.lm.sampling import sample, sampling, uniforms

CPU = torch.device("cpu")


def draws(probs: list[float], count: int, *, temperature: float = 1.0, top_p: float = 1.0) -> list[float]:
    """Shares of each token over `count` seeds."""
    logits = torch.tensor([probs]).log().expand(count, -1)
    params = sampling([temperature] * count, [top_p] * count, list(range(count)), device=CPU)
    tokens, _ = sample(logits, params, [0] * count)
    return [(tokens == n).float().mean().item() for n in range(len(probs))]


def test_tokens_come_in_their_share() -> None:
    assert draws([0.5, 0.3, 0.2], 20_000) == pytest.approx([0.5, 0.3, 0.2], abs=0.015)


def test_the_temperature_sharpens() -> None:
    # Squared and normalised: 0.25, 0.09, 0.04 over 0.38.
    assert draws([0.5, 0.3, 0.2], 20_000, temperature=0.5) == pytest.approx([0.658, 0.237, 0.105], abs=0.015)


def test_top_p_keeps_the_smallest_set_that_reaches_it() -> None:
    assert draws([0.2, 0.5, 0.3], 20_000, top_p=0.7) == pytest.approx([0.0, 0.625, 0.375], abs=0.015)
    assert draws([0.2, 0.5, 0.3], 100, top_p=0.01) == [0.0, 1.0, 0.0]


def test_a_token_of_probability_zero_never_comes() -> None:
    assert draws([0.0, 1.0, 0.0], 5_000) == [0.0, 1.0, 0.0]


def test_greedy_and_drawn_rows_mix() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0]] * 2)
    params = sampling([0.0, 1.0], [1.0, 1.0], [0, 1], device=CPU)
    tokens, logps = sample(logits, params, [0, 0])
    assert tokens[0] == 1
    assert logps[0].item() == pytest.approx(torch.log_softmax(logits[0], -1)[1].item())


def test_numbers_are_even_and_differ_by_seed_and_step() -> None:
    seeds, steps = np.meshgrid(np.arange(300, dtype=np.uint64), np.arange(300, dtype=np.uint64))
    numbers = uniforms(seeds.ravel(), steps.ravel())
    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert len(np.unique(numbers)) > 0.99 * len(numbers)
    shares = np.histogram(numbers, bins=10, range=(0, 1))[0] / len(numbers)
    assert shares == pytest.approx([0.1] * 10, abs=0.005)
    assert (
        abs(np.corrcoef(numbers.reshape(300, 300)[:, :-1].ravel(), numbers.reshape(300, 300)[:, 1:].ravel())[0, 1])
        < 0.01
    )
