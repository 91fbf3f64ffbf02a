"""What a person sees while stages run: a bar on a terminal, a plain line every 30 s elsewhere, counts at the end."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING

from pipeline.cli.common import Console

if TYPE_CHECKING:
    from pipeline.recipe import Chain, Job
    from pipeline.stages.ingest import Ingested

LINE_EVERY_S = 30.0


def watcher(console: Console) -> Callable[[Chain], Awaitable[None]]:
    """A coroutine function that reports on a chain until it is cancelled."""
    if console.quiet:
        return _silent
    return _bar if sys.stderr.isatty() else lambda chain: _lines(console, chain)


async def _silent(chain: Chain) -> None:
    await asyncio.Event().wait()


async def _lines(console: Console, chain: Chain) -> None:
    began = time.monotonic()
    while True:
        await asyncio.sleep(LINE_EVERY_S)
        console.say(_describe(chain, time.monotonic() - began))


async def _bar(chain: Chain) -> None:
    from rich.console import Console as RichConsole
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}", markup=False), TimeRemainingColumn())
    began = time.monotonic()
    with Progress(*columns, console=RichConsole(stderr=True)) as bar:
        task = bar.add_task("", total=chain.driver.progress.total)
        try:
            while True:
                done = chain.driver.progress.done
                bar.update(task, completed=done, description=_rates(chain, time.monotonic() - began))
                await asyncio.sleep(0.5)
        finally:
            bar.update(task, completed=chain.driver.progress.done)


def _describe(chain: Chain, seconds: float) -> str:
    progress = chain.driver.progress
    done, total = progress.done, progress.total
    eta = f", about {(total - done) * seconds / done:.0f} s left" if done else ""
    return f"{done} of {total} records{eta}; {_rates(chain, seconds)}"


def _rates(chain: Chain, seconds: float) -> str:
    journal, usage, seconds = chain.journal, chain.usage, max(seconds, 1e-9)
    return (
        f"{journal.asked} replies ({journal.asked / seconds:.1f}/s, {journal.replayed} from the journal), "
        f"tokens/s in {usage['prompt_tokens'] / seconds:.0f} out {usage['completion_tokens'] / seconds:.0f}, "
        f"{chain.driver.progress.in_flight} in flight, {chain.driver.progress.failed} failed"
    )


def show_ingest(console: Console, ingested: Ingested | None) -> None:
    if ingested is None:
        return
    console.report["counts"]["prompts"] = ingested._asdict()
    merged = f", {ingested.merged_turns} turns merged" if ingested.merged_turns else ""
    cut = f", {ingested.answers_cut} answers behind the prompt left out" if ingested.answers_cut else ""
    console.say(
        f"prompts: {ingested.lines} read, {ingested.new} new, {ingested.known} known, "
        f"{ingested.duplicates} duplicates{merged}{cut}"
    )


def show_work(console: Console, chain: Chain) -> None:
    """What this call asked, and what it had from the journal."""
    work = {"replies": chain.journal.asked, "replayed": chain.journal.replayed, **chain.usage}
    work["neutralised"] = chain.engines.neutralised
    console.report["counts"]["work"] = work
    cached = f" ({work['cached_tokens']} from the cache)" if work.get("cached_tokens") else ""
    console.say(
        f"asked: {work['replies']} replies, {work['replayed']} more from the journal; "
        f"tokens in {work.get('prompt_tokens', 0)}{cached}, out {work.get('completion_tokens', 0)}"
    )
    if work["neutralised"]:
        console.say(f"special tokens in prompts, sent as plain text: {work['neutralised']}")


def show_counts(console: Console, job: Job, names: Sequence[str]) -> None:
    """The balance of every stage: in = ok + filtered + failed, the stage's own tallies, and where its losses are."""
    for name in names:
        manifest = job.run.manifest(name)
        if manifest is None:
            continue
        counts = manifest.counts
        console.report["counts"][name] = dict(counts)
        console.report["outputs"][name] = str(job.run.path / name)
        tallies = ", ".join(f"{key} {value}" for key, value in counts.items() if key not in _BALANCE and value)
        balance = ", ".join(f"{key} {counts[key]}" for key in _BALANCE)
        console.show(f"{name}: {balance}" + (f" ({tallies})" if tallies else ""))
        for state in ("failed", "filtered"):
            if num_lost := sum(part[state]["rows"] for part in manifest.parts):
                path = job.run.losses_path(state, name)
                console.report["outputs"][f"{state}/{name}"] = str(path)
                console.show(f"  {num_lost} {state}, each with its reason: {path}")


_BALANCE = ("in", "ok", "filtered", "failed")


def show_satisfied(console: Console, job: Job, names: Sequence[str]) -> None:
    from pipeline.recipe import SATISFIED_SHARE, satisfied_drafts

    share = satisfied_drafts(job) if "critique-revise" in names else None
    if share is not None and share > SATISFIED_SHARE:
        console.report["counts"]["satisfied_drafts"] = share
        console.show(
            f"note: {share:.0%} of drafts already satisfied their principles: the judge found no fault in them, or "
            "their first revision neither better nor worse. These prompts teach the model little. Take harder prompts, "
            f"look at some records with `cai show --run {job.run.path}`, and check that the judge can tell good from "
            "bad (`cai try`)."
        )
