"""How the server engine has labels: by token, from the top list, by votes. The ledger says what was asked."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.engines import server as server_module
from pipeline.engines.base import Reply, Request
from pipeline.engines.label_tokens import Inexact, are_readable, exact_logprobs
from pipeline.engines.scripted import ScriptedEngine
from pipeline.engines.scripted_answers import Fault, Rule, Script
from pipeline.engines.server import ServerEngine
from pipeline.engines.votes import MAX_TOKENS, NUM_VOTES, count_votes, vote_requests
from pipeline.errors import RequestFailed
from tests.pipeline.engines.serving import ask, play, received

GRADES = (*"123456789", "10")
SAID = {"A": 0.6, "B": 0.3}
NO_LOGPROBS = Fault(kind="no_logprobs")


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "FIRST_WAIT_S", 0.002)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def question(text: str = "A or B", labels: tuple[str, ...] = ("A", "B")) -> Request:
    return Request([{"role": "user", "content": text}], "comparison", labels=labels)


def logs(**shares: float) -> Any:
    return pytest.approx({label: math.log(share) for label, share in shares.items()}, abs=1e-9)


def in_turn(*requests: Request) -> Callable[[ServerEngine], Any]:
    """One after another, after a look at what is served."""

    async def act(engine: ServerEngine) -> list[Reply]:
        await engine.start()
        return [await engine.ask(request) for request in requests]

    return act


def vllm(labels: dict[str, float], **options: Any) -> Script:
    return Script(
        **{"owned_by": "vllm", "token_ids": "read", "rules": (Rule(asks="labels", labels=labels),), **options}
    )


@pytest.mark.parametrize("prompt", ["A or B\n", [{"role": "user", "content": "A or B"}]])
def test_vllm_is_asked_for_the_labels_own_tokens(prompt: Any, tmp_path: Path) -> None:
    """The scripted server gives a tenth of a label's share to another token, the one with a space before it."""
    ledger = tmp_path / "ledger.jsonl"
    (reply,) = play(vllm(SAID), in_turn(Request(prompt, "comparison", labels=("A", "B"))), ledger=ledger)
    assert reply.method == "logprobs"
    assert reply.logprobs == logs(A=0.54, B=0.27)
    (line,) = received(ledger)
    assert (line["body"]["logprob_token_ids"], line["body"]["max_tokens"]) == ([ord("A"), ord("B")], 1)


def test_a_label_beyond_any_top_list_is_read_by_its_token() -> None:
    said = {**{chr(n): 0.03 for n in range(ord("a"), ord("z"))}, "A": 0.2, "B": 1e-6}
    exact, listed = (play(vllm(said, token_ids=how), in_turn(question()))[0] for how in ("read", "none"))
    assert (exact.method, listed.method) == ("logprobs", "topk")
    assert exact.logprobs == logs(A=0.18, B=9e-7)
    assert "B" not in listed.logprobs


def test_ten_in_two_digits_is_read_at_the_second_one_whatever_the_likeliest_grade_is(tmp_path: Path) -> None:
    ledger = tmp_path / "ledger.jsonl"
    said = {**{str(n): 0.05 for n in range(2, 10)}, "1": 0.1, "7": 0.3, "10": 0.2}
    request = question("from 1 to 10", GRADES)
    (reply,) = play(vllm(said, digits="split"), in_turn(request), ledger=ledger)
    assert reply.method == "logprobs"
    assert {label: math.exp(logprob) for label, logprob in reply.logprobs.items()} == pytest.approx(
        {label: 0.9 * share for label, share in said.items()}
    )
    assert received(ledger)[0]["body"]["allowed_token_ids"] == [ord("1")]
    (whole,) = play(vllm(said), in_turn(request))
    assert whole.logprobs == pytest.approx(reply.logprobs)


@pytest.mark.parametrize("how", ["none", "refused", "ignored"])
def test_a_vllm_that_does_not_read_tokens_is_asked_for_its_top_list_and_not_again(how: str, tmp_path: Path) -> None:
    ledger = tmp_path / "ledger.jsonl"
    requests = [question(f"{number}: A or B") for number in range(3)]
    replies = play(vllm(SAID, token_ids=how), in_turn(*requests), ledger=ledger)
    assert [(reply.method, reply.logprobs) for reply in replies] == [("topk", logs(A=0.6, B=0.3))] * 3
    by_token = ["logprob_token_ids" in line["body"] for line in received(ledger)]
    assert by_token == [False] * 3 if how == "none" else [True, False, False, False]


def test_labels_that_no_single_request_tells_apart_are_read_from_the_top_list_the_others_not() -> None:
    odd = question("Say it", ("AB", "BA"))
    first, second, third = play(vllm({"AB": 0.5, "A": 0.2, "B": 0.1}), in_turn(question(), odd, question("2: A or B")))
    assert [first.method, second.method, third.method] == ["logprobs", "topk", "logprobs"]


@pytest.mark.parametrize(
    ("tokens", "readable"),
    [
        (((1,), (2,)), True),
        (((1,), (1, 5), (2,)), True),
        (((1, 5), (1, 6)), True),
        (((1, 5), (2, 6)), False),
        (((1, 5, 6), (1,)), False),
        (((1,), (1,)), False),
        (((1,), ()), False),
    ],
)
def test_what_one_request_can_read(tokens: Any, readable: bool) -> None:
    assert are_readable(tokens) is readable


