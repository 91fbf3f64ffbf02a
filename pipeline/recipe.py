"""The recipe: which stages a call runs, on which engines, and what each stage's lines depend on."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from constitution.principles import Constitution, default_path
from pipeline import nano
from pipeline.config.load import differences, dump, read_file, read_layers
from pipeline.config.settings import EngineSettings, Settings
from pipeline.driver import Driver, Stage
from pipeline.engines import open_engine
from pipeline.engines.base import Engine, Reply
from pipeline.errors import IncompleteError, UsageError
from pipeline.estimate import Estimate, estimate
from pipeline.journal import Journal
from pipeline.records import Message, digest
from pipeline.sources import Spec, mix
from pipeline.stages import critique_revise, generate, rank
from pipeline.stages.asking import Voice
from pipeline.stages.ingest import Ingested, ingest
from pipeline.store import RunFolder, StageWriter, write_atomic

DATA_STAGES = ("generate", "critique-revise", "rank")
MAX_TOKENS = 1024
NANO_MAX_TOKENS = 96
SATISFIED_SHARE = 0.9


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


def estimate_job(path: Path, settings: Settings, names: Sequence[str], limit: int | None) -> Estimate:
    """What a call would ask for, from its sources or else the prompts that the run has; nothing is written or asked."""
    specs = _specs(settings)
    found: Iterator[list[Message]] = (
        (row.messages for row in mix(specs))
        if specs
        else (line["messages"] for line in RunFolder(path).read("prompts"))
    )
    sizes = [sum(len(message["content"]) for message in messages) for messages in itertools.islice(found, limit)]
    max_tokens = NANO_MAX_TOKENS if settings.engine.model == "nano" else MAX_TOKENS
    constitution = Constitution.load(constitution_file(settings))
    return estimate(settings, constitution, names, records=len(sizes), characters=sum(sizes), max_tokens=max_tokens)


class Engines:
    """The engines of one call; equal settings share one."""

    def __init__(self, constitution: Constitution) -> None:
        self._constitution = constitution
        self._open: dict[str, Engine] = {}

    def voice(self, settings: EngineSettings, max_tokens: int | None = None) -> Voice:
        """The engine of a section, and how to speak to it. `nano` stands for the embedded model's folder."""
        is_nano = settings.model == "nano" and settings.backend in ("auto", "transformers")
        key = digest(settings.model_dump(mode="json", exclude={"style"}))
        if key not in self._open:
            found = settings.model_copy(update={"model": str(nano.path())}) if is_nano else settings
            self._open[key] = open_engine(found, name="nano" if is_nano else None)
        default = NANO_MAX_TOKENS if is_nano else MAX_TOKENS
        return Voice(self._open[key], self._constitution.wording, settings.style, max_tokens or default)

    @property
    def neutralised(self) -> int:
        """Texts of special tokens in prompts that were sent as plain text."""
        return sum(engine.neutralised for engine in self._open.values())

    @property
    def concurrency(self) -> int:
        return max(engine.concurrency for engine in self._open.values())

    async def start(self) -> None:
        for engine in self._open.values():
            await engine.start()

    async def close(self) -> None:
        for engine in self._open.values():
            await engine.close()


def build_stages(job: Job, engines: Engines, names: Sequence[str]) -> list[Stage]:
    """The named stages in the order of the recipe, each with the identity of all that its lines depend on."""
    settings, seed = job.settings, job.settings.run.seed
    judge_settings = settings.engine_for(settings.judge)
    stages: list[Stage] = []
    upstream = {
        name: made.fingerprint for name in DATA_STAGES if (made := job.run.manifest(name)) and name not in names
    }

    def add(
        name: str, run: Callable[..., Any], tally: Callable[..., Any], needs: tuple[str, ...], *depends: Any
    ) -> None:
        before = {stage: upstream[stage] for stage in DATA_STAGES[: DATA_STAGES.index(name)] if stage in upstream}
        upstream[name] = digest([name, seed, before, *depends])
        stages.append(Stage(name, run, StageWriter(job.run, name, upstream[name]), needs, tally))

    if "generate" in names:
        models = [settings.engine_for(section) for section in settings.generate.models] or [settings.engine]
        voices = [engines.voice(model, settings.generate.max_tokens) for model in models]
        run: Any = partial(generate.generate, models=voices, settings=settings.generate, seed=seed)
        section = settings.generate.model_dump(mode="json", exclude={"models"})
        add("generate", run, generate.tally, (), section, [_identity(voice) for voice in voices])
    if "critique-revise" in names:
        critic = engines.voice(settings.engine_for(settings.critic), settings.critique_revise.max_tokens)
        judge = engines.voice(judge_settings)
        using = critique_revise.CritiqueRevise(job.constitution, critic, judge, settings.critique_revise, seed)
        run = partial(critique_revise.critique_revise, using=using)
        section = settings.critique_revise.model_dump(mode="json")
        depends = [section, job.constitution.digest, _identity(critic), _identity(judge)]
        add("critique-revise", run, critique_revise.tally, ("generate",), *depends)
    if "rank" in names:
        judge = engines.voice(judge_settings, settings.rank.max_tokens)
        run = partial(rank.rank, using=rank.Rank(job.constitution, judge, settings.rank, seed))
        section = settings.rank.model_dump(mode="json")
        add("rank", run, rank.tally, _rank_needs(upstream), section, job.constitution.digest, _identity(judge))
    return stages


