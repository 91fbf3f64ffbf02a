"""Where keys and values live while rows are decoded, and where those of shared beginnings wait to be used again.

A slab row is one sequence; a column is a position, so a row's keys never move while it grows and nothing is
concatenated. Columns that are not filled yet hold finite leftovers and are masked.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import Cache

BLOCK = 16
"""Tokens per block of the prefix store; shared beginnings are found at this granularity."""


class Slab(Cache):
    """Pre-allocated keys and values, per layer (rows, heads, columns, head dim); the model writes into them in place.

    The layers' full length is kept even for sliding windows: the window is in the mask.
    """

    def __init__(self, *, num_layers: int) -> None:
        super().__init__(layers=[])
        self.store: list[tuple[Tensor, Tensor] | None] = [None] * num_layers
        self.num_rows = 0
        self.num_columns = 0

    def aim(self, first: int, columns: Tensor, *, width: int) -> None:
        """The next forward pass works on rows first, first + 1, …; columns: (B, T) where each new token goes.

        width: how many columns the queries may look at.
        """
        self._first, self._columns, self._width = first, columns, width
        self._rows = torch.arange(first, first + len(columns), device=columns.device)[:, None]

    def update(self, key: Tensor, value: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Called by the model: key, value (B, heads, T, dim) are kept; returns all keys and values up to the width."""
        held = self.store[layer]
        if held is None:
            held = (self._zeros(key), self._zeros(value))
            self.store[layer] = held
        here = slice(self._first, self._first + len(key))
        for whole, new in zip(held, (key, value), strict=True):
            whole.transpose(1, 2)[self._rows, self._columns] = new.transpose(1, 2)
        return held[0][here, :, : self._width], held[1][here, :, : self._width]

    def _zeros(self, like: Tensor) -> Tensor:
        shape = (self.num_rows, like.shape[1], self.num_columns, like.shape[3])
        return torch.zeros(shape, dtype=like.dtype, device=like.device)

    def resize(self, num_rows: int, num_columns: int, *, keep_rows: int, keep_columns: int) -> None:
        """A slab of another shape; num_columns is a multiple of BLOCK. The first keep_rows x keep_columns stay."""
        self.num_rows, self.num_columns = num_rows, num_columns
        for layer, held in enumerate(self.store):
            if held is None:
                continue
            self.store[layer] = None
            grown = self._zeros(held[0]), self._zeros(held[1])
            for new, old in zip(grown, held, strict=True):
                new[:keep_rows, :, :keep_columns] = old[:keep_rows, :, :keep_columns]
            self.store[layer] = grown

    def move(self, source: int, target: int, *, width: int) -> None:
        """Row `target` becomes a copy of row `source`, up to `width` columns."""
        for held in self.held():
            for whole in held:
                whole[target, :, :width] = whole[source, :, :width]

    def held(self) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of the layers that have been used."""
        return [pair for pair in self.store if pair is not None]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0


class Place(NamedTuple):
    """One block of a sequence: its key in the prefix store, its slab row, its number in the sequence."""

    key: bytes
    row: int
    block: int


def block_keys(tokens: Sequence[int]) -> list[bytes]:
    """A key per full block of tokens; it stands for the block and all that comes before it."""
    keys, key = [], b""
    for start in range(0, len(tokens) - BLOCK + 1, BLOCK):
        key = hashlib.blake2b(key + array("q", tokens[start : start + BLOCK]).tobytes(), digest_size=16).digest()
        keys.append(key)
    return keys


class PrefixStore:
    """Keys and values of beginnings that were computed once, in blocks; the least recently used one makes room.

    num_tokens: how many it holds; 0 keeps nothing.
    """

    def __init__(self, *, num_tokens: int) -> None:
        self.num_blocks = num_tokens // BLOCK
        self._pools: list[tuple[Tensor, Tensor]] = []
        self._slots: OrderedDict[bytes, int] = OrderedDict()

    def match(self, keys: Sequence[bytes]) -> int:
        """How many blocks from the beginning are held."""
        return next((n for n, key in enumerate(keys) if key not in self._slots), len(keys))

    def load(self, slab: Slab, places: Sequence[Place]) -> None:
        """Copies held blocks to their places in the slab."""
        if not places:
            return
        for place in reversed(places):  # the end of a sequence makes room before its beginning
            self._slots.move_to_end(place.key)
        self._copy(slab, places, [self._slots[place.key] for place in places], save=False)

    def save(self, slab: Slab, places: Sequence[Place]) -> None:
        """Keeps blocks of the slab that are not held yet."""
        fresh = list({place.key: place for place in places if place.key not in self._slots}.values())
        fresh = fresh[: self.num_blocks]
        if not fresh:
            return
        if not self._pools:
            self._pools = [(self._pool(keys), self._pool(values)) for keys, values in slab.held()]
        slots = []
        for place in fresh:
            full = len(self._slots) == self.num_blocks
            slot = self._slots.popitem(last=False)[1] if full else len(self._slots)
            self._slots[place.key] = slot
            slots.append(slot)
        self._copy(slab, fresh, slots, save=True)

    def clear(self) -> None:
        """Forgets everything; to be called when the model's weights change."""
        self._slots.clear()

    def _pool(self, like: Tensor) -> Tensor:
        shape = (self.num_blocks, like.shape[1], BLOCK, like.shape[3])
        return torch.empty(shape, dtype=like.dtype, device=like.device)  # memory is taken as blocks are written

    def _copy(self, slab: Slab, places: Sequence[Place], slots: Sequence[int], *, save: bool) -> None:
        device = self._pools[0][0].device
        slot = torch.tensor(slots, device=device)
        row = torch.tensor([place.row for place in places], device=device)
        block = torch.tensor([place.block for place in places], device=device)
        for pools, held in zip(self._pools, slab.held(), strict=True):
            for pool, whole in zip(pools, held, strict=True):
                blocks = whole.unflatten(2, (-1, BLOCK)).transpose(1, 2)  # (rows, blocks, heads, BLOCK, dim)
                if save:
                    pool[slot] = blocks[row, block]
                else:
                    blocks[row, block] = pool[slot]
