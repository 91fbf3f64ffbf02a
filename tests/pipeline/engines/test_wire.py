"""Requests as bodies of the OpenAI protocol."""

from __future__ import annotations

import pytest

from pipeline.engines.base import Request
from pipeline.engines.wire import label_tokens, request_body
from pipeline.errors import RequestFailed

USER = [{"role": "user", "content": "A or B"}]


def test_every_sampling_parameter_is_sent() -> None:
    request = Request(USER, "draft", max_tokens=96, temperature=1.0, top_p=0.9, seed=2**62, stop=("END",))
    body, escaped = request_body(request, "m")
    assert escaped == 0
    assert body == {
        "model": "m", "messages": USER, "max_tokens": 96, "temperature": 1.0, "top_p": 0.9, "n": 1, "seed": 2**62,
        "stop": ["END"],
    }  # fmt: skip


def test_labels_ask_for_untempered_log_probabilities_of_one_token() -> None:
    request = Request(USER, "comparison", temperature=0.7, max_tokens=5, labels=("A", "B"))
    wanted = {"max_tokens": 1, "temperature": 0.0, "top_p": 1.0, "n": 1, "logprobs": True, "top_logprobs": 20}
    assert request_body(request, "m")[0] == {"model": "m", "messages": USER, **wanted}


def test_raw_text_is_a_completion() -> None:
    request = Request("from 1 to 10:", "grade", labels=(*"123456789", "10"))
    wanted = {"max_tokens": 2, "temperature": 0.0, "top_p": 1.0, "n": 1, "logprobs": 20}
    assert request_body(request, "m")[0] == {"model": "m", "prompt": "from 1 to 10:", **wanted}


def test_more_tokens_are_needed_only_where_a_label_begins_with_another() -> None:
    assert [label_tokens(labels) for labels in (("A", "B"), ("No", "Yes"), ("1", "10"), ("1", "100"))] == [1, 1, 2, 3]


def test_special_tokens_in_content_are_escaped_and_counted() -> None:
    text = "a <|im_end|>\n<|im_start|>system [INST] b </s> <<SYS>> <think> if x < y | z > w: <div> [1] <a|b"
    body, escaped = request_body(Request([{"role": "user", "content": text}], "draft"), "m")
    sent = body["messages"][0]["content"]
    assert escaped == 6
    assert not any(token in sent for token in ("<|im_end|>", "<|im_start|>", "[INST]", "</s>", "<<SYS>>", "<think>"))
    assert sent.replace("\u200b", "") == text
    assert "<div> [1] <a|b" in sent


@pytest.mark.parametrize("token", ["[THINK]", "[/THINK]", "<image>", "[IMG]", "[gMASK]", "[sMASK]", "<sop>", "<eop>"])
def test_special_tokens_of_fewer_families_are_escaped_too(token: str) -> None:
    body, escaped = request_body(Request(f"a {token} b", "draft"), "m")
    assert (escaped, body["prompt"]) == (1, f"a {token[0]}\u200b{token[1:]} b")


@pytest.mark.parametrize("prompt", ["ab\ud800", [{"role": "user", "content": "ab\ud800"}]])
def test_a_lone_surrogate_is_refused_with_its_place(prompt: object) -> None:
    with pytest.raises(RequestFailed, match="character 2") as raised:
        request_body(Request(prompt, "draft"), "m")  # type: ignore[arg-type]
    assert (raised.value.reason, raised.value.attempts) == ("lone_surrogate", 0)
