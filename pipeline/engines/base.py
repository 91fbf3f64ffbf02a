"""The protocol between those who ask and those who answer.

An engine turns one `Request` into one `Reply`. It knows nothing of records, stages or the journal. It may batch what is
in flight as it likes; among waiting requests the lowest `priority` (the oldest record) goes first. All requests of a
record have one priority, those of different records different ones, so that it tells which prompts begin alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

from pipeline.records import Prompt


@dataclass(frozen=True, slots=True)
class Request:
    """One question to a model.

    prompt: messages for the chat template (the reply is the next assistant turn), or raw text to be continued.
    kind: what is asked, one of draft, critique, revision, check, comparison, grade, reasoning. Engines ignore it.
    max_tokens, temperature, top_p, stop: sampling; temperature 0 is greedy. Ignored where labels are given.
    seed: in [0, 2**63), for temperature > 0 only, else None.
    labels: if not empty, no text is wanted but the log-probability of each label as the whole beginning of the reply.
    attempt: 0 for the first time; a reply that does not parse is asked for again with attempt + 1.
    """

    prompt: Prompt
    kind: str
    max_tokens: int = 0
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    attempt: int = 0


class Usage(NamedTuple):
    """Token counts; cached: prompt tokens that were not computed again."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0


class Reply(NamedTuple):
    """The answer to a `Request`.

    text: without special tokens and the reasoning block; empty for a label request. A request's `stop` is cut off.
    finish_reason: stop (ended by itself or at a stop string) | length (cut at max_tokens) | content_filter; for label
        requests: labels.
    token_ids: the sampled tokens where the engine knows them, else ().
    logprobs: label requests: natural-log probability of each label that the engine could read; a label that another one
        begins with ("1" and "10") does not count the other's share. A missing label was not among those reported.
    method: label requests: logprobs (exact) | topk (from a server's top list) | votes (of several sampled replies, for
        which this one stands).
    reasoning: a reasoning model's block, kept apart.
    """

    text: str
    finish_reason: str
    token_ids: tuple[int, ...] = ()
    logprobs: dict[str, float] | None = None
    method: str = ""
    reasoning: str = ""
    usage: Usage = Usage()


class Engine(Protocol):
    """A served model.

    name: as written into records (`model`). context: longest prompt plus reply in tokens, None if unknown.
    fingerprint: canonical-JSON-able identity of what answers: configuration, tokenizer, template and weights by
        content, never a URL or a path. concurrency: how many requests it wants in flight. running: how many it works on
        at most, just now; the others wait.
    neutralised: how many texts of control tokens in prompts were made plain text so far.
    """

    name: str
    context: int | None
    fingerprint: dict[str, str]
    concurrency: int

    @property
    def running(self) -> int: ...

    @property
    def neutralised(self) -> int: ...

    async def start(self) -> object:
        """Called once before the first request: EngineRefused or EngineDown at once rather than later."""
        ...

    async def ask(self, request: Request, priority: int = 0) -> Reply:
        """Answers, or raises RequestFailed (this request only), EngineDown or EngineRefused (the run stops)."""
        ...

    async def close(self) -> None:
        """Frees the model or the connection. No request may be in flight."""
        ...
