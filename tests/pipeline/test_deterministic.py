"""`engine.deterministic` with the embedded model, through the installed command: the same bytes, whatever happens."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.nano import example_prompts
from tests.support import Command, kill_group, published, wait_for

NUM_PROMPTS = 6
DONE = (0, 3)
"""3: with so few prompts a training dataset may be empty, which is another test's affair."""
Files = dict[str, str]


def start(cai: Command, *, concurrency: int) -> list[str]:
    """The arguments of a run over a few of the embedded model's own prompts."""
    prompts = cai.folder / "prompts.jsonl"
    prompts.write_text("".join(example_prompts().read_text().splitlines(keepends=True)[:NUM_PROMPTS]))
    settings = ("engine.deterministic=true", "critique_revise.rounds=1", f"engine.concurrency={concurrency}")
    options = [word for setting in settings for word in ("--set", setting)]
    return ["run", "--run", "r", "--prompts", str(prompts), "--model", "nano", *options]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """What the run publishes with 8 requests in flight."""
    cai = Command(tmp_path_factory.mktemp("undisturbed"))
    done = cai(*start(cai, concurrency=8))
    assert done.returncode in DONE, done.stderr
    files = published(cai.folder / "r")
    assert {Path(name).parts[0] for name in files} >= {"generate", "critique-revise", "rank", "datasets"}
    return files


def test_one_request_in_flight_gives_the_bytes_of_eight(cai: Command, undisturbed: Files) -> None:
    done = cai(*start(cai, concurrency=1))
    assert done.returncode in DONE, done.stderr
    assert published(cai.folder / "r") == undisturbed


def test_a_run_killed_in_the_middle_ends_in_the_same_bytes(cai: Command, undisturbed: Files) -> None:
    journal = cai.folder / "r" / "journal" / "segment-00000.jsonl"
    process = cai.start(*start(cai, concurrency=8))
    wait_for(lambda: journal.exists() and journal.read_bytes().count(b"\n") >= 30, 60)
    kill_group(process)
    kept = journal.read_bytes()
    assert not (cai.folder / "r" / "rank" / "manifest.json").exists()
    done = cai(*start(cai, concurrency=8))
    assert done.returncode in DONE, done.stderr
    assert published(cai.folder / "r") == undisturbed
    assert journal.read_bytes().startswith(kept[: kept.rfind(b"\n") + 1])
