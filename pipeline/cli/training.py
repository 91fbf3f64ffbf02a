"""train-sft, train-rm, train-dpo, train-rrhf, train-ppo: parse, call, print."""

from __future__ import annotations

import importlib
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from pipeline.cli.common import Console, command, run_option, settings_options
from pipeline.cli.pace import watching
from pipeline.cli.ppo import call_ppo, check_inputs
from pipeline.errors import UsageError

if TYPE_CHECKING:
    from pipeline.config.settings import Settings
    from pipeline.jobs import Job as JobOfRun
    from pipeline.lm.load import Head
    from pipeline.train.layouts import Kind
    from pipeline.train.stage import Job, Report
    from pipeline.voices import Spent

F = TypeVar("F", bound=Callable[..., Any])
KINDS: dict[str, Kind] = {"sft": "sft", "rm": "comparisons", "dpo": "pairs", "rrhf": "ranked", "ppo": "prompts"}


def _training_options(function: F) -> F:
    for option in (
        click.option("--dry-run", is_flag=True, help="Print rows, steps and memory, and train nothing."),
        click.option("--seed", type=int, help="The run's seed: the order of rows."),
        click.option("--name", metavar="NAME", help="Of the model's folder in the run's models/."),
        click.option(
            "--out", type=click.Path(path_type=Path), metavar="DIR", help="The model's folder, without a run."
        ),
        click.option("--model", metavar="MODEL", help="Where training starts: `nano`, a folder or a hub name."),
        click.option(
            "--data", multiple=True, metavar="SOURCE[@WEIGHT]", help="Rows from elsewhere than the run; repeatable."
        ),
        settings_options,
        run_option(),
    ):
        function = option(function)
    return function


@command("train-sft", help="Train a model to imitate the chosen answers.")
@click.option("--reward-model", metavar="MODEL", help="Keep the weights whose answers to test prompts score best.")
@_training_options
def train_sft_command(console: Console, **options: Any) -> None:
    _train(console, "sft", **options)


@command("train-rm", help="Train a reward model on preferences.")
@_training_options
def train_rm_command(console: Console, **options: Any) -> None:
    _train(console, "rm", **options)


@command("train-dpo", help="Train a model on preferences directly (DPO, IPO).")
@_training_options
def train_dpo_command(console: Console, **options: Any) -> None:
    _train(console, "dpo", **options)


@command("train-rrhf", help="Train a model on ranked answers (RRHF).")
@click.option(
    "--reward-model",
    metavar="MODEL",
    help="Its scores replace those of the data; for new answers the run's models/rm if not given.",
)
@click.option("--resample-every", type=click.IntRange(min=1), metavar="STEPS", help="train_rrhf.resample_every.")
@_training_options
def train_rrhf_command(console: Console, *, resample_every: int | None, **options: Any) -> None:
    flags = {} if resample_every is None else {"train_rrhf": {"resample_every": resample_every}}
    _train(console, "rrhf", flags=flags, **options)


@command("train-ppo", help="Train a model by the scores of its answers (PPO), as InstructGPT was.")
@click.option("--reward-model", metavar="MODEL", help="What scores answers; the run's models/rm if not given.")
@_training_options
def train_ppo_command(console: Console, **options: Any) -> None:
    _train(console, "ppo", **options)


def _scorer(trainer: str, settings: Settings, run: Path, model: str | None, *, in_run: bool = True) -> str | None:
    """The model that gives scores in this training, if there is one. model: that the call names."""
    from pipeline.jobs import scoring_model

    reward = settings.train_ppo.reward
    if trainer == "ppo" and model and reward not in ("model", "policy"):
        raise UsageError(f"--reward-model: train_ppo.reward {reward} gives the scores; leave one of them away")
    is_needed = {
        "rrhf": settings.train_rrhf.resample_every is not None,
        "ppo": reward == "model" and in_run,
    }
    return scoring_model(run, model) if model or is_needed.get(trainer) else None


def _call(
    console: Console, trainer: str, job: Job, settings: Settings, *, scorer: str | None, spent: Spent | None = None
) -> Report:
    """The trainer. spent: by the call's steps before."""
    from pipeline.train import ranks
    from pipeline.train.scorers import open_scorer
    from pipeline.voices import NOTHING

    if trainer == "ppo":
        return call_ppo(console, job, settings, scorer, spent or NOTHING)
    module, own = importlib.import_module(f"pipeline.train.{trainer}"), getattr(settings, f"train_{trainer}")
    score = ranks.together(lambda: open_scorer(scorer, "reward", device=job.device)) if scorer else None
    report: Report = getattr(module, f"train_{trainer}")(job, own, **({"score": score} if score else {}))
    return report


