"""What the trainers share around the loop: rows in, a model folder out.

All work is done in `.NAME.training` beside the model's folder, which appears by one rename when it is complete.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from transformers import AutoConfig

from pipeline.config.settings import SplitSettings, TrainSettings
from pipeline.errors import IncompleteError, UsageError
from pipeline.lm.forward import prepare
from pipeline.lm.load import load, load_tokenizer, pick_device
from pipeline.lm.templates import Chat
from pipeline.records import digest
from pipeline.store import io_errors, make_folder, read_json, sync_folder, write_atomic
from pipeline.train import ranks, rows
from pipeline.train.batches import Data, steps_per_epoch, tokenise
from pipeline.train.card import write_card
from pipeline.train.curves import draw_curves
from pipeline.train.layouts import Kind
from pipeline.train.loop import Objective, Outcome, Progress, Task, compute_dtype, fit, silence_dropout
from pipeline.train.memory import Memory, measure
from pipeline.train.shards import fill, shard, skeleton


def _ignore(_: Any) -> None:
    """Nobody watches."""


@dataclass(frozen=True)
class Job:
    """What to train. start: a model folder or hub name. out: the folder to be made. shares: of `export.split`.

    made_from: name -> digest of what the data was made from, for the card.
    """

    sources: Sequence[rows.Source]
    start: str
    out: Path
    shares: SplitSettings = field(default_factory=SplitSettings)
    seed: int = 0
    device: str = "auto"
    made_from: dict[str, str] = field(default_factory=dict)
    watch: Callable[[Progress], None] = _ignore
    say: Callable[[str], None] = _ignore
    should_stop: Callable[[], bool] = lambda: False


class Opened(NamedTuple):
    """What an objective is made of. folder: where work in progress lies; key: identity of model and data."""

    model: Any
    train: Data
    test: Data
    fingerprint: dict[str, str]


class Report(NamedTuple):
    """What came out. is_new: False if the folder had been made from the same inputs before."""

    folder: Path
    outcome: Outcome
    counts: dict[str, Any]
    is_new: bool


def train(
    job: Job,
    settings: TrainSettings,
    *,
    trainer: str,
    kind: Kind,
    make_objective: Callable[[Opened], Objective],
    head: Literal["language", "score"] = "language",
) -> Report:
    """Reads, tokenises, trains and publishes. trainer: its name, for card and identity."""
    divides = ranks.size() > 1 and settings.parallel == "fsdp"
    loaded = ranks.together(
        lambda: load(job.start, dtype="float32", device="cpu" if divides else job.device, head=head)
    )
    model = loaded.model
    check_sizes(model, loaded.tokenizer, job.start)
    data, tallies = ranks.together(
        lambda: read_data(job, settings, kind, Chat(loaded.tokenizer), context_of(model.config))
    )
    counts = _counts(data)
    identity = digest(
        [trainer, settings.model_dump(mode="json", exclude={"parallel"}), job.seed, loaded.fingerprint]
        + [each.digest for each in data.values()]
    )
    if found := ranks.first(lambda: published(job.out, identity)):
        return Report(job.out, Outcome(found["step"], found["metrics"]), counts, is_new=False)
    folder = ranks.first(lambda: work_folder(job.out, identity, job.say))
    prepare(model)
    silence_dropout(model, settings)
    if head == "score":
        _keep_pad_apart(model, loaded.tokenizer)
    trained = model
    if divides:
        model = skeleton(model)
        device = pick_device(job.device)
        shard(trained, device, compute_dtype(settings, device.type))
    objective = make_objective(Opened(trained, data["train"], data["test"], loaded.fingerprint))
    task = Task(trained, objective, data["train"], data["test"], settings, folder, job.seed)
    outcome = fit(task, watch=job.watch, warn=job.say, should_stop=job.should_stop)
    description = {
        "trainer": trainer,
        "identity": identity,
        "start": {"name": job.start, **loaded.fingerprint},
        "data": {name: {"sha256": each.digest, **counts[name]} for name, each in data.items()},
        "sources": [str(tally) for tally in tallies],
        "made_from": job.made_from,
        "settings": settings.model_dump(mode="json"),
        "seed": job.seed,
        "step": outcome.step,
        "metrics": outcome.metrics,
    }
    if divides:
        fill(model, trained)
    ranks.first(lambda: publish(model, loaded.tokenizer, job, folder, description))
    return Report(job.out, outcome, counts, is_new=True)


class Plan(NamedTuple):
    """What a training would do."""

    counts: dict[str, Any]
    steps: int
    memory: Memory


def plan(job: Job, settings: TrainSettings, kind: Kind) -> Plan:
    """Reads and tokenises, and loads no weights."""
    config = AutoConfig.from_pretrained(job.start)
    data, _ = read_data(job, settings, kind, Chat(load_tokenizer(job.start)), context_of(config))
    steps = steps_per_epoch(len(data["train"]), settings.batch_size) * settings.epochs
    return Plan(_counts(data), steps, measure(job.start, data["train"], settings, job.device))


def _counts(data: dict[str, Data]) -> dict[str, Any]:
    return {name: {"rows": len(each), "cut": each.num_cut, **each.left_out} for name, each in data.items()}


def read_data(
    job: Job, settings: TrainSettings, kind: Kind, chat: Chat, context: int
) -> tuple[dict[str, Data], list[rows.Tally]]:
    """Tokens of both splits. Raises IncompleteError (3) if no row is left to train on."""
    tallies: list[rows.Tally] = []
    max_length = min(settings.max_length or context, context)
    data: dict[str, Data] = {}
    for split in rows.SPLITS:
        found = rows.read(job.sources, kind=kind, split=split, shares=job.shares, tallies=tallies)
        data[split] = tokenise(found, chat, max_length=max_length, too_long=settings.too_long)
        if lost := data[split].left_out["too_long"]:
            job.say(f"{split}: {lost} rows longer than {max_length} tokens left out; max_length, too_long: cut")
    if not len(data["train"]):
        raise IncompleteError(f"all rows are longer than {max_length} tokens; set max_length, or too_long: cut")
    return data, tallies


def publish(
    model: Any, tokenizer: Any, job: Job, folder: Path, description: dict[str, Any], *, extras: Sequence[str] = ()
) -> None:
    """Writes the model's folder, in the dtype of its start, and puts it in its place; the work in progress goes.

    extras: further files of the work in progress that go along.
    """
    ready = folder / "ready"
    shutil.rmtree(ready, ignore_errors=True)
    with io_errors(ready):
        model.to(_stored_dtype(job.start))
        model.save_pretrained(ready)
        tokenizer.save_pretrained(ready)
        for name in ("metrics.jsonl", *extras):
            shutil.copyfile(folder / name, ready / name)
    draw_curves(ready / "metrics.jsonl", ready / "curves.png")
    write_card(ready / "README.md", description)
    write_atomic(ready / "training.json", json.dumps(description, indent=1).encode() + b"\n")
    old = folder / "old"
    with io_errors(job.out):
        for path in ready.iterdir():
            _sync(path)
        if job.out.exists():
            os.rename(job.out, old)
        os.rename(ready, job.out)
        sync_folder(job.out.parent)
    shutil.rmtree(folder, ignore_errors=True)


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def published(out: Path, identity: str) -> dict[str, Any] | None:
    """The description of a finished folder that was made from the same inputs."""
    path = out / "training.json"
    if not path.exists():
        if out.exists() and any(out.iterdir()):
            raise UsageError(f"{out}: not empty, and no model that was trained here; choose another name")
        return None
    found: dict[str, Any] = read_json(path)
    return found if found.get("identity") == identity else None


def work_folder(out: Path, identity: str, say: Callable[[str], None]) -> Path:
    """The folder of work in progress; what was begun from other inputs is thrown away."""
    folder = out.with_name(f".{out.name}.training")
    marker = folder / "identity"
    if folder.exists() and not (marker.exists() and marker.read_text() == identity):
        say(f"{folder}: was begun with other inputs; starting afresh")
        shutil.rmtree(folder)
    make_folder(folder)
    write_atomic(marker, identity.encode())
    return folder


def check_sizes(model: Any, tokenizer: Any, name: str) -> None:
    rows_there, tokens = model.get_input_embeddings().num_embeddings, len(tokenizer)
    if tokens > rows_there:
        raise UsageError(f"model {name}: {tokens} tokens, but {rows_there} embeddings; give its own tokenizer")


def _keep_pad_apart(model: Any, tokenizer: Any) -> None:
    """A padding token that is no end of turn: transformers reads the score at the last token that is no padding."""
    names = ("pad_token", "unk_token", "bos_token")
    found = [name for name in names if getattr(tokenizer, name) not in (None, tokenizer.eos_token)]
    if found:
        tokenizer.pad_token = getattr(tokenizer, found[0])
        model.config.pad_token_id = tokenizer.pad_token_id


def context_of(config: Any) -> int:
    return getattr(config.get_text_config(), "max_position_embeddings", None) or 1 << 20


def _stored_dtype(start: str) -> torch.dtype:
    stored = getattr(AutoConfig.from_pretrained(start), "dtype", None)
    return stored if isinstance(stored, torch.dtype) else torch.float32
