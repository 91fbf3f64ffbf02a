"""One training by this project's trainers, on rows that are tokens already: see train.py and peers/trl_trainer.py.

python benchmarks/train_ours.py JOB.json
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from peers.peak import peak_kib

from pipeline.config.settings import Settings, TrainSettings
from pipeline.lm.forward import prepare
from pipeline.lm.load import load
from pipeline.train.batches import Data
from pipeline.train.loop import Progress, Task, fit
from tests.pipeline.train.tiny_jobs import objective, token_data


def settings_of(job: dict[str, Any]) -> TrainSettings:
    section = f"train_{job['trainer']}"
    keys = {name: job[name] for name in ("batch_size", "learning_rate", "precision")}
    tree = {section: {**keys, "schedule": "constant", "warmup": 0.0, "epochs": 1, **job.get("options", {})}}
    return getattr(Settings.model_validate(tree), section)  # type: ignore[no-any-return]


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    settings = settings_of(job)
    data = token_data(map(json.loads, Path(job["rows"]).read_text().splitlines()), job["trainer"])
    model = load(job["model"], dtype="float32", head="score" if job["trainer"] == "rm" else "language").model
    prepare(model)
    losses, ends = [], []

    def watch(progress: Progress) -> None:
        losses.append(progress.line["loss"])
        ends.append((time.perf_counter(), time.process_time()))

    with tempfile.TemporaryDirectory() as folder:
        began, cpu = time.perf_counter(), time.process_time()
        goal = objective(job["trainer"], model, data, settings)
        fit(Task(model, goal, data, Data(), settings, Path(folder), job["seed"]), watch=watch)
    print(json.dumps({
        "seconds": ends[-1][0] - began,  # without the last checkpoint: TRL writes none
        "cpu": ends[-1][1] - cpu,
        "peak": peak_kib(),
        "losses": losses,
    }))  # fmt: skip


if __name__ == "__main__":
    main()
