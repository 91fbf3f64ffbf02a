"""How fast a run goes and when it will be done, from counts read now and then."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

WINDOW_S = 120.0
"""Rates are of this time up to now: long enough to be steady, short enough to follow the engine."""


class Counts(NamedTuple):
    """What has been counted up to a moment. at: seconds of a clock. done: records that this call has finished."""

    at: float
    done: int
    tokens_in: int
    tokens_out: int
    cached: int


class Rates(NamedTuple):
    """Per second. cached: share of the tokens in that were not computed again, None before there were any."""

    tokens_in: float
    tokens_out: float
    cached: float | None
    records: float

    def seconds_left(self, records: int) -> float | None:
        """Until so many more records are done; None while that cannot be known."""
        return records / self.records if self.records > 0 else None


class Meter:
    """Keeps the counts of the last `window_s` seconds, and those of the beginning."""

    def __init__(self, first: Counts, *, window_s: float = WINDOW_S) -> None:
        self._first = first
        self._recent = deque([first])
        self._window_s = window_s

    def read(self, now: Counts) -> Rates:
        """The rates up to `now`: of the window, but of records since the beginning where the window saw none."""
        self._recent.append(now)
        while len(self._recent) > 2 and self._recent[1].at <= now.at - self._window_s:
            self._recent.popleft()
        since = self._recent[0]
        seconds = max(now.at - since.at, 1e-9)
        tokens_in = now.tokens_in - since.tokens_in
        start = since if now.done > since.done else self._first
        return Rates(
            tokens_in / seconds,
            (now.tokens_out - since.tokens_out) / seconds,
            (now.cached - since.cached) / tokens_in if tokens_in else None,
            (now.done - start.done) / max(now.at - start.at, 1e-9),
        )
