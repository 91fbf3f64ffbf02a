"""Labels from a model that reports no log-probabilities: several short replies are sampled and counted as votes."""

from __future__ import annotations

import asyncio
import hashlib
import math
from collections import Counter
from collections.abc import Awaitable, Callable

from constitution.verdicts import read_vote
from pipeline.engines.base import Reply, Request, Usage
from pipeline.records import canonical

NUM_VOTES = 8
MIN_VOTES = NUM_VOTES // 2
MAX_TOKENS = 8


async def ask_votes(request: Request, ask: Callable[[Request], Awaitable[Reply]]) -> Reply:
    """The reply to a label request from NUM_VOTES replies at temperature 1. Raises what a vote's request raises."""
    replies = await asyncio.gather(*map(ask, vote_requests(request)), return_exceptions=True)
    for reply in replies:
        if isinstance(reply, BaseException):
            raise reply
    return count_votes(request.labels, replies)  # type: ignore[arg-type]


def vote_requests(request: Request) -> list[Request]:
    """The requests of the votes. Seeds follow each other from a hash of what is asked."""
    asked = canonical([request.prompt, request.labels, request.attempt])
    seed = int.from_bytes(hashlib.sha256(asked).digest()[:8])
    return [
        Request(
            request.prompt,
            request.kind,
            max_tokens=MAX_TOKENS,
            temperature=1.0,
            seed=(seed + number) % 2**63,
            attempt=request.attempt,
        )
        for number in range(NUM_VOTES)
    ]


def count_votes(labels: tuple[str, ...], replies: list[Reply]) -> Reply:
    """The labels' log-probabilities, none of them where fewer than MIN_VOTES of the replies are a vote.

    Besides the votes one more counts, spread evenly over the labels (Perks 1947), so that no share is 0 or 1:
    P(label) = (votes for it + 1 / labels) / (votes + 1), times the share of the replies that are votes.
    """
    found = [read_vote(reply.text, labels) for reply in replies]
    votes = Counter(label for label in found if label is not None)
    logprobs = {}
    if votes.total() >= MIN_VOTES:
        whole = votes.total() / len(replies)
        logprobs = {x: math.log(whole * (votes[x] + 1 / len(labels)) / (votes.total() + 1)) for x in labels}
    usage = Usage(*(sum(counts) for counts in zip(*(reply.usage for reply in replies), strict=True)))
    return Reply("", "labels", (), logprobs, "votes", usage=usage)
