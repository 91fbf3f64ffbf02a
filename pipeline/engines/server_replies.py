"""What an OpenAI-compatible server sent, read with suspicion: a `Reply`, or `BadReply` with an excerpt."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from typing import Any

from pipeline.engines.base import Reply, Request, Usage
from pipeline.lm.templates import split_reasoning

EXCERPT_CHARS = 200
_FINISH_REASONS = ("stop", "length", "content_filter")
_TOO_LONG = (
    "context_length_exceeded",
    "exceed_context_size",
    "context length",
    "context window",
    "max_model_len",
    "too long",
    "too many tokens",
)


class BadReply(ValueError):
    """A 200 that does not hold what the protocol promises. raw: the part in question, whole."""

    def __init__(self, what: str, raw: str) -> None:
        super().__init__(what)
        self.what = what
        self.raw = raw

    def __str__(self) -> str:
        return f"{self.what}: {excerpt(self.raw)}"


class NoLogprobs(BadReply):
    """A whole reply without the log-probabilities that were asked for."""

    def __init__(self, logprobs: Any) -> None:
        super().__init__("no log-probabilities, logprobs is", json.dumps(logprobs))


def excerpt(text: str) -> str:
    """The beginning of a text on one line, for a message: what is not printable is escaped."""
    shown = (c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[:EXCERPT_CHARS])
    return "".join(shown) + ("…" if len(text) > EXCERPT_CHARS else "")


def is_too_long(message: str) -> bool:
    """Whether a 400's text is about the prompt's length; servers share no code for it."""
    lowered = message.lower()
    return any(phrase in lowered for phrase in _TOO_LONG)


def is_about_logprobs(message: str) -> bool:
    """Whether a refusal's text is about log-probabilities, which not every server gives."""
    return "logprob" in message.lower()


def retry_after_s(headers: Mapping[str, str]) -> float:
    """Seconds that the server asks to wait, else 0: `retry-after-ms`, or `Retry-After` in seconds or as a date."""
    milliseconds = _number(headers.get("retry-after-ms", ""))
    if milliseconds is not None:
        return milliseconds / 1000
    value = headers.get("retry-after", "")
    seconds = _number(value)
    if seconds is not None:
        return seconds
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, OverflowError):
        return 0.0


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return max(0.0, value) if math.isfinite(value) else None


def read_reply(raw: bytes, request: Request) -> Reply:
    """The reply to `request` in a 200's body; labels are read from the top list. Raises BadReply."""
    if request.labels:
        positions, usage = read_positions(raw, request)
        return Reply("", "labels", (), label_logprobs(request.labels, positions), "topk", usage=usage)
    choice, usage = _read_choice(raw)
    text, reasoning = _text(choice)
    finish_reason = choice.get("finish_reason")
    if finish_reason not in _FINISH_REASONS:
        raise BadReply(f"the finish_reason is none of {', '.join(_FINISH_REASONS)}", str(finish_reason))
    for stop in request.stop:
        text = text.partition(stop)[0]
    return Reply(text, finish_reason, reasoning=reasoning, usage=usage)


def read_positions(raw: bytes, request: Request) -> tuple[list[Position], Usage]:
    """The positions of a label request's reply. Raises BadReply."""
    choice, usage = _read_choice(raw)
    return _positions(choice.get("logprobs"), chat=not isinstance(request.prompt, str)), usage


def _read_choice(raw: bytes) -> tuple[dict[str, Any], Usage]:
    body = _read_json(raw)
    choices = body.get("choices")
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
        number = len(choices) if isinstance(choices, list) else "no list of"
        raise BadReply(f"{number} choices in place of 1", json.dumps(body))
    return choices[0], _usage(body.get("usage"))


def _read_json(raw: bytes) -> dict[str, Any]:
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise BadReply("not JSON", raw.decode("utf-8", "replace")) from error
    if not isinstance(body, dict):
        raise BadReply("not a JSON object", json.dumps(body))
    return body


