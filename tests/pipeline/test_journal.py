from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline import journal as journal_module
from pipeline.engines.base import Reply, Request, Usage
from pipeline.errors import CorruptError, EngineDown, RequestFailed, ResourceError, StoppedError
from pipeline.journal import Journal, Segment, request_key
from tests.support import Told

REQUEST = Request([{"role": "user", "content": "One?"}], "draft", max_tokens=9, temperature=1.0, seed=3)
ODD = "line\nbreak, \r\n, nul \0, separators \u2028\u2029\x85, quotes \"'\\, emoji \U0001f600, NFC é and e\u0301"


def with_journal(folder: Path, act: Callable[[Journal, Segment], Awaitable[Any]], **options: Any) -> Any:
    async def whole() -> Any:
        journal = Journal(folder, **options)
        await journal.start()
        segment = journal.open(0)
        try:
            return await act(journal, segment)
        finally:
            await journal.release(segment)
            await journal.close()

    return asyncio.run(whole())


def ask_all(folder: Path, engine: Told, *requests: Request, **options: Any) -> list[Any]:
    """Replies or exceptions, all asked at once."""

    async def act(journal: Journal, segment: Segment) -> list[Any]:
        asked = (journal.ask(engine, request, segment, 0) for request in requests)
        return await asyncio.gather(*asked, return_exceptions=True)

    found: list[Any] = with_journal(folder, act, **options)
    return found


def numbered(num: int) -> list[Request]:
    return [replace(REQUEST, seed=n) for n in range(num)]


def test_a_stored_reply_is_never_asked_again(tmp_path: Path) -> None:
    engine = Told(lambda request: f"seed {request.seed}")
    first = ask_all(tmp_path, engine, *numbered(5))
    again = ask_all(tmp_path, engine, *numbered(6))
    assert [reply.text for reply in again] == [f"seed {n}" for n in range(6)]
    assert again[:5] == first
    assert len(engine.requests) == 6


def test_a_reply_comes_back_as_it_was(tmp_path: Path) -> None:
    logprobs = {"A": -0.1, "B": -1e-17, "C": -math.pi}
    replies = [
        Reply(ODD, "length", (1, 2, 70000), None, "", ODD, Usage(3, 4, 1)),
        Reply("", "labels", (), logprobs, "topk", "", Usage(3, 1)),
        Reply("", "stop"),
    ]
    engine = Told(lambda request: replies[request.seed or 0])
    assert ask_all(tmp_path, engine, *numbered(3)) == replies
    assert ask_all(tmp_path, engine, *numbered(3)) == replies
    assert len(engine.requests) == 3


def test_everything_that_may_change_a_reply_is_in_its_key() -> None:
    other_prompt = [{"role": "user", "content": "Two?"}]
    changes: list[dict[str, Any]] = [
        {"prompt": other_prompt}, {"prompt": "One?"}, {"kind": "critique"}, {"max_tokens": 10}, {"temperature": 0.9},
        {"top_p": 0.9}, {"seed": 4}, {"stop": ("x",)}, {"labels": ("A", "B")}, {"attempt": 1},
    ]  # fmt: skip
    keys = [request_key("m", REQUEST), request_key("n", REQUEST)]
    keys += [request_key("m", replace(REQUEST, **change)) for change in changes]
    assert len(set(keys)) == len(keys)


def test_what_cannot_change_a_reply_is_not_in_its_key() -> None:
    greedy = replace(REQUEST, temperature=0.0)
    assert request_key("m", greedy) == request_key("m", replace(greedy, seed=9, top_p=0.5))
    labels = replace(REQUEST, labels=("A", "B"))
    assert request_key("m", labels) == request_key("m", replace(labels, max_tokens=1, temperature=0.0, seed=None))


def test_two_who_ask_the_same_at_once_share_one_reply(tmp_path: Path) -> None:
    engine = Told(lambda request: "once")
    replies = ask_all(tmp_path, engine, REQUEST, REQUEST, REQUEST)
    assert [reply.text for reply in replies] == ["once"] * 3
    assert len(engine.requests) == 1


