"""Stages made ready to run: on which engines, and what each stage's lines depend on."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.driver import Driver, Stage
from pipeline.engines.base import Reply, Request
from pipeline.errors import IncompleteError, UsageError
from pipeline.jobs import Job, is_sampled, keep_inputs, made_from, policy, reply_tokens
from pipeline.journal import Journal, OnReply
from pipeline.records import Line, digest
from pipeline.stages import critique_revise, generate, rank
from pipeline.stages.asking import Voice
from pipeline.store import StageWriter
from pipeline.voices import NOTHING, Engines, Spent, used_up

DATA_STAGES = ("generate", "critique-revise", "rank")
SATISFIED_SHARE = 0.9


def build_stages(job: Job, engines: Engines, names: Sequence[str]) -> list[Stage]:
    """The named stages in the order of the recipe, each with the identity of all that its lines depend on.

    They are those of the phase that `job.run` is seen from: in phase 2 the policy drafts, and its samples are ranked.
    """
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
        voices = _drafters(job, engines)
        run: Any = partial(generate.generate, models=voices, settings=settings.generate, seed=seed)
        section = settings.generate.model_dump(mode="json", exclude={"models"})
        depends: list[Any] = [section, [_identity(voice) for voice in voices]]
        if job.run.phase == 1:
            add("generate", run, generate.tally, (), *depends)
        else:
            start = made_from(job.run, "models/sft")
            add("generate", run, generate.tally, (), *depends, settings.export.split.model_dump(mode="json"), start)
            stages[-1].writer.extra["made_from"] = start
    if "critique-revise" in names:
        chain = _critique_revise(job, engines)
        run = partial(critique_revise.critique_revise, using=chain)
        section = settings.critique_revise.model_dump(mode="json")
        voices = [*chain.authors, *chain.critics, chain.judge]
        depends = [section, job.constitution.digest, chain.reviser is None, [_identity(voice) for voice in voices]]
        add("critique-revise", run, critique_revise.tally, ("generate",), *depends)
    if "rank" in names:
        judge = engines.voice(judge_settings, settings.rank.max_tokens)
        using = rank.Rank(job.constitution, judge, settings.rank, seed, with_given=job.run.phase == 1)
        run = partial(rank.rank, using=using)
        section = settings.rank.model_dump(mode="json")
        add("rank", run, rank.tally, _rank_needs(upstream), section, job.constitution.digest, _identity(judge))
    return stages


def _drafters(job: Job, engines: Engines) -> list[Voice]:
    longest = job.settings.generate.max_tokens
    if job.run.phase == 2:
        return [engines.voice(policy(job), longest or reply_tokens(job.settings))]
    return [engines.voice(model, longest) for model in job.settings.generators.values()]


def _critique_revise(job: Job, engines: Engines) -> critique_revise.CritiqueRevise:
    settings, max_tokens = job.settings, job.settings.critique_revise.max_tokens
    critics = [engines.voice(critic, max_tokens) for critic in settings.critics.values()]
    is_one = bool(critics) and isinstance(settings.critic, dict)
    authors = [] if is_one else [engines.voice(author, max_tokens) for author in settings.generators.values()]
    return critique_revise.CritiqueRevise(
        constitution=job.constitution,
        authors=authors,
        critics=critics,
        reviser=critics[0] if is_one else None,
        judge=engines.voice(settings.engine_for(settings.judge)),
        settings=settings.critique_revise,
        seed=settings.run.seed,
        samples=settings.generate.samples,
    )


def _rank_needs(upstream: dict[str, str]) -> tuple[str, ...]:
    """Ranking takes what is there: revised drafts, drafts alone, or only the answers that came with the prompts."""
    return tuple(name for name in ("generate", "critique-revise") if name in upstream)


def _identity(voice: Voice) -> list[Any]:
    return [voice.engine.fingerprint, voice.engine.context, voice.style, voice.max_tokens]


@dataclass
class Chain:
    """Stages about to run. `driver.progress` and `journal` tell how far they are."""

    stages: list[Stage]
    engines: Engines
    journal: Journal
    driver: Driver

    @property
    def spent(self) -> Spent:
        """What this chain alone has cost."""
        return self.engines.spent(self.journal.usage)


def prepare(
    job: Job,
    names: Sequence[str],
    *,
    limit: int | None = None,
    grace_s: float = 30.0,
    spent: Spent = NOTHING,
    journal_folder: Path | None = None,
    on_reply: OnReply | None = None,
) -> Chain:
    """Opens the engines, keeps the inputs and lines the stages up. UsageError if a stage before them has not run.

    spent: of the budgets, by earlier chains of the call. journal_folder: the run's own if not given. on_reply: see
    Journal.
    """
    earlier = [name for name in DATA_STAGES if name not in names and DATA_STAGES.index(name) < _first(names)]
    inputs = [name for name in earlier if job.run.manifest(name)]
    if "critique-revise" in names and "generate" not in [*names, *inputs]:
        raise UsageError(f"{job.run.path}: no drafts to revise; run `cai generate --run {job.run.path}` first")
    if job.run.phase == 2 and "generate" not in [*names, *inputs]:
        raise UsageError(f"{job.run.path}: nothing to rank; run `cai generate --run {job.run.path} --phase 2` first")
    engines = Engines(job.constitution)
    try:
        stages = build_stages(job, engines, names)
        if job.frozen:
            _check_frozen(job, stages)
        keep_inputs(job)
    except BaseException:
        # A model that is loaded already must not outlive one that cannot be.
        asyncio.run(engines.close())
        raise

    def count(request: Request, reply: Reply, is_new: bool) -> None:
        if on_reply:
            on_reply(request, reply, is_new)
        if is_new and (budget := used_up(spent.plus(chain.spent), job.settings.run)):
            driver.stop(f"at {budget}")

    journal = Journal(journal_folder or job.run.path / "journal", on_reply=count)
    # A record asks for several things at once, so fewer records than places keep the engine full.
    window = max(2, engines.concurrency)
    driver = Driver(
        job.run, stages, journal, window=window, limit=limit, inputs=inputs, takes=_takes(job), grace_s=grace_s
    )
    chain = Chain(stages, engines, journal, driver)
    return chain


def _takes(job: Job) -> Callable[[Line], bool]:
    """Which prompts come in: in phase 2 those that preferences are trained on and tested with."""
    if job.run.phase == 1:
        return lambda prompt: True
    return lambda prompt: is_sampled(prompt, job.settings.export.split)


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


async def run_chain(
    chain: Chain,
    *,
    max_time: float | None,
    watch: Callable[[Chain], Awaitable[None]],
    warn: Callable[[str], None] = lambda text: None,
) -> None:
    """Runs the stages to the end. SIGTERM, SIGUSR1, Ctrl-C and `max_time` seconds stop it; StoppedError then.

    watch: a coroutine beside the requests, for progress; it is cancelled at the end. warn: gets what is doubtful before
    the first request; EngineRefused for what cannot work. A second Ctrl-C ends the process with 130.
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
    watcher: asyncio.Future[None] | None = None
    try:
        await chain.engines.start()
        # What is loaded by now stays: with it, a full collection stops all requests for a second.
        gc.collect()
        gc.freeze()
        kinds = {kind for stage in chain.stages for kind in _KINDS[stage.name]}
        for doubt in chain.engines.preflight(chain.driver.run_folder.path, kinds):
            warn(doubt)
        watcher = asyncio.ensure_future(watch(chain))
        await chain.driver.run()
    finally:
        if timer:
            timer.cancel()
        if watcher:
            watcher.cancel()
            await asyncio.gather(watcher, return_exceptions=True)
        await chain.engines.close()
        gc.unfreeze()


_KINDS = {
    "generate": ("draft",),
    "critique-revise": ("critique", "revision", "check", "comparison"),
    "rank": ("comparison", "grade"),
}
"""What each stage may ask, of constitution.samples.KINDS."""

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
                    f"{job.run.name_of(name)}: {lost.replace('_', ' ')} {counts[lost]} of {counts[total]}, more than "
                    f"run.max_failed_share ({allowed:.0%}); see {job.run.losses_path(state, name)}"
                )


def satisfied_drafts(job: Job) -> float | None:
    """The share of drafts in which the first round found nothing to improve; None before critique-revise."""
    manifest = job.run.manifest("critique-revise")
    if not manifest or not manifest.counts["first_rounds"]:
        return None
    return manifest.counts["drafts_satisfied"] / manifest.counts["first_rounds"]
