"""Every model reply, kept by the content of its request.

Truth is JSONL segments, one per prompt shard, with a CRC-32 in every line. A reply is written to its segment before the
record that asked sees it, and fsynced with its group: at most 256 replies or half a second. On reading, a last line
without its newline is a torn write and is cut off; any other line that does not match its CRC is corruption.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.engines.base import Engine, Reply, Request, Usage
from pipeline.errors import CaiError, CorruptError, RequestFailed, StoppedError
from pipeline.records import canonical, digest
from pipeline.store import io_errors, make_folder, sync_folder, write_all

OnReply = Callable[[Request, Reply, bool], None]
GROUP_REPLIES = 256
GROUP_S = 0.5


def request_key(engine_identity: str, request: Request) -> str:
    """sha256 of everything that may change the reply. engine_identity: digest of the engine's fingerprint."""
    asked: dict[str, Any] = {
        "model": engine_identity,
        "kind": request.kind,
        "prompt": request.prompt,
        "attempt": request.attempt,
    }
    if request.labels:
        asked["labels"] = request.labels
    else:
        asked["max_tokens"] = request.max_tokens
        asked["temperature"] = request.temperature
        asked["stop"] = request.stop
        if request.temperature > 0:
            asked["top_p"] = request.top_p
            asked["seed"] = request.seed
    return hashlib.sha256(canonical(asked)).hexdigest()


