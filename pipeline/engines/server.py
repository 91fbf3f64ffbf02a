"""Any server that speaks the OpenAI protocol, in its plain form: one endpoint, deadlines, retries, log-probabilities.

Retried, with growing jittered waits and at least as long as `Retry-After` asks: no connection, resets, 408, 409, 425,
429, 5xx, and a few times replies that break the protocol. Not retried: what no second try can change, and a request
that reached its deadline, for re-sending what a slow server still works on makes it slower.

Down or odd? When `DOWN_AFTER` requests in a row were given up, the server is asked for one token. If it gives one, the
requests were odd, each fails alone and the run goes on; if not, or after `HOPELESS_AFTER` in a row, the endpoint is
down. A health check would not do: it may answer while the model hangs. Several endpoints and adaptive limits come on
top of this file.
"""

from __future__ import annotations

import asyncio
import difflib
import heapq
import importlib
import itertools
import os
import random
from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import tenacity

from pipeline.engines.base import Reply, Request
from pipeline.engines.server_replies import BadReply, excerpt, is_too_long, read_reply, retry_after_s
from pipeline.engines.wire import NO_THINKING, REQUEST_STATUSES, RETRIED_STATUSES, Body, request_body
from pipeline.errors import EngineDown, EngineRefused, RequestFailed, UsageError

if TYPE_CHECKING:
    from openai import APIStatusError

MAX_TRIES = 8  # at 30 % faults one request in 15,000 uses them up
MAX_BAD_REPLIES = 3
DOWN_AFTER, HOPELESS_AFTER = 3, 10  # requests given up in a row, none answered between
CONNECT_S = 10.0
START_S, PROBE_S = 60.0, 60.0
NO_LIST_STATUSES = frozenset({404, 405, 501, *REQUEST_STATUSES})
THINKING_SERVERS = ("vllm", "sglang")
"""Owners of a model, in `/models`, whose servers hand NO_THINKING to the chat template; others may refuse it."""
POOL_CONNECTIONS = 16  # a pool looks at all its connections for every request: small pools in turn cost less
FIRST_WAIT_S = 0.25
LONGEST_WAIT_S = 20.0


class _TryAgain(Exception):
    """One try failed in a way that another may not. reason: as in RequestFailed; wait_s: what the server asks for."""

    def __init__(self, reason: str, detail: str, wait_s: float = 0.0) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail
        self.wait_s = wait_s


class Slots:
    """At most so many holders; among those who wait the lowest priority goes first, then who came first."""

    def __init__(self, number: int) -> None:
        self._free = number
        self._waiting: list[tuple[int, int, asyncio.Future[None]]] = []
        self._arrivals = itertools.count()

    async def take(self, priority: int) -> None:
        if self._free > 0:
            self._free -= 1
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._waiting, (priority, next(self._arrivals), turn))
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled():
                self.give()
            raise

    def give(self) -> None:
        while self._waiting:
            *_, turn = heapq.heappop(self._waiting)
            if not turn.done():
                turn.set_result(None)
                return
        self._free += 1


