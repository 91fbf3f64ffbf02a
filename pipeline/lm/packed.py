"""Prompts and their completions in one row without padding: each prompt stands there once for all its completions.

A completion attends to its prompt and to itself. Attention is computed piece by piece and takes no cache, so gradient
checkpointing and sliding windows change nothing; the other layers see a single row of real tokens. Left out: a fused
kernel for many short pieces, where a GPU spends its time on starting kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

PACKED = "packed"
"""The name under which the attention is known to transformers."""


class Spans(NamedTuple):
    """Lengths of the pieces of a row: a prompt, its completions, the next prompt, …"""

    groups: tuple[tuple[int, tuple[int, ...]], ...]

    @property
    def lengths(self) -> list[int]:
        return [length for prompt, completions in self.groups for length in (prompt, *completions)]

    @property
    def joined(self) -> Spans:
        """The same, with a prompt and its only completion as one piece: attention cannot tell them apart."""
        return Spans(tuple((p + c[0], ()) if len(c) == 1 else (p, c) for p, c in self.groups))


class Packed(NamedTuple):
    """token_ids, position_ids: (1, T); a completion's positions go on from its prompt's."""

    token_ids: Tensor
    position_ids: Tensor
    spans: Spans


def pack(
    prompts: Sequence[Tensor], completions: Sequence[Sequence[Tensor]], *, round_up: Callable[[int], int] = int
) -> Packed:
    """prompts: G tensors (P,). completions: those of each prompt, tensors (C,); C may be 0.

    round_up: to how many tokens the row is filled up, with a piece that nobody looks at.
    """
    tokens, positions = [], []
    for prompt, continued in zip(prompts, completions, strict=True):
        tokens += [prompt, *continued]
        positions.append(torch.arange(len(prompt)))
        positions += [torch.arange(len(prompt), len(prompt) + len(completion)) for completion in continued]
    groups = [(len(prompt), tuple(map(len, own))) for prompt, own in zip(prompts, completions, strict=True)]
    num_tokens = sum(map(len, tokens))
    if missing := round_up(num_tokens) - num_tokens:
        filling = torch.zeros(missing, dtype=torch.long)
        tokens, positions, groups = [*tokens, filling], [*positions, filling], [*groups, (missing, ())]
    return Packed(torch.cat(tokens).long()[None], torch.cat(positions)[None], Spans(tuple(groups)))


def packed_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    spans: Spans | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in every layer. query: (1, heads, T, dim); returns (1, T, heads, dim).

    Without spans it is the usual attention over a batch of rows. Dropout is left out on purpose.
    """
    if spans is None:
        if softcap is not None:
            raise ValueError("attention scores with a soft cap are computed in packed rows only")
        found: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **options
        )
        return found
    key, value = (repeat_kv(each, query.shape[1] // each.shape[1]) for each in (key, value))
    attend = partial(_attend, scaling=scaling, window=sliding_window, softcap=softcap)
    if query.device.type != "cpu":
        return _piece_by_piece(attend, query, key, value, spans), None
    # For a CPU torch has half-precision kernels that are slow for such pieces, and keeps one for each length it meets.
    dtype = torch.promote_types(query.dtype, torch.float32)
    with torch.autocast("cpu", enabled=False):
        wide = _piece_by_piece(attend, query.to(dtype), key.to(dtype), value.to(dtype), spans)
    return wide.to(query.dtype), None


def _piece_by_piece(
    attend: Callable[[Tensor, Tensor, Tensor], Tensor], query: Tensor, key: Tensor, value: Tensor, spans: Spans
) -> Tensor:
    pieces = zip(*(each.split(spans.lengths, dim=2) for each in (query, key, value)), strict=True)
    outputs = []
    for _, completions in spans.groups:
        queries, *prompt = next(pieces)
        outputs.append(attend(queries, *prompt))
        for _ in completions:
            queries, *own = next(pieces)
            if queries.shape[2]:
                keys, values = (torch.cat(both, dim=2) for both in zip(prompt, own, strict=True))
                outputs.append(attend(queries, keys, values))
    return torch.cat(outputs, dim=2).transpose(1, 2)


def _attend(
    query: Tensor, key: Tensor, value: Tensor, *, scaling: float | None, window: int | None, softcap: float | None
) -> Tensor:
    """Causal attention of the last positions of one sequence to all of them."""
    num_queries, num_keys = query.shape[2], key.shape[2]
    if num_queries == num_keys and (window is None or window >= num_keys) and softcap is None:
        return scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
    mask = torch.ones(num_queries, num_keys, dtype=torch.bool, device=query.device).tril(num_keys - num_queries)
    if window is not None:
        mask = mask.triu(num_keys - num_queries - window + 1)
    if softcap is None:
        return scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = softcap * torch.tanh(query @ key.transpose(2, 3) * (scale / softcap))
    scores = scores.masked_fill(~mask, float("-inf"))
    return scores.softmax(dim=-1, dtype=torch.float32).to(value.dtype) @ value


AttentionInterface.register(PACKED, packed_attention)
AttentionMaskInterface.register(PACKED, sdpa_mask)
