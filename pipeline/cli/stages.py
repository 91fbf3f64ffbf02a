"""generate, critique-revise, rank, export: parse, call, print."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
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

if TYPE_CHECKING:
    from pipeline.config.settings import Settings
    from pipeline.jobs import Job
    from pipeline.voices import Spent

F = TypeVar("F", bound=Callable[..., Any])


def chain_options(function: F) -> F:
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


def _phase_option(function: F) -> F:
    return click.option(
        "--phase",
        type=click.IntRange(1, 2),
        default=1,
        show_default=True,
        help="2: samples of the SFT model, for preferences.",
    )(function)


@command("generate", help="Draft answers to the prompts.")
@_phase_option
@chain_options
def generate_command(console: Console, **options: Any) -> None:
    _run_stage(console, "generate", **options)


@command("critique-revise", help="Criticise and revise the drafts.")
@chain_options
def critique_revise_command(console: Console, **options: Any) -> None:
    _run_stage(console, "critique-revise", phase=1, **options)


@command("rank", help="Compare the candidates and put them in order.")
@_phase_option
@chain_options
def rank_command(console: Console, **options: Any) -> None:
    _run_stage(console, "rank", **options)


def _run_stage(
    console: Console,
    name: str,
    *,
    phase: int,
    run: Path,
    limit: int | None,
    dry_run: bool,
    frozen: bool,
    grace: float,
    **options: Any,
) -> None:
    from pipeline.chain import check_shares
    from pipeline.cli.estimates import show_estimate
    from pipeline.store import RunFolder
    from pipeline.voices import NOTHING, check_models

    settings = read_settings(run, **options)
    is_first = phase == 1 and (bool(options["prompts"]) or name == "generate")
    RunFolder.check(run, create=is_first)
    if phase == 1 or name != "generate":  # whom phase 2 samples is the run's own model
        check_models(settings, (name,))  # before prompts are brought in, which a mended call would keep
    if dry_run:
        show_estimate(console, run, settings, [(phase, (name,))], limit)
        return
    with opened(console, run, settings, frozen=frozen, is_first=is_first) as job:
        limit = bring_prompts(console, job, limit) if is_first else limit
        job = job.of_phase(phase)
        run_chain(console, job, (name,), limit=limit, grace=grace, max_time=settings.run.max_time, spent=NOTHING)
        check_shares(job, (name,))


def read_settings(
    run: Path,
    *,
    prompts: Sequence[str],
    seed: int | None,
    config: Path | None,
    assignments: Sequence[str],
    model: str | None,
    endpoints: Sequence[str],
    constitution: str | None,
) -> Settings:
    """The settings of a call with `chain_options`."""
    from pipeline import jobs

    flags = model_flags(model, endpoints, constitution)
    flags |= {"prompts": {"sources": [{"path": path} for path in prompts]}} if prompts else {}
    flags |= {} if seed is None else {"run": {"seed": seed}}
    return jobs.resolve(run, config, assignments, flags)


@contextmanager
def opened(console: Console, run: Path, settings: Settings, *, frozen: bool, is_first: bool) -> Iterator[Job]:
    """Holds the run for a call. is_first: it may be made."""
    from pipeline import jobs
    from pipeline.calllog import logged
    from pipeline.lock import locked
    from pipeline.store import RunFolder

    stop_on_signals()
    RunFolder.check(run, create=is_first)
    with locked(run), logged(run, console.report):
        RunFolder(run, create=is_first)
        job, changed = jobs.open_job(run, settings, frozen=frozen)
        for line in changed:
            console.say(f"changed since the last call: {line}")
        yield job


def bring_prompts(console: Console, job: Job, limit: int | None) -> int | None:
    """Reads the sources. Returns the limit of what follows."""
    from pipeline import jobs
    from pipeline.cli import progress

    ingested = jobs.ingest_prompts(job, limit)
    progress.show_ingest(console, ingested)
    # A reading that brought new prompts was itself limited; they may stand behind older ones.
    return None if ingested and ingested.new else limit


def run_chain(
    console: Console,
    job: Job,
    names: Sequence[str],
    *,
    limit: int | None,
    grace: float,
    max_time: float | None,
    spent: Spent,
) -> Spent:
    """Runs stages as one chain and shows what came of them. Returns what the call has spent by then."""
    from pipeline import chain as chains
    from pipeline.cli import progress

    chain = chains.prepare(job, names, limit=limit, grace_s=grace, spent=spent)
    try:
        asyncio.run(chains.run_chain(chain, max_time=max_time, watch=progress.watcher(console), warn=console.say))
    finally:
        stop_on_signals()
        progress.show_work(console, chain.journal, chain.engines)
        progress.show_counts(console, job, names)
    progress.show_satisfied(console, job, names)
    return spent.plus(chain.spent)


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
        export(console, job)


def export(console: Console, job: Job, *, before_samples: bool = False) -> None:
    """Writes the datasets and prints what came out, and what was left out and why. before_samples: see export_run."""
    from pipeline import jobs
    from pipeline.stages.export import export_run

    report = export_run(
        job.run,
        job.settings.export,
        tie_band=job.settings.rank.tie_band,
        pairs_from=job.settings.recipe.pairs,
        before_samples=before_samples,
    )
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
