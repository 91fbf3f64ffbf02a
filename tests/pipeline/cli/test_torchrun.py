"""The installed command in two processes that torchrun starts: one speaks and writes, and all end alike."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.pipeline.train.tiny_jobs import metrics, write_rows
from tests.support import CAI, FAULTS, environment, kill_group, wait_for

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python", "--")


def start(folder: Path, *settings: str, **changes: str) -> subprocess.Popen:
    rows = write_rows(folder / "rows.jsonl")
    call = ["train-sft", "--model", "nano", "--data", str(rows), "--out", "sft", "--json"]
    assignments = [part for each in ("batch_size=8", *settings) for part in ("--set", f"train_sft.{each}")]
    return subprocess.Popen(
        [*TORCHRUN, CAI, *call, *assignments],
        cwd=folder,
        env=environment(**changes),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen) -> tuple[str, str, list[int]]:
    """What was printed, and the exit codes of the processes that torchrun names, none if all went well."""
    try:
        out, err = process.communicate(timeout=300)
    finally:
        kill_group(process)
    codes = [int(code) for code in re.findall(r"exitcode +: (-?\d+)", err)]
    assert (process.returncode == 0) == (not codes), err
    return out, err, codes


def workers(process: subprocess.Popen) -> dict[int, int]:
    """Rank -> process id."""
    found = {}
    for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        words = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        found |= {int(word.removeprefix(b"RANK=")): int(pid) for word in words if word.startswith(b"RANK=")}
    return found


def test_two_processes_speak_as_one_wherever_they_are_started(tmp_path: Path) -> None:
    for name in ("pipeline", "constitution"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise SystemExit('the wrong package')")
    out, err, codes = finish(start(tmp_path, "epochs=1"))
    assert codes == [], err
    assert json.loads(out)["counts"]["train-sft"]["train"]["rows"] == 24
    assert err.count("start: ") == 1
    assert [line["step"] for line in metrics(tmp_path / "sft")] == [1, 2, 3]


def test_a_signal_to_one_process_stops_all_after_the_same_step(tmp_path: Path) -> None:
    process = start(tmp_path, "epochs=1000")
    log = tmp_path / ".sft.training" / "metrics.jsonl"
    wait_for(lambda: log.exists() and log.read_bytes().count(b"\n") >= 2, seconds=120)
    os.kill(workers(process)[1], signal.SIGTERM)
    out, err, codes = finish(process)
    assert set(codes) == {75}, err
    assert len(codes) == 2
    last = metrics(log.parent)[-1]["step"]
    assert err.count(f"stopped after step {last} of 3000") == 1
    assert json.loads(out)["exit_code"] == 75
    assert (log.parent / "checkpoints" / f"step-{last:08d}").is_dir()


def test_a_loss_that_is_not_finite_ends_all(tmp_path: Path) -> None:
    _, err, codes = finish(start(tmp_path, "epochs=2", "learning_rate=1e30"))
    assert codes == [7, 7], err
    assert len(re.findall(r"step \d: loss .*nan.*rows row", err)) == 1


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_full_disk_in_the_first_process_ends_all(parallel: str, tmp_path: Path) -> None:
    fault = {"PYTHONPATH": f"{FAULTS}{os.pathsep}{os.environ.get('PYTHONPATH', '')}", "FAULT": "enospc:1:fsync"}
    _, err, codes = finish(start(tmp_path, f"parallel={parallel}", "epochs=1", **fault))
    assert codes == [5, 5], err
    assert err.count("free some room") == 1


def test_a_killed_process_ends_all_and_the_same_command_goes_on(tmp_path: Path) -> None:
    process = start(tmp_path, "epochs=4", "save_every=1")
    checkpoint = tmp_path / ".sft.training" / "checkpoints" / "step-00000002"
    wait_for(checkpoint.is_dir, seconds=120)
    os.kill(workers(process)[1], signal.SIGKILL)
    _, err, codes = finish(process)
    assert -9 in codes, err
    assert "Traceback" not in err.partition("torch/distributed/elastic")[0]
    _, err, codes = finish(start(tmp_path, "epochs=4", "save_every=1"))
    assert codes == [], err
    assert [line["step"] for line in metrics(tmp_path / "sft")] == list(range(1, 13))
