"""Small trainings for tests: rows on the spot, a small random model, a few steps."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pipeline.config.settings import Settings
from pipeline.train import rows
from pipeline.train.batches import Data
from pipeline.train.dpo import Preference, train_dpo
from pipeline.train.loop import Objective, Progress
from pipeline.train.reference import compute_logps
from pipeline.train.rm import Comparisons, train_rm
from pipeline.train.rrhf import train_rrhf
from pipeline.train.sft import Imitation, train_sft
from pipeline.train.stage import Job, Report

TRAINERS: dict[str, Any] = {"sft": train_sft, "rm": train_rm, "dpo": train_dpo, "rrhf": train_rrhf}
WORDS = ("please", "help", "me", "to", "write", "a", "letter", "about", "the", "old", "bicycle", "said", "user")


def write_rows(path: Path, num: int = 24, *, num_test: int = 6, seed: int = 0, better: str = "") -> Path:
    """Rows that all trainers can read: two or three completions of unequal length, scores, soft labels.

    better: a word that the best completion alone has.
    """
    draw = random.Random(seed)

    def text() -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(1, 12)))

    lines = []
    for n in range(num + num_test):
        completions = [f"{text()} {i}" for i in range(draw.randint(2, 3))]
        if better:
            others = [" ".join(word for word in one.split() if word != better) for one in completions]
            completions = [f"{better} {others[0]}", *others[1:]]
        line = {
            "id": f"row{n}",
            "prompt": f"{text()} {n}",
            "completion": completions[0],
            "chosen": completions[0],
            "rejected": completions[1],
            "chosen_probability": draw.choice([0.6, 0.9, 1.0]),
            "completions": completions,
            "scores": [float(len(completions) - i) for i in range(len(completions))],
            "split": "train" if n < num else "test",
        }
        lines.append(json.dumps(line) + "\n")
    path.write_text("".join(lines))
    return path


def run_job(
    trainer: str,
    data: Path,
    start: Path,
    out: Path,
    *,
    keys: dict[str, Any] | None = None,
    score: Any = None,
    **job: Any,
) -> Report:
    """Trains in this process. keys: of the trainer's section. score: the reward model of SFT and RRHF."""
    section = f"train_{trainer}"
    tree = {section: {"batch_size": 8, "learning_rate": 1e-3, "epochs": 1, **(keys or {})}}
    settings = getattr(Settings.model_validate(tree), section)
    made = Job(**{"sources": [rows.Source(str(data))], "start": str(start), "out": out, **asked_after_steps(**job)})
    return TRAINERS[trainer](made, settings, **({"score": score} if score else {}))


def asked_after_steps(**job: Any) -> dict[str, Any]:
    """A job's options with a `should_stop` that is asked once a step, and not before the first one.

    heeds: in its place, one that is asked whenever training asks.
    """
    stepped: list[Progress] = []

    def watch(progress: Progress) -> None:
        stepped.append(progress)
        if "watch" in job:
            job["watch"](progress)

    if heeds := job.pop("heeds", None):
        return {**job, "should_stop": heeds}
    asks = {"should_stop": lambda: bool(stepped) and job["should_stop"]()} if "should_stop" in job else {}
    return {**job, "watch": watch, **asks}


def metrics(folder: Path) -> list[dict[str, Any]]:
    """Every line of metrics.jsonl, without times."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


def token_data(pairs: Iterable[dict[str, Any]], trainer: str) -> Data:
    """Rows whose prompt, chosen and rejected are token ids already."""
    data = Data()
    for number, pair in enumerate(pairs):
        completions = [pair["chosen"], pair["rejected"]][: 1 if trainer == "sft" else 2]
        data.add(rows.Row(str(number), [], ("",) * len(completions), 1.0, (), "given"), pair["prompt"], completions)
    return data


def objective(trainer: str, model: Any, data: Data, settings: Any) -> Objective:
    """What a trainer minimises, reference log-probs included, where there is no stage around it."""
    if trainer == "sft":
        return Imitation()
    if trainer == "rm":
        return Comparisons(settings.center_coef)
    return Preference(settings, {id(data): compute_logps(model, data, settings)})
