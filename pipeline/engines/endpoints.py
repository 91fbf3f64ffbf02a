"""One OpenAI-compatible endpoint: its connection, its limit, and whether it is in or out.

What a refusal means is read here: for this try (`TryAgain`), for this request (RequestFailed), for all (EngineRefused).

The limit on requests in flight follows TCP (RFC 5681): it begins at the maximum; a sign of overload (429, 503, silence)
halves it, once for all that was sent before; every reply adds 1 below the last half and 1/limit above it. An endpoint
that comes back begins at 1.

An endpoint goes out when nothing listens there, when it answered nobody while a request reached its deadline, or after
OUT_AFTER failures in a row. While it is out a probe asks, in
growing intervals, for its list of models and then for one token; a token brings it in again.
"""

from __future__ import annotations

import asyncio
import importlib
import random
import time
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from pipeline.engines.server_replies import excerpt, is_about_logprobs, is_too_long, retry_after_s
from pipeline.engines.wire import NOT_SERVED_STATUSES, REQUEST_STATUSES, RETRIED_STATUSES, Body
from pipeline.errors import EngineDown, EngineRefused, RequestFailed, UsageError

if TYPE_CHECKING:
    from openai import APIStatusError

    from pipeline.engines.label_tokens import ExactLabels

CONNECT_S = 10.0
PROBE_S = 60.0
FIRST_PROBE_S, LONGEST_PROBE_S = 0.5, 30.0
OUT_AFTER = 5
NO_LIST_STATUSES = frozenset({*NOT_SERVED_STATUSES, *REQUEST_STATUSES})
REFUSED_FIELD_STATUSES = frozenset({400, 403, 422})
FAULTS = frozenset({"connection_lost", "server_error", "timeout"})
"""Reasons of a failed try that count towards going out."""


class TryAgain(Exception):
    """One try failed in a way that another may not.

    reason: as in RequestFailed. wait_s: what the server asks for. overload: the server has too much to do.
    """

    def __init__(self, reason: str, detail: str, wait_s: float = 0.0, *, overload: bool = False) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail
        self.wait_s = wait_s
        self.overload = overload


class Limit:
    """How many requests may be in flight; see the top of the file. maximum: never more."""

    def __init__(self, maximum: int) -> None:
        self.maximum = maximum
        self.value = float(maximum)
        self._half = float(maximum)
        self._halved_at = 0.0

    def replied(self) -> None:
        step = 1.0 if self.value < self._half else 1.0 / self.value
        self.value = min(self.value + step, self.maximum)

    def overloaded(self, sent_at: float) -> None:
        """sent_at: of the request that tells so, on the monotonic clock."""
        if sent_at >= self._halved_at:
            self.value = self._half = max(1.0, self.value / 2)
            self._halved_at = time.monotonic()

    def restart(self) -> None:
        self.value = 1.0


