"""The server engine against the real local server that misbehaves on request."""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from pipeline.engines import server as server_module
from pipeline.engines.base import Reply, Request
from pipeline.engines.endpoints import Endpoint
from pipeline.engines.pool import Pool
from pipeline.engines.scripted import ScriptedEngine
from pipeline.engines.scripted_answers import Fault, Rule, Script
from pipeline.engines.scripted_server import running
from pipeline.engines.server import ServerEngine
from pipeline.errors import EngineDown, RequestFailed
from tests.pipeline.engines.serving import ask, chat, faulty, play, received

GRADES = (*"123456789", "10")


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "FIRST_WAIT_S", 0.002)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def test_the_answers_are_those_of_the_engine_in_process() -> None:
    question = "Which?\n(A) one two\n(B) three four\nReply with A or B only."
    requests = [
        chat("hello"),
        chat("greedy", temperature=0.0, seed=None, stop=("~:~",)),
        Request("raw text to go on", "draft", max_tokens=20),
        Request([{"role": "user", "content": question}], "comparison", labels=("A", "B")),
        Request(f"{question}\n", "comparison", labels=("B", "A")),
        Request([{"role": "user", "content": "Grade it from 1 (worst) to 10 (best)."}], "grade", labels=GRADES),
    ]
    in_process = ScriptedEngine()
    for request, reply in zip(requests, ask(Script(), *requests), strict=True):
        expected = asyncio.run(in_process.ask(request))
        assert isinstance(reply, Reply)
        assert reply._replace(logprobs=None) == expected._replace(logprobs=None)
        if expected.logprobs:
            assert reply.logprobs == pytest.approx(expected.logprobs, abs=1e-9)


@pytest.mark.parametrize(
    "header",
    [
        {"retry_after": "1"},
        {"retry_after": "0.4"},
        {"retry_after_ms": 400},
        {"retry_after_date_s": 2.0},
        {},
    ],
)
def test_a_429_is_retried_when_the_server_says(header: dict[str, Any]) -> None:
    script = faulty("x", kind="status", status=429, first=1, **header)
    begun = time.monotonic()
    (reply,) = ask(script, chat("x"))
    took = time.monotonic() - begun
    # An HTTP date has whole seconds: 2 s from now is at least 1 s from now.
    least = {"retry_after": float(header.get("retry_after", 0)), "retry_after_ms": 0.4, "retry_after_date_s": 1.0}
    assert isinstance(reply, Reply)
    assert took >= (least[next(iter(header))] if header else 0)
    assert took < 4


def test_a_wait_beyond_the_deadline_is_not_waited_for() -> None:
    begun = time.monotonic()
    (failure,) = ask(faulty("x", kind="status", status=429, retry_after="3600"), chat("x"))
    assert isinstance(failure, RequestFailed)
    assert (failure.reason, failure.attempts) == ("busy", 1)
    assert time.monotonic() - begun < 5


def test_errors_and_resets_at_30_percent_cost_no_reply(tmp_path: Path) -> None:
    ledger = tmp_path / "ledger.jsonl"
    faults = (
        Fault(kind="status", status=503, rate=0.1),
        Fault(kind="reset", rate=0.11),
        Fault(kind="cut_body", rate=0.1),
    )
    requests = [chat(f"question {number}") for number in range(300)]
    replies = ask(Script(faults=faults), *requests, ledger=ledger, concurrency=16)
    expected = [asyncio.run(ScriptedEngine().ask(request)) for request in requests]
    assert replies == expected
    tries = Counter(line["key"] for line in received(ledger))
    assert len(tries) == 300
    assert 60 <= sum(count > 1 for count in tries.values()) <= 130
    assert max(tries.values()) <= server_module.MAX_TRIES


def test_a_request_that_hangs_alone_fails_alone_and_is_not_sent_again(tmp_path: Path) -> None:
    ledger = tmp_path / "ledger.jsonl"

    async def act(engine: ServerEngine) -> list[Any]:
        hanging = asyncio.create_task(engine.ask(chat("hang")))
        fine = [await engine.ask(chat(f"fine {number}")) for number in range(5)]
        return [*fine, *await asyncio.gather(hanging, return_exceptions=True)]

    *fine, failure = play(faulty("hang", kind="hang"), act, ledger=ledger, timeout_s=0.5)
    assert all(reply.text for reply in fine)
    assert isinstance(failure, RequestFailed)
    assert (failure.reason, failure.attempts) == ("timeout", 1)
    assert Counter(line["try"] for line in received(ledger)) == {1: 6}


