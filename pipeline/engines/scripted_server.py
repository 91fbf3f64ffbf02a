"""The scripted engine as a real HTTP server on 127.0.0.1: speaks the OpenAI protocol, misbehaves, keeps a ledger.

One asyncio protocol per connection and no framework: thousands of requests a second from one process. Left out: TLS,
chunked request bodies, streaming, keys (none is checked; a 401 is a fault in the script).
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import struct
import time
from collections import Counter, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from pipeline.engines.scripted_answers import Answer, Fault, Script, alter, answer, content_key
from pipeline.engines.scripted_replies import encode, error_body, reply_body, response, retry_headers, tokenize
from pipeline.engines.wire import Body
from pipeline.errors import UsageError

MAX_HEAD = 64 * 1024


class Ledger:
    """Append-only JSON lines, each written at once; an existing file is continued, its numbers and counts go on."""

    def __init__(self, path: Path | None) -> None:
        self.asked: Counter[str] = Counter()
        self.in_flight = 0
        self._number = 0
        self._file: int | None = None
        if path is not None:
            self._continue(path)
            self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

    def _continue(self, path: Path) -> None:
        if not path.exists():
            return
        with path.open("r+b") as old:
            whole = 0
            for raw in old:
                if raw.endswith(b"\n"):
                    whole += len(raw)
                    line = json.loads(raw)
                    if line["event"] == "received":
                        self._number = line["n"]
                        self.asked[line["key"]] += 1
            old.truncate(whole)

    def received(self, key: str, path: str, body: Body, *, authorized: bool) -> tuple[int, int]:
        """Notes a request; returns its number and how often this content was asked before.

        authorized: whether an Authorization header came with it.
        """
        self._number += 1
        self.in_flight += 1
        before = self.asked[key]
        self.asked[key] += 1
        self._write(
            {
                "event": "received", "n": self._number, "t": time.time(), "key": key, "try": before + 1,
                "in_flight": self.in_flight, "authorized": authorized, "path": path, "body": body,
            }
        )  # fmt: skip
        return self._number, before

    def answered(self, number: int, key: str, status: int, fault: str) -> None:
        """Notes what is sent next; status 0 where nothing whole is."""
        self.in_flight -= 1
        line = {"event": "answered", "n": number, "t": time.time(), "key": key, "status": status, "fault": fault}
        self._write(line)

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _write(self, line: dict[str, Any]) -> None:
        if self._file is not None:
            os.write(self._file, json.dumps(line, separators=(",", ":")).encode() + b"\n")


class Connection(asyncio.Protocol):
    """One client connection: requests are read one after another and answered in that order."""

    def __init__(self, script: Script, ledger: Ledger, open_connections: set[Connection]) -> None:
        self.script = script
        self.ledger = ledger
        self.open_connections = open_connections
        self.buffer = b""
        self.backlog: deque[tuple[str, str, bytes, bool]] = deque()
        self.current: tuple[int, str] | None = None
        self.timer: asyncio.TimerHandle | None = None
        self.transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self.open_connections.add(self)

    def connection_lost(self, error: Exception | None) -> None:
        self.open_connections.discard(self)
        if self.timer:
            self.timer.cancel()
        self._answered(0, "client gone")

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        while (end := self.buffer.find(b"\r\n\r\n")) >= 0:
            method, path, headers = _read_head(self.buffer[:end])
            length = headers.get("content-length", "0")
            if not length.isdigit() or "transfer-encoding" in headers:
                self._send_error(411, "a Content-Length is needed")
                self.transport.close()
                return
            if len(self.buffer) < end + 4 + int(length):
                if headers.pop("expect", "").lower() == "100-continue" and len(self.buffer) == end + 4:
                    self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
                return
            raw = self.buffer[end + 4 : end + 4 + int(length)]
            self.backlog.append((method, path, raw, "authorization" in headers))
            self.buffer = self.buffer[end + 4 + int(length) :]
            self._next()
        if len(self.buffer) > MAX_HEAD:
            self._send_error(431, "the head is too long")
            self.transport.close()

    def _next(self) -> None:
        """Begins the oldest waiting request, if none is being answered."""
        if self.current is None and self.backlog:
            method, path, raw, authorized = self.backlog.popleft()
            if method == "POST" and path in ("/v1/chat/completions", "/v1/completions"):
                self._complete(path, raw, authorized=authorized)
            elif (method, path) == ("POST", "/tokenize") and self.script.token_ids != "none":
                self._send(200, {"tokens": tokenize(self.script, json.loads(raw))})
                self._next()
            else:
                self._look_up(method, path)
                self._next()

    def _look_up(self, method: str, path: str) -> None:
        if (method, path) == ("GET", "/health"):
            self._send(200, {"status": "ok"})
        elif (method, path) == ("GET", "/v1/models"):
            models = self.script.models or ("scripted",)
            extra = {} if self.script.context is None else {"max_model_len": self.script.context}
            entry = {"object": "model", "created": 0, "owned_by": self.script.owned_by, **extra}
            served = [{"id": name, **entry} for name in models]
            self._send(200, {"object": "list", "data": served})
        else:
            self._send_error(404, f"no {method} {path} here")

    def _complete(self, path: str, raw: bytes, *, authorized: bool) -> None:
        try:
            body = _read_body(raw, chat=path.endswith("chat/completions"))
            key = content_key(body)
        except ValueError as error:
            self._send_error(400, str(error))
            self._next()
            return
        number, before = self.ledger.received(key, path, body, authorized=authorized)
        self.current = (number, key)
        if self.script.models and body["model"] not in self.script.models:
            self._finish(404, error_body(f"The model `{body['model']}` does not exist", "model_not_found"))
            return
        if "logprob_token_ids" in body and self.script.token_ids in ("none", "refused"):
            self._finish(400, error_body("logprob_token_ids: extra fields are not permitted", "unknown_field"))
            return
        said = answer(self.script, body, key, before)
        if said.latency_s:
            self.timer = asyncio.get_running_loop().call_later(said.latency_s, self._reply, path, body, said)
        else:
            self._reply(path, body, said)

    def _reply(self, path: str, body: Body, said: Answer) -> None:
        num_tokens = said.usage.prompt_tokens + (body.get("max_tokens") or 0)
        if self.script.context is not None and num_tokens > self.script.context:
            text = f"maximum context length is {self.script.context} tokens, {num_tokens} were asked for"
            self._finish(400, error_body(text, "context_length_exceeded"))
        elif said.fault:
            self._misbehave(path, body, said, said.fault)
        else:
            self._finish(200, reply_body(self.script, path, body, said))

    def _misbehave(self, path: str, body: Body, said: Answer, fault: Fault) -> None:
        reply = reply_body(self.script, path, body, alter(said, fault))
        if fault.kind == "hang":
            return
        if fault.kind == "reset":
            self._reset()
        elif fault.kind == "status":
            self._finish(fault.status, error_body(fault.message, fault.code), retry_headers(fault), fault=fault.kind)
        elif fault.kind == "html":
            page = b"<!DOCTYPE html><html><body><h1>Gateway</h1></body></html>"
            self._finish(200, page, "Content-Type: text/html\r\n", fault=fault.kind)
        elif fault.kind == "cut_json":
            self._finish(200, encode(reply)[: len(encode(reply)) // 2], fault=fault.kind)
        elif fault.kind == "cut_body":
            whole = response(200, encode(reply), "")
            self._answered(0, fault.kind)
            self.transport.write(whole[: len(whole) - len(whole) // 4])
            self.transport.close()
        elif fault.kind == "drip":
            self._drip(response(200, encode(reply), ""), 0, fault.every_s)
        else:
            if fault.kind == "choices":
                reply["choices"] = reply["choices"] * fault.choices
            if fault.kind == "no_logprobs":
                reply["choices"][0]["logprobs"] = None
            self._finish(200, reply, fault=fault.kind)

    def _reset(self) -> None:
        connection: socket.socket = self.transport.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._answered(0, "reset")
        self.transport.abort()

    def _drip(self, whole: bytes, sent: int, every_s: float) -> None:
        if sent == len(whole):
            self._answered(200, "drip")
            self._next()
            return
        self.transport.write(whole[sent : sent + 1])
        self.timer = asyncio.get_running_loop().call_later(every_s, self._drip, whole, sent + 1, every_s)

    def _finish(self, status: int, reply: dict[str, Any] | bytes, headers: str = "", *, fault: str = "") -> None:
        self._answered(status, fault)
        self._send(status, reply, headers)
        self._next()

    def _send(self, status: int, reply: dict[str, Any] | bytes, headers: str = "") -> None:
        self.transport.write(response(status, reply if isinstance(reply, bytes) else encode(reply), headers))

    def _send_error(self, status: int, message: str) -> None:
        self._send(status, error_body(message, ""))

    def _answered(self, status: int, fault: str) -> None:
        if self.current is not None:
            self.ledger.answered(*self.current, status, fault)
            self.current = None


def _read_head(head: bytes) -> tuple[str, str, dict[str, str]]:
    first, *lines = head.decode("latin-1").split("\r\n")
    method, _, rest = first.partition(" ")
    pairs = (line.partition(":") for line in lines)
    return method, rest.partition(" ")[0].partition("?")[0], {k.strip().lower(): v.strip() for k, _, v in pairs}


def _read_body(raw: bytes, *, chat: bool) -> Body:
    """Raises ValueError for what the protocol does not allow."""
    body = json.loads(raw)
    if not isinstance(body, dict) or not isinstance(body.get("model"), str):
        raise ValueError("the body is not an object with a `model`")
    messages = body.get("messages")
    if chat and not (isinstance(messages, list) and messages and all("role" in message for message in messages)):
        raise ValueError("`messages` is not a list of messages")
    if not chat and not isinstance(body.get("prompt"), str):
        raise ValueError("`prompt` is not a string")
    if body.get("stream") or body.get("n") not in (None, 1):
        raise ValueError("neither streaming nor n > 1 is served")
    return body


@asynccontextmanager
async def running(script: Script, *, port: int = 0, ledger: Path | None = None) -> AsyncIterator[str]:
    """The server inside this event loop; yields its base URL. Raises UsageError when the port is taken."""
    notes = Ledger(ledger)
    connections: set[Connection] = set()
    loop = asyncio.get_running_loop()
    try:
        server = await loop.create_server(
            lambda: Connection(script, notes, connections), "127.0.0.1", port, backlog=1024
        )
    except OSError as error:
        raise UsageError(f"127.0.0.1:{port}: {error.strerror}; choose another --port, or 0 for a free one") from error
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
    finally:
        server.close()
        for connection in tuple(connections):
            connection.transport.abort()
        notes.close()


async def serve(script: Script, *, port: int = 0, ledger: Path | None = None) -> None:
    """Serves until SIGTERM or SIGINT; prints one line with the address when ready."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    async with running(script, port=port, ledger=ledger) as url:
        print(f"ready {url}", flush=True)
        await stop.wait()
