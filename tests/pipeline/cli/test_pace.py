"""What is said while a training runs; the bar itself is looked at by eye."""

from __future__ import annotations

import pytest

from pipeline.cli import pace
from pipeline.cli.common import Console
from pipeline.train.loop import Progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time is what its only item says."""
    now = [1000.0]
    monkeypatch.setattr(pace.time, "monotonic", lambda: now[0])
    return now


def after(step: int, *, total: int = 100) -> Progress:
    return Progress(step, total, tokens=500 * step, line={"loss": 2.5})


def test_speed_and_time_left_are_those_of_this_call(clock: list[float]) -> None:
    """It went on from step 40: 10 steps and 5,000 tokens in 20 s, 50 steps to go."""
    told = pace.Pace()
    assert told.describe(after(40)) == "loss 2.5000"
    clock[0] += 20
    assert told.describe(after(50)) == "loss 2.5000, 250 tokens/s, about 2 min left"


def test_the_last_steps_count(clock: list[float]) -> None:
    told = pace.Pace()
    for step in range(1, 3 * pace.PACE_STEPS):
        clock[0] += 100 if step < pace.PACE_STEPS else 0.5
        said = told.describe(after(step, total=3 * pace.PACE_STEPS))
    assert "1000 tokens/s" in said


def test_a_log_gets_a_line_every_30_s(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with pace.watching(Console("train-sft", as_json=False, quiet=False)) as watch:
        for step in range(1, 101):
            clock[0] += 1
            watch(after(step))
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "step 30 of 100; loss 2.5000, 500 tokens/s, about 70 s left",
        "step 60 of 100; loss 2.5000, 500 tokens/s, about 40 s left",
        "step 90 of 100; loss 2.5000, 500 tokens/s, about 10 s left",
    ]
