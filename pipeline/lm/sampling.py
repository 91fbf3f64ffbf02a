"""The next token of each row. What a row draws depends on its own seed and step only, never on its batch mates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Sampling(NamedTuple):
    """temperature: (B,), 0 is greedy. top_p: (B,) in (0, 1]. seeds: (B,) uint64, read where temperature > 0."""

    temperature: Tensor
    top_p: Tensor
    seeds: np.ndarray
    any_random: bool
    any_top_p: bool


def sampling(
    temperature: Sequence[float], top_p: Sequence[float], seeds: Sequence[int], *, device: torch.device
) -> Sampling:
    """The parameters of B rows as tensors."""
    return Sampling(
        torch.tensor(temperature, dtype=torch.float32, device=device),
        torch.tensor(top_p, dtype=torch.float32, device=device),
        np.array(seeds, dtype=np.uint64),
        any(value > 0 for value in temperature),
        any(heat > 0 and value < 1 for heat, value in zip(temperature, top_p, strict=True)),
    )


def uniforms(seeds: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """One number in [0, 1) for each (seed, step): the finaliser of SplitMix64 (Steele et al. 2014), applied to both.

    seeds, steps: (B,) uint64. Returns (B,) float32 with 24 random bits.
    """
    with np.errstate(over="ignore"):
        mixed = _mix(_mix(seeds + np.uint64(0x9E3779B97F4A7C15)) ^ (steps * np.uint64(0xD1342543DE82EF95)))
    return ((mixed >> np.uint64(40)).astype(np.float64) / 2**24).astype(np.float32)


def _mix(bits: np.ndarray) -> np.ndarray:
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))


def sample(logits: Tensor, params: Sampling, steps: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Draws one token per row by inverting the distribution function.

    logits: (B, V). steps: how many tokens each row has drawn before. Returns tokens (B,) and their log-probabilities
    (B,) in nats, after the temperature and before top-p; a greedy row's are those of temperature 1.
    """
    heat = torch.where(params.temperature > 0, params.temperature, 1.0)
    logps = torch.log_softmax(logits.float() / heat[:, None], dim=-1)
    tokens = logits.argmax(-1)
    if params.any_random:
        draws = uniforms(params.seeds, np.array(steps, dtype=np.uint64))
        probs = logps.exp()
        if params.any_top_p:
            probs = _nucleus(probs, params.top_p)
        drawn = _invert(probs, torch.from_numpy(draws).to(logits.device))
        tokens = torch.where(params.temperature > 0, drawn, tokens)
    return tokens, logps.gather(-1, tokens[:, None])[:, 0]


def _nucleus(probs: Tensor, top_p: Tensor) -> Tensor:
    """The smallest set of most probable tokens that reaches top_p (Holtzman et al. 2020); the rest becomes 0."""
    ordered, indices = probs.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(-1) - ordered
    keep = (before < top_p[:, None]) | (top_p[:, None] >= 1)
    keep[:, 0] = True
    return torch.zeros_like(probs).scatter(-1, indices, torch.where(keep, ordered, 0.0))


def _invert(probs: Tensor, draws: Tensor) -> Tensor:
    """probs: (B, V), not necessarily normalised. draws: (B,) in [0, 1). Never returns a token of probability 0.

    Where probs are NaN it is some token; its log-probability, NaN, tells.
    """
    cumulative = probs.cumsum(-1)
    total = cumulative[:, -1]
    target = torch.minimum(draws * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, target[:, None], right=True)[:, 0].clamp(max=probs.shape[-1] - 1)
