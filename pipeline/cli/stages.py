"""generate, critique-revise, rank, export and the whole recipe: parse, call, print."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from pipeline.cli.common import (
    Console,
    command,
    model_flags,
    model_options,
    run_option,
    settings_options,
    stop_on_signals,
)
from pipeline.errors import UsageError

if TYPE_CHECKING:
    from pipeline.config.settings import Settings
    from pipeline.estimate import Measured
    from pipeline.jobs import Job

F = TypeVar("F", bound=Callable[..., Any])


def _chain_options(function: F) -> F:
    for option in (
        click.option("--grace", type=float, default=30.0, show_default=True, help="Seconds to drain after a signal."),
        click.option("--frozen", is_flag=True, help="Refuse to go on if settings or principles changed."),
        click.option("--dry-run", is_flag=True, help="Print records, requests, tokens and disk, and ask nothing."),
        click.option("--seed", type=int, help="The run's seed."),
        click.option("--limit", type=click.IntRange(1), help="Only the first N prompts."),
        click.option("--prompts", multiple=True, metavar="FILE|hf:NAME", help="Where prompts come from; repeatable."),
        model_options,
        settings_options,
        run_option(),
    ):
        function = option(function)
    return function


@command("run", help="Run the whole recipe: generate, critique-revise, rank, export.")
@click.option(
    "--calibrate",
    type=click.IntRange(1),
    is_flag=False,
    flag_value=8,
    metavar="[N]",
    help="With --dry-run: ask for real about the first N prompts (8), kept for the run, and estimate from that.",
)
@_chain_options
def run_command(console: Console, **options: Any) -> None:
    _run_stages(console, ("generate", "critique-revise", "rank"), export=True, **options)


@command("generate", help="Draft answers to the prompts.")
@_chain_options
def generate_command(console: Console, **options: Any) -> None:
    _run_stages(console, ("generate",), **options)


@command("critique-revise", help="Criticise and revise the drafts.")
@_chain_options
def critique_revise_command(console: Console, **options: Any) -> None:
    _run_stages(console, ("critique-revise",), **options)


@command("rank", help="Compare the candidates and put them in order.")
@_chain_options
def rank_command(console: Console, **options: Any) -> None:
    _run_stages(console, ("rank",), **options)


@command("export", help="Write the datasets.")
@click.option("--format", "format_", type=click.Choice(["messages", "text"]), help="Message lists, or strings.")
@settings_options
@run_option()
def export_command(
    console: Console, *, run: Path, config: Path | None, assignments: Sequence[str], format_: str | None
) -> None:
    from pipeline import jobs
    from pipeline.calllog import logged
    from pipeline.lock import locked
    from pipeline.store import RunFolder

    stop_on_signals()
    RunFolder(run)
    flags = {"export": {"format": format_}} if format_ else {}
    settings = jobs.resolve(run, config, assignments, flags)
    with locked(run), logged(run, console.report):
        job, _ = jobs.open_job(run, settings)
        jobs.keep_inputs(job)
        _export(console, job)


def _export(console: Console, job: Job) -> None:
    """Writes the datasets and prints what came out, and what was left out and why."""
    from pipeline import jobs
    from pipeline.stages.export import export_run

    report = export_run(job.run, job.settings.export, tie_band=job.settings.rank.tie_band)
    jobs.keep_inputs(job)
    splits = {name: report.prompts[name] for name in ("sft", "preference", "test")}
    console.show("split: " + ", ".join(f"{name} {count} prompts" for name, count in splits.items()))
    counts: dict[str, Any] = {"split": splits}
    for name, published in report.datasets.items():
        left_out = dict(sorted(report.dropped[name].items()))
        counts[name] = {**published.rows, "left_out": left_out}
        folder = job.run.path / "datasets" / name
        if any(published.rows.values()):
            console.report["outputs"][f"datasets/{name}"] = str(folder)
        why = "; left out: " + ", ".join(f"{reason} {count}" for reason, count in left_out.items()) if left_out else ""
        rows = ", ".join(f"{split} {count}" for split, count in published.rows.items())
        empty = "; empty now, and cannot be loaded" if published.version and not any(published.rows.values()) else ""
        console.show(f"{folder}: {rows} rows{empty}{why}")
    counts |= {"labels": dict(report.labels), "helpful": dict(report.helpful)}
    for what, found in (("chosen of preference rows", report.labels), ("helpful rows of sft", report.helpful)):
        if found:
            console.show(f"{what}: " + ", ".join(f"{name} {count}" for name, count in sorted(found.items())))
    if report.left_out:
        console.report["outputs"]["filtered/export"] = str(report.left_out)
        console.show(f"left out, each with its reason: {report.left_out}")
    console.report["counts"]["datasets"] = counts
    report.check()


def _run_stages(
    console: Console,
    names: Sequence[str],
    *,
    run: Path,
    prompts: Sequence[str],
    limit: int | None,
    seed: int | None,
    dry_run: bool,
    frozen: bool,
    grace: float,
    config: Path | None,
    assignments: Sequence[str],
    model: str | None,
    endpoints: Sequence[str],
    constitution: str | None,
    export: bool = False,
    calibrate: int | None = None,
) -> None:
    from pipeline import jobs, recipe
    from pipeline.calllog import logged
    from pipeline.cli import progress
    from pipeline.lock import locked
    from pipeline.store import RunFolder

    flags = model_flags(model, endpoints, constitution) | _input_flags(prompts, seed)
    if calibrate and not dry_run:
        raise UsageError("--calibrate: measures for an estimate; use it with --dry-run")
    settings = jobs.resolve(run, config, assignments, flags)
    if dry_run:
        _dry_run(console, run, settings, names, limit, calibrate)
        return
    stop_on_signals()
    is_first = bool(prompts) or "generate" in names
    if is_first:
        recipe.check_models(settings, names)  # before prompts are brought in, which a mended call would keep
    RunFolder.check(run, create=is_first)
    with locked(run), logged(run, console.report):
        RunFolder(run, create=is_first)
        job, changed = jobs.open_job(run, settings, frozen=frozen)
        for line in changed:
            console.say(f"changed since the last call: {line}")
        if is_first:
            ingested = jobs.ingest_prompts(job, limit)
            progress.show_ingest(console, ingested)
            # A reading that brought new prompts was itself limited; they may stand behind older ones.
            limit = None if ingested and ingested.new else limit
        chain = recipe.prepare(job, names, limit=limit, grace_s=grace)
        try:
            watch, max_time = progress.watcher(console), settings.run.max_time
            asyncio.run(recipe.run_chain(chain, max_time=max_time, watch=watch, warn=console.say))
        finally:
            stop_on_signals()
            progress.show_work(console, chain)
            progress.show_counts(console, job, names)
        progress.show_satisfied(console, job, names)
        if export:
            _export(console, job)
        recipe.check_shares(job, names)


def _input_flags(prompts: Sequence[str], seed: int | None) -> dict[str, Any]:
    sources = {"prompts": {"sources": [{"path": path} for path in prompts]}} if prompts else {}
    return sources | ({} if seed is None else {"run": {"seed": seed}})


def _dry_run(
    console: Console, run: Path, settings: Settings, names: Sequence[str], limit: int | None, num: int | None
) -> None:
    """Counts what the call would ask for, from the sources or the prompts that the run already has.

    num: how many prompts to measure it on; None: guess.
    """
    from pipeline import jobs
    from pipeline.estimate import REPLY_SHARE

    measured = _measure(console, run, settings, num) if num else None
    estimate = jobs.estimate_job(run, settings, names, limit, measured)
    by_votes = estimate.by_votes
    console.report["counts"] = {**estimate._asdict(), "by_votes": by_votes and by_votes._asdict()}
    of_in, of_out = "about, at 4 characters a token", f"about, at {REPLY_SHARE:.0%} of max_tokens a reply"
    if measured:
        of_in = of_out = f"about, as for the first {measured.records} prompts"
    console.show(f"records      {estimate.records:>14,}")
    for kind, number in estimate.requests.items():
        console.show(f"  {kind:<10} {number:>14,} requests")
    console.show(f"requests     {sum(estimate.requests.values()):>14,}")
    console.show(f"tokens in    {estimate.tokens_in:>14,}  {of_in}")
    console.show(f"tokens out   {estimate.tokens_out:>14,}  {of_out}")
    console.show(f"disk         {estimate.disk / 1e6:>14,.1f}  MB, about")
    if estimate.cost is not None:
        console.show(f"cost         {estimate.cost:>14,.2f}  about, at price_in and price_out of the settings")
    if by_votes:
        cost = "" if by_votes.cost is None else f", cost {by_votes.cost:,.2f}"
        console.show(
            f"by votes     {sum(by_votes.requests.values()):>14,} requests, tokens in {by_votes.tokens_in:,}, out "
            f"{by_votes.tokens_out:,}{cost}: if the judge gives no log-probabilities, which `cai doctor` tells"
        )
    if estimate.seconds is not None and measured:
        pace = f"the pace of {measured.records} prompts in flight; an engine with room for more is faster"
        console.show(f"seconds      {estimate.seconds:>14,.0f}  about, at {pace}")


def _measure(console: Console, run: Path, settings: Settings, num: int) -> Measured:
    from pipeline.calibrate import calibrate
    from pipeline.lock import locked
    from pipeline.store import RunFolder

    stop_on_signals()
    RunFolder.check(run, create=True)
    with locked(run):
        measured = calibrate(run, settings, num)
    stop_on_signals()
    if measured.seconds_per_reply is None:
        console.say("every reply was in the journal already, so that there is no time to go by; take more prompts")
    return measured
