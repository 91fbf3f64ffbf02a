"""Rows that nothing can be learnt from: left out of a training, counted, and told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import IncompleteError
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


@pytest.mark.parametrize("arguments", [["train-dpo", "--dry-run"], ["train-ppo", "--dry-run"], ["score", "--policy"]])
def test_a_command_counts_refused_rows(arguments: list[str], strict: Path, cai: Command, tmp_path: Path) -> None:
    jsonl(tmp_path / "rows.jsonl", *GOOD, BAD)
    model = [str(strict)] if arguments[0] == "score" else ["--model", str(strict)]
    extra = (
        ["--set", "train_ppo.max_tokens=8", "--set", "train_ppo.reward=judge"] if arguments[0] == "train-ppo" else []
    )
    done = cai(*arguments, *model, "--data", "rows.jsonl", "--out", "out", "--json", *extra)
    assert done.returncode == 0, done.stderr
    assert '"bad_roles": 1' in done.stdout


def test_scoring_names_what_left_it_without_rows(strict: Path, tmp_path: Path) -> None:
    kind: ScorerKind = "policy"
    sources: list[Any] = [Source(str(jsonl(tmp_path / "rows.jsonl", BAD)))]
    with pytest.raises(IncompleteError, match="bad_roles 1"):
        run_score(ScoreJob(sources, str(strict), kind, tmp_path / "out"))
