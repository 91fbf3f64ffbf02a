"""Shares with their uncertainty."""

from __future__ import annotations

import math
from typing import NamedTuple

Z_95 = 1.959964


class Rate(NamedTuple):
    """hits of cases, with the 95 % interval [low, high] of Wilson 1927; all shares in [0, 1]."""

    hits: int
    cases: int
    share: float
    low: float
    high: float

    def __str__(self) -> str:
        if not self.cases:
            return "no cases"
        return f"{self.share:6.1%}  [{self.low:.1%}, {self.high:.1%}]  of {self.cases}"


def wilson(hits: int, cases: int) -> Rate:
    """The share of hits among cases; without cases everything is possible."""
    if cases == 0:
        return Rate(0, 0, 0.0, 0.0, 1.0)
    p, z = hits / cases, Z_95
    centre = p + z * z / (2 * cases)
    half = z * math.sqrt(p * (1 - p) / cases + z * z / (4 * cases * cases))
    scale = 1 + z * z / cases
    return Rate(hits, cases, p, max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale))
