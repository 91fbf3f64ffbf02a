"""`cai score`, as installed: from a reward model to a choice that SFT trains on, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.pipeline.train.tiny_jobs import write_rows
from tests.support import Command


def test_a_choice_of_scored_answers_is_trained_on(cai: Command, tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl")
    data = ["--data", "rows.jsonl"]
    once = ["--model", "nano", "--set", "train_rm.epochs=1", "--set", "train_sft.epochs=1"]
    assert cai("train-rm", *data, *once, "--out", "rm").returncode == 0
    done = cai("score", *data, "--reward-model", "rm", "--group", "best-of-n", "--out", "best", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    counts = report["counts"]["score"]
    assert counts["prompts"] == {"train": 24, "test": 6}
    assert counts["parts"] == {"best": {"train": 24, "test": 6}}
    assert report["outputs"]["scored"] == ["best"]
    done = cai("train-sft", "--data", "best", *once, "--reward-model", "rm", "--out", "sft", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["counts"]["train-sft"]["train"]["rows"] == 24
    described = json.loads((tmp_path / "sft" / "training.json").read_text())
    assert "eval/reward" in described["metrics"]
    assert described["settings"]["select"] == "max eval/reward"


def test_answers_are_resampled_with_a_reward_model(cai: Command, tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", 8)
    data, once = ["--data", "rows.jsonl", "--model", "nano"], ["--set", "train_rrhf.epochs=1"]
    assert cai("train-rm", *data, "--out", "rm").returncode == 0
    keys = [*once, "--resample-every", "1", "--reward-model", "rm", "--out", "rrhf", "--json"]
    done = cai("train-rrhf", *data, *keys)
    assert done.returncode == 0, done.stderr
    (line,) = (json.loads(line) for line in (tmp_path / "rrhf" / "metrics.jsonl").read_text().splitlines())
    assert line["ranking/candidates"] > 3  # a prompt of the data has 2 or 3 of its own
    assert "reward model: " in (tmp_path / "rrhf" / "README.md").read_text()


def test_the_summary_is_printed(cai: Command, tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl")
    done = cai("score", "--data", "rows.jsonl", "--policy", "nano", "--out", "scored")
    assert done.returncode == 0, done.stderr
    kinds = [line.split(":")[0] for line in done.stdout.splitlines()]
    assert kinds[:4] == ["order as before, test", "order as before, train", "scores", "quantiles"]
    assert "label_source given" in kinds
    assert done.stdout.splitlines()[-1] == "scored: train 24, test 6 rows; version v0001"


def test_a_dry_run_reads_and_writes_nothing(cai: Command, tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl")
    done = cai("score", "--data", "rows.jsonl", "--policy", "nano", "--out", "scored", "--dry-run", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert [report["counts"]["score"][split]["rows"] for split in ("train", "test")] == [24, 6]
    assert report["run"] is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.jsonl"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--policy", "nano", "--reward-model", "rm"], "give one of them"),
        (["--policy", "nano", "--out", "scored"], "--out without --data"),
        (["--data", "rows.jsonl", "--out", "scored"], "or give --reward-model or --policy"),
        (["--data", "rows.jsonl", "--policy", "nano", "--group", "best", "--out", "scored"], "use best-of-n"),
        (["--policy", "nano"], "no run here"),
    ],
)
def test_what_cannot_be_done_is_told_in_one_line(
    cai: Command, tmp_path: Path, options: list[str], message: str
) -> None:
    write_rows(tmp_path / "rows.jsonl")
    done = cai("score", *options)
    assert (done.returncode, message in done.stderr, done.stderr.count("\n")) == (2, True, 1), done.stderr
