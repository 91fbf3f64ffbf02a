"""status and show, as the installed command prints them."""

from __future__ import annotations

import io
import json
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest

from pipeline.cli.view import show_cases
from pipeline.reading import Case
from pipeline.records import Record
from pipeline.store import RunFolder
from tests.support import Command, write_prompts

SCRIPT = """
rules:
  - {last: "Rewrite", text: "Lock the door with the blue key."}
  - {last: "Point out", text: "It names the wrong key."}
  - {asks: labels, labels: {A: 0.9, B: 0.1}}
  - {asks: text, text: "Lock the door with the red key."}
"""
"""The judge prefers whatever it sees first, so that verdicts are `same` and comparisons ties."""


@pytest.fixture
def run(cai: Command) -> Path:
    (cai.folder / "script.yaml").write_text(SCRIPT)
    prompts = write_prompts(cai.folder / "prompts.jsonl", 3)
    options = ["--set", "engine.backend=scripted", "--set", "engine.script=script.yaml"]
    done = cai("run", "--run", "r", "--prompts", prompts, "--json", *options)
    assert done.returncode == 3, done.stderr  # all ties: no preference pair
    return cai.folder / "r"


def test_show_prints_a_record_with_its_changes_marked(cai: Command, run: Path) -> None:
    done = cai("show", "-r", "r", "--limit", "1", "--in-order")
    assert (done.returncode, done.stderr) == (0, "")
    for line in (
        "      Question 0: what is to be done about case 0?",
        "  draft 0 by scripted, 7 tokens",
        "      Lock the door with the red key.",
        "        It names the wrong key.",
        "        Lock the door with the [-red-]{+blue+} key.",
        "        (unchanged)",
    ):
        assert line in done.stdout.splitlines()
    assert "p 0.50 (shown first 0.90, shown second 0.10), tie, topk, label mass 1.00" in done.stdout
    assert "\x1b" not in done.stdout


def test_show_with_json_gives_the_lines_of_the_files(cai: Command, run: Path) -> None:
    record = json.loads(cai("show", "-r", "r", "--limit", "1", "--in-order", "--json").stdout)["outputs"]["records"][0]
    for stage in ("generate", "critique-revise", "rank"):
        first = (run / stage / "part-00000.jsonl").read_text().splitlines()[0]
        assert record[stage] == json.loads(first)


def test_show_finds_a_record_by_the_beginning_of_its_id(cai: Command, run: Path) -> None:
    ids = [json.loads(line)["id"] for line in (run / "prompts" / "part-00000.jsonl").read_text().splitlines()]
    assert cai("show", "-r", "r", ids[2][:10]).stdout.startswith(f"record {ids[2]}\n")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["show", "-r", "nowhere"], 2, "cai: nowhere: no run here; start one: cai run"),
        (["status", "-r", "nowhere"], 2, "cai: nowhere: no run here; start one: cai run"),
        (["status"], 2, "cai: runs/first: no run here; start one: cai run"),
        (["show", "-r", "r", "zz"], 2, "cai: r: no such record has an id that begins with 'zz'"),
        (["show", "-r", "r", "--principle", "harm-peple"], 2, "did you mean 'harm-people'?"),
        (["show", "-r", "r", "--limit", "0"], 2, "cai: Invalid value for '--limit'"),
        (["show", "-r", "r", "--verdict", "better"], 2, "cai: Invalid value for '--verdict'"),
        (["show", "-r", "r", "--regressed"], 0, "r: no record fits"),
    ],
)
def test_what_cannot_be_shown_is_said_in_one_line(
    cai: Command, run: Path, arguments: list[str], code: int, message: str
) -> None:
    done = cai(*arguments)
    assert done.returncode == code
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_changed_part_or_manifest_ends_with_the_code_for_corruption(cai: Command, run: Path) -> None:
    part = run / "rank" / "part-00000.jsonl"
    part.write_bytes(part.read_bytes().replace(b'"tie"', b'"top"', 1))
    done = cai("show", "-r", "r")
    assert (done.returncode, "rank/part-00000.jsonl:1: this line was changed" in done.stderr) == (4, True)
    manifest = run / "rank" / "manifest.json"
    manifest.write_bytes(manifest.read_bytes().replace(b'"ok":3', b'"ok":2'))
    done = cai("status", "-r", "r")
    assert (done.returncode, "rank/manifest.json" in done.stderr) == (4, True)


