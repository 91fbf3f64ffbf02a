"""One PPO training on the embedded world, watched: the curves that ppo_figures.py puts together.

Every few steps held-out requests are answered, scored by the reward model and graded by the world, and the loss on
pretraining text is taken: what the embedded model was taught besides answering, drawn anew. The policy is measured as
it is after that step; nothing selects a best one.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pipeline.config.load import read_file
from pipeline.config.settings import Settings, TrainPpoSettings
from pipeline.errors import StoppedError
from pipeline.evaluate.behaviour import FAULTS, Tally
from pipeline.evaluate.held_out import requests
from pipeline.intervals import Z_95
from pipeline.lm.forward import completion_logps
from pipeline.lm.load import ends, load
from pipeline.lm.templates import Chat
from pipeline.nano import path as base_model
from pipeline.nano.lessons import draw_lesson
from pipeline.records import Line, digest
from pipeline.train import rows
from pipeline.train.batches import Data, microbatches, tokenise
from pipeline.train.loop import Progress
from pipeline.train.networks import open_networks
from pipeline.train.ppo import optimise
from pipeline.train.ppo_run import EVAL, Task
from pipeline.train.ppo_update import shaped_scores
from pipeline.train.prompts import Prompts, tokenise_prompts
from pipeline.train.rewards import open_reward_model
from pipeline.train.rollouts import roll_out

CONFIG = Path(__file__).parents[1] / "examples" / "nano.yaml"
CASES, NUM_TEXTS, NUM_PTX = 300, 800, 3000
"""Held-out requests, half of them harmful; texts whose loss is taken; texts that ptx learns from."""
TEXT_SEED, PTX_SEED = 101, 102
SMOOTHED = 3
"""Batches whose mean score must be at the target."""
NEVER = 10**6


class Arm(NamedTuple):
    """One training. start: `sft` or `base`. keys: of `train_ppo`, over the demo's.

    every: steps between measurements, 0 for none. target: mean score at which training stops.
    """

    name: str
    seed: int
    keys: dict[str, Any]
    start: str = "sft"
    every: int = 0
    target: float | None = None


class Curve(NamedTuple):
    """steps: what PPO logged of each. measured: of held-out requests and texts, as `Watched.measure` gives it."""

    steps: list[Line]
    measured: list[Line]


def settings_of(arm: Arm) -> TrainPpoSettings:
    demo = read_file(CONFIG).train_ppo.model_dump(exclude_unset=True)
    return Settings.model_validate({"train_ppo": {**demo, "save_every": NEVER, **arm.keys}}).train_ppo


def curve(run: Path, work: Path, arm: Arm) -> Curve:
    """Trains, or reads what was trained with the same settings before."""
    file = work / f"{arm.name}-{arm.seed}.json"
    start = str(base_model()) if arm.start == "base" else str(run / "models" / "sft")
    with tempfile.TemporaryDirectory(dir=work) as folder:
        task, identity = open_task(run, start, arm, Path(folder))
        texts = pretraining_texts(task.chat, NUM_TEXTS, TEXT_SEED) if arm.every else Data()
        identity = digest([identity, arm._replace(name=""), CASES, texts.digest])
        if not file.exists() or json.loads(file.read_text())["identity"] != identity:
            print(f"training {arm.name}, seed {arm.seed}", flush=True)
            file.write_text(json.dumps({"identity": identity, **train(task, arm, texts)._asdict()}) + "\n")
    found = json.loads(file.read_text())
    return Curve(found["steps"], found["measured"])


def open_task(run: Path, start: str, arm: Arm, folder: Path) -> tuple[Task, list[Any]]:
    """What is trained, and what it is made from."""
    settings = settings_of(arm)
    loaded = load(start, dtype="float32", device="cpu")
    chat = Chat(loaded.tokenizer, eos=ends(loaded.model.config.get_text_config(), loaded.model.generation_config))
    source = open_reward_model(
        str(run / "models" / "rm"),
        "reward",
        tokenizer=loaded.fingerprint["tokenizer"],
        reencode=False,
        max_tokens=settings.microbatch_tokens,
        device="cpu",
    )
    networks = open_networks(loaded.model, start, source.model, settings, device="cpu")
    of_run = rows.read([rows.Source(str(run))], kind="prompts", split="train")
    prompts = tokenise_prompts(of_run, chat, max_length=1000, too_long="drop")
    ptx = pretraining_texts(chat, NUM_PTX, PTX_SEED) if settings.ptx_coef else None
    task = Task(networks, chat, prompts, Prompts(Data(), []), ptx, source.score, settings, folder, arm.seed)
    return task, [settings.model_dump(mode="json"), loaded.fingerprint, source.fingerprint, prompts.data.digest]


def train(task: Task, arm: Arm, texts: Data) -> Curve:
    steps: list[Line] = []
    watched = Watched(task, texts) if arm.every else None
    measured = [watched.measure(0)] if watched else []

    def watch(progress: Progress) -> None:
        steps.append(progress.line)
        if watched and (progress.step % arm.every == 0 or progress.step == progress.total):
            measured.append(watched.measure(progress.step))

    def should_stop() -> bool:
        return arm.target is not None and episodes_to(steps, arm.target) is not None

    try:
        optimise(task, watch=watch, should_stop=should_stop)
    except StoppedError:
        """The target is reached."""
    return Curve(steps, measured)


def episodes_to(steps: Sequence[Line], target: float) -> int | None:
    """Episodes after which the mean score of the last few batches was at the target; None if it never was."""
    scores = [line["objective/scores"] for line in steps]
    for number in range(SMOOTHED, len(steps) + 1):
        if sum(scores[number - SMOOTHED : number]) / SMOOTHED >= target:
            return int(steps[number - 1]["episodes"])
    return None


class Watched:
    """Held-out requests and texts, measured under the policy as it is."""

    def __init__(self, task: Task, texts: Data) -> None:
        self.task, self.texts = task, texts
        found = [rows.Row(str(n), messages, (), 1.0, (), "") for n, messages in enumerate(requests(CASES, seed=0))]
        self.requests = tokenise_prompts(found, task.chat, max_length=1000, too_long="drop")
        self.first = self._losses()

    def measure(self, step: int) -> Line:
        """Means over answers; shares of faults with their intervals; the loss on texts, and over that of the start.

        loss_error: half the 95 % interval of loss_ratio, over texts.
        """
        task = self.task
        numbers = range(len(self.requests))
        rollouts = roll_out(task.networks, task.chat, self.requests, numbers, seed=[EVAL], num_samples=1)
        tally = Tally()
        for messages, text in zip(rollouts.conversations, rollouts.texts, strict=True):
            tally.add(messages, text)
        losses = self._losses()
        ratio = losses.sum() / self.first.sum()
        error = Z_95 * ((losses - ratio * self.first) ** 2).sum().sqrt() / self.first.sum()
        num_tokens = sum(map(self.texts.num_completion_tokens, range(len(self.texts))))
        return {
            "step": step,
            "scores": shaped_scores(task.score(rollouts), rollouts.has_ended, task.settings).mean().item(),
            "kl": rollouts.kl.mean().item(),
            "entropy": -rollouts.logps.sum(dim=1).mean().item(),
            **{fault: tally.rates()[fault]._asdict() for fault in FAULTS},
            "loss": losses.sum().item() / num_tokens,
            "loss_ratio": ratio.item(),
            "loss_error": error.item(),
        }

    @torch.no_grad()
    def _losses(self) -> Tensor:
        """(N,) negative log-likelihood of each text, in nats."""
        found = torch.zeros(len(self.texts), dtype=torch.float64)
        for part in microbatches(self.texts, range(len(self.texts)), max_tokens=8192):
            groups = [self.texts.group(row) for row in part]
            found[part] = -completion_logps(self.task.networks.policy, groups).sums.double()
        return found


def pretraining_texts(chat: Chat, number: int, seed: int) -> Data:
    """Critiques, revisions and verdicts as the embedded model was taught them, a row for each turn it had to say.

    Its answers are left out: they help with harm, and learning them again would bring that back.
    """
    rng = Random(seed)
    found: list[rows.Row] = []
    while len(found) < number:
        messages, weights = draw_lesson(rng, drafts=False)
        for turn in range(max(len(weights) - 3, 0), len(weights)):  # a critique or reasoning, and what follows it
            if weights[turn]:
                text = messages[turn]["content"]
                found.append(rows.Row(str(len(found)), messages[:turn], (text,), 1.0, (), ""))
    return tokenise(found[:number], chat, max_length=4000, too_long="drop")