def test_when_all_hang_the_endpoint_is_down_without_a_storm(tmp_path: Path) -> None:
    ledger = tmp_path / "ledger.jsonl"
    begun = time.monotonic()
    requests = [chat(f"hang {number}") for number in range(40)]
    failures = ask(Script(faults=(Fault(kind="hang"),)), *requests, ledger=ledger, timeout_s=0.5, concurrency=8)
    assert time.monotonic() - begun < 3
    kinds = Counter(type(failure) for failure in failures)
    assert kinds == {RequestFailed: server_module.DOWN_AFTER - 1, EngineDown: 40 - server_module.DOWN_AFTER + 1}
    assert len(received(ledger)) <= 8 + server_module.DOWN_AFTER


@pytest.mark.parametrize("fault", [{"kind": "hang"}, {"kind": "status", "status": 500}])
@pytest.mark.parametrize("prompt", ["odd {}", [{"role": "user", "content": "odd {}"}]])
def test_the_last_odd_requests_fail_alone_where_the_server_still_answers(fault: dict[str, Any], prompt: Any) -> None:
    requests = [Request(json.loads(json.dumps(prompt).replace("{}", str(n))), "draft", max_tokens=9) for n in range(5)]
    failures = ask(faulty("odd", **fault), *requests, timeout_s=0.3, concurrency=2)
    assert [type(failure) for failure in failures] == [RequestFailed] * 5


def test_ten_given_up_in_a_row_are_an_endpoint_that_is_down_though_it_answers_a_greeting() -> None:
    requests = [chat(f"odd {number}") for number in range(30)]
    failures = ask(faulty("odd", kind="hang"), *requests, timeout_s=0.3, concurrency=10)
    kinds = Counter(type(failure) for failure in failures)
    assert kinds[RequestFailed] < server_module.HOPELESS_AFTER
    assert kinds[RequestFailed] + kinds[EngineDown] == 30


def test_one_byte_at_a_time_meets_the_deadline() -> None:
    begun = time.monotonic()
    (failure,) = ask(faulty("x", kind="drip", every_s=0.05), chat("x"), timeout_s=0.5)
    assert isinstance(failure, RequestFailed)
    assert failure.reason == "timeout"
    assert time.monotonic() - begun < 2


def test_a_slow_drip_that_ends_in_time_is_a_reply() -> None:
    (reply,) = ask(faulty("x", kind="drip", every_s=0.0005), chat("x"), timeout_s=30)
    assert isinstance(reply, Reply)


@pytest.mark.parametrize(
    ("fault", "shown"),
    [
        ({"kind": "html"}, "DOCTYPE"),
        ({"kind": "cut_json"}, "not JSON"),
        ({"kind": "choices", "choices": 0}, "0 choices"),
        ({"kind": "choices", "choices": 2}, "2 choices"),
        ({"kind": "odd_text", "odd": "surrogate"}, "\\ud800"),
    ],
)
def test_a_reply_that_breaks_the_protocol_is_retried_a_little_and_kept_as_excerpt(
    fault: dict[str, Any], shown: str, tmp_path: Path
) -> None:
    ledger = tmp_path / "ledger.jsonl"
    bad, fine = ask(faulty("bad", **fault), chat("bad"), chat("fine"), ledger=ledger)
    assert isinstance(bad, RequestFailed)
    assert (bad.reason, bad.attempts) == ("bad_reply", server_module.MAX_BAD_REPLIES)
    assert shown in bad.detail
    assert bad.detail.isprintable()
    assert isinstance(fine, Reply)
    assert len(received(ledger)) == server_module.MAX_BAD_REPLIES + 1
    (again,) = ask(faulty("bad", first=1, **fault), chat("bad"))
    assert isinstance(again, Reply)


def test_empty_reasoning_only_cut_and_filtered_are_told_apart() -> None:
    kinds = ("empty", "reasoning_only", "length", "content_filter")
    script = Script(rules=tuple(Rule(last=kind, faults=(Fault(kind=kind),)) for kind in kinds))
    empty, reasoning, cut, filtered = ask(script, *(chat(kind) for kind in kinds))
    assert isinstance(empty, Reply)
    assert (empty.text, empty.reasoning, empty.finish_reason) == ("", "", "stop")
    assert isinstance(reasoning, Reply)
    assert reasoning.text == ""
    assert reasoning.reasoning
    assert isinstance(cut, Reply)
    assert cut.finish_reason == "length"
    assert isinstance(filtered, Reply)
    assert (filtered.text, filtered.finish_reason) == ("", "content_filter")


