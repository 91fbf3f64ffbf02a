"""What the stages say while they run and at their end: progress, balances, losses and where their reasons are."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import re
import subprocess
from pathlib import Path

import pytest

from pipeline import chain as chains
from pipeline import jobs
from pipeline.cli import progress
from pipeline.cli.common import Console
from pipeline.config.settings import Settings
from pipeline.store import RunFolder
from tests.support import CAI, Command, environment, write_prompts

SCRIPTED = ("--set", "engine.backend=scripted")


def test_lost_samples_are_counted_and_their_reasons_named(cai: Command) -> None:
    prompts = write_prompts(cai.folder / "p.jsonl", 6)
    assert cai("generate", "--run", "r", "--prompts", prompts, *SCRIPTED).returncode == 0
    (cai.folder / "script.yaml").write_text("rules: [{last: Reply with the new answer only, text: ''}]")
    lost = cai("critique-revise", "--run", "r", *SCRIPTED, "--set", f"engine.script={cai.folder}/script.yaml")
    assert lost.returncode == 3
    assert "critique-revise: in 6, ok 6, filtered 0, failed 0 (lost_samples 12, samples 12)" in lost.stdout
    assert "12 failed, each with its reason: r/failed/critique-revise.jsonl" in lost.stdout
    assert "critique-revise: lost samples 12 of 12" in lost.stderr


def test_answers_behind_the_prompt_are_counted(cai: Command) -> None:
    row = {"transcript": "\n\nHuman: Why?\n\nAssistant: Because."}
    (cai.folder / "p.jsonl").write_text(json.dumps(row) + "\n")
    done = cai("generate", "--run", "r", "--prompts", "p.jsonl", *SCRIPTED)
    assert "1 answers behind the prompt left out" in done.stderr


SLOW = """
latency_s: 0.1
rules:
  - {last: "case 14[?]$", text: ""}
"""
"""Prompt 2 gets empty drafts only, so that its record fails with both samples."""


def read_terminal(command: list[str], folder: Path) -> str:
    """All that a command writes to a terminal of 80 columns."""
    ours, theirs = pty.openpty()
    env = environment(TERM="xterm", COLUMNS="80", LINES="24")
    with subprocess.Popen(command, cwd=folder, env=env, stdin=theirs, stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        found = b""
        try:
            while block := os.read(ours, 65536):
                found += block
        except OSError:  # how Linux says that nobody has the other end open
            pass
        assert process.wait(30) == 3, found.decode()
    os.close(ours)
    return found.decode()


def test_a_terminal_shows_a_bar_with_records_tokens_requests_and_failures(cai: Command) -> None:
    prompts = write_prompts(cai.folder / "p.jsonl", 12)
    (cai.folder / "slow.yaml").write_text(SLOW)
    options = ["--set", "engine.script=slow.yaml", "--set", "engine.concurrency=4"]
    seen = read_terminal([str(CAI), "run", "-r", "r", "--prompts", str(prompts), *SCRIPTED, *options], cai.folder)
    assert "\x1b[?25l" in seen  # the cursor is hidden, and shown again at the end
    assert seen.rindex("\x1b[?25h") > seen.rindex("12 of 12 records")
    frames = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\r", "", seen).split("━" * 20)
    done = [int(number) for frame in frames for number in re.findall(r"(\d+) of 12 records", frame)]
    assert done[0] == 0
    assert done[-1] == 12
    assert done == sorted(done)
    assert len(set(done)) > 3
    drawn = [frame for frame in frames if "records, about" in frame]
    line = r"records, about \d+ s left\n *tokens/s in \d+ \(0% from the cache\), out \d+; \d failures"
    assert any(re.search(line, frame) for frame in drawn)
    assert any(re.search(r"\nrequests: 4 running, \d+ waiting, \d+ answered, \d+ from the journal", f) for f in drawn)
    assert "2 failures, 1 records lost" in frames[-1]


def test_a_log_gets_a_plain_line_now_and_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "LINE_EVERY_S", 0.02)
    (tmp_path / "slow.yaml").write_text(SLOW)
    settings = Settings.model_validate(
        {
            "engine": {"backend": "scripted", "script": str(tmp_path / "slow.yaml")},
            "prompts": {"sources": [{"path": str(write_prompts(tmp_path / "p.jsonl", 3))}]},
        }
    )
    job, _ = jobs.open_job(RunFolder(tmp_path / "r", create=True).path, settings)
    jobs.ingest_prompts(job, None)
    chain = chains.prepare(job, ("generate",))
    console = Console("generate", as_json=False, quiet=False)
    asyncio.run(chains.run_chain(chain, max_time=None, watch=progress.watcher(console)))
    shown = capsys.readouterr().err
    assert "\x1b" not in shown
    line = re.compile(
        r"(\d) of 3 records(?:, about \d+ s left)?; tokens/s in \d+(?: \(0% from the cache\))?, out \d+; "
        r"requests: (\d) running, 0 waiting, (\d+) answered, 0 from the journal; "
        r"(?:0 failures|2 failures, 1 records lost)"
    )
    states = [tuple(map(int, found.groups())) for said in shown.splitlines() if (found := line.fullmatch(said))]
    assert len(states) == len(shown.splitlines())
    # Two drafts for each prompt; then those that came empty are asked for again, twice.
    assert {(0, 6, 0), (2, 2, 6), (2, 2, 8)} <= set(states)


def test_times_are_said_in_the_unit_that_fits() -> None:
    said = [progress.duration(seconds) for seconds in (0.4, 99, 150, 5400, 7200)]
    assert said == ["0 s", "99 s", "2 min", "90 min", "2.0 h"]
