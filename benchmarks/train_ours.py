"""One training by this project's trainers, on rows that are tokens already: see train.py and peers/trl_trainer.py.

python benchmarks/train_ours.py JOB.json
"""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from pipeline.config.settings import Settings, TrainSettings
from pipeline.lm.forward import prepare
from pipeline.lm.load import load
from pipeline.train.batches import Data
from pipeline.train.dpo import Preference
from pipeline.train.loop import Objective, Progress, Task, fit
from pipeline.train.reference import compute_logps
from pipeline.train.rm import Comparisons
from pipeline.train.rows import Row
from pipeline.train.sft import Imitation


def read(path: Path, trainer: str) -> Data:
    data = Data()
    for number, line in enumerate(path.read_text().splitlines()):
        pair = json.loads(line)
        completions = [pair["chosen"]] if trainer == "sft" else [pair["chosen"], pair["rejected"]]
        data.add(Row(str(number), [], ("",) * len(completions), 1.0, (), "given"), pair["prompt"], completions)
    return data


def objective(trainer: str, model: Any, data: Data, settings: Any) -> Objective:
    if trainer == "sft":
        return Imitation()
    if trainer == "rm":
        return Comparisons(settings.center_coef)
    return Preference(settings, {id(data): compute_logps(model, data, settings)})


def settings_of(job: dict[str, Any]) -> TrainSettings:
    section = f"train_{job['trainer']}"
    keys = {name: job[name] for name in ("batch_size", "learning_rate", "precision")}
    tree = {section: {**keys, "schedule": "constant", "warmup": 0.0, "epochs": 1, **job.get("options", {})}}
    return getattr(Settings.model_validate(tree), section)  # type: ignore[no-any-return]


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    settings = settings_of(job)
    data = read(Path(job["rows"]), job["trainer"])
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
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        "losses": losses,
    }))  # fmt: skip


if __name__ == "__main__":
    main()
