"""Whose weights a training keeps: by any metric of its evaluations, in the direction that the settings name."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from pipeline.config.settings import TrainSftSettings
from pipeline.errors import UsageError
from pipeline.train.rows import Source
from pipeline.train.sft import Imitation
from pipeline.train.stage import Extras, Job, Opened, train
from tests.pipeline.train.tiny_jobs import metrics, run_job


@pytest.mark.parametrize("select", ["max eval/rewards/margin", "min eval/rewards/margin", "max eval/loss"])
def test_the_named_metric_chooses_the_weights(select: str, start: Path, data: Path, tmp_path: Path) -> None:
    keys = {"epochs": 3, "eval_every": 1, "select": select}
    report = run_job("dpo", data, start, tmp_path / "dpo", keys=keys)
    direction, name = select.split()
    best = {"max": max, "min": min}[direction](metrics(tmp_path / "dpo"), key=lambda line: line[name])
    assert report.outcome.step == best["step"]
    assert report.outcome.metrics == {key: value for key, value in best.items() if key.startswith("eval/")}
    again = run_job("dpo", data, tmp_path / "dpo", tmp_path / "again", keys={"eval_every": 1, "learning_rate": 1e-9})
    assert math.isclose(metrics(tmp_path / "again")[0]["eval/logps/chosen"], best["eval/logps/chosen"], rel_tol=1e-5)
    assert again.is_new


def test_a_metric_that_no_evaluation_has_is_refused_before_the_first_step(
    start: Path, data: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=r"no eval/accuracy; take one of eval/logps/completion, eval/loss"):
        run_job("sft", data, start, tmp_path / "sft", keys={"select": "max eval/accuracy"})
    assert not (tmp_path / ".sft.training" / "metrics.jsonl").exists()


def test_a_measure_of_the_model_is_logged_and_can_choose(start: Path, data: Path, tmp_path: Path) -> None:
    values = iter([0.2, 0.9, 0.4])

    def make_extras(opened: Opened) -> Extras:
        return Extras(measures={"eval/taste": lambda model: next(values)})

    settings = TrainSftSettings(batch_size=8, epochs=1, eval_every=1, select="max eval/taste")
    job = Job(sources=[Source(str(data))], start=str(start), out=tmp_path / "sft")
    report = train(
        job, settings, trainer="sft", kind="sft", make_objective=lambda opened: Imitation(), make_extras=make_extras
    )
    assert [line["eval/taste"] for line in metrics(tmp_path / "sft")] == [0.2, 0.9, 0.4]
    assert report.outcome.step == 2
