"""What only PPO takes of a call: the rewards and the sampler that the settings name."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.cli.common import Console
from pipeline.errors import UsageError

if TYPE_CHECKING:
    from pipeline.config.settings import Settings
    from pipeline.train.stage import Job, Report
    from pipeline.voices import Spent


def check_ppo(run: Path, settings: Settings, trainers: Sequence[str]) -> None:
    """What `cai run` would learn only when all else is done: whether PPO has what gives scores, and its sampler."""
    from pipeline import jobs

    reward = settings.train_ppo.reward
    if reward == "policy":
        raise UsageError("train_ppo.reward: policy: `cai train-ppo --reward-model MODEL` names one, `cai run` cannot")
    if reward == "model" and "rm" not in trainers:
        jobs.scoring_model(run, None, options="`rm` before `ppo` in recipe.trainers")
    check_inputs(settings)


def check_inputs(settings: Settings) -> None:
    """What PPO takes besides rows and models, without running or opening it."""
    from pipeline.train.rewards import find_function
    from pipeline.vllm_rollouts import check_sampler
    from pipeline.voices import check_models

    if settings.train_ppo.sampler == "vllm":
        check_sampler(settings)
    if (reward := settings.train_ppo.reward) in ("judge", "graded"):
        judge = settings.engine_for(settings.judge)
        if judge.model is None and judge.backend != "scripted":
            raise UsageError(f"train_ppo.reward: {reward}: no model judges; set judge.model, or engine.model")
        check_models(settings, ("rank",))
    elif reward not in ("model", "policy"):
        find_function(reward)


def call_ppo(console: Console, job: Job, settings: Settings, reward_model: str | None, spent: Spent) -> Report:
    """With the reward and the sampler that the settings name. spent: by the call's steps before, of its budgets."""
    from constitution.principles import Constitution
    from pipeline.cli.progress import show_work
    from pipeline.jobs import constitution_file
    from pipeline.live_judge import live_judge
    from pipeline.train.output import JOURNAL, work_path
    from pipeline.train.ppo import train_ppo
    from pipeline.vllm_rollouts import vllm_sampler

    ppo = settings.train_ppo
    with ExitStack() as held:
        sampler = held.enter_context(vllm_sampler(settings)) if ppo.sampler == "vllm" else None
        if ppo.reward not in ("judge", "graded"):
            return train_ppo(job, ppo, reward_model=reward_model, sampler=sampler)
        constitution, replies = Constitution.load(constitution_file(settings)), work_path(job.out) / JOURNAL
        judge, source = held.enter_context(
            live_judge(settings, constitution, job.start, ppo.reward, folder=replies, earlier=spent)
        )
        held.callback(lambda: show_work(console, judge.journal, judge.engines))
        return train_ppo(job, ppo, judge=source, sampler=sampler)
