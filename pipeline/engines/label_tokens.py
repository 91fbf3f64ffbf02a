"""Exact log-probabilities of labels from a vLLM server, which takes the tokens whose log-probabilities are wanted.

`logprob_token_ids` gives the model's own, over its whole vocabulary, however unlikely a token is (with the server's
default `--logprobs-mode raw_logprobs`). The server itself says which tokens a label is behind its template
(`/tokenize`), once for all requests with these labels. A label of two tokens ("1", "0") is read at the second position:
`allowed_token_ids` makes the first token be taken, and changes nothing in what is reported.

Left out: labels of three tokens, and several of two that begin differently. They are read from the top list.
"""

from __future__ import annotations

import asyncio
import math

from pipeline.engines.base import Reply, Request
from pipeline.engines.endpoints import Endpoint
from pipeline.engines.server_replies import Position, read_positions
from pipeline.engines.wire import NO_THINKING, Body
from pipeline.errors import EngineRefused, RequestFailed

LEAST = 1e-43
"""Probability that stands for none, so that its logarithm can be written as JSON."""
Tokens = tuple[tuple[int, ...], ...]
"""Of each label."""


class Inexact(Exception):
    """The server cannot be asked for labels by token, or took no notice of it."""


class ExactLabels:
    """Asks one endpoint for labels by token, and remembers which tokens they are."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._known: dict[tuple[tuple[str, ...], str | None], Tokens] = {}
        self._looking = asyncio.Lock()

    async def ask(self, request: Request, body: Body) -> Reply | None:
        """None for labels that cannot be read so. body: of the request for a top list.

        Raises Inexact, and what the endpoint raises.
        """
        tokens = await self._tokens(request)
        if not are_readable(tokens):
            return None
        try:
            raw = await self._endpoint.complete(exact_body(body, tokens))
        except RequestFailed as error:
            if error.reason == "too_long":
                raise
            raise Inexact(str(error)) from error
        positions, usage = read_positions(raw, request)
        logprobs = dict(zip(request.labels, exact_logprobs(tokens, positions), strict=True))
        return Reply("", "labels", (), logprobs, "logprobs", usage=usage)

    async def _tokens(self, request: Request) -> Tokens:
        border = request.prompt[-1:] if isinstance(request.prompt, str) else None
        key = (request.labels, border)
        async with self._looking:
            if key not in self._known:
                try:
                    self._known[key] = await self._look_up(request.labels, border)
                except (EngineRefused, RequestFailed) as error:
                    raise Inexact(str(error)) from error
        return self._known[key]

    async def _look_up(self, labels: tuple[str, ...], border: str | None) -> Tokens:
        """Tokens of each label behind a raw prompt's last character, or behind the template's beginning of a reply."""
        if border is not None:
            bodies: list[Body] = [{"prompt": border + label, "add_special_tokens": False} for label in ("", *labels)]
        else:
            asked = {"role": "user", "content": "x"}
            bodies = [{"messages": [asked], **NO_THINKING}]
            for label in labels:
                said = {"role": "assistant", "content": label}
                kept = {"add_generation_prompt": False, "continue_final_message": True}
                bodies.append({"messages": [asked, said], **kept, **NO_THINKING})
        before, *whole = [tuple(await self._endpoint.tokenize(body)) for body in bodies]
        return tuple(tokens[len(before) :] if tokens[: len(before)] == before else () for tokens in whole)


def are_readable(tokens: Tokens) -> bool:
    """Whether one request tells the labels' probabilities: each is one token, or two with the same first one."""
    firsts = {label[0] for label in tokens if len(label) == 2}
    return all(len(label) in (1, 2) for label in tokens) and len(firsts) <= 1 and len(set(tokens)) == len(tokens)


def exact_body(body: Body, tokens: Tokens) -> Body:
    """The body that asks for the tokens in place of a top list."""
    body = {name: value for name, value in body.items() if name != "top_logprobs"}
    if "prompt" in body:
        body["logprobs"] = 1
    first = next((label[0] for label in tokens if len(label) == 2), None)
    if first is not None:
        body["allowed_token_ids"] = [first]
    wanted = sorted({token for label in tokens for token in label})
    length = 1 if first is None else 2
    return {**body, "max_tokens": length, "logprob_token_ids": wanted, "return_tokens_as_token_ids": True}


def exact_logprobs(tokens: Tokens, positions: list[Position]) -> list[float]:
    """Log-probability of each label; one that another begins with ("1", "10") does not count the other's share.

    Raises Inexact where a token's is missing, or is 0: then what is reported is what `allowed_token_ids` left.
    """
    try:
        shares = [math.prod(positions[n][1][f"token_id:{token}"] for n, token in enumerate(label)) for label in tokens]
    except (KeyError, IndexError) as error:
        raise Inexact("the server reports other tokens than those asked for") from error
    if min(shares) == 0.0 or sum(share for share, label in zip(shares, tokens, strict=True) if len(label) == 1) > 1.001:
        raise Inexact("the server does not report the model's own log-probabilities; see its --logprobs-mode")
    longer = [(label[:1], share) for label, share in zip(tokens, shares, strict=True) if len(label) == 2]
    own = (
        share - sum(other for first, other in longer if first == label)
        for label, share in zip(tokens, shares, strict=True)
    )
    return [math.log(max(share, LEAST)) for share in own]
