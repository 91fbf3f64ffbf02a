"""Log-probabilities of completions against the model's own forward pass over prompt and completion together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.errors import EngineRefused
from pipeline.lm import head
from pipeline.lm.forward import Group, completion_ends, completion_logps, prepare
from pipeline.lm.head import token_logps
from pipeline.lm.packed import PACKED, Spans, packed_attention
from tests.pipeline.lm.tiny import families, sharpen

LENGTHS = [(30, (7, 12)), (5, (1, 3)), (41, (26, 2, 9)), (12, (4,))]


def draw_groups(seed: int = 3) -> list[Group]:
    generator = torch.Generator().manual_seed(seed)

    def tokens(length: int) -> Tensor:
        return torch.randint(3, 300, (length,), generator=generator)

    return [Group(tokens(prompt), tuple(tokens(length) for length in lengths)) for prompt, lengths in LENGTHS]


def tiny(name: str) -> Any:
    torch.manual_seed(0)
    return sharpen(families()[name](), std=0.08)


def concatenated(model: Any, groups: Sequence[Group]) -> Tensor:
    """Every completion in a forward pass of its own, alone with its prompt; the usual logits and log-softmax."""
    found = []
    for group in groups:
        for completion in group.completions:
            row = torch.cat([group.prompt, completion])
            logits = model(input_ids=row[None], use_cache=False).logits[0].float()
            logps = torch.log_softmax(logits[len(group.prompt) - 1 : -1], dim=-1)
            found.append(logps[torch.arange(len(completion)), completion])
    return torch.cat(found)


def gradients(model: Any, logps: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    weights = torch.linspace(-1, 1, len(logps), dtype=logps.dtype)
    (logps * weights).sum().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def largest_difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Of the gradients as one vector, relative to its length."""
    distance = sum((found[name] - expected[name]).double().pow(2).sum() for name in expected)
    length = sum(gradient.double().pow(2).sum() for gradient in expected.values())
    return (distance / length).sqrt().item()


def make_packed(model: Any) -> None:
    prepare(model)
    assert model.config._attn_implementation == PACKED


def make_checkpointed(model: Any) -> None:
    make_packed(model)
    model.gradient_checkpointing_enable()
    model.train()  # transformers checkpoints in training mode only
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0


def leave_rows(model: Any) -> None:
    """Nothing is prepared: the prompt is repeated for every completion."""


@pytest.mark.parametrize("name", families())
@pytest.mark.parametrize("path", [make_packed, make_checkpointed, leave_rows])
def test_every_path_equals_the_concatenated_forward(name: str, path: Callable[[Any], None]) -> None:
    model, groups = tiny(name), draw_groups()
    if name == "gemma2":
        model.set_attn_implementation("eager")  # as lm/load.py has it: the others leave its soft cap out
    expected = concatenated(model, groups)
    by_parameter = gradients(model, expected)
    path(model)
    found = completion_logps(model, groups)
    assert (found.tokens - expected).abs().max() <= 1e-5
    assert largest_difference(gradients(model, found.tokens), by_parameter) <= 1e-6


def test_a_completion_does_not_depend_on_what_is_packed_with_it() -> None:
    model, groups = tiny("llama"), draw_groups()
    make_packed(model)
    together = completion_logps(model, groups)
    alone = torch.cat([completion_logps(model, [group]).sums for group in groups])
    assert torch.allclose(together.sums, alone, atol=1e-5, rtol=0)
    backwards = completion_logps(model, groups[::-1]).sums
    counts = [len(group.completions) for group in groups[::-1]]
    assert torch.allclose(torch.cat(backwards.split(counts)[::-1]), together.sums, atol=1e-5, rtol=0)


def test_the_last_mlp_sees_the_tokens_that_predict_alone() -> None:
    model = tiny("llama")
    prepare(model)
    seen: list[int] = []
    for layer in model.model.layers:
        layer.mlp.gate_proj.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape[1]))
    groups = draw_groups()
    completion_logps(model, groups)
    behind = [sum(len(c) - 1 for c in group.completions) for group in groups]  # the last token predicts nothing
    assert set(seen[:-1]) == {sum(len(group.prompt) for group in groups) + sum(behind)}
    assert seen[-1] == len(groups) + sum(behind)  # a prompt's end predicts the first tokens


