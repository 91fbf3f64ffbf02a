"""Any servers that speak the OpenAI protocol and serve one model: deadlines, retries, failover, log-probabilities.

Retried, elsewhere if possible: no connection, resets, 408, 409, 425, 429, 5xx but 501, and a few times replies that
break the protocol. When every endpoint has been tried the next try waits, longer each time, with jitter; no endpoint is
asked before the time that its `Retry-After` names. A waiting request holds no place. Not retried: what no second try
can change, and a request that reached its deadline, for re-sending what a slow server still works on makes it slower;
but with several endpoints a try has half of the deadline, so that what a silent one holds can move once.

Down or odd? When `DOWN_AFTER` requests in a row were given up, every endpoint is asked for one token. If one gives it,
the requests were odd, each fails alone and the run goes on; if none, or after `HOPELESS_AFTER` in a row, the engine is
down. A health check would not do: it may answer while the model hangs.

Labels: by token where an endpoint is vLLM (label_tokens.py), else from the top list; where no endpoint gives
log-probabilities, by votes (votes.py).

endpoints.py is one endpoint, pool.py says which one a request goes to.
"""

from __future__ import annotations

import asyncio
import difflib
import itertools
import logging
import os
import random
import time
from collections.abc import Callable, Sequence
from typing import Any

import tenacity

from pipeline.engines.base import Reply, Request
from pipeline.engines.endpoints import CONNECT_S, Endpoint, TryAgain
from pipeline.engines.label_tokens import ExactLabels, Inexact
from pipeline.engines.pool import Pool
from pipeline.engines.server_replies import BadReply, NoLogprobs, read_reply
from pipeline.engines.votes import ask_votes
from pipeline.engines.wire import NO_THINKING, Body, request_body
from pipeline.errors import EngineDown, EngineRefused, RequestFailed, UsageError

MAX_TRIES = 8  # at 30 % faults one request in 15,000 uses them up
MAX_BAD_REPLIES = 3
DOWN_AFTER, HOPELESS_AFTER = 3, 10  # requests given up in a row, none answered between
START_S = 60.0
THINKING_SERVERS = ("vllm", "sglang")
"""Owners of a model, in `/models`, whose servers hand NO_THINKING to the chat template; others may refuse it."""
BAD_REPLIES = frozenset({"bad_reply", "no_logprobs"})
"""Reasons of a failed try that say nothing of whether the endpoint is up."""
FIRST_WAIT_S = 0.25
LONGEST_WAIT_S = 20.0


class _Call:
    """One request on its way.

    is_label: a label is asked for, be it as a vote. spent_s: in tries and in waits between them, of its deadline; not
    in the queue.
    """

    def __init__(self, request: Request, body: Body, priority: int, *, is_label: bool) -> None:
        self.request = request
        self.body = body
        self.priority = priority
        self.last: Endpoint | None = None
        self.spent_s = 0.0
        self.has_moved = False
        self.is_label = is_label


