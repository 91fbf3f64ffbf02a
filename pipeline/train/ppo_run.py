"""The state of a PPO training: networks, optimisers, their average, KL coefficient, best evaluation; and its files."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pipeline.config.settings import TrainPpoSettings
from pipeline.errors import CaiError, ResourceError
from pipeline.lm.templates import Chat
from pipeline.records import Line
from pipeline.train import checkpoints, ranks, shards
from pipeline.train.advantages import adapted_kl_coef
from pipeline.train.batches import Data, steps_per_epoch
from pipeline.train.best import Best
from pipeline.train.lines import LineFile
from pipeline.train.loop import Outcome, enough_memory
from pipeline.train.networks import Networks
from pipeline.train.optimizer import load_state, state_tensors
from pipeline.train.ppo_update import Learner, check_finite, make_learners, shaped_scores
from pipeline.train.prompts import Prompts
from pipeline.train.rewards import Score
from pipeline.train.rollouts import Rollouts, roll_out
from pipeline.train.samplers import DrawOutside, Sampler, draw_here

EVALUATED = ("eval/scores", "eval/kl", "eval/length", "eval/ended")
"""What every evaluation measures, by name."""
EVAL = -1
"""Stands for the step in the seeds of validation completions: the same draws at every evaluation."""


@dataclass(frozen=True)
class Task:
    """What is trained, and on what. validation: prompts, may be empty. ptx: rows, None without. folder: of the work.

    measure: see rewards.Source. sampler: that draws in the place of training itself.
    """

    networks: Networks
    chat: Chat
    prompts: Prompts
    validation: Prompts
    ptx: Data | None
    score: Score
    settings: TrainPpoSettings
    folder: Path
    seed: int
    measure: Callable[[], dict[str, float]] = dict
    sampler: Sampler | None = None


class Run:
    """The state of one training."""

    def __init__(self, task: Task) -> None:
        self.task, self.settings = task, task.settings
        self.per_epoch = steps_per_epoch(len(task.prompts), self.settings.batch_size)
        self.total = self.per_epoch * self.settings.epochs
        self.draw = DrawOutside(task.sampler, task.folder / "sampler") if task.sampler else draw_here
        self.learners: dict[str, Learner] = make_learners(task.networks)
        if not shards.is_sharded(task.networks.policy):
            for learner in self.learners.values():
                ranks.copy_from_first([parameter.detach() for parameter in learner.parameters.values()])
        policy = self.learners["policy"].parameters
        self.average = {name: p.detach().clone() for name, p in policy.items()} if self.settings.ema_decay else {}
        self.kl_coef = self.settings.kl_coef
        self.best = Best(self.settings.select)
        self.step = self.num_episodes = self.num_tokens = 0
        self.checkpoints = checkpoints.Series(task.folder)
        self.pending: Line | None = None  # of a step whose evaluation did not come to its end
        self.metrics, self.samples = (LineFile(task.folder / f"{name}.jsonl") for name in ("metrics", "samples"))

    @property
    def where(self) -> str:
        return f"{self.task.folder}: step {self.step + 1}"

    def place(self) -> Line:
        """How far training is."""
        epoch = round(self.step / self.per_epoch, 4)
        return {"step": self.step, "epoch": epoch, "episodes": self.num_episodes}

    def roll_out(self, prompts: Prompts, batch: list[int], *, step: int) -> Rollouts:
        """step: EVAL, or the one whose updates follow."""
        settings = self.settings
        with enough_memory(self.where, prompts.data, batch):
            return roll_out(
                self.task.networks,
                self.task.chat,
                prompts,
                batch,
                seed=[self.task.seed, step],
                num_samples=settings.num_samples,
                draw=self.draw,
                keep_graph=step != EVAL and settings.minibatch_size >= len(batch),
            )

    def score(self, rollouts: Rollouts) -> Tensor:
        """(B,) of a step's rollouts. If those who give the scores end the training, the steps before are saved."""
        try:
            return self.task.score(rollouts)
        except CaiError:
            if self.step:
                self.save()
            raise

    def count_tokens(self, rollouts: Rollouts) -> None:
        self.num_tokens += sum(map(rollouts.data.num_tokens, range(len(rollouts.data))))

    @torch.no_grad()
    def average_weights(self) -> None:
        """Exponential moving average of the policy, one step of it for each step of PPO."""
        for name, average in self.average.items():
            average.lerp_(self.learners["policy"].parameters[name], 1 - (self.settings.ema_decay or 0.0))

    def adapt_kl_coef(self, kl: float, num_episodes: int) -> None:
        if (target := self.settings.kl_target) is not None:
            horizon = self.settings.kl_horizon
            self.kl_coef = adapted_kl_coef(self.kl_coef, kl, target=target, horizon=horizon, num_episodes=num_episodes)

    def evaluate(self) -> Line:
        """Validation prompts, num_samples completions each; keeps the best weights within the KL budget."""
        prompts, budget = self.task.validation, self.settings.kl_budget
        if not len(prompts):
            return {}
        own = self._swap(self.average)
        rollouts = self.roll_out(prompts, list(range(len(prompts))), step=EVAL)
        scores = shaped_scores(self.task.score(rollouts), rollouts.has_ended, self.settings)
        values = (
            scores.mean(),
            rollouts.kl.mean(),
            rollouts.completion_mask.sum(dim=1).float().mean(),
            rollouts.has_ended.float().mean(),
        )
        found = {
            **{name: value.item() for name, value in zip(EVALUATED, values, strict=True)},
            **{f"eval/{name}": value for name, value in self.task.measure().items()},
        }
        check_finite(f"{self.task.folder}: evaluation after step {self.step}", found)
        ranks.together(lambda: self.best.check(found))
        if self.step and budget is not None and found["eval/kl"] > budget:
            self.best.pass_over()
        elif self.step and self.best.take(self.step, found):
            weights = self.learners["policy"].parameters
            checkpoints.write(self.task.folder / "best", {"step": self.step}, {"policy": weights})
        self._swap(own)
        return found

    @torch.no_grad()
    def _swap(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Puts these weights into the policy; returns what they replace."""
        parameters = self.learners["policy"].parameters
        own = {name: parameters[name].detach().clone() for name in weights}
        for name, value in weights.items():
            parameters[name].copy_(value)
        return own

    def has_stalled(self) -> bool:
        return self.settings.patience is not None and self.best.stale >= self.settings.patience

    def is_due(self, every: int | None) -> bool:
        """At the end of training, and every so many steps; once an epoch if not said."""
        return self.step == self.total or self.step % (every or self.per_epoch) == 0

    # Files

    def save(self, line: Line | None = None) -> None:
        """line: of this step, if its evaluation is still to come."""
        state = {name: getattr(self, name) for name in ("step", "num_episodes", "num_tokens", "kl_coef")}
        state |= {"best": self.best.state, "bytes": [self.metrics.size(), self.samples.size()]}
        state["pending"] = json.dumps(line)
        tensors = {"average": self.average} if self.average else {}
        for name, learner in self.learners.items():
            tensors[name] = learner.parameters
            tensors[f"{name}-optimizer"] = state_tensors(learner.optimizer, learner.parameters)
        self.checkpoints.save(state, tensors)

    def resume(self, warn: Callable[[str], None]) -> None:
        """Takes everything from the newest checkpoint, and cuts off what was logged after it."""
        sizes = [0, 0]
        if found := self.checkpoints.resume(warn):
            state, tensors = dict(found.state), found.tensors
            sizes, self.best.state = state.pop("bytes"), state.pop("best")
            self.pending = json.loads(state.pop("pending"))
            for name, value in state.items():
                setattr(self, name, value)
            for name, learner in self.learners.items():
                _copy(learner.parameters, tensors(name))
                load_state(learner.optimizer, learner.parameters, tensors(f"{name}-optimizer"))
            if self.average:
                _copy(self.average, tensors("average"))
        for file, size in zip((self.metrics, self.samples), sizes, strict=True):
            file.cut(size)

    def finish(self, warn: Callable[[str], None]) -> Outcome:
        """Leaves the best weights in the policy; without evaluations the last ones, or their average."""
        if not len(self.task.validation):
            self._swap(self.average)
            return Outcome(self.step, {})
        if not self.best.step:
            warn(f"no evaluation within kl_budget {self.settings.kl_budget}: the folder holds the starting model")
            self.task.networks.restart()
            return Outcome(0, {})
        step = self.best.step
        places = {
            self.task.folder / "best": "policy",
            self.checkpoints.place(step): "average" if self.average else "policy",
        }
        weights = checkpoints.weights_of(step, places, warn)
        if weights is None:
            return self._keep_last(warn)
        _copy(self.learners["policy"].parameters, weights)
        return Outcome(step, self.best.metrics)

    def _keep_last(self, warn: Callable[[str], None]) -> Outcome:
        """Where the best weights are damaged. Raises ResourceError if the last ones are beyond the KL budget."""
        found, budget = self.metrics.last_evaluation(), self.settings.kl_budget
        if budget is not None and found["eval/kl"] > budget:
            work = self.task.folder
            raise ranks.shared(ResourceError(f"{work / 'best'}: is not whole any more; delete {work} and train again"))
        warn(f"the weights of step {self.step} are kept, and not those of step {self.best.step}")
        self._swap(self.average)
        return Outcome(self.step, found)


@torch.no_grad()
def _copy(parameters: dict[str, Tensor], tensors: dict[str, Tensor]) -> None:
    for name, parameter in parameters.items():
        parameter.copy_(shards.like(tensors[name], parameter))


def logged(step: int, rollouts: Rollouts, scores: Tensor, number: int) -> list[Line]:
    """The first completions of a step, for samples.jsonl."""
    owners = [row for row in range(len(rollouts.data)) for _ in rollouts.data.completions(row)]
    values = zip(owners, rollouts.texts, scores.tolist(), rollouts.kl.tolist(), strict=True)
    return [
        {
            "step": step,
            "id": rollouts.data.ids[row],
            "prompt": rollouts.conversations[row],
            "completion": text,
            "score": round(score, 4),
            "kl": round(kl, 4),
        }
        for row, text, score, kl in list(values)[:number]
    ]


class Clock:
    """seconds: of the parts of a step, by name."""

    def __init__(self) -> None:
        self.began = self.last = time.perf_counter()
        self.parts: dict[str, float] = {}

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.parts[f"seconds/{name}"], self.last = round(now - self.last, 3), now

    @property
    def seconds(self) -> dict[str, float]:
        return {**self.parts, "seconds": round(time.perf_counter() - self.began, 3)}
