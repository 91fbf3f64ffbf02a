"""What one run of one arm came to, and the tables and files made of many."""

from __future__ import annotations

import bisect
import csv
import itertools
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

STEADY = (0.1, 0.9)
"""The steady state lasts from the moment when the first share of all output tokens is done to that of the second."""


class Measured(NamedTuple):
    """One run. seconds: from its start to its end; rates: output tokens per second, steady_rate 0 where unknown.

    prompt_tokens, cached_tokens: of all requests; cached were found in the prefix cache.
    """

    part: str
    style: str
    round: int
    arm: str
    requests: int
    output_tokens: int
    seconds: float
    rate: float
    steady_rate: float
    prompt_tokens: int
    cached_tokens: int


class Timeline:
    """When which reply came, from the moment that this is made."""

    def __init__(self, *, in_bulk: bool = False) -> None:
        """in_bulk: replies come many at a time, so that no steady rate can be read from them."""
        self._in_bulk = in_bulk
        self._began = time.perf_counter()
        self._ended = 0.0
        self._replies: list[tuple[float, int]] = []
        self._prompt_tokens = self._cached_tokens = 0

    def add(self, prompt_tokens: int, output_tokens: int, cached_tokens: int) -> None:
        self._replies.append((time.perf_counter(), output_tokens))
        self._prompt_tokens += prompt_tokens
        self._cached_tokens += cached_tokens

    def end(self) -> None:
        self._ended = time.perf_counter()

    def measured(self, part: str, style: str, round_: int, arm: str) -> Measured:
        seconds = self._ended - self._began
        tokens = sum(count for _, count in self._replies)
        return Measured(
            part, style, round_, arm, len(self._replies), tokens, seconds, tokens / seconds,
            0.0 if self._in_bulk else self._steady_rate(),
            self._prompt_tokens, self._cached_tokens,
        )  # fmt: skip

    def _steady_rate(self) -> float:
        done = list(itertools.accumulate(count for _, count in self._replies))
        first, last = (bisect.bisect_left(done, share * done[-1]) for share in STEADY)
        return (done[last] - done[first]) / (self._replies[last][0] - self._replies[first][0])


def ratio(runs: Sequence[Measured], style: str, arm: str, other: str, what: str = "rate") -> float:
    """The median over the rounds of arm / other."""
    by_round = {(run.round, run.arm): getattr(run, what) for run in runs if run.style == style}
    rounds = sorted({number for number, name in by_round if name == arm})
    return statistics.median(by_round[number, arm] / by_round[number, other] for number in rounds)


def table(runs: Sequence[Measured]) -> str:
    """Markdown: medians of each arm, and the pipeline's ratios to it in the same rounds; round 0 is a trial."""
    lines = [
        "| style | arm | tokens/s | steady | prefix cache | pipeline ÷ arm: total | steady |",
        "|---|---|---|---|---|---|---|",
    ]
    runs = [run for run in runs if run.round]
    for style, arm in dict.fromkeys((run.style, run.arm) for run in runs):
        found = [run for run in runs if (run.style, run.arm) == (style, arm)]
        rate, steady = (statistics.median(getattr(run, what) for run in found) for what in ("rate", "steady_rate"))
        hits = sum(run.cached_tokens for run in found) / sum(run.prompt_tokens for run in found)
        cells = [style, arm, f"{rate:.0f}", f"{steady:.0f}" if steady else "", f"{hits:.0%}"]
        if arm == "pipeline":
            cells += ["", ""]
        else:
            cells.append(f"{ratio(runs, style, 'pipeline', arm):.3f}")
            cells.append(f"{ratio(runs, style, 'pipeline', arm, 'steady_rate'):.3f}" if steady else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def write(path: Path, runs: Sequence[Any], about: dict[str, Any]) -> None:
    """runs: named tuples of one kind. `path`.csv: a line a run; `path`.json: how they were made, and the runs."""
    with path.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(runs[0]._fields)
        writer.writerows([f"{cell:.6g}" if isinstance(cell, float) else cell for cell in run] for run in runs)
    content = {**about, "runs": [run._asdict() for run in runs]}
    path.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")
