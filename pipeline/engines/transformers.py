"""The engine that runs a model in this process with transformers: CPU, CUDA, MPS.

One thread owns the model. Requests wait in two heaps (texts, labels) by priority, then arrival; they join the running
batch between two steps, several at a time because a prompt pass costs about as much for one as for a few.
"""

from __future__ import annotations

import asyncio
import heapq
import os
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from pipeline.engines.base import Reply, Request, Usage
from pipeline.engines.rendered import Renderer
from pipeline.errors import EngineDown, ResourceError
from pipeline.lm.check import check_decoding
from pipeline.lm.decode import Decoder, LabelQuery, Row
from pipeline.lm.load import ends, load
from pipeline.lm.templates import Chat

_GATHER_S = 0.002  # an idle engine waits this long for the first request's company
_PATIENCE = 8  # steps a request may wait for company before it joins the batch
_GIB = 1 << 30


@dataclass(order=True, slots=True)
class _Ticket:
    """A request on its way: what is computed for it, and who waits."""

    priority: int
    arrival: int
    job: Row | LabelQuery = field(compare=False)
    future: asyncio.Future[None] = field(compare=False)


class TransformersEngine:
    """Implements engines.base.Engine.

    model: a folder or a hub name; name: as written into records, default the folder's or the hub's name.
    context: longest prompt plus reply in tokens, default what the model allows. concurrency: rows decoded together.
    deterministic: each request runs alone from an empty cache; on one machine its reply then depends on nothing else.
    """

    def __init__(
        self,
        model: str,
        *,
        revision: str | None = None,
        dtype: str = "auto",
        device: str = "auto",
        context: int | None = None,
        concurrency: int = 64,
        deterministic: bool = False,
        name: str | None = None,
    ) -> None:
        loaded = load(model, revision=revision, dtype=dtype, device=device)
        self.name = name or (Path(model).resolve().name if Path(model).is_dir() else model)
        check_decoding(loaded.model)
        self.concurrency = concurrency
        self.context = _context(loaded.model, context)
        eos = ends(loaded.model.config.get_text_config(), loaded.model.generation_config)
        self.chat = Chat(loaded.tokenizer, eos=eos)
        self.fingerprint = {
            **loaded.fingerprint,
            "template": self.chat.template_hash,
            "deterministic": str(deterministic).lower(),
        }
        self._renderer = Renderer(self.chat, self.context)
        self._deterministic = deterministic
        self._decoder = _decoder(loaded.model, concurrency=concurrency, alone=deterministic)
        self._inbox: queue.SimpleQueue[_Ticket | None] = queue.SimpleQueue()
        self._texts: list[_Ticket] = []
        self._labels: list[_Ticket] = []
        self._running: dict[int, _Ticket] = {}
        self._arrivals = 0
        self._patience = 0
        self._error: BaseException | None = None
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._work, name="transformers-engine", daemon=True)
        self._thread.start()

    @property
    def running(self) -> int:
        return len(self._decoder.active)

    @property
    def neutralised(self) -> int:
        return self._renderer.neutralised

    async def start(self) -> None:
        """Ready since it was made."""

    async def ask(self, request: Request, priority: int = 0) -> Reply:
        """Answers; raises RequestFailed (`too_long`, `bad_roles`, `empty_prompt`), ResourceError, EngineRefused."""
        job = self._job(request, self._renderer.prompt(request))
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        with self._lock:
            if self._error is not None:
                raise self._error
            self._arrivals += 1
            self._inbox.put(_Ticket(priority, self._arrivals, job, future))
        await future
        if isinstance(job, LabelQuery):
            usage = Usage(len(job.prompt), 0, job.cached_tokens)
            logprobs = dict(zip(request.labels, job.logps, strict=True))
            return Reply("", "labels", logprobs=logprobs, method="logprobs", usage=usage)
        usage = Usage(len(job.prompt), len(job.completion), job.cached_tokens)
        return self._renderer.reply(request, job.completion, job.finish_reason, usage)

    async def close(self) -> None:
        """Ends the thread; requests still waiting get EngineDown."""
        self._inbox.put(None)
        await asyncio.to_thread(self._thread.join)

    def _job(self, request: Request, prompt: list[int]) -> Row | LabelQuery:
        if request.labels:
            query = LabelQuery(prompt, self.chat.labels(request.prompt, request.labels))
            self._renderer.check_length(len(prompt), query.reach)
            return query
        return Row(
            prompt,
            max_tokens=self._renderer.max_tokens(request, prompt),
            temperature=request.temperature,
            top_p=request.top_p,
            seed=request.seed or 0,
            eos=self.chat.eos,
            stopped=_stopper(self.chat, request.stop) if request.stop else None,
        )

    # What follows runs in the engine's thread.

    def _work(self) -> None:
        try:
            while self._collect():
                self._admit()
                if self._decoder.active:
                    self._decoder.step()
                    self._deliver()
            self._fail(EngineDown("the engine was closed"))
        except (torch.OutOfMemoryError, MemoryError) as error:
            self._fail(_out_of_memory(error))
        except BaseException as error:  # noqa: BLE001 -- nobody else sees this thread; all who wait get it
            self._fail(_out_of_memory(error) if "can't allocate memory" in str(error) else error)

    def _collect(self) -> bool:
        """Moves arrivals into the heaps, waiting when there is nothing to do. False when the engine is closed."""
        idle = not (self._decoder.active or self._texts or self._labels)
        if idle:
            first = self._inbox.get()
            if first is None:
                return False
            self._sort(first)
            time.sleep(_GATHER_S)
        while not self._inbox.empty():
            ticket = self._inbox.get()
            if ticket is None:
                return False
            self._sort(ticket)
        return True

    def _sort(self, ticket: _Ticket) -> None:
        heapq.heappush(self._labels if isinstance(ticket.job, LabelQuery) else self._texts, ticket)

    def _admit(self) -> None:
        decoder = self._decoder
        if self._deterministic:
            if not decoder.active:
                heap = min((heap for heap in (self._texts, self._labels) if heap), key=lambda heap: heap[0])
                self._prefill([heapq.heappop(heap)])
            return
        free = decoder.max_rows - len(decoder.active)
        ready = min(free, len(self._texts)) + len(self._labels)
        self._patience = self._patience - 1 if ready else _PATIENCE
        if not ready or (decoder.active and self._patience > 0 and ready < decoder.max_rows // 8):
            return
        self._patience = _PATIENCE
        first = heapq.nsmallest(free, self._texts) if free else []
        room = decoder.room(ticket.job for ticket in first if isinstance(ticket.job, Row)) if first else 0
        tickets = [heapq.heappop(self._texts) for _ in range(room)]
        tickets += [heapq.heappop(self._labels) for _ in range(min(len(self._labels), decoder.max_rows))]
        self._prefill(tickets)

    def _prefill(self, tickets: Sequence[_Ticket]) -> None:
        wanted = [ticket for ticket in tickets if not ticket.future.cancelled()]
        self._running.update((id(ticket.job), ticket) for ticket in wanted)
        self._decoder.prefill([ticket.job for ticket in wanted])
        self._settle([ticket for ticket in wanted if isinstance(ticket.job, LabelQuery)])
        self._deliver()

    def _deliver(self) -> None:
        self._settle([self._running[id(row)] for row in self._decoder.retire()])

    def _settle(self, tickets: Sequence[_Ticket], error: BaseException | None = None) -> None:
        """Wakes those who wait for these tickets, in their own event loop."""
        for ticket in tickets:
            self._running.pop(id(ticket.job), None)
            loop = ticket.future.get_loop()
            if not loop.is_closed():
                loop.call_soon_threadsafe(_wake, ticket.future, error)

    def _fail(self, error: BaseException) -> None:
        with self._lock:
            self._error = error
        while not self._inbox.empty():
            ticket = self._inbox.get()
            if ticket is not None:
                self._sort(ticket)
        self._settle([*self._running.values(), *self._texts, *self._labels], error)


def _wake(future: asyncio.Future[None], error: BaseException | None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(None)
    else:
        future.set_exception(error)


def _stopper(chat: Chat, stops: Sequence[str]) -> Callable[[list[int]], bool]:
    """True when the last tokens hold a stop string; a token has at least one byte."""
    window = max(len(stop.encode()) for stop in stops) + 4
    return lambda completion: any(stop in chat.text(completion[-window:]) for stop in stops)


def _context(model: Any, wanted: int | None) -> int | None:
    """The model's positions, or fewer if fewer are wanted."""
    limits = (getattr(model.config.get_text_config(), "max_position_embeddings", None), wanted)
    return min((limit for limit in limits if limit), default=None)


def _decoder(model: Any, *, concurrency: int, alone: bool) -> Decoder:
    """A decoder whose caches take at most part of the memory that is there."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    per_token = 2 * config.num_hidden_layers * heads * size * model.dtype.itemsize
    if model.device.type == "cuda":
        free = torch.cuda.mem_get_info(model.device)[0]
        cache, prefixes = free // 2, free // 5
    else:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        cache, prefixes = min(total // 8, 4 * _GIB), min(total // 16, 1 * _GIB)
    return Decoder(
        model,
        max_rows=concurrency,
        cache_tokens=cache // per_token,
        prefix_tokens=prefixes // per_token,
        prefill_tokens=4096 if model.device.type == "cpu" else 16384,
        alone=alone,
    )


def _out_of_memory(error: BaseException) -> ResourceError:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return ResourceError(
        f"out of memory ({reason}); lower engine.concurrency or engine.context, or use a smaller dtype"
    )
