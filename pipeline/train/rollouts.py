"""Rollouts: completions that the policy draws, with what the networks say of each of their tokens.

Of what is drawn the drawn token's log-probability alone is kept. What a completion draws depends on its seed alone,
and a seed on step, row and sample; so there is no state of a sampler to be kept. The log-probabilities that training
compares with are computed again, in the pass that training itself uses. Several processes deal the prompts among
themselves, and all have all rollouts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.lm import decode
from pipeline.lm.templates import Chat
from pipeline.records import Message
from pipeline.train import ranks
from pipeline.train.batches import Data, deal, own_microbatches, pass_tokens
from pipeline.train.networks import Networks, Predictions
from pipeline.train.prompts import Prompts
from pipeline.train.rows import Row
from pipeline.train.samplers import Draw, draw_here
from pipeline.train.shards import by_itself


class Ahead(NamedTuple):
    """What the networks said of these rows' completions; gradients can still flow back through it, once.

    counts: see `batches.own_microbatches`.
    """

    rows: list[int]
    counts: bool
    predictions: Predictions


class Rollouts(NamedTuple):
    """R prompts with num_samples completions each, B in all, of up to T tokens.

    data: their tokens, a row for each prompt. conversations: (R,). texts: (B,), a prompt's one after the other.
    has_ended: (B,) by itself, within max_tokens. completion_mask: (B, T).
    sampler_logps, logps, ref_logps: (B, T) as drawn, under the policy again, under the starting model; values: (B, T),
    0 without a value function. All 0 where the mask is False. ahead: see `roll_out`.
    """

    data: Data
    conversations: list[list[Message]]
    texts: list[str]
    has_ended: Tensor
    completion_mask: Tensor
    sampler_logps: Tensor
    logps: Tensor
    ref_logps: Tensor
    values: Tensor
    ahead: tuple[Ahead, ...] = ()

    @property
    def kl(self) -> Tensor:
        """(B,) log-ratio of each whole completion: a sample of its KL from the start, in nats."""
        return (self.logps - self.ref_logps).sum(dim=1)


def roll_out(
    networks: Networks,
    chat: Chat,
    prompts: Prompts,
    rows: Sequence[int],
    *,
    seed: Sequence[int],
    num_samples: int,
    draw: Draw = draw_here,
    keep_graph: bool = False,
) -> Rollouts:
    """rows: of the prompts. seed: numbers that, with a row's place and a sample's number, seed what is drawn.

    keep_graph: an update over all of it comes next, before any weight changes. If no process has more of it than a
    microbatch, the pass that reads it is then that update's forward pass too: `ahead`.
    """
    waiting = _waiting(networks, chat, prompts.data, rows, seed=seed, num_samples=num_samples)
    drawn = _drawn(networks, waiting, draw, num_samples=num_samples)
    data, texts = Data(), [chat.text(one.completion) for one in drawn]
    for place, row in enumerate(rows):
        own = slice(place * num_samples, (place + 1) * num_samples)
        prompt = prompts.conversations[row]
        example = Row(prompts.data.ids[row], prompt, tuple(texts[own]), 1.0, (), "policy")
        data.add(example, prompts.data.group(row).prompt.tolist(), [one.completion for one in drawn[own]])
    device = networks.policy.device
    lengths = torch.tensor([len(one.completion) for one in drawn])
    mask = (torch.arange(int(lengths.max())) < lengths[:, None]).to(device)
    sampler_logps = torch.zeros(mask.shape, device=device)
    sampler_logps[mask] = torch.tensor([logp for one in drawn for logp in one.logps], device=device)
    return Rollouts(
        data,
        [prompts.conversations[row] for row in rows],
        texts,
        torch.tensor([one.finish_reason == "stop" for one in drawn], device=device),
        mask,
        sampler_logps,
        *_read(networks, data, mask, keep_graph=keep_graph),
    )


def _waiting(
    networks: Networks, chat: Chat, data: Data, rows: Sequence[int], *, seed: Sequence[int], num_samples: int
) -> list[decode.Row]:
    """What is to be continued, num_samples times each of the rows, in order."""
    settings = networks.settings
    return [
        decode.Row(
            data.group(row).prompt.tolist(),
            max_tokens=settings.max_tokens,
            temperature=settings.temperature,
            seed=draw_seed(*seed, place, number),
            eos=chat.eos,
        )
        for place, row in enumerate(rows)
        for number in range(num_samples)
    ]


def _drawn(networks: Networks, waiting: list[decode.Row], draw: Draw, *, num_samples: int) -> list[decode.Row]:
    """The same rows, continued; of several processes each draws every so many-th prompt's."""
    owners = [n // num_samples % ranks.size() for n in range(len(waiting))]
    own = [row for row, owner in zip(waiting, owners, strict=True) if owner == ranks.rank()]
    ranks.together(lambda: draw(networks, own))
    parts = [iter(part) for part in ranks.gather(own)]
    return [next(parts[owner]) for owner in owners]


def draw_seed(*numbers: int) -> int:
    """In [0, 2**64), another one for any other numbers."""
    text = "/".join(map(str, numbers))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


@torch.no_grad()
def _read(
    networks: Networks, data: Data, mask: Tensor, *, keep_graph: bool
) -> tuple[Tensor, Tensor, Tensor, tuple[Ahead, ...]]:
    """(B, T) each: logps, ref_logps, values."""
    settings, device = networks.settings, mask.device
    logps, ref_logps, values = (torch.zeros(mask.shape, device=device) for _ in range(3))
    shares = deal(data, range(len(data)), ranks.size())
    largest = max(sum(map(data.num_tokens, share)) for share in shares)  # all processes keep it, or none
    keep_graph = keep_graph and largest <= settings.microbatch_tokens
    aheads = []

    def read() -> None:
        size = pass_tokens(settings.microbatch_tokens, device)
        for rows, counts in own_microbatches(data, range(len(data)), max_tokens=size):
            groups, numbers = [data.group(row) for row in rows], completions_of(data, rows)
            reference = networks.reference_logps(groups)
            with torch.set_grad_enabled(keep_graph):
                found = networks.predict(groups, with_entropies=keep_graph and settings.entropy_coef > 0)
            if keep_graph:
                aheads.append(Ahead(rows, counts, found))
            if not counts:
                continue
            put(ref_logps, numbers, mask, reference)
            put(logps, numbers, mask, found.logps)
            if found.values is not None:
                put(values, numbers, mask, found.values)

    by_itself(networks.policy, read)
    ranks.add_up([logps, ref_logps, values])
    return logps, ref_logps, values, tuple(aheads)


def completions_of(data: Data, rows: Sequence[int]) -> list[int]:
    """Numbers of the rows' completions, in the order in which a pass over them gives their tokens."""
    return [number for row in rows for number in data.completions(row)]


def put(padded: Tensor, numbers: list[int], mask: Tensor, tokens: Tensor) -> None:
    """Writes the tokens of these completions, (M,), into their rows of padded, (B, T)."""
    own = torch.zeros_like(padded[numbers])
    own[mask[numbers]] = tokens
    padded[numbers] = own


def take(padded: Tensor, numbers: list[int], mask: Tensor) -> Tensor:
    """(M,) what `put` wrote."""
    return padded[numbers][mask[numbers]]
