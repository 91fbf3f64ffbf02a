"""Log-probabilities of given tokens from hidden states, without the tensors that automatic differentiation would keep.

Forward and backward each touch the (M, V) logits in place. Up to CHUNK logits are kept from one to the other; where
there are more, they are made again chunk by chunk.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from pipeline.lm.products import fill_up, is_wide, linear

CHUNK = 1 << 25
"""Logits at a time: 128 MiB in fp32."""


def token_logps(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """(M,) fp32, in nats. hidden: (M, H). weight: (V, H) and bias: (V,) of the head. targets: (M,) token ids.

    softcap: logits are softcap·tanh(logits / softcap), as in Gemma 2. temperature: what they are then divided by.
    Differentiable once, by hidden, weight and bias.
    """
    kind = hidden.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        half = torch.get_autocast_dtype(kind)
        hidden, weight, bias = hidden.to(half), weight.to(half), None if bias is None else bias.to(half)
    num_tokens, rows = len(hidden), max(1, CHUNK // len(weight))
    if is_wide(hidden):
        hidden, targets = fill_up(hidden), fill_up(targets[:, None])[:, 0]
    keep = len(hidden) <= rows
    chunks = zip(hidden.split(rows), targets.split(rows), strict=True)
    shape = Shape(softcap, temperature)
    logps = [_TokenLogps.apply(states, weight, bias, tokens, shape, keep) for states, tokens in chunks]
    return torch.cat(logps)[:num_tokens]


class Shape(NamedTuple):
    """What a model does to its logits behind the head."""

    softcap: float | None
    temperature: float


class _TokenLogps(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        shape: Shape,
        keep: bool,
    ) -> Tensor:
        logits = _logits(hidden, weight, bias, shape)
        totals = logits.logsumexp(dim=-1)
        ctx.shape = shape
        ctx.save_for_backward(hidden, weight, bias, targets, totals, logits if keep else None)
        return logits.gather(1, targets[:, None])[:, 0] - totals

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """∂ logp[target] / ∂ logits = onehot(target) - softmax(logits)."""
        hidden, weight, bias, targets, totals, logits = ctx.saved_tensors
        grad = grads[0][:, None]
        if logits is None:
            logits = _logits(hidden, weight, bias, ctx.shape)
        softcap, temperature = ctx.shape
        slope = None if softcap is None else 1 - (logits * (temperature / softcap)) ** 2
        by_logits = logits.sub_(totals[:, None]).exp_().mul_(-grad).scatter_add_(1, targets[:, None], grad)
        if slope is not None:
            by_logits.mul_(slope)
        if temperature != 1:
            by_logits.div_(temperature)
        by_logits = by_logits.to(hidden.dtype)
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        return (
            linear(by_logits, weight.T) if needs_hidden else None,
            by_logits.T @ hidden if needs_weight else None,
            by_logits.sum(dim=0) if needs_bias else None,
            None,
            None,
            None,
        )


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, shape: Shape) -> Tensor:
    logits = linear(hidden, weight, bias).float()
    if shape.softcap is not None:
        logits.div_(shape.softcap).tanh_().mul_(shape.softcap)
    return logits if shape.temperature == 1 else logits.div_(shape.temperature)


def token_entropies(
    hidden: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """(M,) fp32, in nats: the entropy of each next token's distribution; differentiable, keeps (M, V) tensors."""
    logits = linear(hidden, weight, bias).float()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logps = (logits / temperature).log_softmax(dim=-1)
    return -(logps.exp() * logps).sum(dim=-1)