class Segment:
    """The replies of one prompt shard: read at opening, appended to while its records are in flight."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.replies: dict[str, Reply | bytes] = {}
        self.pending: dict[str, asyncio.Future[Reply]] = {}
        self.fd = -1
        self.size = self._read() if path.exists() else 0
        self.dirty = False

    def _read(self) -> int:
        """Loads the replies and returns the length of what is whole."""
        with io_errors(self.path):
            data = self.path.read_bytes()
        whole = data.rfind(b"\n") + 1
        for number, line in enumerate(data[:whole].split(b"\n")[:-1], start=1):
            # {"crc":"01234567","key":"<64 hex digits>","reply":{...}}: the CRC covers all that follows its comma.
            if line[:18] != b'{"crc":"%08x",' % zlib.crc32(line[18:]):
                raise CorruptError(
                    f"{self.path}:{number}: this line was changed after it was written; "
                    "delete the line and run again, its reply is then asked anew"
                )
            self.replies.setdefault(line[25:89].decode(), line[99:-1])
        return whole

    def get(self, key: str) -> Reply | None:
        stored = self.replies.get(key)
        if isinstance(stored, bytes):
            stored = self.replies[key] = _decode(stored)
        return stored

    def append(self, lines: list[bytes]) -> None:
        """Writes whole lines; on an error the file is cut back to its last whole line."""
        with io_errors(self.path):
            if self.fd < 0:
                is_new = not self.path.exists()
                self.fd = os.open(self.path, os.O_WRONLY | os.O_CREAT, 0o644)
                os.ftruncate(self.fd, self.size)
                os.lseek(self.fd, self.size, os.SEEK_SET)
                if is_new:
                    sync_folder(self.path.parent)
            data = b"".join(lines)
            try:
                write_all(self.fd, data)
            except OSError:
                os.ftruncate(self.fd, self.size)
                os.lseek(self.fd, self.size, os.SEEK_SET)
                raise
            self.size += len(data)
            self.dirty = True

    def sync(self) -> None:
        if self.dirty:
            self.dirty = False
            with io_errors(self.path):
                os.fsync(self.fd)

    def close(self) -> None:
        self.sync()
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def _decode(data: bytes) -> Reply:
    content = json.loads(data)
    return Reply(
        text=content["text"],
        finish_reason=content["finish_reason"],
        token_ids=tuple(content.get("token_ids", ())),
        logprobs=content.get("logprobs"),
        method=content.get("method", ""),
        reasoning=content.get("reasoning", ""),
        usage=Usage(*content.get("usage", ())),
    )


_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode


def _journal_line(key: str, reply: Reply) -> bytes:
    content = {name: value for name, value in reply._asdict().items() if value not in ("", (), None)}
    content["text"] = reply.text
    try:
        body = b'"key":"%s","reply":%s}' % (key.encode(), _encode(content).encode())
    except UnicodeEncodeError as error:
        raise RequestFailed("bad_reply", f"the reply holds a lone surrogate: {reply.text[:80]!r}") from error
    except ValueError as error:
        raise RequestFailed("bad_reply", f"the reply's log-probabilities are not finite: {reply.logprobs}") from error
    return b'{"crc":"%08x",%s\n' % (zlib.crc32(body), body)


class Journal:
    """Asks engines through the segments of a folder. Use from one event loop; `start` before, `close` after.

    asked, replayed: how many replies came from an engine and how many from the segments.
    on_reply: sees every reply once with its request; is_new: it was asked for just now.
    in_flight: requests that each engine has not answered yet. usage: the tokens of each one's answers.
    """

    def __init__(self, folder: Path, *, on_reply: OnReply | None = None) -> None:
        self.folder = folder
        self.asked = 0
        self.replayed = 0
        self.in_flight: Counter[Engine] = Counter()
        self.usage: dict[Engine, Counter[str]] = {}
        self.stopping = False
        self._on_reply = on_reply
        self._identities: dict[int, str] = {}
        self._queue: list[tuple[Segment, str, Request, Reply, bytes, asyncio.Future[Reply]]] = []
        self._wake = asyncio.Event()
        self._syncing = asyncio.Lock()
        self._closing = False
        self._unsynced: list[Segment] = []
        self._num_unsynced = 0
        self._writer: asyncio.Task[None] | None = None
        self._broken: CaiError | None = None

    @property
    def tokens(self) -> Counter[str]:
        """`usage` of all engines together."""
        total: Counter[str] = Counter()
        for found in self.usage.values():
            total.update(found)
        return total

    def load(self) -> tuple[int, int]:
        """Requests (running, waiting): those that engines work on, and those that wait for them."""
        running = sum(min(number, engine.running) for engine, number in self.in_flight.items())
        return running, self.in_flight.total() - running

    async def start(self) -> None:
        make_folder(self.folder)
        self._writer = asyncio.create_task(self._write_groups())

    def open(self, number: int) -> Segment:
        """The segment of prompt shard `number`. Close it with `release` when its shard is published."""
        return Segment(self.folder / f"segment-{number:05d}.jsonl")

    async def release(self, segment: Segment) -> None:
        """Makes the segment durable and forgets it."""
        async with self._syncing:
            await asyncio.to_thread(segment.close)

    async def ask(self, engine: Engine, request: Request, segment: Segment, priority: int) -> Reply:
        """The stored reply if there is one, else the engine's, stored first.

        Raises what the engine raises, and StoppedError for a request that was not sent when `stopping` was set.
        """
        identity = self._identities.get(id(engine))
        if identity is None:
            identity = self._identities[id(engine)] = digest(engine.fingerprint)
        key = request_key(identity, request)
        reply = segment.get(key)
        if reply is not None:
            self.replayed += 1
            if self._on_reply:
                self._on_reply(request, reply, False)
            return reply
        twin = segment.pending.get(key)
        if twin is not None:
            return await asyncio.shield(twin)
        return await self._ask_engine(engine, request, segment, priority, key)

    async def _ask_engine(self, engine: Engine, request: Request, segment: Segment, priority: int, key: str) -> Reply:
        if self.stopping:
            raise StoppedError("stopped before this request was sent")
        future: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        segment.pending[key] = future
        self.in_flight[engine] += 1
        try:
            reply = await engine.ask(request, priority)
            self.usage.setdefault(engine, Counter()).update(reply.usage._asdict())
            self._enqueue(segment, key, request, reply, future)
            return await future
        except BaseException as error:
            if not future.done():
                # Whoever waits for the same reply gets the same answer; nobody may be waiting.
                if isinstance(error, Exception):
                    future.set_exception(error)
                    future.exception()
                else:
                    future.cancel()
            raise
        finally:
            self.in_flight[engine] -= 1
            segment.pending.pop(key, None)

    def _enqueue(
        self, segment: Segment, key: str, request: Request, reply: Reply, future: asyncio.Future[Reply]
    ) -> None:
        if self._broken is not None:
            raise self._broken
        self._queue.append((segment, key, request, reply, _journal_line(key, reply), future))
        self._wake.set()

    async def _write_groups(self) -> None:
        """The one writer: appends what has come, wakes those who asked, fsyncs a group when it is full or old."""
        loop = asyncio.get_running_loop()
        timer: asyncio.TimerHandle | None = None
        try:
            while self._queue or not self._closing:
                await self._wake.wait()
                self._wake.clear()
                self._write_queue(GROUP_REPLIES - self._num_unsynced)
                if self._num_unsynced >= GROUP_REPLIES or (timer and loop.time() >= timer.when()):
                    await self._sync()
                    if timer:
                        timer.cancel()
                    timer = None
                elif self._num_unsynced and timer is None:
                    timer = loop.call_later(GROUP_S, self._wake.set)
                if self._queue:
                    self._wake.set()
            await self._sync()
        except CaiError as error:
            self._break(error)
        except BaseException as error:
            self._break(CaiError(f"{self.folder}: the journal's writer ended: {error!r}"))
            raise

    def _break(self, error: CaiError) -> None:
        """Nothing can be kept any more: whoever waits for a reply, or asks for one, gets the error."""
        self._broken = error
        for *_, future in self._queue:
            if not future.done():
                future.set_exception(error)
        self._queue.clear()

    def _write_queue(self, limit: int) -> None:
        batch, self._queue = self._queue[:limit], self._queue[limit:]
        lines: dict[int, tuple[Segment, list[bytes]]] = {}
        for segment, _, _, _, line, _ in batch:
            lines.setdefault(id(segment), (segment, []))[1].append(line)
        try:
            for segment, group in lines.values():
                if not segment.dirty:
                    self._unsynced.append(segment)
                segment.append(group)
            for segment, key, request, reply, _, future in batch:
                segment.replies[key] = reply
                self.asked += 1
                if self._on_reply:
                    self._on_reply(request, reply, True)
                if not future.done():
                    future.set_result(reply)
        except BaseException:
            self._queue = batch + self._queue
            raise
        self._num_unsynced += len(batch)

    async def _sync(self) -> None:
        async with self._syncing:
            segments, self._unsynced, self._num_unsynced = self._unsynced, [], 0
            await asyncio.to_thread(_sync_all, segments)

    async def close(self) -> None:
        """Writes and fsyncs what has come; raises what kept it from doing so. Segments still open are the caller's."""
        if self._writer is not None:
            self._closing = True
            self._wake.set()
            writer, self._writer = self._writer, None
            await writer
        if self._broken is not None:
            raise self._broken


def _sync_all(segments: list[Segment]) -> None:
    for segment in segments:
        segment.sync()
