"""What a person sees while stages run: a bar on a terminal, a plain line every 30 s elsewhere, counts at the end."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any

from pipeline.cli.common import Console
from pipeline.rates import Counts, Meter

if TYPE_CHECKING:
    from pipeline.chain import Chain
    from pipeline.jobs import Job
    from pipeline.journal import Journal
    from pipeline.stages.ingest import Ingested
    from pipeline.voices import Engines

LINE_EVERY_S = 30.0
DRAW_EVERY_S = 0.5
BAR_WIDTH = 30


def watcher(console: Console) -> Callable[[Chain], Awaitable[None]]:
    """A coroutine function that reports on a chain until it is cancelled."""
    if console.quiet:
        return _silent
    is_screen = sys.stderr.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")
    return _bar if is_screen else lambda chain: _lines(console, chain)


async def _silent(chain: Chain) -> None:
    await asyncio.Event().wait()


async def _lines(console: Console, chain: Chain) -> None:
    meter = Meter(_counts(chain))
    while True:
        await asyncio.sleep(LINE_EVERY_S)
        console.say("; ".join(_describe(chain, meter)))


async def _bar(chain: Chain) -> None:
    """A bar with the records beside it, and the rest under it."""
    from rich.console import Console as RichConsole
    from rich.console import Group
    from rich.live import Live
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    meter = Meter(_counts(chain))

    def draw() -> Group:
        records, tokens, requests, failures = _describe(chain, meter)
        beside = Table.grid(padding=(0, 1))
        progress = chain.driver.progress
        beside.add_row(ProgressBar(progress.total, progress.done, width=BAR_WIDTH), Text(records))
        return Group(beside, Text(f"{tokens}; {failures}"), Text(requests))

    with Live(draw(), console=RichConsole(stderr=True), auto_refresh=False) as live:
        try:
            while True:
                await asyncio.sleep(DRAW_EVERY_S)
                live.update(draw(), refresh=True)
        finally:
            live.update(draw())


def _counts(chain: Chain) -> Counts:
    usage, progress = chain.journal.tokens, chain.driver.progress
    tokens = (usage["prompt_tokens"], usage["completion_tokens"], usage["cached_tokens"])
    return Counts(time.monotonic(), progress.done - progress.kept, *tokens)


def _describe(chain: Chain, meter: Meter) -> tuple[str, str, str, str]:
    """Records and the time they need, tokens, requests, failures."""
    progress, journal, rates = chain.driver.progress, chain.journal, meter.read(_counts(chain))
    to_do = progress.total - progress.done
    left = rates.seconds_left(to_do) if to_do else None
    cached = "" if rates.cached is None else f" ({rates.cached:.0%} from the cache)"
    running, waiting = journal.load()
    answered = f"{journal.asked} answered, {journal.replayed} from the journal"
    lost = f", {progress.failed} records lost" if progress.failed else ""
    return (
        f"{progress.done} of {progress.total} records" + ("" if left is None else f", about {duration(left)} left"),
        f"tokens/s in {rates.tokens_in:.0f}{cached}, out {rates.tokens_out:.0f}",
        f"requests: {running} running, {waiting} waiting, {answered}",
        f"{progress.failures} failures{lost}",
    )


def duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 100 * 60 else f"{seconds / 3600:.1f} h"


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


def show_work(console: Console, journal: Journal, engines: Engines) -> None:
    """What this call asked, and what it had from the journal."""
    work: dict[str, Any] = {"replies": journal.asked, "replayed": journal.replayed, **journal.tokens}
    work["neutralised"] = engines.neutralised
    cost = engines.cost(journal.usage)
    if cost is not None:
        work["cost"] = round(cost, 6)
    before = console.report["counts"].get("work", {})
    console.report["counts"]["work"] = {name: before.get(name, 0) + work.get(name, 0) for name in (before | work)}
    cached = f" ({work['cached_tokens']} from the cache)" if work.get("cached_tokens") else ""
    console.say(
        f"asked: {work['replies']} replies, {work['replayed']} more from the journal; "
        f"tokens in {work.get('prompt_tokens', 0)}{cached}, out {work.get('completion_tokens', 0)}"
        + ("" if cost is None else f"; cost {cost:.2f}")
    )
    if work["neutralised"]:
        console.say(f"special tokens in prompts, sent as plain text: {work['neutralised']}")


def show_counts(console: Console, job: Job, names: Sequence[str]) -> None:
    """The balance of every stage: in = ok + filtered + failed, the stage's own tallies, and where its losses are."""
    for name in names:
        manifest = job.run.manifest(name)
        if manifest is None:
            continue
        counts, shown = manifest.counts, job.run.name_of(name)
        console.report["counts"][shown] = dict(counts)
        console.report["outputs"][shown] = str(job.run.folder(name))
        tallies = ", ".join(f"{key} {value}" for key, value in counts.items() if key not in _BALANCE and value)
        balance = ", ".join(f"{key} {counts[key]}" for key in _BALANCE)
        console.show(f"{shown}: {balance}" + (f" ({tallies})" if tallies else ""))
        for state in ("failed", "filtered"):
            if num_lost := sum(part[state]["rows"] for part in manifest.parts):
                path = job.run.losses_path(state, name)
                console.report["outputs"][f"{state}/{shown}"] = str(path)
                console.show(f"  {num_lost} {state}, each with its reason: {path}")


_BALANCE = ("in", "ok", "filtered", "failed")


def show_satisfied(console: Console, job: Job, names: Sequence[str]) -> None:
    from pipeline.chain import SATISFIED_SHARE, satisfied_drafts

    share = satisfied_drafts(job) if "critique-revise" in names else None
    if share is not None and share > SATISFIED_SHARE:
        console.report["counts"]["satisfied_drafts"] = share
        console.show(
            f"note: {share:.0%} of drafts already satisfied their principles: the judge found no fault in them, or "
            "their first revision neither better nor worse. These prompts teach the model little. Take harder prompts, "
            f"look at some records with `cai show --run {job.run.path}`, and check that the judge can tell good from "
            "bad (`cai try`)."
        )
