"""What the stages share in asking: seeds, replies that must be usable, and both orders of a comparison."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

from constitution.principles import Principle
from constitution.prompts import COMPARISON_LABELS, Style, comparison_prompt, reasoning_prompt, stops, verdict_prompt
from constitution.verdicts import Comparison, Reading, compare_orders, prefers_a, read_labels
from constitution.wording import Wording
from pipeline.config.settings import RankSettings
from pipeline.driver import Ask
from pipeline.engines.base import Engine, Reply, Request
from pipeline.errors import RequestFailed
from pipeline.records import Failure, Message, Prompt

MAX_ATTEMPTS = 3
COT_CLAMP = (0.4, 0.6)
"""After a chain of thought the labels' probabilities saturate (CAI section 4.1)."""
METHODS = ("logprobs", "topk", "votes")
"""How labels are read, the best first."""
T = TypeVar("T")


class Voice(NamedTuple):
    """A model, and how it is to be spoken to. max_tokens: the longest reply it is asked for."""

    engine: Engine
    wording: Wording
    style: Style = "chat"
    max_tokens: int = 1024


class Sampling(NamedTuple):
    """place: what the seed of a sampled reply is made from, besides the attempt. sample: its number among siblings."""

    temperature: float = 0.0
    top_p: float = 1.0
    place: tuple[str | int, ...] = ()
    sample: int = 0

    def seed(self, attempt: int) -> int | None:
        """(H(place, attempt) + sample) mod 2**63; None for greedy replies, which have none."""
        if self.temperature == 0:
            return None
        text = "\0".join(str(part) for part in (*self.place, attempt))
        return (int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) + self.sample) % 2**63


async def together(calls: Iterable[Awaitable[T]]) -> list[T]:
    """All results; waits for every call before it raises the first error, so that no paid reply is thrown away."""
    results = await asyncio.gather(*calls, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results  # type: ignore[return-value]


async def _asked(ask: Ask, engine: Engine, request: Request) -> Reply:
    """The reply; a failure knows what was asked."""
    try:
        return await ask(engine, request)
    except RequestFailed as error:
        error.kind = request.kind
        raise


def lost(error: RequestFailed, sample: int, turn: int) -> Failure:
    """The failure line of a sample that a request could not be answered for."""
    return Failure(sample, turn, error.kind, error.reason, error.detail, error.attempts)


async def ask_text(ask: Ask, voice: Voice, prompt: Prompt, kind: str, sampling: Sampling | None = None) -> Reply:
    """A reply with text in it. Asks again with the next attempt; RequestFailed (empty, …) after MAX_ATTEMPTS."""
    sampling = sampling or Sampling()
    for attempt in range(MAX_ATTEMPTS):
        reply = await _asked(
            ask,
            voice.engine,
            Request(
                prompt,
                kind,
                max_tokens=voice.max_tokens,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                seed=sampling.seed(attempt),
                stop=stops(voice.style),
                attempt=attempt,
            ),
        )
        problem = _unusable(reply)
        if not problem:
            return reply._replace(text=reply.text.strip())
    error = RequestFailed(
        problem, f"no usable reply; the last: {reply.reasoning[:80] or reply.text[:80]!r}", MAX_ATTEMPTS
    )
    error.kind = kind
    raise error


def _unusable(reply: Reply) -> str:
    if reply.finish_reason == "content_filter":
        return "content_filter"
    if not reply.text.strip():
        return "reasoning_only" if reply.reasoning else "empty"
    return ""


async def ask_labels(ask: Ask, voice: Voice, prompt: Prompt, kind: str, labels: Sequence[str]) -> tuple[Reading, str]:
    """The probabilities of the labels as the reply, and how they were had (logprobs, topk, votes)."""
    reply = await _asked(ask, voice.engine, Request(prompt, kind, labels=tuple(labels)))
    return read_labels(reply.logprobs, labels), reply.method


class Judgement(NamedTuple):
    """A comparison of two texts under one principle.

    method, label_mass: how well the labels could be read; of both orders the worse.
    """

    comparison: Comparison
    method: str
    label_mass: float


async def compare(
    ask: Ask,
    voice: Voice,
    conversation: Sequence[Message],
    texts: tuple[str, str],
    principle: Principle,
    settings: RankSettings,
    *,
    a_first: bool = True,
) -> Judgement:
    """Asks which of two texts is better, in both orders or, with `order: single`, in the one that `a_first` says."""
    a, b = texts
    orders = [True, False] if settings.order != "single" else [a_first]
    answers = await together(
        _which_is_better(ask, voice, conversation, (a, b) if first else (b, a), principle, settings) for first in orders
    )
    readings = {first: prefers_a(reading, a_first=first) for first, (reading, _) in zip(orders, answers, strict=True)}
    if settings.order == "single":
        comparison = compare_orders(readings[a_first], None, order="single", **_bounds(settings))
        if not a_first:
            comparison = comparison._replace(p_ab=None, p_ba=comparison.p_ab)
    else:
        comparison = compare_orders(readings[True], readings[False], order=settings.order, **_bounds(settings))
    method = max((method for _, method in answers), key=METHODS.index)
    return Judgement(comparison, method, min(reading.label_mass for reading, _ in answers))


def _bounds(settings: RankSettings) -> dict[str, Any]:
    clamp = settings.clamp or (COT_CLAMP if settings.chain_of_thought else None)
    return {"tie_band": settings.tie_band, "clamp": clamp}


async def _which_is_better(
    ask: Ask,
    voice: Voice,
    conversation: Sequence[Message],
    shown: tuple[str, str],
    principle: Principle,
    settings: RankSettings,
) -> tuple[Reading, str]:
    """The reading of COMPARISON_LABELS for two texts in the order shown, after a chain of thought if one is wanted."""
    how: dict[str, Any] = {"wording": voice.wording, "style": voice.style}
    if settings.chain_of_thought:
        prompt = reasoning_prompt(conversation, *shown, principle, **how)
        reasoning = (await ask_text(ask, voice, prompt, "reasoning")).text
        prompt = verdict_prompt(conversation, *shown, principle, reasoning, **how)
    else:
        prompt = comparison_prompt(conversation, *shown, principle, **how)
    return await ask_labels(ask, voice, prompt, "comparison", COMPARISON_LABELS)