@pytest.mark.parametrize("odd", ["nul", "line_separator"])
def test_odd_characters_come_through_unchanged(odd: str) -> None:
    (reply,) = ask(faulty("x", kind="odd_text", odd=odd), chat("x"))
    assert isinstance(reply, Reply)
    assert reply.text.endswith({"nul": "\0", "line_separator": "\u2028"}[odd])


def test_a_think_block_is_kept_apart_and_stops_are_cut_off() -> None:
    script = Script(rules=(Rule(last="x", text="<think>\nwhy\n</think>\n\nanswer END more"),))
    (reply,) = ask(script, chat("x", stop=("END",)))
    assert isinstance(reply, Reply)
    assert (reply.reasoning, reply.text) == ("why", "answer ")


def test_a_prompt_that_is_too_long_fails_alone(tmp_path: Path) -> None:
    ledger = tmp_path / "ledger.jsonl"
    script = Script(context=120, rules=(Rule(last="odd", faults=(Fault(kind="status", status=400, message="no"),)),))
    long, odd, fine = ask(script, chat("x " * 100), chat("odd"), chat("x"), ledger=ledger)
    assert isinstance(long, RequestFailed)
    assert long.reason == "too_long"
    assert isinstance(odd, RequestFailed)
    assert odd.reason == "refused_by_server"
    assert isinstance(fine, Reply)
    assert len(received(ledger)) == 3


def test_no_answer_at_all_is_an_endpoint_that_is_down() -> None:
    async def act() -> None:
        async with running(Script()) as url:
            pass
        engine = ServerEngine("scripted", [url])
        with pytest.raises(EngineDown, match="no answer"):
            await engine.start()
        with pytest.raises(EngineDown, match="given up after 8 tries") as raised:
            await engine.ask(chat("x"))
        assert raised.value.exit_code == 75
        await engine.close()

    asyncio.run(act())


def test_the_fingerprint_names_the_model_and_the_revision_only() -> None:
    one, other = (ServerEngine("m", [f"http://{host}:1/v1"], revision="2024-06") for host in ("a", "b"))
    assert one.fingerprint == other.fingerprint == {"backend": "server", "model": "m", "revision": "2024-06"}


def test_a_lone_surrogate_is_refused_before_it_is_sent(tmp_path: Path) -> None:
    ledger = tmp_path / "ledger.jsonl"
    (failure,) = ask(Script(), chat("a\ud800"), ledger=ledger)
    assert isinstance(failure, RequestFailed)
    assert (failure.reason, failure.attempts) == ("lone_surrogate", 0)
    assert received(ledger) == []


def test_at_most_concurrency_requests_are_in_flight_and_older_records_go_first(tmp_path: Path) -> None:
    ledger = tmp_path / "ledger.jsonl"

    async def act(engine: ServerEngine) -> None:
        priorities = [5, 9, 8, 3, 4, 1, 2, 6, 7, 0]
        await asyncio.gather(*(engine.ask(chat(str(p)), priority=p) for p in priorities))

    play(Script(latency_s=0.02), act, ledger=ledger, concurrency=1)
    lines = received(ledger)
    assert max(line["in_flight"] for line in lines) == 1
    # The first two to come: one is sent, for nobody waits yet; then the lowest of those waiting.
    assert [line["body"]["messages"][0]["content"] for line in lines] == ["5", *"012346789"]


def test_a_waiting_request_that_is_cancelled_gives_its_turn_on() -> None:
    async def act() -> list[str]:
        lone = Endpoint("http://127.0.0.1:9/v1", "m", key="", key_variable="", concurrency=1)
        pool, order = Pool([lone]), []

        async def hold(name: str, priority: int) -> None:
            place = await pool.take(priority)
            order.append(name)
            await asyncio.sleep(0)
            pool.give(place)

        tasks = [asyncio.create_task(hold(name, n)) for n, name in enumerate("abc")]
        await asyncio.sleep(0)
        tasks[1].cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.wait_for(pool.take(0), 1)
        await pool.close()
        return order

    assert asyncio.run(act()) == ["a", "c"]


def test_digits_spelt_one_by_one_come_back_from_a_real_server() -> None:
    labels = {"1": 0.2, "9": 0.1, "10": 0.6}
    script = Script(digits="split", rules=(Rule(asks="labels", labels=labels),))
    (reply,) = ask(script, Request("from 1 to 10", "grade", labels=GRADES))
    assert isinstance(reply, Reply)
    assert reply.logprobs == pytest.approx({label: math.log(p) for label, p in labels.items()}, abs=1e-6)