def test_a_run_of_another_format_is_refused(cai: Command, run: Path) -> None:
    (run / "run.json").write_text('{"format":99}')
    done = cai("status", "-r", "r")
    assert done.returncode == 2
    assert "run folder of format 99, this cai knows format 1" in done.stderr


def test_status_counts_and_names_the_next_command(cai: Command, run: Path) -> None:
    lines = cai("status", "-r", "r").stdout.splitlines()
    assert lines[2].split() == ["generate", "1", "3", "3", "0", "0", "complete"]
    tallies = next(line for line in lines if line.startswith("critique-revise: "))
    assert "drafts_satisfied 6, drafts_worsened 0, first_rounds 6, lost_samples 0, lost_verdicts 0" in tallies
    assert tallies.endswith("samples 6, stopped 0, verdict_same 12")
    to_do = lines.index("to do: nothing, the run is complete")
    assert lines[to_do + 1] == "next: cai show --run r"
    report = json.loads(cai("status", "-r", "r", "--json").stdout)
    assert (report["command"], report["run"], report["exit_code"], report["error"]) == ("status", "r", 0, None)
    assert report["counts"]["generate"] == {
        "parts": 1,
        "prompts": 3,
        "stale": 0,
        "in": 3,
        "ok": 3,
        "filtered": 0,
        "failed": 0,
        "samples": 6,
        "lost_samples": 0,
        "completions": 6,
        "completions_cut": 0,
    }
    assert report["outputs"]["complete"] is True


def shown(*texts: str, **lines: Any) -> str:
    """What is printed of a record whose draft is the first text, revised into the others."""
    rounds = [
        {
            "principle": "kind",
            "critique": "",
            "revision": text,
            "finish_reason": "stop",
            "verdict": "unverified",
            "stopped": False,
        }
        for text in texts[1:]
    ]
    draft = {"sample": 0, "text": texts[0], "model": "m", "finish_reason": "stop", "num_tokens": 1}
    stages = {"generate": {"completions": [draft]}, "critique-revise": {"chains": [{"sample": 0, "rounds": rounds}]}}
    record = Record("id", [{"role": "user", "content": "?"}], 0, [], [], {**stages, **lines})
    out = io.StringIO()
    with redirect_stdout(out):
        show_cases([Case(record, [], [])])
    return out.getvalue()


def test_control_characters_and_markup_of_a_model_do_nothing() -> None:
    text = shown("\x1b[31mred\x1b[0m \x9b2J [bold]b[/bold] :smile: \u202eback\r\x07")
    assert "      \\x1b[31mred\\x1b[0m \\x9b2J [bold]b[/bold] :smile: \\u202eback\\r\\x07" in text.splitlines()


def test_a_lone_surrogate_can_be_printed() -> None:
    assert "      \\ud800" in shown("\ud800").splitlines()


def test_no_line_of_a_model_can_pass_for_one_of_ours() -> None:
    text = shown("one\nrecord other\n  ranking")
    assert [line for line in text.splitlines() if line.startswith("record")] == ["record id"]
    assert "        ranking" in text.splitlines()


def test_wide_spaces_and_other_scripts_stay_as_they_are() -> None:
    assert "      全角\u3000空白 é 👍" in shown("全角\u3000空白 é 👍").splitlines()


def test_a_round_is_shown_against_what_it_revised() -> None:
    text = shown("a red key", "a blue key", "a blue lock")
    assert "        a [-red-]{+blue+} key" in text.splitlines()
    assert "        a blue [-key-]{+lock+}" in text.splitlines()


def test_a_critique_or_revision_by_another_than_the_author_names_who_wrote_it() -> None:
    entry = {"principle": "kind", "critic": "ann", "critique": "Curt.", "model": "m", "revision": "b"}
    entry |= {"finish_reason": "stop", "verdict": "unverified", "stopped": False}
    chains = {"chains": [{"sample": 0, "rounds": [entry]}]}
    text = shown("a", **{"critique-revise": chains}).splitlines()
    assert "      critique by ann" in text
    assert "      revision" in text


def test_show_of_a_run_without_records_says_how_to_go_on(cai: Command) -> None:
    RunFolder(cai.folder / "new", create=True)
    done = cai("show", "-r", "new")
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr == "new: no records yet; `cai status --run new` says what to do\n"
