"""Work side by side: what comes out, which threads it has, and what happens to errors."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from pipeline.train.abreast import abreast
from tests.pipeline.train.ppo_jobs import opened, save_pair


@pytest.fixture
def four_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("four_threads")
def test_each_has_its_share_of_the_threads_at_the_same_time() -> None:
    meeting = threading.Barrier(2, timeout=20)

    def act() -> tuple[int, bool]:
        meeting.wait()
        return torch.get_num_threads(), torch.is_grad_enabled()

    assert abreast(act, act) == [(2, True)] * 2
    with torch.no_grad():
        assert abreast(act, act) == [(2, False)] * 2
    assert torch.get_num_threads() == 4


@pytest.mark.usefixtures("four_threads")
def test_an_error_is_raised_once_all_have_ended() -> None:
    has_ended = threading.Event()

    def fail() -> None:
        raise MemoryError("too much")

    with pytest.raises(MemoryError, match="too much"):
        abreast(fail, has_ended.set)
    assert has_ended.is_set()
    assert torch.get_num_threads() == 4


def test_with_fewer_threads_than_actions_they_are_one_after_the_other() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    found = abreast(threading.get_ident, threading.get_ident)
    torch.set_num_threads(before)
    assert found == [threading.get_ident()] * 2


@pytest.mark.parametrize("value", ["separate", "joint"])
def test_predictions_and_gradients_are_those_of_one_thread(value: str, tmp_path: Path) -> None:
    networks, _, prompts, _ = opened(*save_pair(tmp_path), value=value, entropy_coef=0.1)
    completion = torch.tensor([5, 6, 7])
    groups = [prompts.data.group(row)._replace(completions=(completion,)) for row in range(len(prompts))]
    before, found = torch.get_num_threads(), []
    for num_threads in (1, 2):
        torch.set_num_threads(num_threads)
        predicted = networks.predict(groups, with_entropies=True)
        ends = predicted.cut_off()
        loss = (ends.logps * ends.values).sum() + ends.entropies.square().sum()
        loss.backward()
        networks.backward(predicted, ends)
        learned = [p for each in networks.parameters.values() for p in each.values()]
        found.append([*predicted, *(parameter.grad for parameter in learned)])
        for parameter in learned:
            parameter.grad = None
    torch.set_num_threads(before)
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)
    assert all(gradient.abs().sum() > 0 for gradient in found[1][3:])
