"""Schedules, Bradley-Terry and ranks."""

import math
import random

import pytest

from constitution.ranking import bradley_terry, connected, order, schedule


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_up_to_six_candidates_all_meet():
    assert schedule(0) == schedule(1) == ()
    assert schedule(3) == ((0, 1), (0, 2), (1, 2))
    assert len(schedule(6)) == 15


def test_seven_candidates_meet_at_the_distances_one_and_two():
    expected = {(i, (i + d) % 7) for i in range(7) for d in (1, 2)}
    assert schedule(7) == tuple(sorted((min(pair), max(pair)) for pair in expected))


@pytest.mark.parametrize("num", [7, 8, 15, 16, 33, 60])
def test_larger_schedules_are_connected_fair_and_small(num):
    pairs = schedule(num)
    assert len(set(pairs)) == len(pairs) < num * math.log2(num)
    assert all(a < b for a, b in pairs)
    assert connected(num, pairs) == list(range(num))
    assert len({sum(i in pair for pair in pairs) for i in range(num)}) == 1


def test_without_a_prior_to_speak_of_a_chain_gives_its_log_odds():
    scores = bradley_terry(3, [(0, 1, 0.8), (1, 2, 0.8)], prior=1e6)
    assert scores == pytest.approx([math.log(4), 0.0, -math.log(4)], abs=1e-6)


def test_one_certain_win_is_held_by_the_prior():
    # 1 - sigmoid(2x) = x at x = 0.3374
    assert bradley_terry(2, [(0, 1, 1.0)], prior=1.0) == pytest.approx([0.3374, -0.3374], abs=1e-4)


def test_the_gradient_vanishes_at_the_scores_whose_mean_is_zero():
    source = random.Random(3)
    comparisons = [(a, b, source.choice([0.0, 1.0, source.random()])) for a, b in schedule(12)]
    scores = bradley_terry(12, comparisons, prior=2.0)
    assert sum(scores) == pytest.approx(0.0, abs=1e-7)
    for i, score in enumerate(scores):
        pull = sum(p - sigmoid(scores[a] - scores[b]) for a, b, p in comparisons if a == i)
        push = sum(p - sigmoid(scores[a] - scores[b]) for a, b, p in comparisons if b == i)
        assert pull - push == pytest.approx(score / 4.0, abs=1e-7)


def test_it_converges_on_many_certain_verdicts_and_a_weak_prior():
    comparisons = [(a, b, 1.0) for a, b in schedule(6)] * 50
    scores = bradley_terry(6, comparisons, prior=100.0)
    assert scores == sorted(scores, reverse=True)
    first = sum(1 - sigmoid(scores[0] - scores[b]) for b in range(1, 6)) * 50
    assert first == pytest.approx(scores[0] / 1e4, rel=1e-4)


def test_equal_evidence_gives_equal_scores_in_any_order():
    ring = [(i, (i + 1) % 5, 0.7) for i in range(5)]
    assert bradley_terry(5, ring) == [0.0] * 5
    comparisons = [(a, b, 0.9) for a, b in schedule(6)]
    backwards = [(b, a, 0.1) for a, b in reversed(schedule(6))]
    assert bradley_terry(6, comparisons) == bradley_terry(6, backwards)


def test_nothing_compared_leaves_zeros():
    assert bradley_terry(3, []) == [0.0, 0.0, 0.0]
    assert bradley_terry(0, []) == []
    assert bradley_terry(3, [(0, 1, 0.9)])[2] == 0.0


@pytest.mark.parametrize("bad", [(0, 2, 0.5), (0, 0, 0.5), (0, 1, math.nan), (0, 1, 1.1), (-1, 1, 0.5)])
def test_a_comparison_that_makes_no_sense_is_refused(bad):
    with pytest.raises(ValueError, match="give two of 2 candidates and a probability"):
        bradley_terry(2, [bad])


def test_the_largest_connected_set_is_found():
    assert connected(6, [(0, 1), (2, 3), (3, 4)]) == [2, 3, 4]
    assert connected(4, [(2, 3), (0, 1)]) == [0, 1]
    assert connected(3, []) == [0]
    assert connected(1, []) == [0]
    assert connected(0, []) == []


def test_ranks_go_by_score_and_then_by_key():
    assert order([0.1, 0.5, 0.1, -2.0], [(1, 0), (0, 0), (0, 1), (0, 2)]) == [3, 1, 2, 4]
