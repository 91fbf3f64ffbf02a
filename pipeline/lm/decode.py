"""Decoding with a key-value cache: rows come and go while the batch keeps running.

`prefill` computes the prompts of new rows and of label queries, `step` adds a token to every active row, `retire`
hands out the finished ones. A beginning shared by several jobs is computed once: a job that needs blocks which another
job of the same call computes waits for it, then copies them. Beam search and speculative decoding are left out.
"""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pipeline.lm.cache import BLOCK, Place, PrefixStore, Slab, block_keys
from pipeline.lm.labels import Label, Tree, label_tree, own_shares, read_tree
from pipeline.lm.masks import Masks
from pipeline.lm.sampling import Sampling, sample, sampling

_MASK_CELLS = 1 << 24  # queries x columns of one pass; bounds the mask of a long prompt


@dataclass(slots=True, eq=False)
class Row:
    """A prompt that is being continued.

    prompt: its tokens, at least one. max_tokens: at least 1. temperature 0 is greedy.
    eos: tokens that end it; they stay in the completion. stopped: called with the completion after every token; True
    ends the row. completion, logps: what was drawn, with its log-probability after the temperature.
    finish_reason: stop | length, "" while it runs. cached_tokens: of the prompt, not computed again.
    """

    prompt: list[int]
    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    eos: frozenset[int] = frozenset()
    stopped: Callable[[list[int]], bool] | None = None
    completion: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    finish_reason: str = ""
    cached_tokens: int = 0
    keys: list[bytes] = field(default_factory=list)

    @property
    def reach(self) -> int:
        """Columns it may come to need."""
        return len(self.prompt) + self.max_tokens

    @property
    def filled(self) -> int:
        """Columns that hold its keys; the last drawn token has none yet."""
        return len(self.prompt) + len(self.completion) - 1

    def extend(self, token: int, logp: float) -> None:
        self.completion.append(token)
        self.logps.append(logp)
        if token in self.eos or (self.stopped is not None and self.stopped(self.completion)):
            self.finish_reason = "stop"
        elif len(self.completion) >= self.max_tokens:
            self.finish_reason = "length"


@dataclass(slots=True, eq=False)
class LabelQuery:
    """A prompt and the labels (token sequences) whose log-probability as the reply's beginning is wanted in `logps`."""

    prompt: list[int]
    labels: tuple[Label, ...]
    logps: list[float] = field(default_factory=list)
    cached_tokens: int = 0
    keys: list[bytes] = field(default_factory=list)

    @property
    def tree(self) -> Tree:
        return label_tree(self.labels)

    @property
    def reach(self) -> int:
        return len(self.prompt) + len(self.tree.tokens)


Job = Row | LabelQuery


def _nodes(job: Job) -> tuple[int, ...]:
    return job.tree.tokens if isinstance(job, LabelQuery) else ()


def _to_run(job: Job) -> list[int]:
    return [*job.prompt, *_nodes(job)]