class Endpoint:
    """Requests to one address. key: sent to its origin only; "" sends none. key_variable: where it was read, for cures.

    in_flight, limit: requests now, and at most. is_out: not to be asked while another endpoint is in. trouble: the last
    failure. resting: until it may be asked again (monotonic seconds), as it asked for. takes_thinking: see
    wire.NO_THINKING. exact: what label_tokens.py knows of it; None if labels cannot be asked for by token.
    """

    def __init__(self, url: str, model: str, *, key: str, key_variable: str, concurrency: int) -> None:
        self.origin = _origin(url)
        self._tokenize_url = url.rstrip("/").removesuffix("/v1") + "/tokenize"
        self.model = model
        self.limit = Limit(concurrency)
        self.in_flight = 0
        self.is_out = False
        self.trouble = ""
        self.resting = 0.0
        self.takes_thinking = False
        self.exact: ExactLabels | None = None
        self.failures = 0
        self._replied_at = 0.0
        self._raw = False
        self._key = key
        self._key_variable = key_variable
        self._open_client(url, concurrency)

    def _open_client(self, url: str, concurrency: int) -> None:
        """An openai client without its own retries; no redirects, so that the key goes to the origin only."""
        import openai

        # The HTTP library that openai is built on: httpx, or httpx2 since 3.0.
        http = importlib.import_module(type(openai.DEFAULT_CONNECTION_LIMITS).__module__.partition(".")[0])
        timeout = http.Timeout(None, connect=CONNECT_S)
        self._client = openai.AsyncOpenAI(
            base_url=url,
            api_key=self._key or "none",  # the client insists on one; `_options` keeps it from being sent
            max_retries=0,
            timeout=timeout,
            http_client=openai.DefaultAioHttpClient(
                limits=http.Limits(max_connections=concurrency + 1, max_keepalive_connections=concurrency + 1),
                timeout=timeout,
                follow_redirects=False,
                trust_env=urlsplit(url).hostname not in ("127.0.0.1", "localhost", "::1"),
            ),
        )
        self._options: Any = {} if self._key else {"headers": {"Authorization": openai.Omit()}}
        self._response_class = http.Response
        self._openai = openai

    @property
    def load(self) -> float:
        return self.in_flight / self.limit.value

    def has_place(self) -> bool:
        return self.in_flight + 1 <= self.limit.value and time.monotonic() >= self.resting

    def succeeded(self) -> None:
        self.failures = 0
        self.is_out = False
        self._replied_at = time.monotonic()
        self.limit.replied()

    def failed(self, error: TryAgain, sent_at: float) -> None:
        """Counts a failed try; the endpoint may be out after it."""
        self.trouble = str(error)
        if error.overload:
            self.limit.overloaded(sent_at)
        if error.reason in FAULTS:
            self.failures += 1
        is_silent = error.reason == "timeout" and self._replied_at < sent_at
        if error.reason == "unreachable" or is_silent or self.failures >= OUT_AFTER:
            self.is_out = True

    async def models(self) -> list[dict[str, Any]] | None:
        """The list of served models; None from a server that has none."""
        response = await self.send("GET", "/models", None)
        try:
            served = response.json()["data"]
            return served if all(isinstance(entry["id"], str) for entry in served) else None
        except (ValueError, KeyError, TypeError):
            return None

    async def serves(self, timeout_s: float = PROBE_S) -> bool:
        """Whether the model gives one token for a prompt that no server chokes on."""
        path, prompt = "/chat/completions", {"messages": [{"role": "user", "content": "Hello."}]}
        if self._raw:
            path, prompt = "/completions", {"prompt": "Hello."}  # type: ignore[dict-item]
        try:
            async with asyncio.timeout(min(PROBE_S, timeout_s)):
                await self.send("POST", path, {"model": self.model, **prompt, "max_tokens": 1, "temperature": 0.0})
        except (TryAgain, TimeoutError, RequestFailed, EngineRefused):
            return False
        return True

    async def wait_until_back(self) -> None:
        """Returns when an endpoint that is out gives a token again; it is in then, with a limit of 1."""
        wait_s = FIRST_PROBE_S
        while self.is_out:
            await asyncio.sleep(wait_s * random.uniform(0.5, 1.0))
            wait_s = min(2 * wait_s, LONGEST_PROBE_S)
            try:
                async with asyncio.timeout(CONNECT_S):
                    served = await self.models()
            except (TryAgain, TimeoutError, RequestFailed, EngineRefused):
                continue
            if (served is None or any(entry["id"] == self.model for entry in served)) and await self.serves():
                self.failures = 0
                self.limit.restart()
                self.is_out = False

    async def complete(self, body: Body) -> bytes:
        """The reply to the body of a completion, as sent."""
        self._raw = "prompt" in body
        response = await self.send("POST", "/completions" if self._raw else "/chat/completions", body)
        return bytes(response.content)

    async def tokenize(self, body: Body) -> list[int]:
        """The tokens of a prompt or of messages, as vLLM serves them, outside of the protocol's path."""
        response = await self.send("POST", self._tokenize_url, {"model": self.model, **body})
        try:
            tokens = response.json()["tokens"]
        except (ValueError, KeyError, TypeError):
            tokens = None
        if not (isinstance(tokens, list) and all(isinstance(token, int) for token in tokens)):
            raise EngineRefused(f"{self.origin}: {self._tokenize_url} gives no tokens")
        return tokens

    async def send(self, method: str, path: str, body: Body | None) -> Any:
        """One HTTP exchange; the response if it is a 200, or says that there is nothing to GET."""
        try:
            if method == "GET":
                return await self._client.get(path, cast_to=self._response_class, options=self._options)
            return await self._client.post(path, body=body, cast_to=self._response_class, options=self._options)
        except self._openai.APIStatusError as error:
            if method == "GET" and error.status_code in NO_LIST_STATUSES:
                return error.response
            # What the server wrote may repeat the key, so that its error does not go on as a cause.
            raise self._refusal(error, wants_logprobs="logprobs" in (body or {})) from None
        except self._openai.APIConnectionError as error:
            reason, cause = _lost(error)
            said = f"{self.origin}: {type(cause).__name__} {self.excerpt(str(cause))}".rstrip()
            raise TryAgain(reason, said) from error

    def _refusal(self, error: APIStatusError, *, wants_logprobs: bool) -> Exception:
        """What a status other than 200 means: for this try, for this request, or for all."""
        status = error.status_code
        said = f"{self.origin}: {status} {self.excerpt(error.response.text)}".rstrip()
        if status in RETRIED_STATUSES:
            reason = "busy" if status == 429 else "server_error"
            wait_s = retry_after_s(error.response.headers)
            return TryAgain(reason, said, wait_s, overload=status in (429, 503))
        if wants_logprobs and status in REFUSED_FIELD_STATUSES and is_about_logprobs(error.response.text):
            return RequestFailed("no_logprobs", said)
        if status in REQUEST_STATUSES:
            return RequestFailed("too_long" if is_too_long(error.response.text) else REQUEST_STATUSES[status], said)
        cure = "see the server's log"
        if status in (401, 403):
            cure = "set api_key_env beside base_urls to the environment variable that holds its key"
            if self._key_variable:
                cure = f"put a key for it into the environment variable {self._key_variable}"
        elif status in NOT_SERVED_STATUSES:
            cure = f"does it serve {self.model!r}, and does base_url end as it should (often in /v1)?"
        elif 300 <= status < 400:
            cure = "redirects are not followed; put the final address into base_urls"
        return EngineRefused(f"{said}; {cure}")

    def no_answer(self, said: str) -> EngineDown:
        return EngineDown(f"{self.origin}: no answer ({said}); start the server, then run again")

    def excerpt(self, text: str) -> str:
        """The beginning of what a server wrote. The key is hidden before the cut, which else could leave half of it."""
        return excerpt(text.replace(self._key, "[key]") if self._key else text)

    async def close(self) -> None:
        await self._client.close()


def _lost(error: BaseException) -> tuple[str, BaseException]:
    """Whether nothing listens there or a connection broke, and the transport's own error.

    httpx's name for an error of aiohttp does not tell the two apart; the error below it does.
    """
    cause = error.__cause__ or error
    cause = cause.__cause__ or cause
    names = {base.__name__ for base in type(cause).__mro__}
    unreachable = {"ClientConnectorError", "ConnectionTimeoutError", "ConnectError", "ConnectTimeout"}
    return "unreachable" if names & unreachable else "connection_lost", cause


def _origin(url: str) -> str:
    """Scheme, host and port. Raises UsageError for anything but http(s), and for a URL with a password in it."""
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise UsageError(f"base_urls: {error}; write it like http://127.0.0.1:8000/v1") from error
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UsageError(f"base_urls: {excerpt(url)!r} is no http(s) address; write it like http://127.0.0.1:8000/v1")
    if "@" in parts.netloc:
        raise UsageError(f"base_urls: a password in the address of {parts.hostname}; put the key into the environment")
    return f"{parts.scheme}://{parts.netloc}"
