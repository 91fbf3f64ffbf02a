"""Readings, orders, clamps, revisions and grades, on numbers worked by hand."""

import math

import pytest

from constitution.verdicts import (
    Reading,
    compare_orders,
    ensemble,
    grade,
    judge_revision,
    prefers_a,
    read_labels,
    read_vote,
    rescale,
    same_position,
)
from constitution.wording import GRADE_LABELS

AB = ("A", "B")


def logs(**shares: float) -> dict[str, float]:
    return {label: math.log(share) for label, share in shares.items()}


def test_two_labels_are_normalised_over_their_mass():
    reading = read_labels(logs(A=0.6, B=0.2), AB)
    assert reading.status == "ok"
    assert reading.label_mass == pytest.approx(0.8)
    assert reading.probabilities == pytest.approx({"A": 0.75, "B": 0.25})


def test_labels_of_a_small_mass_abstain():
    assert read_labels(logs(A=0.05, B=0.04), AB) == Reading({}, pytest.approx(0.09), "abstain")
    assert read_labels(logs(A=0.05, B=0.04), AB, min_mass=0.05).status == "ok"


def test_a_label_outside_the_list_abstains_unless_little_is_unaccounted_for():
    assert read_labels(logs(A=0.85), AB).status == "abstain"
    reading = read_labels(logs(A=0.95), AB)
    assert reading.probabilities == {"A": 1.0, "B": 0.0}


def test_no_reading_abstains():
    for nothing in (None, {}, {"C": -0.1}, {"A": -math.inf, "B": -math.inf}):
        assert read_labels(nothing, AB) == Reading({}, 0.0, "abstain")


def test_what_is_no_log_probability_abstains():
    for value in (math.nan, 0.5, math.inf):
        assert read_labels({"A": value, "B": -1.0}, AB).status == "abstain"
    assert read_labels({"A": -0.01, "B": -0.01}, AB).status == "abstain"


def test_one_impossible_label_is_a_reading():
    reading = read_labels({"A": math.log(0.5), "B": -math.inf}, AB)
    assert reading.probabilities == {"A": 1.0, "B": 0.0}


def test_the_first_label_means_a_only_when_a_came_first():
    reading = read_labels(logs(A=0.9, B=0.1), AB)
    assert prefers_a(reading, a_first=True) == pytest.approx(0.9)
    assert prefers_a(reading, a_first=False) == pytest.approx(0.1)
    assert prefers_a(Reading({}, 0.0, "abstain"), a_first=True) is None


def test_both_orders_are_averaged():
    assert compare_orders(0.9, 0.5) == (pytest.approx(0.7), 0.9, 0.5, "ok")
    assert compare_orders(0.9, 0.1).status == "tie"
    assert compare_orders(0.9, 0.1).p == pytest.approx(0.5)


def test_orders_that_disagree_tie_when_agreement_is_asked_for():
    assert compare_orders(0.95, 0.4, order="agree-or-tie") == (0.5, 0.95, 0.4, "tie")
    assert compare_orders(0.95, 0.6, order="agree-or-tie") == (pytest.approx(0.775), 0.95, 0.6, "ok")
    assert compare_orders(0.2, 0.4, order="agree-or-tie").p == pytest.approx(0.3)


def test_a_single_order_needs_only_the_first():
    assert compare_orders(0.8, None, order="single") == (0.8, 0.8, None, "ok")
    assert compare_orders(None, 0.8, order="single") == (None, None, 0.8, "abstain")


def test_without_one_order_the_comparison_abstains():
    for order in ("average", "agree-or-tie"):
        assert compare_orders(0.8, None, order=order) == (None, 0.8, None, "abstain")
        assert compare_orders(None, 0.8, order=order).p is None


def test_the_tie_band_is_a_distance_from_one_half():
    assert compare_orders(0.6, 0.5, tie_band=0.1).status == "tie"
    assert compare_orders(0.4, 0.5, tie_band=0.1).status == "tie"
    assert compare_orders(0.7, 0.6, tie_band=0.1).status == "ok"


def test_the_clamp_is_put_on_each_order():
    assert compare_orders(0.99, 0.3, clamp=(0.4, 0.6)) == (pytest.approx(0.5), 0.6, 0.4, "tie")
    assert compare_orders(0.99, 0.55, clamp=(0.4, 0.6)).p == pytest.approx(0.575)


def test_what_is_no_probability_clamp_or_order_is_refused():
    with pytest.raises(ValueError, match="not a probability"):
        compare_orders(math.nan, 0.5)
    with pytest.raises(ValueError, match=r"around 0\.5"):
        compare_orders(0.5, 0.5, clamp=(0.6, 0.9))
    with pytest.raises(ValueError, match="average, agree-or-tie or single"):
        compare_orders(0.5, 0.5, order="both")  # type: ignore[arg-type]


def test_the_same_position_in_both_orders_is_noticed():
    assert same_position(0.9, 0.2)  # the first one, twice
    assert same_position(0.1, 0.8)  # the second one, twice
    assert not same_position(0.9, 0.6)
    assert not same_position(0.2, 0.1)
    assert not same_position(0.5, 0.1)


@pytest.mark.parametrize(
    ("p_ab", "p_ba", "verdict"),
    [
        (0.6, 0.52, "improved"),
        (0.9, 0.5, "same"),
        (0.9, 0.4, "same"),
        (0.54, 0.53, "same"),
        (0.5, 0.5, "same"),
        (0.4, 0.48, "worse"),
        (0.1, 0.5, "same"),
        (0.46, 0.47, "same"),
        (None, 0.9, "abstain"),
        (0.9, None, "abstain"),
        (0.56, 0.54, "improved"),
        (0.44, 0.46, "worse"),
        (0.55, 0.55, "improved"),
        (0.45, 0.45, "worse"),
    ],
)
def test_a_revision_is_judged_as_the_design_says(p_ab, p_ba, verdict):
    assert judge_revision(p_ab, p_ba) == verdict


def test_an_ensemble_is_the_mean_of_what_was_read():
    assert ensemble([0.9, None, 0.6]) == pytest.approx(0.75)
    assert ensemble([None]) is None
    assert ensemble([]) is None


def test_a_grade_is_the_weighted_mean_and_rescales_to_a_reward():
    shares = {label: 0.0 for label in GRADE_LABELS} | {"2": 0.25, "10": 0.75}
    assert grade(Reading(shares, 1.0, "ok")) == pytest.approx(8.0)
    assert grade(Reading({}, 0.0, "abstain")) is None
    assert (rescale(1.0), rescale(10.0), rescale(5.5)) == (-1.0, 1.0, 0.0)


@pytest.mark.parametrize("text", ["A", " A\n", "(A)", "**A**.", '"A"', "A:\nbecause B is rude", "[A]"])
def test_a_reply_that_is_a_label_is_a_vote(text: str) -> None:
    assert read_vote(text, AB) == "A"


@pytest.mark.parametrize("text", ["", "a", "A or B", "Answer: A", "The answer is A.", "It is A", "AB", "\u0410"])
def test_a_reply_that_is_more_or_less_than_a_label_is_no_vote(text: str) -> None:
    assert read_vote(text, AB) is None


def test_a_grade_is_read_whole() -> None:
    assert [read_vote(text, GRADE_LABELS) for text in ("10.", "1", "11", "10/10")] == ["10", "1", None, None]