class Decoder:
    """One model with its cache.

    max_rows: rows decoded together. cache_tokens: rows x columns of keys and values; one job alone may exceed it.
    prefix_tokens: room for shared beginnings. prefill_tokens: tokens per prompt pass.
    alone: every job runs by itself from an empty cache, so that its arithmetic does not depend on others; a row must
    have retired before the next job is prefilled.
    """

    def __init__(
        self,
        model: Any,
        *,
        max_rows: int = 64,
        cache_tokens: int = 1 << 17,
        prefix_tokens: int = 1 << 16,
        prefill_tokens: int = 4096,
        alone: bool = False,
    ) -> None:
        self.model = model.eval()
        self.max_rows = 1 if alone else max_rows
        self.cache_tokens = cache_tokens
        self.prefill_tokens = prefill_tokens
        self.alone = alone
        self.active: list[Row] = []
        self.prefixes = PrefixStore(num_tokens=0 if alone else prefix_tokens)
        self._config = model.config.get_text_config()
        self._masks = Masks(self._config, dtype=model.dtype)
        self._options = {"logits_to_keep"} & set(inspect.signature(model.forward).parameters)
        self._slab = Slab(num_layers=self._config.num_hidden_layers)
        self._sampling: Sampling | None = None

    def room(self, rows: Iterable[Row]) -> int:
        """How many of these rows, from the first, can join now. At least one if none is active."""
        taken, widest = len(self.active), max((row.reach for row in self.active), default=0)
        for row in rows:
            widest = max(widest, row.reach)
            if taken and (taken >= self.max_rows or (taken + 1) * widest > self.cache_tokens):
                break
            taken += 1
        return taken - len(self.active)

    @torch.inference_mode()
    def prefill(self, jobs: Sequence[Job]) -> None:
        """Computes the prompts: rows become active with their first token drawn, label queries get their `logps`."""
        for job in jobs:
            job.keys = block_keys(job.prompt) if self.prefixes.num_blocks else []
        while jobs:
            wave, jobs = self._wave(jobs)
            while wave:
                size = self._batch_size(wave)
                self._prefill(sorted(wave[:size], key=lambda job: isinstance(job, LabelQuery)))
                wave = wave[size:]

    def _wave(self, jobs: Sequence[Job]) -> tuple[list[Job], list[Job]]:
        """Jobs to compute now, shortest first, and those that wait for a beginning which one of these computes."""
        now: list[tuple[int, Job]] = []
        later: list[Job] = []
        coming: set[bytes] = set()
        for job in jobs:
            held = self._held(job)
            if held < (len(job.prompt) - 1) // BLOCK and job.keys and job.keys[held] in coming:
                later.append(job)
            else:
                coming.update(job.keys[held:])
                now.append((len(_to_run(job)) - held * BLOCK, job))
        now.sort(key=lambda item: item[0])
        return [job for _, job in now], later

    def _held(self, job: Job) -> int:
        """Blocks of a job's prompt in the store; never the last token's, whose logits are wanted."""
        return self.prefixes.match(job.keys[: (len(job.prompt) - 1) // BLOCK])

    def _batch_size(self, wave: Sequence[Job]) -> int:
        """How many jobs, from the first, go into one pass: bounded tokens and memory, little padding."""
        widest = max((row.reach for row in self.active), default=0)
        shortest = 0
        for size, job in enumerate(wave):
            widest = max(widest, job.reach)
            fresh = len(_to_run(job)) - self._held(job) * BLOCK
            shortest = shortest or fresh
            too_many = (size + 1) * fresh > self.prefill_tokens or (size + 1) * fresh * widest > _MASK_CELLS
            too_wide = fresh > 2 * shortest + 32 or (len(self.active) + size + 1) * widest > self.cache_tokens
            if size and (self.alone or too_many or too_wide):
                return size
        return len(wave)

    def _prefill(self, batch: list[Job]) -> None:
        """One pass over the prompts of a batch, rows before label queries, in the slab rows after the active ones."""
        first = len(self.active)
        held = [self._held(job) for job in batch]
        self._reserve(first + len(batch), max(job.reach for job in (*batch, *self.active)) + 1)
        rows = range(first, first + len(batch))
        loads = [
            Place(job.keys[n], row, n) for job, row, count in zip(batch, rows, held, strict=True) for n in range(count)
        ]
        self.prefixes.load(self._slab, loads)
        for job, count in zip(batch, held, strict=True):
            job.cached_tokens = count * BLOCK
        logits = self._read(batch, first)
        saves = [
            Place(job.keys[n], row, n)
            for job, row, count in zip(batch, rows, held, strict=True)
            for n in range(count, len(job.keys))
        ]
        self.prefixes.save(self._slab, saves)
        self._answer(batch, logits)

    def _answer(self, batch: list[Job], logits: Tensor) -> None:
        new = [job for job in batch if isinstance(job, Row)]
        if new:
            tokens, logps = sample(logits[: len(new), -1], self._parameters(new), [0] * len(new))
            self._extend(new, tokens, logps)
            self.active.extend(new)
            self._sampling = None
        for job, row in zip(batch[len(new) :], logits[len(new) :], strict=True):
            assert isinstance(job, LabelQuery)
            keep = 1 + len(job.tree.tokens)
            job.logps = own_shares(job.labels, read_tree(job.tree, row[-keep:]))

    def _read(self, batch: list[Job], first: int) -> Tensor:
        """Runs what is not cached, right-aligned. Returns the logits (B, K, V) of the ends; K fits the widest tree."""
        fresh = [_to_run(job)[job.cached_tokens :] for job in batch]
        width = max(len(part) for part in fresh)
        reach = max(len(_to_run(job)) for job in batch)
        trash = self._slab.num_columns - 1
        tokens = torch.tensor([[0] * (width - len(part)) + part for part in fresh])
        columns = torch.tensor(
            [
                [trash] * (width - len(part)) + list(range(job.cached_tokens, job.cached_tokens + len(part)))
                for job, part in zip(batch, fresh, strict=True)
            ]
        )
        positions = torch.where(columns == trash, 0, columns)
        if len(batch) == 1:  # one long prompt: all but its end only fills the cache
            piece = max(256, min(self.prefill_tokens, _MASK_CELLS // reach))
            while tokens.shape[1] > piece + len(_nodes(batch[0])):
                seen = torch.arange(reach) <= columns[:, :piece, None]
                self._forward(first, tokens[:, :piece], columns[:, :piece], positions[:, :piece], seen, keep=1)
                tokens, columns, positions = tokens[:, piece:], columns[:, piece:], positions[:, piece:]
        allowed = torch.arange(reach) <= columns[..., None]
        for n, job in enumerate(batch):
            if isinstance(job, LabelQuery) and job.tree.tokens:
                size, start = len(job.tree.tokens), len(job.prompt)
                positions[n, -size:] = torch.tensor(job.tree.depths) + (start - 1)
                allowed[n, -size:, start : start + size] = job.tree.ancestors
        keep = 1 + max(len(_nodes(job)) for job in batch)
        return self._forward(first, tokens, columns, positions, allowed, keep=min(keep, tokens.shape[1]))

    @torch.inference_mode()
    def step(self) -> None:
        """One more token for every active row."""
        rows = self.active
        columns = torch.tensor([[row.filled] for row in rows])
        tokens = torch.tensor([[row.completion[-1]] for row in rows])
        allowed = torch.arange(max(row.filled for row in rows) + 1) <= columns[..., None]
        logits = self._forward(0, tokens, columns, columns, allowed, keep=1)
        if self._sampling is None:
            self._sampling = self._parameters(rows)
        drawn, logps = sample(logits[:, -1], self._sampling, [len(row.completion) for row in rows])
        self._extend(rows, drawn, logps)

    @torch.inference_mode()
    def retire(self) -> list[Row]:
        """Takes the finished rows out of the batch; what they computed stays in the prefix store."""
        done = [n for n, row in enumerate(self.active) if row.finish_reason]
        if not done:
            return []
        finished = [self.active[n] for n in done]
        if self.prefixes.num_blocks:
            self.prefixes.save(self._slab, [place for n in done for place in self._completed(n)])
        for hole in reversed(done):
            last = self.active.pop()
            if hole < len(self.active):
                self._slab.move(len(self.active), hole, width=last.filled)
                self.active[hole] = last
        self._sampling = None
        return finished

    def _completed(self, n: int) -> list[Place]:
        row = self.active[n]
        keys = block_keys((row.prompt + row.completion)[: row.filled])
        return [Place(keys[block], n, block) for block in range(len(row.keys), len(keys))]

    def _extend(self, rows: list[Row], tokens: Tensor, logps: Tensor) -> None:
        for row, token, logp in zip(rows, tokens.tolist(), logps.tolist(), strict=True):
            row.extend(token, logp)

    def _parameters(self, rows: list[Row]) -> Sampling:
        return sampling(
            [row.temperature for row in rows],
            [row.top_p for row in rows],
            [row.seed for row in rows],
            device=self.model.device,
        )

    def _reserve(self, rows: int, columns: int) -> None:
        """Makes the slab large enough, keeping the active rows."""
        columns = -(-columns // 64) * 64
        slab = self._slab
        if self.alone:
            self._slab = Slab(num_layers=len(slab.store))
            self._slab.resize(rows, columns, keep_rows=0, keep_columns=0)
        elif rows > slab.num_rows or columns > slab.num_columns:
            shape = max(rows, slab.num_rows), max(columns, slab.num_columns)
            if shape[0] * shape[1] > self.cache_tokens:
                shape = rows, columns
            kept = min(slab.num_columns, shape[1])
            slab.resize(*shape, keep_rows=len(self.active), keep_columns=kept)

    def _forward(
        self, first: int, tokens: Tensor, columns: Tensor, positions: Tensor, allowed: Tensor, *, keep: int
    ) -> Tensor:
        """tokens, columns, positions: (B, T). allowed: (B, T, L). Returns the last logits (B, keep, V)."""
        tokens, columns, positions, allowed = (
            part.to(self.model.device) for part in (tokens, columns, positions, allowed)
        )
        self._slab.aim(first, columns, width=allowed.shape[-1])
        output = self.model(
            input_ids=tokens,
            attention_mask=self._masks(allowed, positions),
            position_ids=positions,
            past_key_values=self._slab,
            use_cache=True,
            **dict.fromkeys(self._options, keep),
        )
        return output.logits[:, -keep:]


def decode(decoder: Decoder, rows: Iterable[Row]) -> Iterator[Row]:
    """Runs rows to their end, refilling free places in order; yields each row when it has finished."""
    waiting = deque(rows)
    while waiting or decoder.active:
        room = decoder.room(waiting)
        if room:
            decoder.prefill([waiting.popleft() for _ in range(room)])
            yield from decoder.retire()
        if decoder.active:
            decoder.step()
            yield from decoder.retire()
