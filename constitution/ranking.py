"""From pairwise probabilities to scores and an order.

Bradley-Terry: P(a better than b) = sigmoid(score_a - score_b), scores in log-odds (nats).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

ALL_PAIRS_UP_TO = 6
PRIOR = 3.0
"""Standard deviation of the scores' Gaussian prior in log-odds: one certain win between two puts them 2.1 apart."""


def schedule(num: int) -> tuple[tuple[int, int], ...]:
    """Which of `num` candidates meet: pairs (a, b) with a < b, sorted.

    All pairs up to 6 candidates. Above, the circulant graph of the distances 1, 2, 4, … up to num / 2 on a ring:
    connected, the same number of meetings for everyone, fewer than num * log2(num) pairs.
    """
    if num <= ALL_PAIRS_UP_TO:
        return tuple((a, b) for a in range(num) for b in range(a + 1, num))
    distances = [1 << power for power in range(num.bit_length()) if 1 << power <= num // 2]
    pairs = {tuple(sorted((a, (a + distance) % num))) for a in range(num) for distance in distances}
    return tuple(sorted((a, b) for a, b in pairs))


def bradley_terry(num: int, comparisons: Sequence[tuple[int, int, float]], *, prior: float = PRIOR) -> list[float]:
    """Scores of `num` candidates in log-odds, mean 0, rounded to 1e-9 so that equal evidence gives equal scores.

    comparisons: (a, b, p) with p = P(a better than b) in [0, 1], soft or hard; a pair may come several times.
    prior: standard deviation, in log-odds, of an independent Gaussian prior with mean 0 on each score; it keeps
    certain verdicts finite, and makes the log posterior strictly concave, so that Newton's method finds its one
    maximum, whose mean is 0:

        sum over comparisons of p ln s(d) + (1 - p) ln s(-d)  -  sum over candidates of score^2 / (2 prior^2)
        with d = score_a - score_b, s the sigmoid

    A candidate without comparisons stays at 0; see `connected`.
    """
    for a, b, p in comparisons:
        if not (0 <= a < num and 0 <= b < num and a != b and 0.0 <= p <= 1.0):
            raise ValueError(f"comparison ({a}, {b}, {p}): give two of {num} candidates and a probability")
    precision = 1.0 / (prior * prior)
    scores = [0.0] * num
    for _ in range(100):
        gradient, curvature = _derivatives(scores, comparisons, precision)
        step = _solve(curvature, gradient)
        # A bounded step cannot overshoot into the sigmoid's flat ends, where Newton's steps would grow without limit.
        scale = min(1.0, 2.0 / max(map(abs, step), default=1.0)) if any(step) else 1.0
        scores = [score + scale * change for score, change in zip(scores, step, strict=True)]
        if max(map(abs, step), default=0.0) < 1e-12:
            break
    return [round(score, 9) + 0.0 for score in scores]


def connected(num: int, pairs: Iterable[tuple[int, int]]) -> list[int]:
    """The largest set of candidates that comparisons connect, sorted; of equal ones that with the lowest index."""
    group = list(range(num))
    for a, b in pairs:
        joined, left = group[a], group[b]
        if joined != left:
            group = [joined if g == left else g for g in group]
    members: dict[int, list[int]] = {}
    for candidate, g in enumerate(group):
        members.setdefault(g, []).append(candidate)
    return max(members.values(), key=len, default=[])


def order(scores: Sequence[float], keys: Sequence[Any]) -> list[int]:
    """Each candidate's rank from 1, the highest score first, equal scores by their keys, the smallest first."""
    best_first = sorted(range(len(scores)), key=lambda i: (-scores[i], keys[i]))
    ranks = [0] * len(scores)
    for rank, candidate in enumerate(best_first, start=1):
        ranks[candidate] = rank
    return ranks


def _derivatives(
    scores: Sequence[float], comparisons: Sequence[tuple[int, int, float]], precision: float
) -> tuple[list[float], list[list[float]]]:
    """Gradient (N,) of the log posterior and its negative Hessian (N, N), which is positive definite."""
    num = len(scores)
    gradient = [-precision * score for score in scores]
    curvature = [[precision if i == j else 0.0 for j in range(num)] for i in range(num)]
    for a, b, p in comparisons:
        expected = _sigmoid(scores[a] - scores[b])
        gradient[a] += p - expected
        gradient[b] -= p - expected
        weight = expected * (1.0 - expected)
        curvature[a][a] += weight
        curvature[b][b] += weight
        curvature[a][b] -= weight
        curvature[b][a] -= weight
    return gradient, curvature


def _sigmoid(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x)) if x >= 0 else 1.0 - 1.0 / (1.0 + math.exp(x))


def _solve(matrix: list[list[float]], vector: list[float]) -> list[float]:
    """x with matrix @ x = vector for a positive definite matrix (N, N), by Gaussian elimination without pivoting."""
    num = len(vector)
    rows = [[*row, value] for row, value in zip(matrix, vector, strict=True)]
    for i in range(num):
        for j in range(i + 1, num):
            factor = rows[j][i] / rows[i][i]
            if factor:
                rows[j] = [below - factor * above for below, above in zip(rows[j], rows[i], strict=True)]
    solution = [0.0] * num
    for i in reversed(range(num)):
        rest = sum(rows[i][j] * solution[j] for j in range(i + 1, num))
        solution[i] = (rows[i][num] - rest) / rows[i][i]
    return solution