def test_sums_and_means_are_those_of_each_completion() -> None:
    model, groups = tiny("gpt2"), draw_groups()
    logps = completion_logps(model, groups)
    lengths = [length for _, completions in LENGTHS for length in completions]
    parts = logps.tokens.split(lengths)
    assert logps.lengths.tolist() == lengths
    assert torch.allclose(logps.sums, torch.stack([part.sum() for part in parts]))
    assert torch.allclose(logps.means, torch.stack([part.mean() for part in parts]))


@pytest.mark.parametrize("path", [make_packed, leave_rows])
def test_ends_are_the_hidden_states_of_the_last_tokens(path: Callable[[Any], None]) -> None:
    model, groups = tiny("qwen3"), draw_groups()
    rows = [torch.cat([group.prompt, completion])[None] for group in groups for completion in group.completions]
    expected = torch.cat([model.base_model(input_ids=row, use_cache=False).last_hidden_state[:, -1] for row in rows])
    path(model)
    assert torch.allclose(completion_ends(model, groups), expected, atol=1e-5)


def test_a_model_whose_layers_take_no_packed_rows_is_run_in_plain_ones() -> None:
    model = tiny("llama")
    attention = model.model.layers[0].self_attn
    usual = attention.forward
    attention.forward = lambda *args, spans=None, **kwargs: usual(*args, **kwargs)  # a layer that loses the keyword
    prepare(model)
    assert model.config._attn_implementation == "sdpa"
    groups = draw_groups()
    assert (completion_logps(model, groups).tokens - concatenated(model, groups)).abs().max() <= 1e-5


def test_a_model_that_changes_its_logits_behind_the_head_is_refused() -> None:
    model = tiny("llama")
    usual = model.forward

    def scaled(**options: Any) -> Any:
        output = usual(**options)
        output.logits = output.logits * 0.5
        return output

    model.forward = scaled
    with pytest.raises(EngineRefused, match="not its own"):
        prepare(model)


def test_after_prepare_a_padded_batch_is_still_what_it_was() -> None:
    model = tiny("llama")
    tokens = torch.randint(3, 300, (2, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, :4] = 0
    expected = model(input_ids=tokens, attention_mask=mask).logits
    make_packed(model)
    assert torch.equal(model(input_ids=tokens, attention_mask=mask).logits, expected)


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("chunk", [1 << 25, 150])
def test_the_head_equals_log_softmax_and_its_gradient(
    monkeypatch: pytest.MonkeyPatch, softcap: float | None, chunk: int
) -> None:
    monkeypatch.setattr(head, "CHUNK", chunk)  # 150: five rows of 30 logits at a time, made again in the backward pass
    generator = torch.Generator().manual_seed(0)
    shapes = ((17, 8), (30, 8), (30,))
    parts = [torch.randn(*shape, generator=generator).double().requires_grad_() for shape in shapes]
    targets = torch.randint(0, 30, (17,), generator=generator)
    grad = torch.randn(17, generator=generator).double()

    def plain(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        logits = hidden @ weight.T + bias
        logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        return torch.log_softmax(logits, dim=-1)[torch.arange(17), targets]

    hidden, weight, bias = parts
    expected = plain(*parts)
    found = token_logps(hidden, weight, targets, bias=bias, softcap=softcap)
    assert torch.allclose(found.double(), expected, atol=1e-5)
    by_parts = torch.autograd.grad(expected, parts, grad)
    for own, other in zip(torch.autograd.grad(found, parts, grad.float()), by_parts, strict=True):
        assert torch.allclose(own, other, atol=1e-5)


@pytest.mark.parametrize("autocast", [False, True])
def test_packed_attention_of_half_precision_is_computed_in_fp32_on_a_cpu(autocast: bool) -> None:
    torch.manual_seed(0)
    halves = [torch.randn(1, 2, 30, 8).bfloat16() for _ in range(3)]
    spans = Spans(((10, (12, 0, 8)),))
    expected, _ = packed_attention(None, *(each.float() for each in halves), None, spans=spans)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found, _ = packed_attention(None, *halves, None, spans=spans)
    assert torch.equal(found, expected.bfloat16())
