"""How far a run is, after every step of a run made stage by stage."""

from __future__ import annotations

import json
import os
import shutil
import socket
import time
from pathlib import Path

import pytest

from pipeline import lock
from pipeline.standing import standing
from pipeline.store import RunFolder
from tests.support import Command, write_prompts

SCRIPTED = ("--set", "engine.backend=scripted", "--set", "export.split={sft: 0.5, preference: 0.5, test: 0}")


@pytest.fixture
def run(cai: Command) -> Path:
    prompts = write_prompts(cai.folder / "prompts.jsonl", 6)
    done = cai("generate", "--run", "r", "--prompts", prompts, "--set", "prompts.shard_size=2", *SCRIPTED)
    assert done.returncode == 0, done.stderr
    return cai.folder / "r"


def test_a_new_folder_wants_prompts(tmp_path: Path) -> None:
    found = standing(RunFolder(tmp_path / "r", create=True))
    assert (found.prompts, found.to_do) == (0, ["no prompts yet"])
    assert found.next_command == f"cai run --run {tmp_path}/r --prompts FILE --model MODEL"


def test_what_is_left_after_each_stage_and_the_command_that_does_it(cai: Command, run: Path) -> None:
    found = standing(RunFolder(run))
    assert found.stages["generate"].counts["ok"] == 6
    assert (found.stages["prompts"].parts, found.stages["prompts"].covered) == (3, 6)
    assert found.to_do == ["critique-revise: 6 of 6 prompts", "rank: 6 of 6 prompts", "export"]
    assert found.next_command == f"cai run --run {run}"
    cai("critique-revise", "--run", "r", "--limit", "3")
    assert standing(RunFolder(run)).to_do == ["critique-revise: 3 of 6 prompts", "rank: 6 of 6 prompts", "export"]
    assert cai("run", "--run", "r").returncode == 0
    assert standing(RunFolder(run)).to_do == []
    assert standing(RunFolder(run)).next_command == f"cai show --run {run}"
    shutil.rmtree(run / "datasets")
    assert standing(RunFolder(run)).next_command == f"cai export --run {run}"


def test_a_run_ranked_without_revisions_is_not_told_to_revise(cai: Command, run: Path) -> None:
    cai("rank", "--run", "r", "--limit", "2")
    found = standing(RunFolder(run))
    assert found.to_do == ["rank: 4 of 6 prompts", "export"]
    assert found.next_command == f"cai rank --run {run}"


def test_what_was_made_from_something_that_changed_is_to_do_again(cai: Command, run: Path) -> None:
    cai("run", "--run", "r")
    cai("generate", "--run", "r", "--set", "run.seed=5")
    found = standing(RunFolder(run))
    assert {name: (stage.covered, stage.stale) for name, stage in found.stages.items()} == {
        "prompts": (6, 0),
        "generate": (6, 0),
        "critique-revise": (0, 6),
        "rank": (0, 6),
    }
    assert found.to_do == ["critique-revise: 6 of 6 prompts", "rank: 6 of 6 prompts", "export"]
    assert "6 of them again: what they were made from has changed" in cai("status", "-r", "r").stdout
    assert "note: " in cai("show", "-r", "r").stderr


def test_a_ranking_of_drafts_is_to_do_again_once_they_were_revised(cai: Command, run: Path) -> None:
    cai("rank", "--run", "r")
    assert standing(RunFolder(run)).to_do == ["export"]
    cai("critique-revise", "--run", "r")
    assert standing(RunFolder(run)).to_do == ["rank: 6 of 6 prompts", "export"]


def test_datasets_made_from_something_that_changed_are_to_do_again(cai: Command, run: Path) -> None:
    assert cai("run", "--run", "r").returncode == 0
    assert standing(RunFolder(run)).to_do == []
    assert cai("rank", "--run", "r", "--set", "rank.principles=all").returncode == 0
    assert standing(RunFolder(run)).to_do == ["export"]
    assert "export" in cai("status", "--run", "r").stdout
    assert cai("export", "--run", "r").returncode == 0
    assert standing(RunFolder(run)).to_do == []
    cai("rank", "--run", "r", "--set", "export.margin=0.2")
    assert standing(RunFolder(run)).to_do == ["export"]


def test_datasets_exported_under_other_settings_are_those_of_the_run(cai: Command, run: Path) -> None:
    cai("run", "--run", "r")
    before = {path: path.read_bytes() for path in [run / "export.json", *(run / "datasets").rglob("*.md")]}
    assert cai("export", "--run", "r").returncode == 0
    assert {path: path.read_bytes() for path in before} == before
    assert cai("export", "--run", "r", "--format", "text").returncode == 0
    assert (run / "export.json").read_bytes() != before[run / "export.json"]
    assert standing(RunFolder(run)).to_do == []


def test_an_export_that_was_killed_is_to_do_again(cai: Command, run: Path) -> None:
    cai("run", "--run", "r")
    cai("export", "--run", "r", "--format", "text", fault=f"before:1:replace {run}/datasets/ranked/.README")
    assert not (run / "export.json").exists()
    assert standing(RunFolder(run)).to_do == ["export"]


def test_a_folder_with_a_space_in_its_name_is_quoted(tmp_path: Path) -> None:
    (tmp_path / "my runs").mkdir()
    found = standing(RunFolder(tmp_path / "my runs" / "r", create=True))
    assert f"--run '{tmp_path}/my runs/r'" in found.next_command


def test_who_works_on_a_run_can_be_told_while_they_do(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "r", create=True)
    assert standing(run).holder is None
    with lock.locked(run.path):
        found = standing(run).holder
        assert found is not None
        assert (found.pid, found.host) == (os.getpid(), socket.gethostname())
    assert standing(run).holder is None


def test_another_host_holds_a_run_until_it_has_been_silent_for_a_minute(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "r", create=True)
    path = run.path / "lock"
    path.write_text(json.dumps({"host": "elsewhere", "boot_id": "b", "pid": 1}))
    found = lock.holder(run.path)
    assert found is not None
    assert found.host == "elsewhere"
    os.utime(path, (time.time() - 61, time.time() - 61))
    assert lock.holder(run.path) is None


def test_a_killed_process_holds_nothing(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "r", create=True)
    process = {"host": socket.gethostname(), "boot_id": lock.boot_id(), "pid": 2**22 + 1}
    (run.path / "lock").write_text(json.dumps(process))
    assert lock.holder(run.path) is None
