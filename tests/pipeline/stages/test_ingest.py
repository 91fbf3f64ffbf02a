from __future__ import annotations

import json
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import ResourceError, UsageError
from pipeline.records import message_id
from pipeline.sources import Spec
from pipeline.stages.ingest import Ingested, ingest
from pipeline.store import RunFolder, StageWriter


def file_of(path: Path, *rows: dict[str, Any] | str) -> Path:
    path.write_text("".join(json.dumps(row if isinstance(row, dict) else {"prompt": row}) + "\n" for row in rows))
    return path


def questions(first: int, last: int) -> list[str]:
    return [f"Question {n}?" for n in range(first, last)]


def take(run: RunFolder, *paths: Path, shard_size: int = 4, limit: int | None = None) -> Ingested:
    return ingest(run, [Spec(str(path)) for path in paths], shard_size=shard_size, limit=limit)


def texts(run: RunFolder) -> list[str]:
    return [line["messages"][0]["content"] for line in run.read("prompts")]


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "r", create=True)


def test_prompts_come_in_their_order_in_parts_of_the_shard_size(tmp_path: Path, run: RunFolder) -> None:
    counts = take(run, file_of(tmp_path / "p.jsonl", *questions(0, 10)))
    assert counts == Ingested(lines=10, known=0, new=10, duplicates=0, merged_turns=0)
    assert texts(run) == questions(0, 10)
    assert [part["rows"] for part in run.parts("prompts")] == [4, 4, 2]


def test_an_id_is_made_from_the_messages_unless_the_row_has_one(tmp_path: Path, run: RunFolder) -> None:
    take(run, file_of(tmp_path / "p.jsonl", "One?", {"id": "mine", "prompt": "Two?", "tags": ["x"]}))
    first, second = run.read("prompts")
    assert first["id"] == message_id([{"role": "user", "content": "One?"}])
    assert (second["id"], second["tags"], second["source"]) == ("mine", ["x"], "p.jsonl")


def test_lines_are_known_new_or_duplicates(tmp_path: Path, run: RunFolder) -> None:
    take(run, file_of(tmp_path / "p.jsonl", *questions(0, 3)))
    counts = take(run, file_of(tmp_path / "p.jsonl", *questions(1, 6), *questions(4, 6), "Question 1?"))
    # 1 and 2 are known; 3, 4, 5 are new; 4, 5 and 1 come a second time.
    assert counts == Ingested(lines=8, known=2, new=3, duplicates=3, merged_turns=0)
    assert texts(run) == questions(0, 6)


@pytest.mark.parametrize("is_known", [False, True])
def test_one_id_for_two_prompts_is_refused(tmp_path: Path, run: RunFolder, is_known: bool) -> None:
    first, second = {"id": "x", "prompt": "One?"}, {"id": "x", "prompt": "Two?"}
    if is_known:
        take(run, file_of(tmp_path / "a.jsonl", first))
    with pytest.raises(UsageError, match=r"b\.jsonl: the id 'x' stands for two different prompts"):
        take(run, file_of(tmp_path / "b.jsonl", *([second] if is_known else [first, second])))


def test_the_same_id_with_other_given_answers_is_another_prompt(tmp_path: Path, run: RunFolder) -> None:
    rows = [{"id": "x", "prompt": "One?", "completions": [answer]} for answer in ("a", "b")]
    with pytest.raises(UsageError, match="'x' stands for two different prompts"):
        take(run, file_of(tmp_path / "p.jsonl", *rows))


def test_given_answers_are_kept(tmp_path: Path, run: RunFolder) -> None:
    take(run, file_of(tmp_path / "p.jsonl", {"prompt": "One?", "completions": ["a", "b"]}))
    (line,) = run.read("prompts")
    assert line["completions"] == ["a", "b"]


def test_the_same_sources_are_not_read_again(tmp_path: Path, run: RunFolder) -> None:
    path = file_of(tmp_path / "p.jsonl", *questions(0, 5))
    first = take(run, path)
    before = (run.path / "prompts" / "manifest.json").read_bytes()
    moved = tmp_path / "elsewhere" / "p.jsonl"
    moved.parent.mkdir()
    path.rename(moved)
    assert take(run, moved) == first
    assert (run.path / "prompts" / "manifest.json").read_bytes() == before


def test_ten_calls_that_add_prompts_hold_the_lines_of_one(tmp_path: Path, run: RunFolder) -> None:
    for last in range(1, 11):
        take(run, file_of(tmp_path / "p.jsonl", *questions(0, last)))
    other = RunFolder(tmp_path / "other", create=True)
    take(other, tmp_path / "p.jsonl")
    assert list(run.read("prompts")) == list(other.read("prompts"))


def test_a_limit_takes_the_first_different_prompts_however_often(tmp_path: Path, run: RunFolder) -> None:
    path = file_of(tmp_path / "p.jsonl", *questions(0, 3), *questions(0, 20))
    assert take(run, path, limit=5) == Ingested(lines=8, known=0, new=5, duplicates=3, merged_turns=0)
    take(run, path, limit=5)
    assert texts(run) == questions(0, 5)
    assert take(run, path, limit=7).new == 2
    assert take(run, path, limit=2).new == 0
    assert texts(run) == questions(0, 7)
    take(run, path)
    assert texts(run) == questions(0, 20)


@pytest.mark.parametrize("limit", [None, 12])
def test_a_reading_that_was_killed_ends_like_an_undisturbed_one(
    tmp_path: Path, run: RunFolder, monkeypatch: pytest.MonkeyPatch, limit: int | None
) -> None:
    old = file_of(tmp_path / "old.jsonl", *questions(0, 3))
    path = file_of(tmp_path / "p.jsonl", *questions(1, 15), *questions(1, 3))
    whole = RunFolder(tmp_path / "whole", create=True)
    for folder in (whole, run):
        take(folder, old)
    expected = take(whole, path, limit=limit)
    publish = StageWriter.publish

    def killed(writer: StageWriter, number: int, *args: Any, **options: Any) -> None:
        if number == 3:
            raise KeyboardInterrupt
        publish(writer, number, *args, **options)

    with monkeypatch.context() as patched:
        patched.setattr(StageWriter, "publish", killed)
        with pytest.raises(KeyboardInterrupt):
            take(run, path, limit=limit)
    assert len(texts(run)) == 3 + 2 * 4
    assert take(run, path, limit=limit) == expected
    for file in sorted((whole.path / "prompts").iterdir()):
        assert (run.path / "prompts" / file.name).read_bytes() == file.read_bytes()


def test_turns_that_were_merged_are_counted(tmp_path: Path, run: RunFolder) -> None:
    turns = [{"role": "user", "content": "One."}, {"role": "user", "content": "Two?"}]
    assert take(run, file_of(tmp_path / "p.jsonl", {"messages": turns})).merged_turns == 1
    assert texts(run) == ["One.\n\nTwo?"]


def test_no_room_for_the_ids_seen_is_a_full_disk(
    tmp_path: Path, run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    connect = sqlite3.connect

    def small(*args: Any, **options: Any) -> sqlite3.Connection:
        connection = connect(*args, **options)
        connection.execute("PRAGMA max_page_count=2")
        return connection

    monkeypatch.setattr(sqlite3, "connect", small)
    with pytest.raises(ResourceError, match="database or disk is full; free some room there"):
        take(run, file_of(tmp_path / "p.jsonl", *questions(0, 500)))