def _text(choice: dict[str, Any]) -> tuple[str, str]:
    """Text and reasoning of a chat message or a completion; a `<think>` block in the text counts as reasoning."""
    message = choice.get("message", choice)
    if not isinstance(message, dict):
        raise BadReply("no message", json.dumps(choice))
    text = message.get("content" if "message" in choice else "text") or ""
    reasoning = message.get("reasoning_content") or message.get("reasoning") or ""
    if not isinstance(text, str) or not isinstance(reasoning, str):
        raise BadReply("the text is no text", json.dumps(choice))
    try:
        (text + reasoning).encode()
    except UnicodeEncodeError as error:
        where = f"a lone surrogate at character {error.start} of the text"
        raise BadReply(where, json.dumps((text + reasoning)[error.start])) from error
    if not reasoning:
        # A template may open the block in the prompt, so that the text holds only its end.
        reasoning, text = split_reasoning(text, opened="</think>" in text)
    return text, reasoning


Position = tuple[str, dict[str, float]]
"""A generated position: the token taken, and token -> probability of those listed; without leading white space."""


def _positions(logprobs: Any, *, chat: bool) -> list[Position]:
    """The reported positions of a label reply. Raises NoLogprobs where there is none."""
    try:
        if chat:
            found = [
                (entry["token"], [(top["token"], top["logprob"]) for top in entry["top_logprobs"]])
                for entry in logprobs["content"]
            ]
        else:
            tops = zip(logprobs["tokens"], logprobs["top_logprobs"], strict=True)
            found = [(token, list(top.items())) for token, top in tops]
        positions = [(_bare(token), _probabilities(top)) for token, top in found]
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise NoLogprobs(logprobs) from error
    if not positions or not positions[0][1]:
        raise NoLogprobs(logprobs)
    return positions


def _bare(token: str) -> str:
    """A token without its leading white space, also in the notation of raw vocabularies."""
    return token.lstrip(" \t\r\n\u2581\u0120\u010a")


def _probabilities(top: list[tuple[str, float]]) -> dict[str, float]:
    """Bare token -> probability; variants of one token are added."""
    shares: dict[str, float] = {}
    for token, logprob in top:
        if not math.isnan(logprob):
            shares[_bare(token)] = shares.get(_bare(token), 0.0) + math.exp(min(logprob, 0.0))
    return shares


def label_logprobs(labels: tuple[str, ...], positions: list[Position]) -> dict[str, float]:
    """Log-probability of each label that the positions tell.

    A label that another one begins with ("1", "10"): where the longer one is listed as one token, both are read as they
    stand. Where it is not, the vocabulary may spell it in two tokens: then the second position divides the first one's
    share if the shorter label was the token taken, and else both are left out, for nothing tells them apart.
    """
    taken, first = positions[0]
    shares = {label: first.get(label, 0.0) for label in labels}
    for label in labels:
        longer = [other for other in labels if other != label and other.startswith(label)]
        if not longer or any(shares[other] for other in longer):
            continue
        if taken == label and len(positions) > 1:
            following = positions[1][1]
            whole = shares[label]
            for other in longer:
                shares[other] = whole * following.get(other.removeprefix(label), 0.0)
                shares[label] -= shares[other]
        else:
            shares[label] = 0.0
    return {label: math.log(min(share, 1.0)) for label, share in shares.items() if share > 0}


def _usage(usage: Any) -> Usage:
    """Token counts as reported; what is missing or no number counts 0."""
    if not isinstance(usage, dict):
        return Usage()
    details = usage.get("prompt_tokens_details")
    cached = details.get("cached_tokens") if isinstance(details, dict) else 0
    counts = (usage.get("prompt_tokens"), usage.get("completion_tokens"), cached)
    return Usage(*(count if isinstance(count, int) else 0 for count in counts))
