"""The folder that a training makes, and the one in which it works until then.

All work is done in `.NAME.training` beside the model's folder, which appears by one rename when it is complete.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config.settings import TrainSettings
from pipeline.errors import UsageError
from pipeline.lm.load import stored_dtype
from pipeline.lock import LOCK
from pipeline.records import digest
from pipeline.store import io_errors, make_folder, read_json, sync_folder, write_atomic
from pipeline.train.card import write_card
from pipeline.train.curves import draw_curves
from pipeline.train.lora import ADAPTER, merged, save_adapter
from pipeline.train.trackers import TENSORBOARD

if TYPE_CHECKING:
    from pipeline.train.stage import Job

JOURNAL = "journal"
"""The folder of a live judge's replies in that of the work; they are kept by what was asked, whatever the settings."""
_DESCRIPTION = "training.json"
_FREE = {"parallel", "microbatch_tokens", "gradient_checkpointing", "save_every"}
"""Settings that change how a training computes, but no result."""


def work_path(out: Path) -> Path:
    """Where a model is while it is made."""
    return out.with_name(f".{out.name}.training")


def identity_of(trainer: str, settings: TrainSettings, inputs: Sequence[Any]) -> str:
    """Equal for trainings with the same result."""
    return digest([trainer, settings.model_dump(mode="json", exclude=_FREE), *inputs])


def check_out(out: Path, start: str, *, trainer: str) -> None:
    """Raises UsageError if a training into this folder would destroy something else than an older result of it."""
    check_folder(out)
    if not out.exists() or not any(out.iterdir()):
        return
    own = Path(start).resolve()
    if own.exists() and out.resolve() in (own, *own.parents):
        raise UsageError(f"{out}: training starts from the model in this folder; choose another name")
    found = read_json(out / _DESCRIPTION) if (out / _DESCRIPTION).exists() else {}
    if "trainer" not in found:
        raise UsageError(f"{out}: not empty, and no model that was trained here; choose another name")
    if found["trainer"] != trainer:
        raise UsageError(f"{out}: holds a model of train-{found['trainer']}; choose another name, or delete it")
    if strange := sorted(set(_files(out)) - set(found.get("files", _files(out)))):
        raise UsageError(f"{out}: has {strange[0]}, which no training put there; move it, or choose another name")


def check_folder(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out}: is a file, and what comes out is a folder; choose another name")


def published(out: Path, identity: str) -> dict[str, Any] | None:
    """The description of a finished folder that was made from the same inputs."""
    path = out / _DESCRIPTION
    found: dict[str, Any] = read_json(path) if path.exists() else {}
    return found if found.get("identity") == identity else None


def work_folder(out: Path, identity: str, say: Callable[[str], None]) -> Path:
    """The folder of work in progress; what was begun from other inputs is thrown away, but for paid replies."""
    folder = work_path(out)
    marker = folder / "identity"
    if (out / _DESCRIPTION).exists():
        say(f"{out}: was made from other inputs; it stays there until this training is done")
    if any(path.name != LOCK for path in folder.glob("*")) and not (marker.exists() and marker.read_text() == identity):
        say(f"{folder}: was begun with other inputs; starting afresh")
        _clear(folder)
    make_folder(folder)
    write_atomic(marker, identity.encode())
    return folder


def _clear(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir() and path.name != JOURNAL:
            shutil.rmtree(path)
        elif path.is_file() and path.name != LOCK:
            path.unlink()


def publish(
    model: Any,
    adapted: Any,
    tokenizer: Any,
    job: Job,
    folder: Path,
    description: dict[str, Any],
    *,
    extras: Sequence[str] = (),
) -> None:
    """Writes the model's folder, in the dtype of its start, and puts it in its place; the work in progress goes.

    adapted: what `attach` gave; then the model is the start with the adapter in its weights, and has it in a folder.
    extras: further files of the work in progress that go along.
    """
    ready, old = folder / "ready", folder / "old"
    shutil.rmtree(ready, ignore_errors=True)
    with io_errors(ready):
        if adapted:
            save_adapter(adapted, model, ready / ADAPTER)
            model = merged(job.start, ready / ADAPTER, like=model)
        model.to(stored_dtype(job.start)).save_pretrained(ready)
        tokenizer.save_pretrained(ready)
        for name in ("metrics.jsonl", *extras):
            shutil.copyfile(folder / name, ready / name)
        if TENSORBOARD in job.trackers and (folder / TENSORBOARD).exists():
            shutil.copytree(folder / TENSORBOARD, ready / TENSORBOARD)
        draw_curves(ready / "metrics.jsonl", ready / "curves.png")
        write_card(ready / "README.md", description)
        files = sorted([*_files(ready), _DESCRIPTION])
        write_atomic(ready / _DESCRIPTION, json.dumps({**description, "files": files}, indent=1).encode() + b"\n")
    check_out(job.out, job.start, trainer=description["trainer"])
    with io_errors(job.out):
        for path in ready.rglob("*"):
            _sync(path)
        if job.out.exists():
            os.rename(job.out, old)
        os.rename(ready, job.out)
        sync_folder(job.out.parent)
    shutil.rmtree(folder, ignore_errors=True)


def _files(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()]


def _sync(path: Path) -> None:
    if path.is_dir():
        sync_folder(path)
    else:
        with path.open("rb") as file:
            os.fsync(file.fileno())
