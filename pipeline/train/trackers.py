"""Where a training's metrics go besides metrics.jsonl: TensorBoard, Weights & Biases, Trackio.

metrics.jsonl is the truth: a tracker gets its lines in order, each once, however often a training stops and goes on.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from pipeline.errors import UsageError
from pipeline.records import Line
from pipeline.store import io_errors, write_atomic

TENSORBOARD = "tensorboard"
"""Its folder, of event files, inside that of the model."""
PROJECT = "cai"
_INSTALL = {TENSORBOARD: "'constitutional-pipeline[tensorboard]'", "wandb": "wandb", "trackio": "trackio"}


class Tracker(Protocol):
    """sent: the last step that it knows, -1 before any."""

    sent: int

    def log(self, step: int, values: dict[str, float]) -> None: ...
    def close(self) -> None: ...


def check_installed(names: Sequence[str]) -> None:
    """Raises UsageError for a tracker that is not installed."""
    for name in names:
        if find_spec(name) is None:
            raise UsageError(f"run.trackers: {name} is not installed: pip install {_INSTALL[name]}")


@contextmanager
def following(
    names: Sequence[str], folder: Path, *, name: str, identity: str, settings: dict[str, Any]
) -> Iterator[Callable[[], None]]:
    """Gives what is to be called after every step: it brings the trackers up to the folder's metrics.jsonl.

    name: of the run there. identity: equal for the calls that go on with one training. settings: shown there.
    """
    with ExitStack() as held:
        trackers: list[Tracker] = []
        for each in names:
            opened: Tracker
            if each == TENSORBOARD:
                opened = _TensorBoard(folder / TENSORBOARD)
            else:
                opened = _Remote(each, folder / f"{each}.step", name=name, identity=identity, settings=settings)
            trackers.append(held.enter_context(closing(opened)))
        metrics = _Metrics(folder / "metrics.jsonl")

        def follow() -> None:
            for line in metrics.new_lines() if trackers else ():
                values = {key: value for key, value in line.items() if key not in ("step", "seconds")}
                for tracker in trackers:
                    if line["step"] > tracker.sent:
                        tracker.log(line["step"], values)
                        tracker.sent = line["step"]

        yield follow


class _Metrics:
    """The lines of metrics.jsonl that were not read yet."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._read = 0

    def new_lines(self) -> list[Line]:
        with self._path.open("rb") as file:
            file.seek(self._read)
            data = file.read()
        self._read += len(data)
        return [json.loads(line) for line in data.splitlines()]


class _TensorBoard:
    """Event files, written anew by every call, so that what a killed one wrote beyond its last checkpoint is gone."""

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        shutil.rmtree(folder, ignore_errors=True)
        self._folder = folder
        with io_errors(folder):
            self._writer: Any = SummaryWriter(str(folder))
        self.sent = -1

    def log(self, step: int, values: dict[str, float]) -> None:
        with io_errors(self._folder):
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)
            self._writer.flush()

    def close(self) -> None:
        with io_errors(self._folder):
            self._writer.close()


class _Remote:
    """wandb, or trackio, which has its interface. What was sent stays there; a file beside the work says how far."""

    def __init__(self, module: str, marker: Path, *, name: str, identity: str, settings: dict[str, Any]) -> None:
        self._module = import_module(module)
        self._marker = marker
        self.sent = int(marker.read_text()) if marker.exists() else -1
        own = {"id": identity} if module == "wandb" else {}
        self._run = self._module.init(project=PROJECT, name=name, config=settings, resume="allow", **own)

    def log(self, step: int, values: dict[str, float]) -> None:
        write_atomic(self._marker, str(step).encode())
        self._module.log(values, step=step)

    def close(self) -> None:
        self._module.finish()
