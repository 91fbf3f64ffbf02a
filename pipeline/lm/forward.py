"""Log-probabilities of completions: the one primitive of all training stages.

A prompt runs through the backbone once for its k completions: k = 1 in SFT, 2 in DPO, more in reward models and RRHF.
The last layer's MLP and the head see the positions that predict a completion's tokens, and no others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pipeline.errors import EngineRefused
from pipeline.lm.head import token_entropies, token_logps
from pipeline.lm.packed import PACKED, pack
from pipeline.lm.products import is_wide, rounded

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
    return _run(model, groups, last_token=False)


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
    return _run(model, groups, last_token=True)


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


def _run(model: Any, groups: Sequence[Group], *, last_token: bool) -> Tensor:
    """The backbone's last hidden states: of each completion's last token, or those in which each token is drawn."""
    prompts = [group.prompt for group in groups]
    inputs = [[c if last_token else c[:-1] for c in group.completions] for group in groups]
    run = _run_packed if model.config._attn_implementation == PACKED else _run_rows
    return run(model, prompts, inputs, last_token)


def _run_packed(model: Any, prompts: Sequence[Tensor], inputs: Sequence[Sequence[Tensor]], last_token: bool) -> Tensor:
    round_up = rounded if is_wide(model) else int
    row = pack(prompts, inputs, round_up=round_up)
    wanted, at = [], 0
    for prompt, completions in row.spans.groups:
        at += prompt
        before = torch.tensor([at - 1])
        for length in completions:
            own = torch.arange(at, at + length)
            wanted.append(own[-1:] if last_token else torch.cat([before, own]))
            at += length
    places = torch.cat(wanted)
    read = _with_others(places, at, round_up=round_up)
    no_mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=model.device)  # packed_attention makes the real one
    with _last_mlp_at(model, read.to(model.device), num_tokens=at):
        hidden = model.base_model(
            input_ids=row.token_ids.to(model.device),
            position_ids=row.position_ids.to(model.device),
            attention_mask=no_mask,
            use_cache=False,
            spans=row.spans.joined,
        ).last_hidden_state[0]
    return hidden[places.to(model.device)]


def _with_others(places: Tensor, num_tokens: int, *, round_up: Callable[[int], int]) -> Tensor:
    """The places, each once and in order, among others of the row that make up their number."""
    is_read = torch.zeros(num_tokens, dtype=torch.bool)
    is_read[places] = True
    num_places = int(is_read.sum())
    others = (~is_read).nonzero()[: round_up(num_places) - num_places]
    is_read[others] = True
    return is_read.nonzero()[:, 0]


@contextmanager
def _last_mlp_at(model: Any, places: Tensor, *, num_tokens: int) -> Iterator[None]:
    """Behind the last layer's attention nobody looks at the other tokens of a row, so its MLP leaves them out.

    Not with gradient checkpointing, which runs the layer once more when this has ended.
    """
    layers = getattr(model.base_model, "layers", None) or getattr(model.base_model, "h", None)
    mlp = getattr(layers[-1], "mlp", None) if layers else None
    if mlp is None or (model.training and model.is_gradient_checkpointing):
        yield
        return

    def leave_out(_: Any, inputs: tuple[Tensor]) -> Tensor:
        return inputs[0][:, places]

    def put_back(_: Any, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        return output.new_zeros(1, num_tokens, output.shape[-1]).index_copy(1, places, output)

    hooks = mlp.register_forward_pre_hook(leave_out), mlp.register_forward_hook(put_back)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _run_rows(model: Any, prompts: Sequence[Tensor], inputs: Sequence[Sequence[Tensor]], last_token: bool) -> Tensor:
    """Each completion behind its own copy of the prompt, padded on the right."""
    pairs = [(prompt, completion) for prompt, group in zip(prompts, inputs, strict=True) for completion in group]
    width = max(len(prompt) + len(completion) for prompt, completion in pairs)
    tokens = torch.zeros(len(pairs), width, dtype=torch.long)
    mask = torch.zeros(len(pairs), width, dtype=torch.bool)
    wanted = []
    for n, (prompt, completion) in enumerate(pairs):
        end = len(prompt) + len(completion)
        tokens[n, :end] = torch.cat([prompt, completion])
        mask[n, :end] = True
        wanted.append(torch.arange(end - 1 if last_token else len(prompt) - 1, end) + n * width)
    hidden = model.base_model(
        input_ids=tokens.to(model.device), attention_mask=mask.to(model.device), use_cache=False
    ).last_hidden_state
    return hidden.flatten(0, 1)[torch.cat(wanted).to(model.device)]


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
