"""Training states on disk: each in a folder of its own, written beside and renamed, found whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.dataset_folder import file_sha256
from pipeline.errors import ResourceError
from pipeline.records import canonical, digest
from pipeline.store import io_errors, make_folder, sync_folder, write_atomic
from pipeline.train import ranks, shards

KEPT = 2
"""Newest checkpoints of a training that are kept, one in case the other is damaged."""
LATE_S = 900.0
"""Seconds without a checkpoint after which a training writes one, unless its settings say after how many steps."""

State = dict[str, Any]
Files = dict[str, str]
"""File name -> sha256."""


class Series:
    """The checkpoints of one training: `step-…` in a folder, written by the first process and called by all."""

    def __init__(self, work: Path) -> None:
        self.work, self.folder = work, work / "checkpoints"
        self._step, self._files = 0, Files()
        self._saved_at = time.monotonic()

    @property
    def is_late(self) -> bool:
        return time.monotonic() - self._saved_at >= LATE_S

    def place(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def save(self, state: State, tensors: dict[str, dict[str, Tensor]]) -> None:
        """After `state["step"]`. Tensors that are there already are not written again: a step has but one outcome."""
        step = state["step"]
        if step == self._step:
            ranks.first(lambda: _write_state(self.place(step), state, self._files))
        else:
            self._files = write(self.place(step), state, tensors)
            ranks.first(lambda: prune(self.folder, keep=KEPT))
        self._step, self._saved_at = step, time.monotonic()

    def resume(self, warn: Callable[[str], None]) -> Checkpoint | None:
        """The newest whole one."""
        path = ranks.first(lambda: newest(self.folder, warn))
        if path is None:
            return None
        found = ranks.together(lambda: require(path, training=self.work))
        self._step, self._files = found.state["step"], found.files
        return found


def write(folder: Path, state: State, tensors: dict[str, dict[str, Tensor]]) -> Files:
    """As `save`, of tensors that may be divided over the processes; all of them call it."""
    complete = {name: shards.whole(named) for name, named in tensors.items()}
    return ranks.first(lambda: save(folder, state, complete))


def save(folder: Path, state: State, tensors: dict[str, dict[str, Tensor]]) -> Files:
    """Writes the folder as a whole. tensors: file name -> named tensors. Raises ResourceError, nothing of it left."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    make_folder(folder.parent)
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        make_folder(temporary)
        files = Files()
        for name, named in tensors.items():
            path = temporary / f"{name}.safetensors"
            save_tensors(path, named)
            files[path.name] = file_sha256(path)
        _write_state(temporary, state, files)
        with io_errors(folder):
            shutil.rmtree(folder, ignore_errors=True)
            os.rename(temporary, folder)
            sync_folder(folder.parent)
        return files
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _write_state(folder: Path, state: State, files: Files) -> None:
    body = {"state": state, "files": files}
    write_atomic(folder / "state.json", canonical({**body, "sha256": digest(body)}) + b"\n")


def save_tensors(path: Path, named: dict[str, Tensor]) -> None:
    """Writes a safetensors file, durably."""
    with io_errors(path):
        save_file({name: tensor.detach().contiguous().cpu() for name, tensor in named.items()}, path)
        with path.open("rb") as file:
            os.fsync(file.fileno())


class Checkpoint(NamedTuple):
    """tensors: reads one of its files, by name."""

    state: State
    tensors: Callable[[str], dict[str, Tensor]]
    files: Files


def load(folder: Path) -> Checkpoint | None:
    """None if it is not whole."""
    try:
        content = json.loads((folder / "state.json").read_bytes())
        body = {"state": content["state"], "files": content["files"]}
        if content["sha256"] != digest(body):
            return None
        if any(file_sha256(folder / name) != known for name, known in content["files"].items()):
            return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return Checkpoint(content["state"], lambda name: load_file(folder / f"{name}.safetensors"), content["files"])


def require(folder: Path, *, training: Path) -> Checkpoint:
    """A checkpoint that must be whole; ResourceError if it is not. training: the folder of all its work."""
    found = load(folder)
    if found is None:
        raise ResourceError(f"{folder}: is not whole any more; delete {training} and train again")
    return found


def weights_of(step: int, places: Mapping[Path, str], warn: Callable[[str], None]) -> dict[str, Tensor] | None:
    """Of the first place that is whole and of this step; what is damaged is named. places: folder -> file."""

    def look() -> Path | None:
        for place in places:
            found = load(place)
            if found and found.state["step"] == step:
                return place
            if place.exists():
                warn(f"{place}: does not hold the whole weights of step {step} any more")
        return None

    path = ranks.first(look)
    if path is None:
        return None
    return ranks.together(lambda: require(path, training=path.parent)).tensors(places[path])


def newest(folder: Path, warn: Callable[[str], None]) -> Path | None:
    """The newest whole checkpoint in a folder of `step-…` folders; the others that come before it are named."""
    for path in sorted(folder.glob("step-*"), reverse=True):
        if load(path):
            return path
        warn(f"{path}: this checkpoint is not whole and is left out; going back to an older one")
    return None


def prune(folder: Path, *, keep: int) -> None:
    for path in sorted(folder.glob("step-*"))[:-keep]:
        shutil.rmtree(path, ignore_errors=True)
