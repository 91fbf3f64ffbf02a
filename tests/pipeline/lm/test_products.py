"""Products through oneDNN against the usual ones."""

import copy

import pytest
import torch
from torch.nn import functional

from pipeline.lm import products
from pipeline.lm.forward import Group, completion_logps, prepare
from pipeline.lm.products import Linear, linear, rounded, widen
from tests.pipeline.lm.test_forward import concatenated, gradients, largest_difference
from tests.pipeline.lm.tiny import tiny_llama


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever processor this is."""
    monkeypatch.setattr(products, "_is_wider_than_mkl", lambda: True)


def layer(num_rows: int, *, bias: bool = False) -> list[torch.Tensor]:
    """Input, weight and what the output is multiplied by to make a loss; and a bias if there is one."""
    draw = torch.Generator().manual_seed(0)
    shapes = [(num_rows, 160), (480, 160), (num_rows, 480), *([(480,)] if bias else [])]
    return [torch.randn(shape, generator=draw) for shape in shapes]


@pytest.mark.parametrize("num_rows", [512, 1000, 2049])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.usefixtures("wide")
def test_a_large_product_and_its_gradients_are_those_in_double_precision(num_rows: int, bias: bool) -> None:
    drawn = layer(num_rows, bias=bias)
    rows, weight, factors, *more = (each.clone().requires_grad_() for each in drawn)
    found = linear(rows, weight, *more)
    (found * factors).sum().backward()
    exact = [each.double().requires_grad_() for each in drawn]
    expected = functional.linear(exact[0], exact[1], *exact[3:])
    (expected * exact[2]).sum().backward()
    torch.testing.assert_close(found, expected.float(), rtol=1e-4, atol=2e-4)
    for own, other in zip((rows, weight, *more), (exact[0], exact[1], *exact[3:]), strict=True):
        torch.testing.assert_close(own.grad, other.grad.float(), rtol=1e-4, atol=1e-3)


@pytest.mark.usefixtures("wide")
def test_leading_dimensions_stay_as_they_are() -> None:
    rows, weight, _ = layer(2 * 700)
    assert linear(rows.view(2, 700, 160), weight).shape == (2, 700, 480)


@pytest.mark.usefixtures("wide")
def test_small_products_and_those_in_half_precision_are_the_usual_ones_to_the_bit() -> None:
    rows, weight, _ = layer(511)
    assert torch.equal(linear(rows, weight), functional.linear(rows, weight))
    rows, weight, _ = (each.bfloat16() for each in layer(1000))
    assert torch.equal(linear(rows, weight), functional.linear(rows, weight))
    rows, weight, _ = layer(1000)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(linear(rows, weight), functional.linear(rows, weight))


def test_rows_are_filled_up_to_few_different_numbers() -> None:
    assert [rounded(n) for n in (1, 511, 512, 513, 1024, 1025, 2047, 2048, 2049, 5000)] == (
        [1, 511, 512, 576, 1024, 1088, 2048, 2048, 2176, 5120]
    )
    assert len({rounded(n) for n in range(512, 1 << 14)}) < 80


@pytest.mark.usefixtures("wide")
def test_packed_rows_that_are_filled_up_give_the_same_log_probabilities_and_gradients() -> None:
    model = tiny_llama(vocab_size=700, hidden=256)
    usual = copy.deepcopy(model)
    widen(model)
    prepare(model)
    draw = torch.Generator().manual_seed(1)
    lengths = [(90, 100), (110, 40), (61, 80), (70, 152), (100, 170)]
    groups = [
        Group(torch.randint(3, 700, (prompt,), generator=draw), (torch.randint(3, 700, (own,), generator=draw),))
        for prompt, own in lengths
    ]
    found, expected = completion_logps(model, groups).tokens, concatenated(usual, groups)
    assert len(found) != rounded(len(found)), "the head's rows are filled up too"
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-5)
    assert largest_difference(gradients(model, found), gradients(usual, expected)) < 2e-5


def test_a_model_keeps_its_parameters_and_its_copies_keep_their_layers() -> None:
    model = tiny_llama()
    names, kinds = list(model.state_dict()), [type(module) for module in model.modules()]
    widen(model)
    assert list(model.state_dict()) == names
    expected = [Linear if kind is torch.nn.Linear else kind for kind in kinds]
    assert [type(module) for module in copy.deepcopy(model).modules()] == expected
