"""Rows that nothing can be learnt from: left out of a training, counted, and told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import IncompleteError
from pipeline.store import read_json
from pipeline.train.rows import Source
from pipeline.train.score import ScoreJob, run_score
from pipeline.train.scorers import ScorerKind
from tests.pipeline.lm.test_templates import STRICT
from tests.pipeline.lm.tiny import save_tiny, tiny_tokenizer
from tests.pipeline.train.row_files import assistant, jsonl, user
from tests.pipeline.train.tiny_jobs import TRAINERS, run_job
from tests.support import Command

GOOD = [
    {"id": f"good{n}", "prompt": f"{n}?", "completion": "Yes.", "chosen": "Yes.", "rejected": "No.", "split": "train"}
    for n in range(9)
]
TURNS = [assistant("Welcome."), user("Hi")]
BAD = {**GOOD[0], "id": "greeted", "prompt": TURNS}


@pytest.fixture(scope="module")
def strict(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose template wants the user first."""
    folder = save_tiny(tmp_path_factory.mktemp("strict") / "model")
    tiny_tokenizer(template=STRICT).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_row_that_the_template_refuses_is_left_out_and_named(trainer: str, strict: Path, tmp_path: Path) -> None:
    said: list[str] = []
    path = jsonl(tmp_path / "rows.jsonl", *GOOD[:4], BAD, *GOOD[4:])
    counts = run_job(trainer, path, strict, tmp_path / "out", say=said.append).counts["train"]
    assert (counts["rows"], counts["bad_roles"]) == (9, 1)
    (line,) = [line for line in said if "refuses" in line]
    assert line.startswith(
        "train: bad_roles 1 left out (first greeted: the chat template refuses the turns [assistant, user]"
    )


def test_without_a_row_that_the_template_takes_there_is_nothing_to_train_on(strict: Path, tmp_path: Path) -> None:
    with pytest.raises(IncompleteError, match=r"bad_roles 1 left out \(first greeted: .*no row is left"):
        run_job("sft", jsonl(tmp_path / "rows.jsonl", BAD), strict, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("trainer", TRAINERS)
def test_what_is_left_out_of_each_source_is_said_and_counted_once(trainer: str, start: Path, tmp_path: Path) -> None:
    """Of rows that name no split, too; one that names it counts there."""
    empty = {**GOOD[0], "id": None, "completion": " ", "chosen": "", "split": None}
    first = jsonl(tmp_path / "first.jsonl", *GOOD, empty, {**empty, "split": "test"}, {**empty, "prompt": ""})
    second = jsonl(tmp_path / "second.jsonl", GOOD[0], {**empty, "split": "train"})
    said: list[str] = []
    sources = [Source(str(path)) for path in (first, second)]
    report = run_job(trainer, first, start, tmp_path / "out", sources=sources, say=said.append)
    assert [report.counts[split]["empty"] for split in ("train", "test")] == [3, 1]
    assert said == [
        f"{first}, train: 9 of 12 rows used, 1 in the other split; left out: empty 2 (first {first}:10)",
        f"{second}, train: 1 of 2 rows used, 0 in the other split; left out: empty 1 (first {second}:2)",
        f"{first}, test: 0 of 12 rows used, 11 in the other split; left out: empty 1 (first {first}:11)",
        f"{second}, test: 0 of 2 rows used, 2 in the other split",
    ]
    assert read_json(tmp_path / "out" / "training.json")["data"]["train"]["empty"] == 3
    assert "empty 3" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("trainer", TRAINERS)
def test_labels_of_several_sources_are_counted_apart(trainer: str, start: Path, tmp_path: Path) -> None:
    """Rows of the file, each once, also where its weight repeats them or a reward model has them in one element."""
    sources = ["ai"] * 5 + ["human"] * 3 + [None]
    labelled = [{**row, "label_source": source} for row, source in zip(GOOD, sources, strict=True)]
    path = jsonl(tmp_path / "a.jsonl", *labelled, {**labelled[0], "rejected": "Go.", "label_source": "human"})
    report = run_job(trainer, path, start, tmp_path / "out", sources=[Source(str(path), 2.0)])
    found = {name: n for name, n in report.counts["train"].items() if name.startswith("label_source")}
    assert found == {"label_source ai": 5, "label_source given": 1, "label_source human": 4}
    assert report.counts["train"]["rows"] == (18 if trainer == "rm" else 20)
    assert (
        "label_source ai 5, label_source given 1, label_source human 4" in (tmp_path / "out" / "README.md").read_text()
    )


@pytest.mark.parametrize("arguments", [["train-dpo", "--dry-run"], ["train-ppo", "--dry-run"], ["score", "--policy"]])
def test_a_command_counts_refused_rows(arguments: list[str], strict: Path, cai: Command, tmp_path: Path) -> None:
    jsonl(tmp_path / "rows.jsonl", *GOOD, BAD, {**GOOD[0], "prompt": " "})
    model = [str(strict)] if arguments[0] == "score" else ["--model", str(strict)]
    keys = ("train_ppo.max_tokens=8", "train_ppo.reward=judge", "judge.model=nano")
    extra = [part for key in keys for part in ("--set", key)] if arguments[0] == "train-ppo" else []
    done = cai(*arguments, *model, "--data", "rows.jsonl", "--out", "out", "--json", *extra)
    assert done.returncode == 0, done.stderr
    assert '"bad_roles": 1' in done.stdout
    assert "left out: no_prompt 1 (first rows.jsonl:11)" in done.stderr


def test_scoring_names_what_left_it_without_rows(strict: Path, tmp_path: Path) -> None:
    kind: ScorerKind = "policy"
    sources: list[Any] = [Source(str(jsonl(tmp_path / "rows.jsonl", BAD)))]
    with pytest.raises(IncompleteError, match="; 1 with turns that the model's chat template refuses"):
        run_score(ScoreJob(sources, str(strict), kind, tmp_path / "out"))