def test_log_probabilities_that_were_constrained_or_are_none_are_not_taken_for_the_models_own() -> None:
    tokens = ((1,), (1, 5), (2,))

    def read(first: dict[int, float], second: dict[int, float]) -> list[float]:
        positions = [("", {f"token_id:{n}": p for n, p in shares.items()}) for shares in (first, second)]
        return exact_logprobs(tokens, positions)

    assert read({1: 0.5, 2: 0.1}, {5: 0.8}) == pytest.approx([math.log(0.1), math.log(0.4), math.log(0.1)])
    for first, second in (({1: 1.0, 2: 0.0}, {5: 0.8}), ({1: 1.0, 2: 1.0}, {5: 0.5}), ({1: 0.5}, {5: 0.5})):
        with pytest.raises(Inexact):
            read(first, second)


def test_votes_by_hand() -> None:
    replies = [Reply(text, "stop") for text in ("A", "(A)", "**A**.", '"A"', "B\nfor it is kinder", "A:")]
    unread = [Reply(text, "stop") for text in ("The answer is A", "a")]
    counted = count_votes(("A", "B"), [*replies, *unread])
    assert (counted.method, counted.finish_reason, counted.text) == ("votes", "labels", "")
    # Six of eight are votes, five for A: 6/8 * (5 + 1/2) / 7, and 6/8 * (1 + 1/2) / 7.
    assert counted.logprobs == logs(A=0.75 * 5.5 / 7, B=0.75 * 1.5 / 7)
    unanimous = count_votes(GRADES, [Reply("9", "stop")] * 8)
    assert unanimous.logprobs is not None
    assert math.exp(unanimous.logprobs["9"]) == pytest.approx(8.1 / 9)
    assert math.exp(unanimous.logprobs["10"]) == pytest.approx(0.1 / 9)
    assert count_votes(("A", "B"), [*replies[:3], *unread * 2, Reply("", "content_filter")]).logprobs == {}


@pytest.mark.parametrize(
    "fault", [NO_LOGPROBS, Fault(kind="status", status=403, message="You are not allowed to request logprobs")]
)
@pytest.mark.parametrize("prompt", ["A or B\n", [{"role": "user", "content": "A or B"}]])
def test_without_log_probabilities_a_label_is_what_eight_samples_say(fault: Fault, prompt: Any, tmp_path: Path) -> None:
    """Each request's text is drawn by its content; what the texts are, the scripted engine in process says."""
    ledger = tmp_path / "ledger.jsonl"
    rules = (Rule(asks="labels", faults=(fault,)), Rule(text=["A", "(B)", "Both"]))
    requests = [Request(prompt, "comparison", labels=("A", "B")), question("second: A or B")]
    first, second = play(Script(rules=rules), in_turn(*requests), ledger=ledger)
    texts = [asyncio.run(ScriptedEngine(Script(rules=rules)).ask(vote)).text for vote in vote_requests(requests[0])]
    for_a, for_b = texts.count("A"), texts.count("(B)")
    assert for_a
    assert for_b
    votes = for_a + for_b
    assert first.method == second.method == "votes"
    assert first.logprobs == logs(A=votes / 8 * (for_a + 0.5) / (votes + 1), B=votes / 8 * (for_b + 0.5) / (votes + 1))
    asked = [line["body"] for line in received(ledger)]
    tries = [body for body in asked if "logprobs" in body]
    assert len(tries) == (server_module.MAX_BAD_REPLIES if fault is NO_LOGPROBS else 1)
    cast = [body for body in asked if "logprobs" not in body]
    assert len(cast) == 2 * NUM_VOTES
    assert {(body["temperature"], body["max_tokens"]) for body in cast} == {(1.0, MAX_TOKENS)}
    assert len({body["seed"] for body in cast}) == 2 * NUM_VOTES
    assert first.usage.completion_tokens == NUM_VOTES


def test_votes_come_out_as_in_the_engine_in_process() -> None:
    script = Script(
        rules=(Rule(asks="labels", faults=(NO_LOGPROBS,)), Rule(text="{label}", labels={"A": 0.5, "B": 0.4}))
    )
    requests = [question(f"{number}: A or B") for number in range(20)]
    expected = [asyncio.run(ScriptedEngine(script).ask(request)) for request in requests]
    assert ask(script, *requests) == expected
    assert len({tuple((reply.logprobs or {}).values()) for reply in expected}) > 3


def test_a_server_that_gave_log_probabilities_before_is_not_asked_for_votes(tmp_path: Path) -> None:
    ledger = tmp_path / "ledger.jsonl"
    script = Script(rules=(Rule(last="odd", faults=(NO_LOGPROBS,)),))

    async def act(engine: ServerEngine) -> list[Any]:
        fine = await engine.ask(question())
        return [fine, *await asyncio.gather(engine.ask(question("odd: A or B")), return_exceptions=True)]

    fine, failure = play(script, act, ledger=ledger)
    assert fine.method == "topk"
    assert isinstance(failure, RequestFailed)
    assert (failure.reason, failure.attempts) == ("bad_reply", server_module.MAX_BAD_REPLIES)
    assert "no log-probabilities" in failure.detail
    assert len(received(ledger)) == 1 + server_module.MAX_BAD_REPLIES


def test_a_vote_that_cannot_be_had_fails_the_label() -> None:
    refusal = Fault(kind="status", status=400, message="no")
    script = Script(rules=(Rule(asks="labels", faults=(NO_LOGPROBS,)), Rule(faults=(refusal,))))
    (failure,) = ask(script, question())
    assert isinstance(failure, RequestFailed)
    assert failure.reason == "refused_by_server"
