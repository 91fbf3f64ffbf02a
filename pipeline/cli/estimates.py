"""What a dry run prints."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.cli.common import Console, stop_on_signals

if TYPE_CHECKING:
    from pipeline.config.settings import Settings
    from pipeline.estimate import Estimate, Measured


def show_estimate(
    console: Console,
    run: Path,
    settings: Settings,
    chains: Sequence[tuple[int, Sequence[str]]],
    limit: int | None,
    *,
    num: int | None = None,
    trainers: Sequence[str] = (),
) -> None:
    """Counts what the call would ask for, from the sources or the prompts that the run already has.

    chains: phase and stages. num: how many prompts to measure phase 1 on; None: guess.
    """
    from pipeline import jobs
    from pipeline.estimate import total

    measured = _measure(console, run, settings, num) if num else None
    estimates = {
        phase: jobs.estimate_job(run, settings, names, limit, measured if phase == 1 else None, phase=phase)
        for phase, names in chains
    }
    steps = jobs.estimate_trainings(run, settings, trainers, limit)
    found = total(estimates)
    by_votes = found.by_votes
    console.report["counts"] = found._asdict() | {"by_votes": by_votes and by_votes._asdict(), "steps": steps}
    _show_requests(console, found, measured)
    for trainer, number in steps.items():
        console.show(f"train-{trainer:<6} {number:>14,}  steps at most")


def _show_requests(console: Console, estimate: Estimate, measured: Measured | None) -> None:
    from pipeline.estimate import REPLY_SHARE

    of_in, of_out = "about, at 4 characters a token", f"about, at {REPLY_SHARE:.0%} of max_tokens a reply"
    if measured:
        of_in = of_out = f"about, as for the first {measured.records} prompts"
    console.show(f"records      {estimate.records:>14,}")
    for kind, number in estimate.requests.items():
        console.show(f"  {kind:<17} {number:>7,} requests")
    console.show(f"requests     {sum(estimate.requests.values()):>14,}")
    console.show(f"tokens in    {estimate.tokens_in:>14,}  {of_in}")
    console.show(f"tokens out   {estimate.tokens_out:>14,}  {of_out}")
    console.show(f"disk         {estimate.disk / 1e6:>14,.1f}  MB, about")
    if estimate.cost is not None:
        console.show(f"cost         {estimate.cost:>14,.2f}  about, at price_in and price_out of the settings")
    if estimate.by_votes:
        votes = estimate.by_votes
        cost = "" if votes.cost is None else f", cost {votes.cost:,.2f}"
        console.show(
            f"by votes     {sum(votes.requests.values()):>14,} requests, tokens in {votes.tokens_in:,}, out "
            f"{votes.tokens_out:,}{cost}: if the judge gives no log-probabilities, which `cai doctor` tells"
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
