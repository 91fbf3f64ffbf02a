"""Who draws a rollout's completions: training itself, or a sampler from outside with a copy of the policy's weights."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from pipeline.lm.cache import BLOCK
from pipeline.lm.decode import Decoder, Row, decode
from pipeline.store import io_errors
from pipeline.train.loop import autocast
from pipeline.train.lora import save_adapter
from pipeline.train.networks import Networks

MAX_ROWS = 128
"""Completions that training itself draws at a time."""
PREFIX_TOKENS = 1 << 16
"""Room for what prompts share; where none begins like another, looking for it would only take time."""
Draw = Callable[[Networks, Sequence[Row]], None]
"""Continues the rows, in place, by the policy as it is now."""


class Sampler(Protocol):
    """Continues rows, in place, by a model that it reads from folders."""

    def __call__(self, rows: Sequence[Row], weights: Path, adapter: Path | None) -> None:
        """weights: a model folder; without an adapter it is another one every time, with one it stays the same.

        adapter: a LoRA folder, another one every time.
        """


def draw_here(networks: Networks, rows: Sequence[Row]) -> None:
    """A decoder lives for one call, so that no cached prefix outlives the weights it was computed with."""
    policy = networks.gathered()
    begins_alike = len({tuple(row.prompt[:BLOCK]) for row in rows}) < len(rows)
    was_training = policy.training
    packed = policy.config._attn_implementation
    policy.set_attn_implementation(networks.attention)
    try:
        with autocast(policy, networks.settings):
            decoder = Decoder(policy, max_rows=MAX_ROWS, prefix_tokens=PREFIX_TOKENS if begins_alike else 0)
            for _ in decode(decoder, rows):
                pass
    finally:
        policy.set_attn_implementation(packed)
        policy.train(was_training)


class DrawOutside:
    """Hands the policy over in a folder, before every draw: all its weights, or once its start and then its adapter."""

    def __init__(self, sampler: Sampler, folder: Path) -> None:
        self.sampler, self.weights, self.adapter = sampler, folder / "weights", folder / "adapter"
        self._has_start = False

    def __call__(self, networks: Networks, rows: Sequence[Row]) -> None:
        with io_errors(self.weights):
            adapter = self._write(networks)
        self.sampler(rows, self.weights, adapter)

    def _write(self, networks: Networks) -> Path | None:
        if networks.adapted is None:
            shutil.rmtree(self.weights, ignore_errors=True)
            networks.policy.save_pretrained(self.weights)
            return None
        if not self._has_start:
            networks.reference.save_pretrained(self.weights)
            self._has_start = True
        shutil.rmtree(self.adapter, ignore_errors=True)
        save_adapter(networks.adapted, networks.policy, self.adapter)
        return self.adapter