def _train(console: Console, trainer: str, *, dry_run: bool, reward_model: str | None = None, **options: Any) -> None:
    """By itself, or as one of the processes that torchrun started; of these the first one speaks."""
    run, in_run = options["run"], options["out"] is None

    def read() -> tuple[Job, Settings, str | None]:
        job, settings = _read_job(console, trainer, **options)
        scorer = _scorer(trainer, settings, run, reward_model, in_run=in_run)
        if trainer == "ppo":
            check_inputs(settings)
        return job, settings, scorer

    with ExitStack() as held:
        if "TORCHELASTIC_RUN_ID" in os.environ:
            from pipeline.train import ranks

            held.enter_context(ranks.joined())
            if ranks.rank():
                console.mute()
            job, settings, scorer = ranks.together(read)
        else:
            job, settings, scorer = read()
        console.say(f"start: {job.start}")
        _check_out(job, trainer)
        if dry_run:
            _dry_run(console, trainer, job, settings, scorer)
        else:
            _carry_out(console, trainer, job, settings, scorer=scorer, run=run if in_run else None)


def _read_job(
    console: Console,
    trainer: str,
    *,
    run: Path,
    config: Path | None,
    assignments: Sequence[str],
    data: Sequence[str],
    model: str | None,
    out: Path | None,
    name: str | None,
    seed: int | None,
    flags: dict[str, Any] | None = None,
) -> tuple[Job, Settings]:
    from pipeline import jobs
    from pipeline.store import RUN_NAME, RunFolder

    seeds = {} if seed is None else {"run": {"seed": seed}}
    settings = jobs.resolve(run, config, assignments, {**(flags or {}), **seeds})
    if out is None:
        RunFolder(run)
        if name and not RUN_NAME.fullmatch(name):
            raise UsageError(f"--name {name}: use lower-case letters, digits, '.', '_', '-', at most 64")
    elif name:
        raise UsageError("--name beside --out: it names a folder in a run; leave one of them away")
    elif not data:
        raise UsageError("--out without --data: name what to train on, or leave --out away and give a run")
    from pipeline.train import rows  # and with them torch, once it is known that the call makes sense
    from pipeline.train.stage import Job

    job = Job(
        sources=[rows.parse_source(text) for text in data] or [rows.Source(str(run))],
        start=jobs.start_model(run, settings, trainer, model),
        out=out or run / "models" / (name or trainer),
        shares=settings.export.split,
        seed=settings.run.seed,
        device=settings.engine.device,
        trackers=settings.run.trackers,
        say=console.say,
    )
    return job, settings


def _carry_out(
    console: Console,
    trainer: str,
    job: Job,
    settings: Settings,
    *,
    scorer: str | None,
    run: Path | None,
) -> None:
    """run: that is locked, and whose log gets a line."""
    from pipeline.train import ranks

    with ExitStack() as held:
        if run:
            made_from = ranks.first(lambda: _made_from(_hold_run(console, run, settings, held), trainer, job, scorer))
            job = replace(job, made_from=made_from)
        _hold_output(job, held)
        with _stop_requests() as should_stop, watching(console) as watch:
            job = replace(job, watch=watch, should_stop=should_stop)
            report = _call(console, trainer, job, settings, scorer=scorer)
        _show(console, trainer, report)


def train_in_run(
    console: Console, opened: JobOfRun, trainer: str, *, is_late: Callable[[], bool], spent: Spent
) -> None:
    """A training of `cai run`, from the run's datasets and where the trainer's own command starts.

    is_late: asked after every step; the training stops then and can be resumed. spent: by the steps before.
    """
    from pipeline import jobs
    from pipeline.lm.load import release_memory
    from pipeline.train import rows
    from pipeline.train.stage import Job

    run, settings = opened.run.path, opened.settings
    release_memory()
    job = Job(
        sources=[rows.Source(str(run))],
        start=jobs.start_model(run, settings, trainer, None),
        out=run / "models" / trainer,
        shares=settings.export.split,
        seed=settings.run.seed,
        device=settings.engine.device,
        trackers=settings.run.trackers,
        say=console.say,
    )
    console.say(f"train-{trainer}: start: {job.start}")
    scorer = _scorer(trainer, settings, run, None)
    with ExitStack() as held, _stop_requests() as should_stop, watching(console) as watch:
        _hold_output(job, held)
        made_from = _made_from(opened, trainer, job, scorer)
        job = replace(job, made_from=made_from, watch=watch, should_stop=lambda: should_stop() or is_late())
        report = _call(console, trainer, job, settings, scorer=scorer, spent=spent)
    _show(console, trainer, report)
    console.report["outputs"][f"models/{trainer}"] = console.report["outputs"].pop("model")
    release_memory()


