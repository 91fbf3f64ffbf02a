"""A call's job: its run folder, settings and constitution, the prompts it brings in, and what it would cost."""

from __future__ import annotations

import itertools
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from constitution.principles import Constitution, default_path
from pipeline import nano
from pipeline.config.load import differences, dump, read_file, read_layers
from pipeline.config.settings import EngineSettings, Settings, SplitSettings
from pipeline.dataset_folder import read_card
from pipeline.engines.backends import resolve_backend
from pipeline.errors import UsageError
from pipeline.estimate import Estimate, Measured, estimate, num_steps
from pipeline.records import Line, Message
from pipeline.sources import Spec, mix
from pipeline.splits import split_of
from pipeline.stages.ingest import Ingested, ingest
from pipeline.store import RunFolder, read_json, write_atomic

MAX_TOKENS = 1024
NANO_MAX_TOKENS = 96


@dataclass(frozen=True)
class Job:
    """One call on one run folder. frozen: refuse to redo anything that was made from other inputs."""

    run: RunFolder
    settings: Settings
    constitution: Constitution
    frozen: bool = False

    def of_phase(self, phase: int) -> Job:
        """The same call, on that phase's stages."""
        return replace(self, run=self.run.of_phase(phase))


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


def has_own_model(settings: Settings) -> bool:
    """Whether the model that answers is one that can be loaded here."""
    engine = settings.engine
    return engine.model is not None and resolve_backend(engine) in ("transformers", "vllm")


def start_model(run: Path, settings: Settings, trainer: str, model: str | None) -> str:
    """Where a trainer starts: `model` if given, else the run's SFT model (not for SFT itself), else the run's model."""
    sft = run / "models" / "sft"
    if model is None and trainer != "sft" and (sft / "config.json").exists():
        return str(sft)
    found = model or settings.engine.model
    if not found or (model is None and not has_own_model(settings)):
        raise UsageError("no model to start from: the run has none of its own; use --model MODEL (`nano` is built in)")
    return str(nano.path()) if found == "nano" else found


def reply_tokens(settings: Settings) -> int:
    """The longest reply of the run's model, where the settings do not say."""
    return NANO_MAX_TOKENS if settings.engine.model == "nano" else MAX_TOKENS


def policy(job: Job) -> EngineSettings:
    """Who is sampled in phase 2: the run's SFT model if there is one, else the run's own model."""
    engine, sft = job.settings.engine, job.run.path / "models" / "sft"
    if not (sft / "config.json").exists():
        return engine
    backend = engine.backend if engine.backend in ("transformers", "vllm") else "auto"
    not_its_own = dict.fromkeys(("revision", "adapter", "quantization", "script", "price_in", "price_out"))
    here = {"backend": backend, "model": str(sft), "base_urls": (), "style": "chat"}
    return engine.model_copy(update={**not_its_own, **here})


def made_from(run: RunFolder, *names: str) -> dict[str, str]:
    """What datasets and models of the run are now, by name (`datasets/sft`, `models/sft`), if they are there.

    A cheap look: a dataset's hash is what its card says, and a model's the identity of what it was trained from.
    """
    found = {}
    for name in names:
        folder = run.path / name
        if name.startswith("datasets/"):
            found[name] = read_card(folder).get("files", {}).get("train.parquet", {}).get("sha256", "")
        elif (folder / "training.json").exists():
            found[name] = read_json(folder / "training.json")["identity"]
    return {name: value for name, value in found.items() if value}


def is_current(run: RunFolder, made: dict[str, str]) -> bool:
    """Whether the datasets and models that something was `made_from` are still what they were."""
    names = [name for name in made if name.startswith(("datasets/", "models/"))]
    return made_from(run, *names) == {name: made[name] for name in names}


def is_sampled(prompt: Line, shares: SplitSettings) -> bool:
    """Whether phase 2 samples a prompt: for preferences or for their test, and not one that SFT has imitated."""
    return split_of(prompt["messages"], shares) != "sft"


def scoring_model(run: Path, model: str | None, *, options: str = "--reward-model") -> str:
    """What gives scores: `model` if given, else the run's reward model. options: that name one, for the message."""
    if model is not None:
        return str(nano.path()) if model == "nano" else model
    if not (run / "models" / "rm" / "config.json").exists():
        raise UsageError(f"{run}: no models/rm here; train one with `cai train-rm`, or give {options}")
    return str(run / "models" / "rm")


def ingest_prompts(job: Job, limit: int | None) -> Ingested | None:
    """Brings the configured sources into the run. None if there are none, but the run has prompts already."""
    specs = _specs(job.settings)
    if specs:
        ingested = ingest(job.run, specs, shard_size=job.settings.prompts.shard_size, limit=limit)
        if not ingested.lines:
            raise UsageError(f"{', '.join(spec.path for spec in specs)}: no prompts; give a file that holds some")
        return ingested
    if not job.run.manifest("prompts"):
        raise UsageError(f"{job.run.path}: no prompts; use --prompts FILE, or set prompts.sources in cai.yaml")
    return None


def _specs(settings: Settings) -> list[Spec]:
    return [Spec(source.path, source.tags, source.limit, source.weight) for source in settings.prompts.sources]


def estimate_job(
    path: Path,
    settings: Settings,
    names: Sequence[str],
    limit: int | None,
    measured: Measured | None = None,
    *,
    phase: int = 1,
) -> Estimate:
    """What stages of a phase would ask for, from the sources or else the prompts that the run has; nothing is asked.

    measured: what to go by instead of guesses.
    """
    prompts = (messages for messages, _ in _prompts(path, settings, limit))
    if phase == 2:
        prompts = (messages for messages in prompts if split_of(messages, settings.export.split) != "sft")
        # One policy drafts, whoever drafted in phase 1.
        settings = settings.model_copy(update={"generate": settings.generate.model_copy(update={"models": ()})})
    sizes = [sum(len(message["content"]) for message in messages) for messages in prompts]
    constitution = Constitution.load(constitution_file(settings))
    size = {"records": len(sizes), "characters": sum(sizes), "max_tokens": reply_tokens(settings)}
    return estimate(settings, constitution, names, **size, measured=measured)


def estimate_trainings(path: Path, settings: Settings, trainers: Sequence[str], limit: int | None) -> dict[str, int]:
    """The most steps that each training would take."""
    shares = settings.export.split
    prompts = Counter((split_of(messages, shares), given) for messages, given in _prompts(path, settings, limit))
    return {trainer: num_steps(settings, trainer, prompts) for trainer in trainers}


def _prompts(path: Path, settings: Settings, limit: int | None) -> Iterator[tuple[list[Message], int]]:
    """Each prompt with the number of answers that were given with it."""
    if specs := _specs(settings):
        found = ((row.messages, len(row.given)) for row in mix(specs))
    else:
        found = ((line["messages"], len(line.get("completions", ()))) for line in RunFolder(path).read("prompts"))
    return itertools.islice(found, limit)