def _rank_needs(upstream: dict[str, str]) -> tuple[str, ...]:
    """Ranking takes what is there: revised drafts, drafts alone, or only the answers that came with the prompts."""
    return tuple(name for name in ("generate", "critique-revise") if name in upstream)


def _identity(voice: Voice) -> list[Any]:
    return [voice.engine.fingerprint, voice.engine.context, voice.style, voice.max_tokens]


@dataclass
class Chain:
    """Stages about to run. `driver.progress`, `journal` and `usage` tell how far they are."""

    stages: list[Stage]
    engines: Engines
    journal: Journal
    driver: Driver
    usage: Counter[str]


def prepare(job: Job, names: Sequence[str], *, limit: int | None = None, grace_s: float = 30.0) -> Chain:
    """Opens the engines, keeps the inputs and lines the stages up. UsageError if a stage before them has not run."""
    earlier = [name for name in DATA_STAGES if name not in names and DATA_STAGES.index(name) < _first(names)]
    inputs = [name for name in earlier if job.run.manifest(name)]
    if "critique-revise" in names and "generate" not in [*names, *inputs]:
        raise UsageError(f"{job.run.path}: no drafts to revise; run `cai generate --run {job.run.path}` first")
    engines = Engines(job.constitution)
    stages = build_stages(job, engines, names)
    if job.frozen:
        _check_frozen(job, stages)
    keep_inputs(job)
    usage: Counter[str] = Counter()
    budget = job.settings.run.budget_tokens

    def count(reply: Reply) -> None:
        usage.update(reply.usage._asdict())
        if budget is not None and usage["prompt_tokens"] + usage["completion_tokens"] >= budget:
            driver.stop("at run.budget_tokens")

    journal = Journal(job.run.path / "journal", on_reply=count)
    # A record asks for several things at once, so fewer records than places keep the engine full.
    window = max(2, engines.concurrency)
    driver = Driver(job.run, stages, journal, window=window, limit=limit, inputs=inputs, grace_s=grace_s)
    return Chain(stages, engines, journal, driver, usage)


def _check_frozen(job: Job, stages: Sequence[Stage]) -> None:
    """UsageError if a stage depends on something else than before: a model's content, since the settings are equal."""
    for stage in stages:
        manifest = job.run.manifest(stage.name)
        if manifest and manifest.fingerprint != stage.writer.fingerprint:
            raise UsageError(
                f"{stage.writer.folder}: --frozen, but the model that {stage.name} asks, or a stage before it, has "
                "changed; leave --frozen out to make it anew"
            )


def _first(names: Sequence[str]) -> int:
    return min(DATA_STAGES.index(name) for name in names)


async def run_chain(chain: Chain, *, max_time: float | None, watch: Callable[[Chain], Awaitable[None]]) -> None:
    """Runs the stages to the end. SIGTERM, SIGUSR1, Ctrl-C and `max_time` seconds stop it; StoppedError then.

    watch: a coroutine beside it, for progress; it is cancelled at the end. A second Ctrl-C ends the process with 130.
    """
    loop = asyncio.get_running_loop()
    interrupts = 0

    def interrupted() -> None:
        nonlocal interrupts
        interrupts += 1
        if interrupts > 1:
            os._exit(130)
        chain.driver.stop()

    loop.add_signal_handler(signal.SIGINT, interrupted)
    for number in (signal.SIGTERM, signal.SIGUSR1):
        loop.add_signal_handler(number, chain.driver.stop)
    timer = loop.call_later(max_time, chain.driver.stop, "at run.max_time") if max_time else None
    watcher = asyncio.ensure_future(watch(chain))
    try:
        await chain.engines.start()
        await chain.driver.run()
    finally:
        if timer:
            timer.cancel()
        watcher.cancel()
        await asyncio.gather(watcher, return_exceptions=True)
        await chain.engines.close()


_SHARES = (("failed", "in"), ("filtered", "in"), ("lost_samples", "samples"), ("lost_comparisons", "comparisons"))
"""Counts of losses, and of what each is a share of."""


def check_shares(job: Job, names: Sequence[str]) -> None:
    """IncompleteError (3) if a stage lost more than `run.max_failed_share` of its records, samples or comparisons."""
    allowed = job.settings.run.max_failed_share
    for name in names:
        manifest = job.run.manifest(name)
        counts = manifest.counts if manifest else Counter[str]()
        for lost, total in _SHARES:
            if counts[lost] > allowed * counts[total]:
                state = "filtered" if lost == "filtered" else "failed"
                raise IncompleteError(
                    f"{name}: {lost.replace('_', ' ')} {counts[lost]} of {counts[total]}, more than "
                    f"run.max_failed_share ({allowed:.0%}); see {job.run.losses_path(state, name)}"
                )


def satisfied_drafts(job: Job) -> float | None:
    """The share of drafts in which the first round found nothing to improve; None before critique-revise."""
    manifest = job.run.manifest("critique-revise")
    if not manifest or not manifest.counts["first_rounds"]:
        return None
    return manifest.counts["drafts_satisfied"] / manifest.counts["first_rounds"]
