"""score: parse, call, print."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipeline.cli.common import Console, command, run_option, settings_options, stop_on_signals
from pipeline.errors import UsageError

if TYPE_CHECKING:
    from pipeline.train.score import ScoreReport

LINE_EVERY_S = 30.0
_BARS = " ▁▂▃▄▅▆▇█"


@command("score", help="Score answers with a reward model or a policy, and group them by quality.")
@click.option("--dry-run", is_flag=True, help="Print rows, completions and tokens, and score nothing.")
@click.option("--out", type=click.Path(path_type=Path), metavar="DIR", help="The dataset's folder, without a run.")
@click.option(
    "--group",
    metavar="GROUP",
    help="Write only best-of-n, top-quantile=SHARE, or each of graded=NUMBER bands, as answers to imitate.",
)
@click.option("--policy", metavar="MODEL", help="Score by this model's log-probability per token (p of RRHF).")
@click.option("--reward-model", metavar="MODEL", help="Score with this one; the run's models/rm if not given.")
@click.option("--data", multiple=True, metavar="SOURCE[@WEIGHT]", help="Rows from elsewhere than the run; repeatable.")
@settings_options
@run_option()
def score_command(
    console: Console,
    *,
    run: Path,
    config: Path | None,
    assignments: Sequence[str],
    data: Sequence[str],
    reward_model: str | None,
    policy: str | None,
    group: str | None,
    out: Path | None,
    dry_run: bool,
) -> None:
    from pipeline import jobs
    from pipeline.calllog import logged
    from pipeline.lock import locked
    from pipeline.store import RunFolder

    stop_on_signals("the same command begins anew")
    if reward_model and policy:
        raise UsageError("--reward-model and --policy: give one of them")
    if out is not None and not data:
        raise UsageError("--out without --data: name what to score, or leave --out away and give a run")
    settings = jobs.resolve(run, config, assignments, {})
    if out is None:
        RunFolder(run)
    model = jobs.scoring_model(run, reward_model or policy, options="--reward-model or --policy")
    from pipeline.train import rows  # and with them torch, once it is known that the call makes sense
    from pipeline.train.quality import ALL, parse_grouping
    from pipeline.train.score import ScoreJob, plan_score, run_score

    grouping = parse_grouping(group) if group else ALL
    name = "scored" if grouping == ALL else f"scored-{grouping.kind}"
    job = ScoreJob(
        sources=[rows.parse_source(text) for text in data] or [rows.Source(str(run))],
        model=model,
        kind="policy" if policy else "reward",
        out=out or run / "datasets" / name,
        grouping=grouping,
        shares=settings.export.split,
        device=settings.engine.device,
        microbatch_tokens=settings.train_rm.microbatch_tokens,
        watch=_watch(console),
    )
    console.say(f"{job.kind}: {model}")
    if dry_run:
        _show_plan(console, plan_score(job))
        return
    with ExitStack() as held:
        if out is None:
            held.enter_context(locked(run))
            held.enter_context(logged(run, console.report))
        _show(console, run_score(job))


def _watch(console: Console) -> Callable[[int], None]:
    """A line every 30 s."""
    last = [time.monotonic()]

    def watch(num_rows: int) -> None:
        if time.monotonic() - last[0] >= LINE_EVERY_S:
            last[0] = time.monotonic()
            console.say(f"{num_rows} rows scored")

    return watch


def _show_plan(console: Console, counts: dict[str, dict[str, int]]) -> None:
    console.report["counts"]["score"] = counts
    for split, found in counts.items():
        console.show(f"{split}: " + ", ".join(f"{name} {count}" for name, count in found.items()))


def _show(console: Console, report: ScoreReport) -> None:
    summary: dict[str, Any] = report.summary
    console.report["counts"]["score"] = {
        **summary,
        "parts": {folder.name: made.rows for folder, made in report.parts.items()},
    }
    console.report["outputs"]["scored"] = [str(folder) for folder in report.parts]
    for tally in report.tallies:
        console.say(str(tally))
    for name, value in summary["agreement"].items():
        console.show(f"order as before, {name}: {value:.1%} of pairs")
    console.show(f"scores: {summary['completions']} answers, mean {summary['mean']:.4f}, std {summary['std']:.4f}")
    console.show("quantiles: " + ", ".join(f"{q} {value:.4f}" for q, value in summary["quantiles"].items()))
    histogram = summary["histogram"]
    console.show(f"{histogram['from']:.4f} {_bars(histogram['counts'])} {histogram['to']:.4f}")
    for name, found in summary["means"].items():
        console.show(f"{name}: {found['completions']} answers, mean {found['mean']:.4f}")
    for folder, made in report.parts.items():
        version = f"version {made.version}" if made.version else "no rows, no folder"
        console.show(f"{folder}: train {made.rows['train']}, test {made.rows['test']} rows; {version}")


def _bars(counts: Sequence[int]) -> str:
    """A histogram in one line; what is not empty shows."""
    most = max(counts)
    return "".join(_BARS[-(-count * (len(_BARS) - 1) // most)] for count in counts)
