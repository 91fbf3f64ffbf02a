"""run: the steps of the recipe, one after the other, each as its own command does it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipeline.cli.common import Console, command, stop_on_signals
from pipeline.cli.stages import bring_prompts, chain_options, export, opened, read_settings, run_chain
from pipeline.errors import StoppedError, UsageError

if TYPE_CHECKING:
    from pipeline.config.settings import Settings
    from pipeline.jobs import Job
    from pipeline.recipe import Step


@command("run", help="Run the whole recipe: data, SFT, samples of the SFT model, reward model, DPO.")
@click.option(
    "--calibrate",
    type=click.IntRange(1),
    is_flag=False,
    flag_value=8,
    metavar="[N]",
    help="With --dry-run: ask for real about the first N prompts (8), kept for the run, and estimate from that.",
)
@chain_options
def run_command(
    console: Console,
    *,
    run: Path,
    limit: int | None,
    dry_run: bool,
    frozen: bool,
    grace: float,
    calibrate: int | None,
    **options: Any,
) -> None:
    from pipeline import jobs, recipe
    from pipeline.chain import DATA_STAGES
    from pipeline.cli.ppo import check_ppo
    from pipeline.store import RunFolder
    from pipeline.voices import check_models

    if calibrate and not dry_run:
        raise UsageError("--calibrate: measures for an estimate; use it with --dry-run")
    settings = read_settings(run, **options)
    trainers, why_none = recipe.trainers(settings)
    if trainers and not jobs.has_own_model(settings):
        jobs.start_model(run, settings, trainers[0], None)
    steps = recipe.steps(settings.recipe, trainers)
    RunFolder.check(run, create=True)
    if "ppo" in trainers:
        check_ppo(run, settings, trainers)
    check_models(settings, DATA_STAGES)  # before prompts are brought in, which a mended call would keep
    if dry_run:
        _show_estimate(console, run, settings, steps, limit, calibrate)
    else:
        with opened(console, run, settings, frozen=frozen, is_first=True) as job:
            _Call(console, job, bring_prompts(console, job, limit), grace).run(steps)
    if why_none:
        console.show(f"no training: {why_none}")


def _show_estimate(
    console: Console, run: Path, settings: Settings, steps: list[Step], limit: int | None, calibrate: int | None
) -> None:
    from pipeline.cli.estimates import show_estimate
    from pipeline.recipe import Stages, Train

    chains: dict[int, tuple[str, ...]] = {}
    for step in steps:
        if isinstance(step, Stages):
            chains[step.phase] = chains.get(step.phase, ()) + step.names
    trainers = [step.trainer for step in steps if isinstance(step, Train)]
    show_estimate(console, run, settings, list(chains.items()), limit, num=calibrate, trainers=trainers)


class _Call:
    """One call of `cai run`: its budgets and its deadline count over all steps."""

    def __init__(self, console: Console, job: Job, limit: int | None, grace: float) -> None:
        from pipeline.voices import NOTHING

        self.console, self.job, self.limit, self.grace = console, job, limit, grace
        max_time = job.settings.run.max_time
        self.deadline = None if max_time is None else time.monotonic() + max_time
        self.spent = NOTHING
        self.unchecked: list[tuple[int, tuple[str, ...]]] = []

    def run(self, steps: list[Step]) -> None:
        from pipeline.recipe import Export, Stages

        for step in steps:
            if isinstance(step, Stages):
                self._run_stages(step.phase, step.names)
            elif isinstance(step, Export):
                export(self.console, self.job, before_samples=step.before_samples)
                self._check_shares()
            else:
                self._train(step.trainer)

    def _run_stages(self, phase: int, names: tuple[str, ...]) -> None:
        left = None if self.deadline is None else max(0.0, self.deadline - time.monotonic())
        job = self.job.of_phase(phase)
        self.spent = run_chain(
            self.console, job, names, limit=self.limit, grace=self.grace, max_time=left, spent=self.spent
        )
        self.unchecked.append((phase, names))

    def _check_shares(self) -> None:
        """After the export, so that what there is can be used."""
        from pipeline.chain import check_shares

        for phase, names in self.unchecked:
            check_shares(self.job.of_phase(phase), names)
        self.unchecked.clear()

    def _train(self, trainer: str) -> None:
        from pipeline.cli.training import train_in_run

        if self._is_late():
            raise StoppedError("stopped at run.max_time; the same command goes on from here")
        train_in_run(self.console, self.job, trainer, is_late=self._is_late, spent=self.spent)
        stop_on_signals()

    def _is_late(self) -> bool:
        return self.deadline is not None and time.monotonic() > self.deadline
