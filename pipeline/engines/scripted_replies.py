"""What the scripted HTTP server puts on the wire: bodies in the OpenAI protocol, and whole HTTP responses."""

from __future__ import annotations

import json
import re
import time
from email.utils import formatdate
from math import exp, log
from typing import Any

from pipeline.engines.scripted_answers import Answer, Fault, Script
from pipeline.engines.wire import Body

_TINY = -20.0  # log-probability of the tokens that fill a top list


def reply_body(script: Script, path: str, body: Body, said: Answer) -> dict[str, Any]:
    """A 200's body. reasoning goes into `reasoning_content`, label probabilities into the first token's top list."""
    usage = said.usage
    chat = path.endswith("chat/completions")
    text = said.text
    logprobs: dict[str, Any] | None = None
    if said.logprobs is not None:
        wanted = body.get("top_logprobs", 1) if chat else body["logprobs"]
        taken = [token_text(number) for number in body.get("allowed_token_ids", ())]
        tops = _top_lists(script, said.logprobs, body.get("max_tokens") or 1, *taken)
        text = "".join(top[0][0] for top in tops)
        if "logprob_token_ids" in body and script.token_ids == "read":
            tops = [_by_number(top, body["logprob_token_ids"]) for top in tops]
        else:
            tops = [top[: max(1, int(wanted))] for top in tops]
        logprobs = _chat_logprobs(tops) if chat else _text_logprobs(tops)
    choice: dict[str, Any] = {"index": 0, "finish_reason": said.finish_reason, "logprobs": logprobs}
    if chat:
        choice["message"] = {"role": "assistant", "content": text}
        if said.reasoning:
            choice["message"]["reasoning_content"] = said.reasoning
    else:
        choice["text"] = text
    return {
        "id": f"scripted-{said.key[:16]}",
        "object": "chat.completion" if chat else "text_completion",
        "created": 0,
        "model": body["model"],
        "choices": [choice],
        "usage": {
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        },
    }


Top = list[tuple[str, float]]


def _top_lists(script: Script, labels: dict[str, float], max_tokens: int, taken: str = "") -> list[Top]:
    """Each sampled position's tokens with log-probabilities, the best first, or before it the one to be taken.

    A tenth of each label's share goes to the token with a space before it, as in real vocabularies. With `digits:
    split`, 10 is the tokens 1 and 0, and a second position follows when 1 was the first token.
    """
    first: dict[str, float] = {}
    split = script.digits == "split"
    for label, logprob in labels.items():
        token = label[0] if split and label.isdigit() else label
        first[token] = first.get(token, 0.0) + 0.9 * exp(logprob)
        first[" " + token] = first.get(" " + token, 0.0) + 0.1 * exp(logprob)
    ordered = sorted(
        ((token, log(p)) for token, p in first.items()), key=lambda item: (item[0] != taken, -item[1], item[0])
    )
    tops = [[*ordered, ("The", _TINY), ("I", _TINY - 1)]]
    if split and max_tokens > 1 and ordered and ordered[0][0] == "1" and "10" in labels:
        p_ten = exp(labels["10"] - log(exp(labels["10"]) + exp(labels.get("1", -99.0))))
        following = [("0", log(p_ten)), ("<|end|>", log(max(1 - p_ten, 1e-9)))]
        tops.append(sorted(following, key=lambda item: -item[1]))
    return tops


def _by_number(top: Top, numbers: list[int]) -> Top:
    """The token taken and the tokens asked for, by their numbers."""
    logprobs = dict(top)
    texts = dict.fromkeys([top[0][0], *map(token_text, numbers)])
    return [(f"token_id:{token_number(text)}", logprobs.get(text, _TINY)) for text in texts]


def token_number(token: str) -> int:
    return int.from_bytes(token.encode())


def token_text(number: int) -> str:
    return number.to_bytes((number.bit_length() + 7) // 8).decode()


def tokenize(script: Script, body: Body) -> list[int]:
    """Yes, No, and 10 if digits are whole, are one token each; so is every other character. Its number is its bytes."""
    text = body.get("prompt", "")
    if "messages" in body:
        turns = [f"{turn['role']}: {turn['content']}" for turn in body["messages"]]
        text = "\n".join(turns if body.get("continue_final_message") else [*turns, "assistant: "])
    tokens = re.findall(r"(?s)Yes|No|." if script.digits == "split" else r"(?s)Yes|No|10|.", text)
    return [token_number(token) for token in tokens]


def _chat_logprobs(tops: list[Top]) -> dict[str, Any]:
    positions = [
        [{"token": token, "logprob": logprob, "bytes": list(token.encode())} for token, logprob in top] for top in tops
    ]
    return {"content": [{**top[0], "top_logprobs": top} for top in positions]}


def _text_logprobs(tops: list[Top]) -> dict[str, Any]:
    return {
        "tokens": [top[0][0] for top in tops],
        "token_logprobs": [top[0][1] for top in tops],
        "top_logprobs": [dict(top) for top in tops],
        "text_offset": list(range(len(tops))),
    }


def encode(reply: dict[str, Any]) -> bytes:
    return json.dumps(reply).encode()


def error_body(message: str, code: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": "scripted", "param": None, "code": code or None}}


def response(status: int, body: bytes, headers: str) -> bytes:
    kind = "" if "Content-Type" in headers else "Content-Type: application/json\r\n"
    return f"HTTP/1.1 {status} Scripted\r\n{kind}{headers}Content-Length: {len(body)}\r\n\r\n".encode("latin-1") + body


def retry_headers(fault: Fault) -> str:
    if fault.retry_after_date_s is not None:
        return f"Retry-After: {formatdate(time.time() + fault.retry_after_date_s, usegmt=True)}\r\n"
    if fault.retry_after_ms is not None:
        return f"retry-after-ms: {fault.retry_after_ms}\r\n"
    return f"Retry-After: {fault.retry_after}\r\n" if fault.retry_after else ""
