"""Reading what an OpenAI-compatible server sent: label probabilities by hand, hostile bodies refused."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from pipeline.engines.base import Request
from pipeline.engines.server_replies import BadReply, label_logprobs, read_reply, retry_after_s

GRADES = (*"123456789", "10")


def test_retry_after_forms() -> None:
    assert retry_after_s({"retry-after": "2"}) == 2
    assert retry_after_s({"retry-after": "0.5"}) == 0.5
    assert retry_after_s({"retry-after-ms": "250", "retry-after": "9"}) == 0.25
    assert retry_after_s({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}) == 0
    assert [retry_after_s({"retry-after": bad}) for bad in ("", "soon", "nan", "inf", "-3")] == [0, 0, 0, 0, 0]


def reply_of(*, content: Any = "A", logprobs: Any = None, finish_reason: Any = "stop") -> bytes:
    choice = {"message": {"content": content}, "logprobs": logprobs, "finish_reason": finish_reason}
    return json.dumps({"choices": [choice]}).encode()


def chat_top(*tops: dict[str, float]) -> dict[str, Any]:
    positions = []
    for top in tops:
        listed = [{"token": token, "logprob": math.log(p)} for token, p in top.items()]
        positions.append({"token": next(iter(top)), "logprob": 0.0, "top_logprobs": listed})
    return {"content": positions}


def test_variants_of_a_label_are_added_and_lookalikes_are_not() -> None:
    tops = chat_top({"A": 0.5, " A": 0.1, "\nA": 0.05, "a": 0.1, "A)": 0.1, "B": 0.1, "An": 0.05})
    request = Request([], "comparison", labels=("A", "B", "C"))
    reply = read_reply(reply_of(logprobs=tops), request)
    assert reply.logprobs == pytest.approx({"A": math.log(0.65), "B": math.log(0.1)})


def test_one_and_ten_as_whole_tokens_stand_as_they_are() -> None:
    reply = read_reply(reply_of(logprobs=chat_top({"10": 0.6, "1": 0.3})), Request([], "grade", labels=GRADES))
    assert reply.logprobs == pytest.approx({"1": math.log(0.3), "10": math.log(0.6)})


def test_one_and_ten_spelt_in_digits_are_divided_by_the_second_token() -> None:
    tops = chat_top({"1": 0.8, "9": 0.2}, {"0": 0.75, "<|end|>": 0.25})
    reply = read_reply(reply_of(logprobs=tops), Request([], "grade", labels=GRADES))
    assert reply.logprobs == pytest.approx({"1": math.log(0.2), "9": math.log(0.2), "10": math.log(0.6)})


def test_one_and_ten_are_left_out_where_nothing_tells_them_apart() -> None:
    assert label_logprobs(GRADES, [("9", {"9": 0.7, "1": 0.3})]) == pytest.approx({"9": math.log(0.7)})


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"[]",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"choices": [null]}',
        b'{"choices": {}}',
        reply_of(content=7),
        reply_of(finish_reason="tool_calls"),
        reply_of(finish_reason=None),
        b'{"choices": [{"message": "text", "finish_reason": "stop"}]}',
    ],
)
def test_hostile_bodies_are_bad_replies(raw: bytes) -> None:
    with pytest.raises(BadReply):
        read_reply(raw, Request([], "draft"))


@pytest.mark.parametrize(
    "logprobs",
    [None, [], {}, {"content": []}, {"content": [{"token": "A"}]}, {"content": [{"token": 1, "top_logprobs": [3]}]}],
)
def test_hostile_log_probabilities_are_bad_replies(logprobs: Any) -> None:
    with pytest.raises(BadReply, match="log-probabilities"):
        read_reply(reply_of(logprobs=logprobs), Request([], "comparison", labels=("A", "B")))
