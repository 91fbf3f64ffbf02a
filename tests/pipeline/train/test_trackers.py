"""TensorBoard, wandb and Trackio get every step once."""

from __future__ import annotations

import struct
import sys
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pipeline.errors import StoppedError, UsageError
from tests.pipeline.train.ppo_jobs import run_ppo, save_pair
from tests.pipeline.train.test_stages import stop_after
from tests.pipeline.train.tiny_jobs import metrics, run_job


def train_in_pieces(data: Path, start: Path, out: Path, tracker: str) -> list[dict[str, Any]]:
    """Eight steps: killed after the fifth, whose checkpoint is of the third; stopped after the sixth."""
    keys = {"epochs": 2, "batch_size": 6, "save_every": 3}
    steps = count(1)

    def killed(progress: Any) -> None:
        if next(steps) == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_job("sft", data, start, out, keys=keys, trackers=[tracker], watch=killed)
    asked = count(4)
    with pytest.raises(StoppedError):
        run_job("sft", data, start, out, keys=keys, trackers=[tracker], should_stop=lambda: next(asked) == 6)
    run_job("sft", data, start, out, keys=keys, trackers=[tracker])
    return metrics(out)


def test_tensorboard_reads_every_step_once(start: Path, data: Path, tmp_path: Path) -> None:
    lines = train_in_pieces(data, start, tmp_path / "sft", "tensorboard")
    files = EventAccumulator(str(tmp_path / "sft" / "tensorboard")).Reload()
    assert set(files.Tags()["scalars"]) == {name for line in lines for name in line} - {"step"}
    for name in ("loss", "eval/loss"):
        expected = [(line["step"], pytest.approx(line[name])) for line in lines if name in line]
        assert [(event.step, event.value) for event in files.Scalars(name)] == expected
    assert len(list((tmp_path / "sft" / "tensorboard").iterdir())) == 1


def test_tensorboard_follows_ppo_from_its_first_evaluation(data: Path, tmp_path: Path) -> None:
    models, out = save_pair(tmp_path), tmp_path / "ppo"
    with pytest.raises(StoppedError):
        run_ppo(data, *models, out, trackers=["tensorboard"], should_stop=stop_after(1))
    run_ppo(data, *models, out, trackers=["tensorboard"])
    files, lines = EventAccumulator(str(out / "tensorboard")).Reload(), metrics(out)
    for name in ("eval/scores", "objective/kl"):
        expected = [(line["step"], pytest.approx(line[name])) for line in lines if name in line]
        assert [(event.step, event.value) for event in files.Scalars(name)] == expected
    assert lines[0]["step"] == 0


def log_records(data: bytes) -> Iterator[bytes]:
    """Of a LevelDB log, as wandb writes behind 7 bytes: in blocks, each piece with its crc, length and kind."""
    held, at = b"", 7
    while at + 7 <= len(data):
        if at % 32768 > 32768 - 7:
            at += 32768 - at % 32768
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        held += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            yield held
            held = b""


def test_wandb_gets_every_step_once(start: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from wandb.proto import wandb_internal_pb2

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    lines = train_in_pieces(data, start, tmp_path / "sft", "wandb")
    steps, names = [], set()
    for path in sorted(tmp_path.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime):
        for data_of in log_records(path.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data_of)
            if record.WhichOneof("record_type") == "history":
                steps.append(record.history.step.num)
                names |= {item.key or "/".join(item.nested_key) for item in record.history.item}
    assert steps == [line["step"] for line in lines]
    assert {"loss", "eval/loss", "lr"} <= names


def test_trackio_gets_every_step_once(start: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    lines = train_in_pieces(data, start, tmp_path / "sft", "trackio")
    from trackio.sqlite_storage import SQLiteStorage

    logged = SQLiteStorage.get_logs("cai", "sft")
    assert [(line["step"], line["loss"]) for line in logged] == [(line["step"], line["loss"]) for line in lines]


@pytest.mark.parametrize("tracker", ["wandb", "trackio"])
def test_a_tracker_that_is_not_installed_is_named_before_any_work(
    tracker: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, tracker, None)
    with pytest.raises(UsageError, match=f"^run.trackers: {tracker} is not installed: pip install {tracker}$"):
        run_job("sft", data, tmp_path / "nowhere", tmp_path / "sft", trackers=[tracker])