def test_a_failure_is_shared_but_not_kept(tmp_path: Path) -> None:
    def fail(request: Request) -> str:
        raise RequestFailed("timeout", "no reply")

    failed = ask_all(tmp_path, Told(fail), REQUEST, REQUEST)
    assert [error.reason for error in failed] == ["timeout", "timeout"]
    assert ask_all(tmp_path, Told(lambda request: "now"), REQUEST)[0].text == "now"


def test_a_reply_that_cannot_be_written_fails_alone(tmp_path: Path) -> None:
    odd = [Reply("\ud800", "stop"), Reply("", "labels", (), {"A": math.nan}), Reply("fine", "stop")]
    surrogate, nan, fine = ask_all(tmp_path, Told(lambda request: odd[request.seed or 0]), *numbered(3))
    assert (surrogate.reason, nan.reason, fine.text) == ("bad_reply", "bad_reply", "fine")


def test_a_reply_is_in_the_file_before_the_asker_sees_it(tmp_path: Path) -> None:
    async def act(journal: Journal, segment: Segment) -> None:
        for request in numbered(20):
            reply = await journal.ask(Told(lambda request: f"seed {request.seed}"), request, segment, 0)
            assert reply.text.encode() in segment.path.read_bytes()

    with_journal(tmp_path, act)


def test_replies_are_fsynced_in_groups_of_at_most_256(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    sync = Segment.sync

    def counting(segment: Segment) -> None:
        if segment.dirty:
            synced.append(segment.path.read_bytes().count(b"\n"))
        sync(segment)

    monkeypatch.setattr(Segment, "sync", counting)
    ask_all(tmp_path, Told(lambda request: "x"), *numbered(1000))
    assert [after - before for before, after in zip([0, *synced], synced, strict=False)] == [256, 256, 256, 232]


def test_a_lonely_reply_is_fsynced_within_half_a_second(tmp_path: Path) -> None:
    async def act(journal: Journal, segment: Segment) -> tuple[bool, bool]:
        await journal.ask(Told(lambda request: "x"), REQUEST, segment, 0)
        before = segment.dirty
        await asyncio.sleep(0.8)
        return before, segment.dirty

    assert with_journal(tmp_path, act) == (True, False)


def test_after_a_stop_nothing_new_is_asked_but_the_stored_is_given(tmp_path: Path) -> None:
    engine = Told(lambda request: "x")
    ask_all(tmp_path, engine, REQUEST)

    async def act(journal: Journal, segment: Segment) -> None:
        journal.stopping = True
        assert (await journal.ask(engine, REQUEST, segment, 0)).text == "x"
        with pytest.raises(StoppedError):
            await journal.ask(engine, replace(REQUEST, seed=4), segment, 0)

    with_journal(tmp_path, act)
    assert len(engine.requests) == 1


def written(tmp_path: Path, num: int = 3) -> Path:
    ask_all(tmp_path, Told(lambda request: f"answer {request.seed}"), *numbered(num))
    return tmp_path / "segment-00000.jsonl"


def test_a_torn_tail_is_cut_off_wherever_it_is_torn(tmp_path: Path) -> None:
    path = written(tmp_path)
    whole = path.read_bytes()
    start = whole.rstrip(b"\n").rfind(b"\n") + 1
    for end in range(start, len(whole)):
        path.write_bytes(whole[:end])
        segment = Segment(path)
        assert (len(segment.replies), segment.size) == (2, start)
        segment.append([whole[start:]])
        segment.close()
        assert path.read_bytes() == whole
        assert len(Segment(path).replies) == 3


def test_a_flipped_bit_anywhere_is_found_with_its_line(tmp_path: Path) -> None:
    path = written(tmp_path)
    whole = path.read_bytes()
    for at in range(len(whole) - 1):
        for bit in (1, 128):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ bit]) + whole[at + 1 :])
            line = whole[:at].count(b"\n") + 1
            with pytest.raises(CorruptError, match=rf"segment-00000.jsonl:{line}: this line was changed"):
                Segment(path)
    # Without its newline the last line is a torn write.
    path.write_bytes(whole[:-1] + b"\x0b")
    assert len(Segment(path).replies) == 2


