"""Attention masks that a transformers model takes as they are, also for layers with a sliding window."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pipeline.errors import EngineRefused

_KNOWN_LAYERS = {"full_attention", "sliding_attention"}


class Masks:
    """Turns "may look at" into what the model's layers expect.

    config: of the text model. dtype: of its activations. Raises EngineRefused for layers that are not attention.
    """

    def __init__(self, config: Any, *, dtype: torch.dtype) -> None:
        self.dtype = dtype
        layer_types = set(getattr(config, "layer_types", None) or ())
        if unknown := layer_types - _KNOWN_LAYERS:
            raise EngineRefused(
                f"model type {config.model_type}: {', '.join(sorted(unknown))} layers cannot be decoded here; "
                "serve the model and use engine.backend: server"
            )
        window = getattr(config, "sliding_window", None)
        self.per_layer = "sliding_attention" in layer_types
        self.window = window if self.per_layer or not layer_types else None

    def __call__(self, allowed: Tensor, positions: Tensor) -> Tensor | dict[str, Tensor]:
        """Masks for queries at `positions` (B, T); a key's position is its column.

        allowed: (B, T, L) boolean, each query sees at least one column.
        """
        full = self._additive(allowed)
        if self.window is None:
            return full
        near = full
        if allowed.shape[-1] > self.window:
            seen = torch.arange(allowed.shape[-1], device=allowed.device)
            near = self._additive(allowed & (seen > positions[..., None] - self.window))
        return {"full_attention": full, "sliding_attention": near} if self.per_layer else near

    def _additive(self, allowed: Tensor) -> Tensor:
        blocked = torch.finfo(self.dtype).min
        zeros = torch.zeros((), dtype=self.dtype, device=allowed.device)
        return torch.where(allowed, zeros, blocked)[:, None]