class ServerEngine:
    """`engines.base.Engine` over one endpoint, or several that serve the same model.

    base_urls: each with its `/v1`. api_key_env: the environment variable with the key of all of them; empty or unset:
    none is sent. revision: any word that changes when the served weights do; part of every reply's key. concurrency:
    requests in flight at one endpoint. timeout_s: from a request's first try to the end of its reply, retries and waits
    included. context: `start` asks the servers if it is not given. neutralised: special tokens that were made plain
    text in what was sent.
    """

    context: int | None

    def __init__(
        self,
        model: str,
        base_urls: Sequence[str],
        *,
        api_key_env: str = "OPENAI_API_KEY",
        revision: str = "",
        concurrency: int = 32,
        timeout_s: float = 600.0,
        context: int | None = None,
    ) -> None:
        self.name = model
        self.context = context
        self._context_is_given = context is not None
        self.concurrency = concurrency * len(base_urls)
        self.fingerprint = {"backend": "server", "model": model, "revision": revision}
        self.neutralised = 0
        self._timeout_s = timeout_s
        self._given_up = 0
        self._gives_logprobs: bool | None = None
        self._checking = asyncio.Lock()
        self._ended: EngineDown | EngineRefused | None = None
        key = _key(api_key_env)
        self._pool = Pool(
            [Endpoint(url, model, key=key, key_variable=api_key_env, concurrency=concurrency) for url in base_urls]
        )

    @property
    def running(self) -> int:
        return sum(endpoint.in_flight for endpoint in self._pool.endpoints)

    async def start(self) -> list[str]:
        """Asks what is served, for a preflight, with the retries of a request. Returns the names, [] from servers that
        have no list.

        Raises EngineRefused for a model that is not among them, EngineDown where nothing answers. Of several endpoints
        one that does not answer is left out until it does.
        """
        endpoints = self._pool.endpoints
        found = await asyncio.gather(*(self._look_up(endpoint) for endpoint in endpoints), return_exceptions=True)
        down = [error for error in found if isinstance(error, EngineDown)]
        for error in found:
            if isinstance(error, BaseException) and (not isinstance(error, EngineDown) or len(down) == len(found)):
                raise error
        for endpoint, names in zip(endpoints, found, strict=True):
            if isinstance(names, EngineDown):
                self._pool.leave_out(endpoint, str(names.__cause__) or "timeout")
        return next((names for names in found if isinstance(names, list) and names), [])

    async def _look_up(self, endpoint: Endpoint) -> list[str]:
        """The names of an endpoint's models, [] if it has no list. A server that is not up is not waited for."""

        async def once() -> list[dict[str, Any]] | None:
            try:
                async with asyncio.timeout(CONNECT_S):
                    return await endpoint.models()
            except TimeoutError as error:
                raise endpoint.no_answer(f"timeout after {CONNECT_S:g} s") from error
            except TryAgain as error:
                if error.reason == "unreachable":
                    raise endpoint.no_answer(str(error)) from error
                raise

        begun = time.monotonic()
        retrying = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception_type(TryAgain),
            wait=_wait_s,
            stop=_enough(lambda: START_S + begun - time.monotonic()),
            reraise=True,
        )
        try:
            listed: list[dict[str, Any]] | None = await retrying(once)
        except TryAgain as error:
            raise endpoint.no_answer(str(error)) from error
        if listed is None:
            return []
        served = {entry["id"]: entry for entry in listed}
        if self.name not in served:
            near = difflib.get_close_matches(self.name, served, n=3, cutoff=0.0)
            all_of_them = "; all endpoints have to serve the same model" if len(self._pool.endpoints) > 1 else ""
            raise EngineRefused(
                f"{endpoint.origin}: no model {self.name!r} here; nearest: {', '.join(near) or 'none served'}"
                f"{all_of_them}"
            )
        owner = served[self.name].get("owned_by")
        endpoint.takes_thinking = owner in THINKING_SERVERS
        endpoint.exact = ExactLabels(endpoint) if owner == "vllm" else None
        length = served[self.name].get("max_model_len")
        if isinstance(length, int) and not self._context_is_given:
            self.context = min(length, self.context or length)
        return list(served)

    async def ask(self, request: Request, priority: int = 0) -> Reply:
        """See `Engine.ask`. A request given up is RequestFailed, or EngineDown if no endpoint answers any more."""
        body, escaped = request_body(request, self.name)
        ask = self._ask_labels if request.labels else self._call
        reply = await ask(request, body, priority)
        self.neutralised += escaped
        return reply

    async def _ask_labels(self, request: Request, body: Body, priority: int) -> Reply:
        """By log-probabilities, or by votes once a request has shown that there are none."""

        async def vote(request: Request) -> Reply:
            return await self._call(request, request_body(request, self.name)[0], priority, is_label=True)

        if self._gives_logprobs is not False:
            try:
                reply = await self._call(request, body, priority, is_label=True)
            except RequestFailed as error:
                if error.reason != "no_logprobs":
                    raise
                if self._gives_logprobs:
                    raise RequestFailed("bad_reply", error.detail, error.attempts) from None
            else:
                self._gives_logprobs = True
                return reply
            self._gives_logprobs = False
        return await ask_votes(request, vote)

    async def _call(self, request: Request, body: Body, priority: int, *, is_label: bool = False) -> Reply:
        reply = await self._ask_until_deadline(_Call(request, body, priority, is_label=is_label))
        self._given_up = 0
        return reply

    async def _ask_until_deadline(self, call: _Call) -> Reply:
        def count_the_wait(state: tenacity.RetryCallState) -> None:
            call.spent_s += state.upcoming_sleep

        retrying = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception_type(TryAgain),
            wait=self._wait_s,
            stop=_enough(lambda: self._timeout_s - call.spent_s),
            before_sleep=count_the_wait,
            reraise=True,
        )
        try:
            return await retrying(self._try, call)
        except EngineRefused as error:
            self._ended = error
            raise
        except TryAgain as error:
            tries = int(retrying.statistics.get("attempt_number", 1))
            if error.reason not in BAD_REPLIES and await self._is_down(error.reason):
                self._ended = EngineDown(f"{error.detail}; given up after {tries} tries; run again when it answers")
                raise self._ended from None
            raise RequestFailed(error.reason, error.detail, tries) from None

    async def _try(self, call: _Call) -> Reply:
        """One try, at the endpoint that the pool gives."""
        endpoint = await self._pool.take(call.priority, avoid=call.last)
        begun = time.monotonic()
        try:
            async with self._checking:  # nothing is sent while it is asked whether anybody answers
                pass
            if self._ended:
                raise type(self._ended)(str(self._ended))
            reply = await self._ask_endpoint(endpoint, call)
            endpoint.succeeded()
            return reply
        except TryAgain as error:
            endpoint.failed(error, begun)
            self._pool.rest(endpoint, min(error.wait_s, LONGEST_WAIT_S))
            raise
        except EngineRefused as error:
            if not self._ended and self._others_are_in(endpoint):
                endpoint.is_out = True
                raise TryAgain("refused_by_server", str(error)) from error
            raise
        finally:
            call.last = endpoint
            call.spent_s += time.monotonic() - begun
            self._pool.give(endpoint)

    def _others_are_in(self, endpoint: Endpoint) -> bool:
        return any(other is not endpoint and not other.is_out for other in self._pool.endpoints)

    async def _ask_endpoint(self, endpoint: Endpoint, call: _Call) -> Reply:
        left_s = self._timeout_s - call.spent_s
        may_move = not call.has_moved and self._others_are_in(endpoint)
        try:
            async with asyncio.timeout(min(left_s, self._timeout_s / 2) if may_move else left_s):
                return await self._answer(endpoint, call)
        except RequestFailed as error:
            if error.reason == "no_logprobs" and self._others_are_in(endpoint):
                raise TryAgain(error.reason, error.detail) from None
            raise
        except TimeoutError:
            call.has_moved = True
            said = f"no whole reply from {endpoint.origin} within {self._timeout_s:g} s"
            raise TryAgain("timeout", said, overload=True) from None
        except BadReply as error:
            reason = "no_logprobs" if isinstance(error, NoLogprobs) else "bad_reply"
            raise TryAgain(reason, f"{error.what}: {endpoint.excerpt(error.raw)}") from None

    async def _answer(self, endpoint: Endpoint, call: _Call) -> Reply:
        """What an endpoint says; labels by token if it can be asked so. One that cannot is not asked so again."""
        if call.request.labels and endpoint.exact:
            try:
                reply = await endpoint.exact.ask(call.request, call.body | self._switches(endpoint, call))
                if reply:
                    return reply
            except Inexact as error:
                reply = read_reply(await self._complete(endpoint, call), call.request)
                logging.getLogger(__name__).info("%s: labels from the top list: %s", endpoint.origin, error)
                endpoint.exact = None
                return reply
        return read_reply(await self._complete(endpoint, call), call.request)

    def _switches(self, endpoint: Endpoint, call: _Call) -> Body:
        return NO_THINKING if endpoint.takes_thinking and call.is_label and "messages" in call.body else {}

    async def _complete(self, endpoint: Endpoint, call: _Call) -> bytes:
        switches = self._switches(endpoint, call)
        if not switches:
            return await endpoint.complete(call.body)
        try:
            return await endpoint.complete(call.body | switches)
        except RequestFailed as error:
            if error.reason != "refused_by_server":
                raise
            # Not every tokenizer of such a server has a template to hand it to.
            raw = await endpoint.complete(call.body)
            endpoint.takes_thinking = False
            return raw

    async def _is_down(self, reason: str) -> bool:
        """Whether no endpoint is left, now that another request was given up."""
        self._given_up += 1
        if self._given_up >= HOPELESS_AFTER:
            return True
        if reason == "unreachable" and all(endpoint.is_out for endpoint in self._pool.endpoints):
            return True
        if self._given_up < DOWN_AFTER:
            return False
        async with self._checking:
            if self._ended is not None:
                return True
            serves = await asyncio.gather(*(endpoint.serves(self._timeout_s) for endpoint in self._pool.endpoints))
            return not any(serves)

    def _wait_s(self, state: tenacity.RetryCallState) -> float:
        """Nothing while another endpoint is untried, then as `_wait_s`."""
        return _wait_s(state, len(self._pool.usable()))

    async def close(self) -> None:
        """Closes the connections."""
        await self._pool.close()


