"""Log-probabilities of completions: the one primitive of all training stages.

A prompt runs through the backbone once for its k completions: k = 1 in SFT, 2 in DPO, more in reward models and RRHF.
The head sees the positions that predict a completion's tokens, and no others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pipeline.errors import EngineRefused
from pipeline.lm.head import token_entropies, token_logps
from pipeline.lm.packed import PACKED, pack

_TOLERANCE = {torch.float32: 1e-3}  # nats, of a token
_HALF_TOLERANCE = 0.1  # half precision moves log-probabilities much further


class Group(NamedTuple):
    """A prompt (P,) and its completions (C,), as token ids; none of them empty."""

    prompt: Tensor
    completions: tuple[Tensor, ...]


class Logps(NamedTuple):
    """tokens: (M,) in nats, of all completions one after the other. lengths: (N,) tokens of each completion."""

    tokens: Tensor
    lengths: Tensor

    @property
    def sums(self) -> Tensor:
        """(N,) log-probability of each completion."""
        owners = torch.repeat_interleave(self.lengths)
        return torch.zeros(len(self.lengths), device=self.tokens.device).index_add(0, owners, self.tokens)

    @property
    def means(self) -> Tensor:
        """(N,) the same, divided by the completion's length."""
        return self.sums / self.lengths


def completion_logps(model: Any, groups: Sequence[Group]) -> Logps:
    """Log-probability of every token of every completion, given its prompt; log-softmax in fp32.

    model: a causal language model, as `prepare` leaves it.
    """
    return logps_from_states(model, completion_states(model, groups), groups)


def completion_states(model: Any, groups: Sequence[Group]) -> Tensor:
    """(M, H) hidden states in which each token of each completion is drawn; model: with any head."""
    states = _run(model, groups, last_token=False)
    predicting = torch.cat([torch.cat([before, own]) for before, own in zip(states.before, states.own, strict=True)])
    return states.hidden[predicting.to(model.device)]


def logps_from_states(model: Any, states: Tensor, groups: Sequence[Group], *, temperature: float = 1.0) -> Logps:
    """What `completion_logps` gives, from the states that `completion_states` gives."""
    completions = [completion for group in groups for completion in group.completions]
    lengths = torch.tensor([len(completion) for completion in completions], device=model.device)
    targets = torch.cat(completions).long().to(model.device)
    return Logps(token_logps(states, targets=targets, temperature=temperature, **_head(model)), lengths)


def entropies_from_states(model: Any, states: Tensor, *, temperature: float = 1.0) -> Tensor:
    """(M,) entropy, in nats, of the distribution that each token is drawn from."""
    return token_entropies(states, temperature=temperature, **_head(model))


def completion_ends(model: Any, groups: Sequence[Group]) -> Tensor:
    """(N, H) hidden states at the last token of each completion; model: with any head, as `prepare` leaves it."""
    states = _run(model, groups, last_token=True)
    ends = torch.stack([own[-1] for own in states.own])
    return states.hidden[ends.to(model.device)]


def prepare(model: Any) -> None:
    """Has the model run packed rows if it does that right, else plain rows with the prompt repeated.

    model: a causal language model, or one without its head (a reward model). Raises EngineRefused if what comes out is
    not the model's own, such as logits that are scaled behind the head.
    """
    groups = _probe(model.config.get_text_config().vocab_size)
    plain = _plain(model, groups)
    usual = model.config._attn_implementation
    for attention in (PACKED, usual):
        model.set_attn_implementation(attention)
        if _agrees(model, groups, plain):
            return
    raise EngineRefused(
        f"model type {model.config.model_type}: log-probabilities from its backbone and head are not its own; "
        "start from another model"
    )


class _States(NamedTuple):
    """hidden: (S, H). before, own: for each of N completions, rows of hidden: (1,) before it, (C,) of its tokens."""

    hidden: Tensor
    before: list[Tensor]
    own: list[Tensor]


