"""AdamW, its learning rate over a training, and its state as named tensors."""

from __future__ import annotations

import math
from collections import defaultdict

import torch
from torch import Tensor

from pipeline.config.settings import TrainSettings
from pipeline.train.shards import like

COSINE_END = 0.1


def make_optimizer(parameters: dict[str, Tensor], weight_decay: float, *, eps: float = 1e-8) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019); only matrices decay."""
    matrices = [p for p in parameters.values() if p.ndim > 1]
    others = [p for p in parameters.values() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW([group for group in groups if group["params"]], eps=eps, fused=True)


def learning_rate(step: int, total: int, settings: TrainSettings) -> float:
    """Of the step with this number, from 0: a linear warm-up, then constant, linear to 0 or a cosine to 10 %."""
    warmup = round(settings.warmup * total)
    if step < warmup:
        return settings.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    if settings.schedule == "cosine":
        share = COSINE_END + (1 - COSINE_END) * (1 + math.cos(math.pi * progress)) / 2
    else:
        share = 1 - progress if settings.schedule == "linear" else 1.0
    return settings.learning_rate * share


def state_tensors(optimizer: torch.optim.Optimizer, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    """`KIND.PARAMETER` -> tensor, of every parameter that has been updated."""
    return {
        f"{kind}.{name}": value
        for name, parameter in parameters.items()
        for kind, value in optimizer.state[parameter].items()
    }


def load_state(optimizer: torch.optim.Optimizer, parameters: dict[str, Tensor], tensors: dict[str, Tensor]) -> None:
    """Takes what `state_tensors` gave."""
    found: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for key, value in tensors.items():
        kind, _, name = key.partition(".")
        found[name][kind] = value
    for name, parameter in parameters.items():
        optimizer.state[parameter] = {kind: like(value, parameter) for kind, value in found[name].items()}
