"""Which evaluation was the best so far, by a metric that the settings name."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from pipeline.errors import UsageError


class Best:
    """The best evaluation, and how many came after it.

    rule: `min METRIC` or `max METRIC`, such as `min eval/loss`. step: 0 if there was none. stale: evaluations since.
    """

    def __init__(self, rule: str) -> None:
        direction, _, self.metric = rule.partition(" ")
        self.sign = 1 if direction == "min" else -1
        self.step = self.stale = 0
        self.metrics: dict[str, float] = {}

    def check(self, names: Collection[str]) -> None:
        """Raises UsageError if an evaluation with these metrics lacks the one that decides."""
        if self.metric not in names:
            raise UsageError(f"select: an evaluation has no {self.metric}; take one of {', '.join(sorted(names))}")

    def take(self, step: int, metrics: dict[str, float]) -> bool:
        """Whether this evaluation is better than all before it."""
        is_better = not self.step or self.sign * metrics[self.metric] < self.sign * self.metrics[self.metric]
        self.stale = 0 if is_better else self.stale + 1
        if is_better:
            self.step, self.metrics = step, metrics
        return is_better

    def pass_over(self) -> None:
        """An evaluation that cannot be the best."""
        self.stale += 1

    @property
    def state(self) -> dict[str, Any]:
        return {"step": self.step, "stale": self.stale, "metrics": self.metrics}

    @state.setter
    def state(self, state: dict[str, Any]) -> None:
        self.step, self.stale, self.metrics = state["step"], state["stale"], state["metrics"]
