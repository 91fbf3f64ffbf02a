"""A call's job: its run folder, settings and constitution, the prompts it brings in, and what it would cost."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from constitution.principles import Constitution, default_path
from pipeline import nano
from pipeline.config.load import differences, dump, read_file, read_layers
from pipeline.config.settings import Settings
from pipeline.errors import UsageError
from pipeline.estimate import Estimate, Measured, estimate
from pipeline.records import Message
from pipeline.sources import Spec, mix
from pipeline.stages.ingest import Ingested, ingest
from pipeline.store import RunFolder, write_atomic

MAX_TOKENS = 1024
NANO_MAX_TOKENS = 96


@dataclass(frozen=True)
class Job:
    """One call on one run folder. frozen: refuse to redo anything that was made from other inputs."""

    run: RunFolder
    settings: Settings
    constitution: Constitution
    frozen: bool = False


def resolve(run: Path, config: Path | None, assignments: Sequence[str], flags: dict[str, Any]) -> Settings:
    """The settings of a call on a run folder, with files by their full paths, so that later calls find them too."""
    settings = read_layers(run / "config.yaml", config, assignments, flags)
    sources = tuple(
        source if source.path.startswith("hf:") else source.model_copy(update={"path": os.path.abspath(source.path)})
        for source in settings.prompts.sources
    )
    constitution = settings.constitution and os.path.abspath(settings.constitution)
    prompts = settings.prompts.model_copy(update={"sources": sources})
    return settings.model_copy(update={"constitution": constitution, "prompts": prompts})


def open_job(path: Path, settings: Settings, *, frozen: bool = False) -> tuple[Job, list[str]]:
    """Opens the run. Returns what differs from the last call too.

    frozen: refuse to go on if anything does. The caller holds the run's lock.
    """
    constitution = Constitution.load(constitution_file(settings))
    run = RunFolder(path)
    config, principles = run.path / "config.yaml", run.path / "constitution.yaml"
    changed = differences(read_file(config), settings) if config.exists() else []
    if principles.exists() and Constitution.load(principles).digest != constitution.digest:
        changed.append("constitution: the text of its principles or wording")
    if frozen and changed:
        raise UsageError(f"{run.path}: --frozen, but the inputs changed: {'; '.join(changed)}")
    return Job(run, settings, constitution, frozen), changed


def keep_inputs(job: Job) -> None:
    """Keeps the resolved inputs in the run, for later calls to start from; not before it is known that they work."""
    inputs = {"config.yaml": dump(job.settings), "constitution.yaml": constitution_file(job.settings).read_bytes()}
    for name, data in inputs.items():
        file = job.run.path / name
        if not file.exists() or file.read_bytes() != data:
            write_atomic(file, data)


def constitution_file(settings: Settings) -> Path:
    return Path(settings.constitution) if settings.constitution else default_path()


def start_model(run: Path, settings: Settings, trainer: str, model: str | None) -> str:
    """Where a trainer starts: `model` if given, else the run's SFT model (not for SFT itself), else the run's model."""
    sft = run / "models" / "sft"
    if model is None and trainer != "sft" and (sft / "config.json").exists():
        return str(sft)
    found = model or settings.engine.model
    if not found or (model is None and settings.engine.base_urls):
        raise UsageError("no model to start from: the run has none of its own; use --model MODEL (`nano` is built in)")
    return str(nano.path()) if found == "nano" else found


def reward_model(run: Path, reward: str, model: str | None) -> str | None:
    """What scores answers in PPO: `model` if given, else the run's reward model; None where no model does."""
    if reward not in ("model", "policy"):
        return None
    if model is not None:
        return str(nano.path()) if model == "nano" else model
    found = run / "models" / "rm"
    if reward == "policy" or not (found / "config.json").exists():
        raise UsageError(f"{run}: no models/rm to score with; use --reward-model MODEL, or `cai train-rm` first")
    return str(found)


def ingest_prompts(job: Job, limit: int | None) -> Ingested | None:
    """Brings the configured sources into the run. None if there are none, but the run has prompts already."""
    specs = _specs(job.settings)
    if specs:
        ingested = ingest(job.run, specs, shard_size=job.settings.prompts.shard_size, limit=limit)
        if not job.run.parts("prompts"):
            raise UsageError(f"{', '.join(spec.path for spec in specs)}: no prompts; give a file that holds some")
        return ingested
    if not job.run.manifest("prompts"):
        raise UsageError(f"{job.run.path}: no prompts; use --prompts FILE, or set prompts.sources in cai.yaml")
    return None


def _specs(settings: Settings) -> list[Spec]:
    return [Spec(source.path, source.tags, source.limit, source.weight) for source in settings.prompts.sources]


def estimate_job(
    path: Path, settings: Settings, names: Sequence[str], limit: int | None, measured: Measured | None = None
) -> Estimate:
    """What a call would ask for, from its sources or else the prompts that the run has; nothing is written or asked.

    measured: what to go by instead of guesses.
    """
    specs = _specs(settings)
    found: Iterator[list[Message]] = (
        (row.messages for row in mix(specs))
        if specs
        else (line["messages"] for line in RunFolder(path).read("prompts"))
    )
    sizes = [sum(len(message["content"]) for message in messages) for messages in itertools.islice(found, limit)]
    max_tokens = NANO_MAX_TOKENS if settings.engine.model == "nano" else MAX_TOKENS
    constitution = Constitution.load(constitution_file(settings))
    size = {"records": len(sizes), "characters": sum(sizes), "max_tokens": max_tokens}
    return estimate(settings, constitution, names, **size, measured=measured)
