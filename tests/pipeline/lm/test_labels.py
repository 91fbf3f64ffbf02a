"""Labels of several tokens and labels that begin others, by hand."""

from __future__ import annotations

import math

import pytest
import torch

from pipeline.lm.labels import FLOOR, label_tree, own_shares, read_tree

ONE, TEN, HUNDRED, TWO = (1,), (1, 0), (1, 0, 0), (2,)


def test_a_longer_label_takes_its_share_from_the_shorter_one() -> None:
    raw = [math.log(0.5), math.log(0.2), math.log(0.05), math.log(0.3)]
    own = own_shares([ONE, TEN, HUNDRED, TWO], raw)
    assert [math.exp(logp) for logp in own] == pytest.approx([0.3, 0.15, 0.05, 0.3])


def test_a_label_whose_share_all_belongs_to_another_is_at_the_floor() -> None:
    assert own_shares([ONE, TEN], [math.log(0.5), math.log(0.5)])[0] == FLOOR


def test_beginnings_are_run_once() -> None:
    tree = label_tree((ONE, TEN, HUNDRED, TWO))
    assert tree.tokens == (1, 0)
    assert tree.depths == (1, 2)
    assert tree.ancestors.tolist() == [[True, False], [True, True]]
    assert tree.reads == (((-1, 1),), ((-1, 1), (0, 0)), ((-1, 1), (0, 0), (1, 0)), ((-1, 2),))


def test_log_probabilities_add_up_along_the_tree() -> None:
    tree = label_tree((TEN, TWO))
    logits = torch.tensor([[0.1, 0.6, 0.3], [0.7, 0.2, 0.1]]).log()
    assert [math.exp(value) for value in read_tree(tree, logits)] == pytest.approx([0.42, 0.3])


def test_an_impossible_label_is_finite() -> None:
    logits = torch.tensor([[0.0, 0.0, float("-inf")]])
    assert read_tree(label_tree((TWO,)), logits) == [FLOOR]