def _key(variable: str) -> str:
    """The key in an environment variable, "" if there is none. UsageError, without it, for what no header can hold."""
    key = os.environ.get(variable, "").strip() if variable else ""
    if not (key.isascii() and key.isprintable()):
        raise UsageError(f"{variable}: a key has no control or accented characters; set it again")
    return key


def _enough(left_s: Callable[[], float]) -> Callable[[tenacity.RetryCallState], bool]:
    """Stops after MAX_TRIES tries or MAX_BAD_REPLIES bad replies, and where the next wait would pass the deadline."""
    bad = itertools.count(1)

    def stop(state: tenacity.RetryCallState) -> bool:
        is_bad = _error(state).reason in BAD_REPLIES
        if is_bad and next(bad) >= MAX_BAD_REPLIES:
            return True
        return state.attempt_number >= MAX_TRIES or state.upcoming_sleep >= left_s()

    return stop


def _wait_s(state: tenacity.RetryCallState, endpoints: int = 1) -> float:
    """Full jitter under a limit that doubles when all endpoints were tried; never shorter than the server asks, and
    then a little spread. Nothing while one is untried.
    """
    rounds, untried = divmod(state.attempt_number, endpoints)
    if untried:
        return 0.0
    limit = min(LONGEST_WAIT_S, FIRST_WAIT_S * 2 ** (rounds - 1))
    return _error(state).wait_s * random.uniform(1.0, 1.1) + random.uniform(0.0, limit)


def _error(state: tenacity.RetryCallState) -> TryAgain:
    error = state.outcome.exception() if state.outcome else None
    assert isinstance(error, TryAgain)
    return error
