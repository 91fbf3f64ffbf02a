"""The folder of a model: nothing else is destroyed for it, and one call at a time makes it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from pipeline.errors import LockedError, UsageError
from pipeline.lock import working
from tests.pipeline.test_lock import hold
from tests.pipeline.train.ppo_jobs import run_any, save_pair
from tests.pipeline.train.tiny_jobs import TRAINERS, write_rows
from tests.support import Command

ALL = (*TRAINERS, "ppo")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return save_pair(tmp_path_factory.mktemp("models"))


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("trainer", ALL)
def test_a_model_of_another_trainer_or_the_start_itself_is_left_alone(
    trainer: str, models: tuple[Path, Path], data: Path, tmp_path: Path
) -> None:
    other = "rm" if trainer != "rm" else "dpo"
    run_any(other, data, models, tmp_path / "out")
    before = content(tmp_path)
    with pytest.raises(UsageError, match=f"out: holds a model of train-{other}; choose another name"):
        run_any(trainer, data, models, tmp_path / "out")
    assert content(tmp_path) == before
    shutil.copytree(models[0], tmp_path / "start")
    for out in ("start", "here/../start"):
        (tmp_path / "here").mkdir(exist_ok=True)
        with pytest.raises(UsageError, match="training starts from the model in this folder"):
            run_any(trainer, data, (tmp_path / "start", models[1]), tmp_path / out)
    assert content(tmp_path / "start") == content(models[0])


def test_an_adapter_does_not_start_a_training_into_the_folder_that_holds_it(
    models: tuple[Path, Path], data: Path, tmp_path: Path
) -> None:
    run_any("sft", data, models, tmp_path / "out", keys={"lora": {"r": 4}})
    with pytest.raises(UsageError, match="training starts from the model in this folder"):
        run_any("sft", data, (tmp_path / "out" / "adapter", models[1]), tmp_path / "out")


def test_an_older_result_is_replaced_at_the_end_unless_a_file_of_somebody_else_is_beside_it(
    models: tuple[Path, Path], data: Path, tmp_path: Path
) -> None:
    out, said = tmp_path / "out", list[str]()
    run_any("sft", data, models, out)
    assert sorted(content(out)) == json.loads((out / "training.json").read_text())["files"]
    older = content(out)

    def look(_: object) -> None:
        assert content(out) == older

    assert run_any("sft", data, models, out, seed=1, say=said.append, watch=look).is_new
    assert said == [f"{out}: was made from other inputs; it stays there until this training is done"]
    (out / "mine.gguf").write_text("an afternoon of work")
    before = content(out)
    with pytest.raises(UsageError, match=r"has mine.gguf, which no training put there; move it"):
        run_any("sft", data, models, out, seed=2)
    assert content(out) == before

    def add(_: object) -> None:
        (out / "notes.txt").write_text("written while it trained")

    (out / "mine.gguf").unlink()
    with pytest.raises(UsageError, match=r"has notes.txt"):
        run_any("sft", data, models, out, seed=2, watch=add)
    (out / "notes.txt").unlink()
    assert run_any("sft", data, models, out, seed=2).is_new


@pytest.mark.parametrize("trainer", ALL)
def test_a_file_in_the_place_of_the_folder_is_told(
    trainer: str, models: tuple[Path, Path], data: Path, tmp_path: Path
) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(UsageError, match="out: is a file, and what comes out is a folder"):
        run_any(trainer, data, models, tmp_path / "out")


@pytest.mark.parametrize(
    ("call", "work"),
    [
        ("train-sft --model nano --data rows.jsonl --set train_sft.epochs=1", ".out.training"),
        ("score --policy nano --data rows.jsonl", ".out.scoring"),
    ],
)
def test_a_second_call_for_the_same_folder_is_told_who_is_first(
    call: str, work: str, cai: Command, tmp_path: Path
) -> None:
    write_rows(tmp_path / "rows.jsonl")
    first = hold(tmp_path / work)
    (tmp_path / work / "rows").mkdir()
    (tmp_path / work / "rows" / "precious").write_text("of the first call")
    try:
        done = cai(*call.split(), "--out", "out")
    finally:
        first.kill()
        first.wait()
    assert done.returncode == 6, done.stderr
    assert f"process {first.pid} on host" in done.stderr
    assert "works here; wait for it, stop it, or choose another name" in done.stderr
    assert (tmp_path / work / "rows" / "precious").exists()
    done = cai(*call.split(), "--out", "out")
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "rows.jsonl"]


def test_a_folder_of_work_is_held_once_and_goes_when_nothing_is_left_in_it(tmp_path: Path) -> None:
    folder = tmp_path / ".out.training"
    with working(folder), pytest.raises(LockedError), working(folder):
        pass
    assert not folder.exists()
    with working(folder):
        (folder / "checkpoints").mkdir()
    assert (folder / "checkpoints").exists()
    with working(folder):
        shutil.rmtree(folder)
    assert not folder.exists()