class ServerEngine:
    """`engines.base.Engine` over one endpoint.

    base_url: with its `/v1`. api_key_env: the environment variable with the key; empty or unset: none is sent.
    revision: any word that changes when the served weights do; part of every reply's key. timeout_s: from a request's
    first try to the end of its reply, retries and waits included. context: `start` asks the server if it is not given.
    neutralised: special tokens that were made plain text in what was sent.
    """

    context: int | None

    def __init__(
        self,
        model: str,
        base_url: str,
        *,
        api_key_env: str = "OPENAI_API_KEY",
        revision: str = "",
        concurrency: int = 32,
        timeout_s: float = 600.0,
        context: int | None = None,
    ) -> None:
        self.name = model
        self.context = context
        self.concurrency = concurrency
        self.fingerprint = {"backend": "server", "model": model, "revision": revision}
        self.neutralised = 0
        self.origin = _origin(base_url)
        self._api_key_env = api_key_env
        self._timeout_s = timeout_s
        self._slots = Slots(concurrency)
        self._given_up = 0
        self._probing = asyncio.Lock()
        self._takes_thinking = False
        self._ended: EngineDown | EngineRefused | None = None
        self._key = _key(api_key_env)
        self._open_clients(base_url, self._key)

    def _open_clients(self, base_url: str, key: str) -> None:
        """openai clients without their own retries; no redirects, so that the key goes to `base_url`'s origin only."""
        import openai

        # The HTTP library that openai is built on: httpx, or httpx2 since 3.0.
        http = importlib.import_module(type(openai.DEFAULT_CONNECTION_LIMITS).__module__.partition(".")[0])
        limits = http.Limits(max_connections=self.concurrency, max_keepalive_connections=self.concurrency)
        is_local = urlsplit(base_url).hostname in ("127.0.0.1", "localhost", "::1")
        timeout = http.Timeout(None, connect=CONNECT_S)
        tls = http.create_ssl_context()
        self._clients = [
            openai.AsyncOpenAI(
                base_url=base_url,
                api_key=key or "none",  # the client insists on one; `_options` keeps it from being sent
                max_retries=0,
                timeout=timeout,
                http_client=openai.DefaultAsyncHttpxClient(
                    verify=tls, limits=limits, timeout=timeout, follow_redirects=False, trust_env=not is_local
                ),
            )
            for _ in range(-(-self.concurrency // POOL_CONNECTIONS))
        ]
        self._turns = itertools.cycle(self._clients)
        self._options: Any = {} if key else {"headers": {"Authorization": openai.Omit()}}
        self._response_class = http.Response
        self._openai = openai

    async def start(self) -> list[str]:
        """Asks what is served, for a preflight, with the retries of a request. Returns the names, [] from a server that
        has no list.

        Raises EngineRefused for a model that is not among them, EngineDown where nothing answers.
        """
        try:
            response: Any = await self._retrying(START_S)(self._look_up)
        except _TryAgain as error:
            raise self._no_answer(str(error)) from error
        try:
            served = {entry["id"]: entry for entry in response.json()["data"]}
        except (ValueError, KeyError, TypeError):
            return []
        if self.name not in served:
            near = difflib.get_close_matches(self.name, served, n=3, cutoff=0.0)
            raise EngineRefused(
                f"{self.origin}: no model {self.name!r} here; nearest: {', '.join(near) or 'none served'}"
            )
        self._takes_thinking = served[self.name].get("owned_by") in THINKING_SERVERS
        length = served[self.name].get("max_model_len")
        if self.context is None and isinstance(length, int):
            self.context = length
        return list(served)

    async def _look_up(self) -> Any:
        """The list of models, or what a server without one says instead. A server that is not up is not waited for."""
        try:
            return await asyncio.wait_for(self._send("GET", "/models", None), CONNECT_S)
        except TimeoutError as error:
            raise self._no_answer(f"timeout after {CONNECT_S:g} s") from error
        except _TryAgain as error:
            if error.reason == "unreachable":
                raise self._no_answer(str(error)) from error
            raise

    def _no_answer(self, said: str) -> EngineDown:
        return EngineDown(f"{self.origin}: no answer ({said}); start the server, then run again")

    async def ask(self, request: Request, priority: int = 0) -> Reply:
        """See `Engine.ask`. A request given up is RequestFailed, or EngineDown if the endpoint is."""
        body, escaped = request_body(request, self.name)
        if self._takes_thinking and request.labels and "messages" in body:
            body |= NO_THINKING
        await self._slots.take(priority)
        try:
            reply = await self._ask_until_deadline(body, request)
        finally:
            self._slots.give()
        self.neutralised += escaped
        self._given_up = 0
        return reply

    def _retrying(self, deadline_s: float) -> tenacity.AsyncRetrying:
        return tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception_type(_TryAgain), wait=_wait_s, stop=_enough(deadline_s), reraise=True
        )

    async def _ask_until_deadline(self, body: Body, request: Request) -> Reply:
        retrying = self._retrying(self._timeout_s)
        try:
            async with asyncio.timeout(self._timeout_s):
                return await retrying(self._try, body, request)
        except TimeoutError:
            reason, detail = "timeout", f"no whole reply from {self.origin} within {self._timeout_s:g} s"
        except _TryAgain as error:
            reason, detail = error.reason, error.detail
        except EngineRefused as error:
            self._ended = error
            raise
        tries = int(retrying.statistics.get("attempt_number", 1))
        if reason != "bad_reply" and await self._is_down(reason, body):
            self._ended = EngineDown(f"{detail}; given up after {tries} tries; run again when it answers")
            raise self._ended
        raise RequestFailed(reason, detail, tries)

    async def _try(self, body: Body, request: Request) -> Reply:
        if self._ended:
            raise type(self._ended)(str(self._ended))
        path = "/completions" if "prompt" in body else "/chat/completions"
        try:
            response = await self._send("POST", path, body)
        except RequestFailed as error:
            if error.reason != "refused_by_server" or not NO_THINKING.keys() <= body.keys():
                raise
            # Not every tokenizer of such a server has a template to hand it to.
            response = await self._send("POST", path, {k: v for k, v in body.items() if k not in NO_THINKING})
            self._takes_thinking = False
        try:
            return read_reply(response.content, request)
        except BadReply as error:
            raise _TryAgain("bad_reply", f"{error.what}: {self._excerpt(error.raw)}") from None

    async def _is_down(self, reason: str, body: Body) -> bool:
        """Whether the endpoint is gone, now that another request was given up. body: of that request."""
        self._given_up += 1
        if reason == "unreachable" or self._given_up >= HOPELESS_AFTER:
            return True
        if self._given_up < DOWN_AFTER:
            return False
        async with self._probing:
            return self._ended is not None or not await self._serves("prompt" in body)

    async def _serves(self, raw: bool) -> bool:
        """Whether the model gives one token for a prompt that no server chokes on. raw: for a text to continue."""
        path, prompt = "/chat/completions", {"messages": [{"role": "user", "content": "Hello."}]}
        if raw:
            path, prompt = "/completions", {"prompt": "Hello."}  # type: ignore[dict-item]
        try:
            async with asyncio.timeout(min(PROBE_S, self._timeout_s)):
                await self._send("POST", path, {"model": self.name, **prompt, "max_tokens": 1, "temperature": 0.0})
        except (_TryAgain, TimeoutError, RequestFailed, EngineRefused):
            return False
        return True

    async def _send(self, method: str, path: str, body: Body | None) -> Any:
        """One HTTP exchange; the response if it is a 200, or says that there is nothing to GET."""
        client = next(self._turns)
        try:
            if method == "GET":
                return await client.get(path, cast_to=self._response_class, options=self._options)
            return await client.post(path, body=body, cast_to=self._response_class, options=self._options)
        except self._openai.APIStatusError as error:
            if method == "GET" and error.status_code in NO_LIST_STATUSES:
                return error.response
            # What the server wrote may repeat the key, so that its error does not go on as a cause.
            raise self._refusal(error) from None
        except self._openai.APIConnectionError as error:
            cause = error.__cause__ or error
            reason = "unreachable" if type(cause).__name__ in ("ConnectError", "ConnectTimeout") else "connection_lost"
            said = f"{self.origin}: {type(cause).__name__} {self._excerpt(str(cause))}".rstrip()
            raise _TryAgain(reason, said) from error

    def _refusal(self, error: APIStatusError) -> Exception:
        """What a status other than 200 means: for this try, for this request, or for the run."""
        status = error.status_code
        said = f"{self.origin}: {status} {self._excerpt(error.response.text)}".rstrip()
        if status in RETRIED_STATUSES:
            return _TryAgain("busy" if status == 429 else "server_error", said, retry_after_s(error.response.headers))
        if status in REQUEST_STATUSES:
            return RequestFailed("too_long" if is_too_long(error.response.text) else REQUEST_STATUSES[status], said)
        cure = "see the server's log"
        if status in (401, 403):
            cure = "set api_key_env beside base_urls to the environment variable that holds its key"
            if self._api_key_env:
                cure = f"put a key for it into the environment variable {self._api_key_env}"
        elif status == 404:
            cure = f"does it serve {self.name!r}, and does base_url end as it should (often in /v1)?"
        elif 300 <= status < 400:
            cure = "redirects are not followed; put the final address into base_url"
        return EngineRefused(f"{said}; {cure}")

    def _excerpt(self, text: str) -> str:
        """The beginning of what a server wrote. The key is hidden before the cut, which else could leave half of it."""
        return excerpt(text.replace(self._key, "[key]") if self._key else text)

    async def close(self) -> None:
        """Closes the connections."""
        for client in self._clients:
            await client.close()


def _origin(base_url: str) -> str:
    """Scheme, host and port. Raises UsageError for anything but http(s), and for a URL with a password in it."""
    try:
        parts = urlsplit(base_url)
    except ValueError as error:
        raise UsageError(f"base_urls: {error}; write it like http://127.0.0.1:8000/v1") from error
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UsageError(
            f"base_urls: {excerpt(base_url)!r} is no http(s) address; write it like http://127.0.0.1:8000/v1"
        )
    if "@" in parts.netloc:
        raise UsageError(f"base_urls: a password in the address of {parts.hostname}; put the key into the environment")
    return f"{parts.scheme}://{parts.netloc}"


def _key(variable: str) -> str:
    """The key in an environment variable, "" if there is none. UsageError, without it, for what no header can hold."""
    key = os.environ.get(variable, "").strip() if variable else ""
    if not (key.isascii() and key.isprintable()):
        raise UsageError(f"{variable}: a key has no control or accented characters; set it again")
    return key


def _enough(deadline_s: float) -> Callable[[tenacity.RetryCallState], bool]:
    """Stops after MAX_TRIES tries or MAX_BAD_REPLIES bad replies, and where the next wait would pass the deadline."""
    bad = itertools.count(1)

    def stop(state: tenacity.RetryCallState) -> bool:
        is_bad = _error(state).reason == "bad_reply"
        if is_bad and next(bad) >= MAX_BAD_REPLIES:
            return True
        return (
            state.attempt_number >= MAX_TRIES or (state.seconds_since_start or 0.0) + state.upcoming_sleep >= deadline_s
        )

    return stop


def _wait_s(state: tenacity.RetryCallState) -> float:
    """Full jitter under a doubling limit; never shorter than the server asks, and then a little spread."""
    limit = min(LONGEST_WAIT_S, FIRST_WAIT_S * 2 ** (state.attempt_number - 1))
    return _error(state).wait_s * random.uniform(1.0, 1.1) + random.uniform(0.0, limit)


def _error(state: tenacity.RetryCallState) -> _TryAgain:
    error = state.outcome.exception() if state.outcome else None
    assert isinstance(error, _TryAgain)
    return error