def test_a_line_deleted_as_the_message_says_is_asked_anew(tmp_path: Path) -> None:
    path = written(tmp_path)
    first, _, third = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + third)
    engine = Told(lambda request: f"answer {request.seed}")
    assert [reply.text for reply in ask_all(tmp_path, engine, *numbered(3))] == ["answer 0", "answer 1", "answer 2"]
    assert [request.seed for request in engine.requests] == [1]


def test_the_first_stored_reply_wins(tmp_path: Path) -> None:
    path = written(tmp_path, 1)
    line = path.read_bytes()
    ask_all(tmp_path / "other", Told(lambda request: "another answer"), REQUEST, *numbered(1))
    other = (tmp_path / "other" / "segment-00000.jsonl").read_bytes().splitlines(keepends=True)
    path.write_bytes(line + b"".join(other))
    replies = ask_all(tmp_path, Told(lambda request: "a third"), *numbered(1))
    assert replies[0].text == "answer 0"


def test_a_failing_write_reaches_all_who_wait_and_leaves_whole_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path)
    before = path.read_bytes()

    def full(fd: int, data: bytes) -> None:
        journal_module.os.write(fd, data[: len(data) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(journal_module, "write_all", full)
    with pytest.raises(ResourceError, match=r"segment-00000.jsonl: No space left on device"):
        ask_all(tmp_path, Told(lambda request: "new"), *(replace(REQUEST, seed=n) for n in range(10, 20)))
    assert path.read_bytes() == before


def test_a_failing_last_fsync_is_not_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def act() -> None:
        journal = Journal(tmp_path)
        await journal.start()
        segment = journal.open(0)
        await journal.ask(Told(lambda request: "x"), REQUEST, segment, 0)
        monkeypatch.setattr(journal_module.os, "fsync", broken)
        await journal.close()

    def broken(fd: int) -> None:
        raise OSError(5, "Input/output error")

    with pytest.raises(ResourceError, match=r"segment-00000.jsonl: Input/output error"):
        asyncio.run(act())


def test_a_bug_in_the_writer_ends_the_run_instead_of_hanging_it(tmp_path: Path) -> None:
    def bug(request: Request, reply: Reply, is_new: bool) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        ask_all(tmp_path, Told(lambda request: "x"), *numbered(3), on_reply=bug)


def test_an_engine_that_is_down_is_told_to_all_who_wait(tmp_path: Path) -> None:
    def down(request: Request) -> str:
        raise EngineDown("gone")

    assert [type(error) for error in ask_all(tmp_path, Told(down), REQUEST, REQUEST)] == [EngineDown, EngineDown]


def test_a_journal_line_is_json_with_its_crc_first(tmp_path: Path) -> None:
    line = json.loads(written(tmp_path, 1).read_text())
    assert list(line) == ["crc", "key", "reply"]
    assert line["reply"] == {"text": "answer 0", "finish_reason": "stop", "usage": [0, 2, 0]}


def test_the_load_is_what_engines_work_on_and_what_waits_for_them(tmp_path: Path) -> None:
    loads: list[tuple[int, int]] = []
    journal = Journal(tmp_path)

    def say(request: Request) -> str:
        loads.append(journal.load())
        return "x"

    async def whole() -> None:
        await journal.start()
        segment = journal.open(0)
        one, two = Told(say, name="one", concurrency=2), Told(say, name="two", concurrency=8)
        asked = [(one, request) for request in numbered(5)] + [(two, request) for request in numbered(3)]
        await asyncio.gather(*(journal.ask(engine, request, segment, 0) for engine, request in asked))
        await journal.release(segment)
        await journal.close()

    asyncio.run(whole())
    assert loads[0] == (2 + 3, 3)
    assert journal.load() == (0, 0)
