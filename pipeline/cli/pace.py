"""What a person sees while a training runs: a bar on a terminal, a plain line every 30 s elsewhere."""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from pipeline.cli.common import Console
from pipeline.cli.progress import LINE_EVERY_S, duration

if TYPE_CHECKING:
    from pipeline.train.loop import Progress

PACE_STEPS = 50
"""Over so many steps the speed is measured."""


@contextmanager
def watching(console: Console) -> Iterator[Callable[[Progress], None]]:
    """A bar on a terminal, a line every 30 s elsewhere."""
    if console.quiet:
        yield lambda progress: None
    elif not sys.stderr.isatty() or os.environ.get("TERM") in ("dumb", "unknown"):
        pace, last = Pace(), [time.monotonic()]

        def line(progress: Progress) -> None:
            told = pace.describe(progress)
            if time.monotonic() - last[0] >= LINE_EVERY_S:
                last[0] = time.monotonic()
                console.say(f"step {progress.step} of {progress.total}; {told}")

        yield line
    else:
        from rich.console import Console as RichConsole
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
        from rich.progress import Progress as Bar

        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}", markup=False))
        with Bar(*columns, console=RichConsole(stderr=True)) as bar:
            pace, task = Pace(), bar.add_task("", total=None)

            def draw(progress: Progress) -> None:
                bar.update(task, completed=progress.step, total=progress.total, description=pace.describe(progress))

            yield draw


class Pace:
    """What a training does in a second, from its last steps; what was done before a resume does not count."""

    def __init__(self) -> None:
        self.marks: deque[tuple[float, Progress]] = deque(maxlen=PACE_STEPS)

    def describe(self, progress: Progress) -> str:
        """Loss and, from the second step on, tokens a second and the time left."""
        self.marks.append((time.monotonic(), progress))
        (began, first), (now, last) = self.marks[0], self.marks[-1]
        loss = f"loss {progress.line['loss']:.4f}"
        if first is last:
            return loss
        rate = (last.tokens - first.tokens) / (now - began)
        left = (last.total - last.step) * (now - began) / (last.step - first.step)
        return f"{loss}, {rate:.0f} tokens/s, about {duration(left)} left"
