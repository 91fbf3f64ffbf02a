"""status and show: how far a run is, and its records for reading."""

from __future__ import annotations

import difflib
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import click

from pipeline.cli.common import Console, command, printable, run_option
from pipeline.errors import UsageError

if TYPE_CHECKING:
    from pipeline.reading import Wanted
    from pipeline.standing import Standing
    from pipeline.store import RunFolder

VERDICTS = ("worse", "improved", "same", "abstain", "unverified")
_BALANCE = ("in", "ok", "filtered", "failed")
_METRICS = ("eval/loss", "eval/scores/accuracy", "eval/rewards/accuracy")


@command("status", help="Show how far a run is, what is left to do, and the command that does it.")
@run_option()
def status_command(console: Console, *, run: Path) -> None:
    from pipeline.calllog import last_call
    from pipeline.standing import standing
    from pipeline.store import RunFolder

    found = standing(RunFolder(run))
    _report(console, found)
    for line in _status_lines(found):
        console.show(line)
    if call := last_call(run):
        console.report["outputs"]["last_call"] = call
        how = call["error"] or "done"
        cost = call["counts"].get("work", {}).get("cost")
        how += "" if cost is None else f", cost {cost:.2f}"
        console.show(printable(f"last call, {call['time']}: cai {shlex.join(call['argv'])} ({how})"))


def _report(console: Console, found: Standing) -> None:
    counts = {
        name: {"parts": stage.parts, "prompts": stage.covered, "stale": stage.stale, **stage.counts}
        for name, stage in found.stages.items()
    }
    datasets = {name: {"version": dataset.version, **dataset.rows} for name, dataset in found.datasets.items()}
    models = {name: model._asdict() for name, model in found.models.items()}
    console.report["counts"] = {**counts, "datasets": datasets, "models": models}
    console.report["outputs"] = {
        "complete": not found.to_do,
        "to_do": found.to_do,
        "next": found.next_command,
        "holder": found.holder._asdict() if found.holder else None,
    }


def _status_lines(found: Standing) -> list[str]:
    lines = [f"{'stage':<16}{'parts':>7}" + "".join(f"{name:>11}" for name in _BALANCE)]
    for name, stage in found.stages.items():
        balance = "".join(f"{stage.counts[key]:>11,}" for key in _BALANCE)
        left = found.prompts - stage.covered
        state = f"{left:,} prompts to do" if left > 0 else "complete"
        again = f", {stage.stale:,} of them again: what they were made from has changed" if stage.stale else ""
        lines.append(f"{name:<16}{stage.parts:>7,}{balance}  {state}{again}")
    for name, stage in found.stages.items():
        if tallies := [f"{key} {stage.counts[key]:,}" for key in sorted(stage.counts) if key not in _BALANCE]:
            lines.append(f"{name}: {', '.join(tallies)}")
    for name, dataset in found.datasets.items():
        rows = ", ".join(f"{split} {number:,}" for split, number in dataset.rows.items())
        lines.append(f"datasets/{name}: {dataset.version}, {rows}")
    for name, model in found.models.items():
        metrics = "".join(f", {metric} {model.metrics[metric]:.4f}" for metric in _METRICS if metric in model.metrics)
        old = "" if model.is_current else "; made from what has changed since"
        lines.append(f"models/{name}: step {model.step}{metrics}{old}")
    if found.holder:
        pid, host = found.holder.pid, found.holder.host
        lines.append(f"at work: process {pid} on host {host}, last sign of life {found.holder.silence_s:.0f} s ago")
    lines.append(f"to do: {'; '.join(found.to_do) or 'nothing, the run is complete'}")
    when = "next, when that has ended" if found.holder else "next"
    return [*lines, f"{when}: {found.next_command}"]


@command("show", short_help="Read the records of a run.")
@click.option("--limit", type=click.IntRange(1), default=5, show_default=True, help="At most so many records.")
@click.option(
    "--worst/--in-order",
    "worst_first",
    default=True,
    help="Which first: the ones to look at (default), or as they came.",
)
@click.option("--failed", is_flag=True, help="Only records that failed, were filtered, or lost a sample.")
@click.option("--verdict", type=click.Choice(VERDICTS), help="Only records with a revision of that verdict.")
@click.option("--regressed", "verdict", flag_value="worse", help="The same as --verdict worse.")
@click.option("--principle", metavar="NAME", help="Only records that drew the principle of that id.")
@run_option()
@click.argument("id", required=False, default="")
def show_command(
    console: Console,
    *,
    run: Path,
    id: str,
    principle: str | None,
    verdict: str | None,
    failed: bool,
    worst_first: bool,
    limit: int,
) -> None:
    """Read the records of a run: prompt, drafts, critiques, revisions as word diffs, verdicts, ranks, losses.

    ID: only records whose id begins so.

    Worst first: records with a revision that the judge found worse (the surest verdict first), then those where a text
    that was not revised beat every revision (by the distance in score), then those that failed or lost a sample, then
    the rest, the least improved first. What a revision takes out stands in [-...-] and what it puts in in {+...+}; on
    a terminal in colours.
    """
    from pipeline.cli.view import show_cases
    from pipeline.reading import STAGES, Wanted, select
    from pipeline.store import RunFolder

    folder = RunFolder(run)
    for stage in STAGES:
        try:
            folder.check_inputs(stage)
        except UsageError as error:
            console.say(f"note: {error}")
    wanted = Wanted(id, principle, verdict, failed)
    found = select(folder, wanted, limit=limit, worst_first=worst_first)
    console.report["outputs"]["records"] = [case.plain() for case in found]
    if not found:
        _say_none(console, folder, wanted)
    elif not console.as_json:
        show_cases(found)


def _say_none(console: Console, folder: RunFolder, wanted: Wanted) -> None:
    """Nothing to show: a slip in an id is an error, filters that leave nothing are not."""
    from constitution.principles import Constitution
    from pipeline.reading import Wanted

    if wanted.id_prefix:
        raise UsageError(
            f"{folder.path}: no such record has an id that begins with {wanted.id_prefix!r}; "
            f"ids stand in {folder.path / 'prompts'}, or leave the other filters out"
        )
    principles = folder.path / "constitution.yaml"
    if wanted.principle is not None and principles.exists():
        ids = [principle.id for principle in Constitution.load(principles)]
        if wanted.principle not in ids:
            near = difflib.get_close_matches(wanted.principle, ids, 1, 0.5)
            cure = f"did you mean {near[0]!r}?" if near else f"ids: {', '.join(ids)}"
            raise UsageError(f"--principle {wanted.principle}: the run's constitution has no such id; {cure}")
    is_empty = wanted == Wanted()
    hint = f"no records yet; `cai status --run {folder.path}` says what to do" if is_empty else "no record fits"
    console.say(f"{folder.path}: {hint}")