def _made_from(opened: JobOfRun, trainer: str, job: Job, scorer: str | None) -> dict[str, str]:
    """What of the run a training depends on, as it is now."""
    from pipeline import jobs
    from pipeline.train.rows import dataset_of

    run, names = opened.run.path, list[str]()
    if str(run) in [source.path for source in job.sources]:
        names += [f"datasets/{dataset_of(run, KINDS[trainer]).name}"]
    names += ["models/sft"] if job.start == str(run / "models" / "sft") else []
    names += ["models/rm"] if trainer == "ppo" and scorer == str(run / "models" / "rm") else []
    return {"constitution": opened.constitution.digest, **jobs.made_from(opened.run, *names)}


def _check_out(job: Job, trainer: str) -> None:
    """Before models are loaded or anything is written."""
    from pipeline.train import ranks
    from pipeline.train.output import check_out

    ranks.first(lambda: check_out(job.out, job.start, trainer=trainer))


def _hold_output(job: Job, held: ExitStack) -> None:
    """Locks the folder of work in progress, whichever way another call may come to it."""
    from pipeline.lock import working
    from pipeline.train import ranks
    from pipeline.train.output import work_path

    ranks.first(lambda: held.enter_context(working(work_path(job.out))))


def _hold_run(console: Console, run: Path, settings: Settings, held: ExitStack) -> JobOfRun:
    """Locks and logs the call, and keeps its inputs if it comes to its end."""
    from pipeline import jobs
    from pipeline.calllog import logged
    from pipeline.lock import locked

    held.enter_context(locked(run))
    held.enter_context(logged(run, console.report))
    opened, _ = jobs.open_job(run, settings)

    def keep(kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            jobs.keep_inputs(opened)

    held.push(keep)
    return opened


def _dry_run(console: Console, trainer: str, job: Job, settings: Settings, scorer: str | None) -> None:
    from constitution.principles import Constitution
    from pipeline.estimate import live_requests
    from pipeline.jobs import constitution_file
    from pipeline.train.plan import plan
    from pipeline.train.ppo import plan_ppo

    if trainer == "ppo":
        found = plan_ppo(job, settings.train_ppo, reward_model=scorer)
    else:
        head: Head = "score" if trainer == "rm" else "language"
        names = ["loss", *importlib.import_module(f"pipeline.train.{trainer}").METRICS]
        names += ["reward"] if trainer == "sft" and scorer else []
        found = plan(
            job,
            getattr(settings, f"train_{trainer}"),
            KINDS[trainer],
            head,
            metrics=[f"eval/{name}" for name in names],
            scorer=scorer,
        )
    memory, asked = found.memory, {}
    if trainer == "ppo":
        asked["answers"] = found.answers
        if settings.train_ppo.reward in ("judge", "graded"):
            constitution = Constitution.load(constitution_file(settings))
            asked["judge_requests"] = found.answers * live_requests(settings, constitution)
    console.report["counts"] = {
        **found.counts,
        "steps": found.steps,
        **asked,
        "memory": {**memory._asdict(), "total": memory.total, "advice": found.advice},
    }
    for split, counts in found.counts.items():
        console.show(f"{split}: " + ", ".join(f"{name} {count}" for name, count in counts.items()))
    console.show(f"steps         {found.steps:>12,}")
    for name, number in asked.items():
        console.show(f"{name:<14}{number:>12,}  at most")
    for part in ("weights", "gradients", "optimizer", "activations", "total", "free"):
        console.show(f"{part:<12}  {getattr(memory, part) / 2**20:>12,.1f}  MiB")
    console.show(found.advice or f"fits, with microbatches of up to {memory.tokens} tokens")


def _show(console: Console, trainer: str, report: Report) -> None:
    console.report["counts"][f"train-{trainer}"] = {**report.counts, "step": report.outcome.step}
    console.report["outputs"]["model"] = str(report.folder)
    for split, counts in report.counts.items():
        console.show(f"{split}: " + ", ".join(f"{name} {count}" for name, count in counts.items()))
    for name, value in report.outcome.metrics.items():
        console.show(f"{name}: {value:.4f}")
    done = "the weights after step" if report.is_new else "made from the same inputs before; the weights after step"
    console.show(f"{report.folder}: {done} {report.outcome.step}")


@contextmanager
def _stop_requests() -> Iterator[Callable[[], bool]]:
    """SIGTERM, SIGUSR1 and a first Ctrl-C ask for a stop at the end of the step; a second Ctrl-C stops at once."""
    asked: list[int] = []

    def ask(number: int, frame: object) -> None:
        if number == signal.SIGINT and signal.SIGINT in asked:
            raise KeyboardInterrupt
        asked.append(number)

    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, ask)
    yield lambda: bool(asked)