def _run(model: Any, groups: Sequence[Group], *, last_token: bool) -> _States:
    """The backbone's last hidden states. last_token: also of each completion's last token, which predicts nothing."""
    prompts = [group.prompt for group in groups]
    inputs = [[c if last_token else c[:-1] for c in group.completions] for group in groups]
    if model.config._attn_implementation == PACKED:
        return _run_packed(model, prompts, inputs)
    return _run_rows(model, prompts, inputs)


def _run_packed(model: Any, prompts: Sequence[Tensor], inputs: Sequence[Sequence[Tensor]]) -> _States:
    row = pack(prompts, inputs)
    hidden = model.base_model(
        input_ids=row.token_ids.to(model.device),
        position_ids=row.position_ids.to(model.device),
        attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool, device=model.device),  # packed_attention has its own
        use_cache=False,
        spans=row.spans,
    ).last_hidden_state[0]
    before, own, at = [], [], 0
    for prompt, completions in row.spans.groups:
        at += prompt
        last = torch.tensor([at - 1])
        for length in completions:
            before.append(last)
            own.append(torch.arange(at, at + length))
            at += length
    return _States(hidden, before, own)


def _run_rows(model: Any, prompts: Sequence[Tensor], inputs: Sequence[Sequence[Tensor]]) -> _States:
    """Each completion behind its own copy of the prompt, padded on the right."""
    pairs = [(prompt, completion) for prompt, group in zip(prompts, inputs, strict=True) for completion in group]
    width = max(len(prompt) + len(completion) for prompt, completion in pairs)
    tokens = torch.zeros(len(pairs), width, dtype=torch.long)
    mask = torch.zeros(len(pairs), width, dtype=torch.bool)
    before, own = [], []
    for n, (prompt, completion) in enumerate(pairs):
        start, end = len(prompt), len(prompt) + len(completion)
        tokens[n, :end] = torch.cat([prompt, completion])
        mask[n, :end] = True
        before.append(torch.tensor([n * width + start - 1]))
        own.append(torch.arange(n * width + start, n * width + end))
    hidden = model.base_model(
        input_ids=tokens.to(model.device), attention_mask=mask.to(model.device), use_cache=False
    ).last_hidden_state
    return _States(hidden.flatten(0, 1), before, own)


def _head(model: Any) -> dict[str, Any]:
    head = model.get_output_embeddings()
    softcap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    return {"weight": head.weight, "bias": getattr(head, "bias", None), "softcap": softcap}


def _probe(vocabulary: int) -> list[Group]:
    lengths = ((21, (7, 3)), (6, (1, 12)))
    tokens = iter((7 + 13 * n) % vocabulary for n in range(1000))
    return [
        Group(_take(tokens, prompt), tuple(_take(tokens, length) for length in completions))
        for prompt, completions in lengths
    ]


def _take(tokens: Any, length: int) -> Tensor:
    return torch.tensor([next(tokens) for _ in range(length)])


@torch.no_grad()
def _plain(model: Any, groups: Sequence[Group]) -> Tensor:
    """What `completion_logps` should find, or without a head `completion_ends`: one plain forward pass a completion."""
    found = []
    for prompt, completion in ((group.prompt, completion) for group in groups for completion in group.completions):
        row = torch.cat([prompt, completion])[None].to(model.device)
        if model.get_output_embeddings() is None:
            found.append(model.base_model(input_ids=row, use_cache=False).last_hidden_state[0, -1:])
            continue
        logps = model(input_ids=row, use_cache=False).logits[0].float().log_softmax(dim=-1)
        found.append(logps[len(prompt) - 1 : -1].gather(1, row[0, len(prompt) :, None])[:, 0])
    return torch.cat(found)


@torch.no_grad()
def _agrees(model: Any, groups: Sequence[Group], plain: Tensor) -> bool:
    has_head = model.get_output_embeddings() is not None
    try:
        found = completion_logps(model, groups).tokens if has_head else completion_ends(model, groups)
    except (AttributeError, RuntimeError, TypeError, ValueError):
        return False
    tolerance = _TOLERANCE.get(model.dtype, _HALF_TOLERANCE)
    return bool((found - plain).abs().max() <= tolerance * plain.abs().max().clamp(min=1))
