"""Training states on disk: each in a folder of its own, written beside and renamed, found whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.dataset_folder import file_sha256
from pipeline.errors import ResourceError
from pipeline.records import canonical, digest
from pipeline.store import io_errors, make_folder, sync_folder, write_atomic

State = dict[str, Any]


def save(folder: Path, state: State, tensors: dict[str, dict[str, Tensor]]) -> None:
    """Writes the folder as a whole. tensors: file name -> named tensors. Raises ResourceError, nothing of it left."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    make_folder(folder.parent)
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        make_folder(temporary)
        files = {}
        for name, named in tensors.items():
            path = temporary / f"{name}.safetensors"
            save_tensors(path, named)
            files[path.name] = file_sha256(path)
        body = {"state": state, "files": files}
        write_atomic(temporary / "state.json", canonical({**body, "sha256": digest(body)}) + b"\n")
        with io_errors(folder):
            shutil.rmtree(folder, ignore_errors=True)
            os.rename(temporary, folder)
            sync_folder(folder.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


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
    return Checkpoint(content["state"], lambda name: load_file(folder / f"{name}.safetensors"))


def require(folder: Path, *, training: Path, step: int | None = None) -> Checkpoint:
    """A checkpoint that must be whole, and of this step; ResourceError if not. training: the folder of all its work."""
    found = load(folder)
    if found is None or step not in (None, found[0]["step"]):
        raise ResourceError(f"{folder}: is not whole any more; delete {training} and train again")
    return found


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
