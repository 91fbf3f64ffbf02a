"""From label probabilities to verdicts: one reading, both orders, ensembles, revisions, grades.

Nothing that could not be read becomes a number: a reading abstains, and what is built on it is None or `abstain`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

from constitution.wording import COMPARISON_LABELS, GRADE_LABELS

Order = Literal["average", "agree-or-tie", "single"]
Verdict = Literal["improved", "worse", "same", "abstain"]

IMPROVED_FROM = 0.55
"""Smallest mean probability at which a revision counts as improved; 1 minus it, at most, as worse."""


class Reading(NamedTuple):
    """What a judge said.

    probabilities: label -> share of the labels' mass, sums to 1; empty with abstain. label_mass: what the labels that
    were read hold of the reply's whole probability, in [0, 1].
    """

    probabilities: dict[str, float]
    label_mass: float
    status: Literal["ok", "abstain"]


class Comparison(NamedTuple):
    """Two completions a and b, compared. p, p_ab, p_ba: probability that a is better, see `compare_orders`.

    p is None unless status is ok or tie. failed: the requests got no reply; only a stage can know and say that.
    """

    p: float | None
    p_ab: float | None
    p_ba: float | None
    status: Literal["ok", "tie", "abstain", "failed"]


def read_labels(logprobs: Mapping[str, float] | None, labels: Sequence[str], *, min_mass: float = 0.1) -> Reading:
    """Normalises the labels' probabilities over the labels.

    logprobs: label -> natural-log probability, of those labels that could be read; None if none could. Abstains if the
    labels hold less than `min_mass`, or if a label was not read while as much as `min_mass` is unaccounted for (it may
    lie outside a server's top list). Otherwise a label that was not read counts 0, wrong by less than `min_mass`.
    A value that is no log-probability (NaN, above 0) makes the whole reading abstain.
    """
    given = {label: logprobs[label] for label in labels if label in logprobs} if logprobs else {}
    if any(math.isnan(value) or value > 1e-3 for value in given.values()):
        return Reading({}, 0.0, "abstain")
    shares = {label: math.exp(min(value, 0.0)) for label, value in given.items()}
    mass = sum(shares.values())
    if mass > 1.0 + 1e-3 * len(labels):
        return Reading({}, 0.0, "abstain")
    mass_read = min(mass, 1.0)
    complete = len(given) == len(labels) or mass_read > 1.0 - min_mass
    if mass <= 0.0 or mass < min_mass or not complete:
        return Reading({}, mass_read, "abstain")
    return Reading({label: shares.get(label, 0.0) / mass for label in labels}, mass_read, "ok")


def read_vote(text: str, labels: Sequence[str]) -> str | None:
    """The label that a sampled reply is, or None.

    Its first line has to be the label and nothing else, but for brackets, quotes, asterisks, a full stop or a colon
    around it; a label within a sentence, or in other letter case, is no vote.
    """
    first = text.strip().partition("\n")[0].strip(" \t\r()[]\"'*.:")
    return first if first in labels else None


def prefers_a(reading: Reading, *, a_first: bool) -> float | None:
    """Probability that candidate a is better, from a reading of COMPARISON_LABELS; None if it abstained.

    Label A names the candidate that was shown first: with b shown first, that a is better is what label B says.
    """
    if reading.status != "ok":
        return None
    return reading.probabilities[COMPARISON_LABELS[0 if a_first else 1]]


def compare_orders(
    p_ab: float | None,
    p_ba: float | None,
    *,
    order: Order = "average",
    tie_band: float = 0.0,
    clamp: tuple[float, float] | None = None,
) -> Comparison:
    """One comparison from its two orders.

    p_ab: P(a is better) as judged with a shown first. p_ba: P(a is better) too, NOT of b, as judged with b shown first,
    so a judge without position bias has p_ab = p_ba; use `prefers_a`. None = abstained.
    order: average, p is the mean; agree-or-tie, the mean if both orders prefer the same candidate, else a tie at 0.5;
    single, p_ab alone. clamp: (low, high) around 0.5, put on each order before anything else (CAI section 4.1: 0.4 to
    0.6 after chain of thought). tie_band: |p - 0.5| up to this is a tie. Without a reading that is needed: abstain.
    """
    p_ab, p_ba = _clamped(p_ab, clamp), _clamped(p_ba, clamp)
    if order not in ("average", "agree-or-tie", "single"):
        raise ValueError(f"order {order!r}: use average, agree-or-tie or single")
    if p_ab is None or (p_ba is None and order != "single"):
        return Comparison(None, p_ab, p_ba, "abstain")
    if order == "single" or p_ba is None:
        p = p_ab
    elif order == "agree-or-tie" and (p_ab - 0.5) * (p_ba - 0.5) <= 0.0:
        return Comparison(0.5, p_ab, p_ba, "tie")
    else:
        p = (p_ab + p_ba) / 2
    return Comparison(p, p_ab, p_ba, "tie" if abs(p - 0.5) <= tie_band else "ok")


def same_position(p_ab: float, p_ba: float) -> bool:
    """Whether the judge preferred the same POSITION in both orders; arguments as in `compare_orders`."""
    return (p_ab > 0.5 > p_ba) or (p_ab < 0.5 < p_ba)


def judge_revision(p_ab: float | None, p_ba: float | None) -> Verdict:
    """What a revision (a) did to the text that it revised (b); arguments as in `compare_orders`.

    improved: mean at least 0.55 and both orders above 0.5. worse: the mirror. abstain: an order has no reading.
    """
    if p_ab is None or p_ba is None:
        return "abstain"
    mean = (p_ab + p_ba) / 2
    if mean >= IMPROVED_FROM and min(p_ab, p_ba) > 0.5:
        return "improved"
    if mean <= 1.0 - IMPROVED_FROM + 1e-12 and max(p_ab, p_ba) < 0.5:
        return "worse"
    return "same"


def ensemble(ps: Sequence[float | None]) -> float | None:
    """Mean over several principles' probabilities for the same pair; None counts for nothing, and gives None alone."""
    read = [p for p in ps if p is not None]
    return sum(read) / len(read) if read else None


def grade(reading: Reading) -> float | None:
    """Mean of the grades 1 to 10, weighted by their probabilities; None if the reading of GRADE_LABELS abstained."""
    if reading.status != "ok":
        return None
    return sum(int(label) * reading.probabilities[label] for label in GRADE_LABELS)


def rescale(grade: float) -> float:
    """A grade in [1, 10] as a reward in [-1, 1] (d-RLAIF, arXiv 2309.00267)."""
    return (grade - 5.5) / 4.5


def _clamped(p: float | None, clamp: tuple[float, float] | None) -> float | None:
    if p is None:
        return None
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"{p} is not a probability")
    if clamp is None:
        return p
    low, high = clamp
    if not 0.0 <= low <= 0.5 <= high <= 1.0:
        raise ValueError(f"clamp [{low}, {high}]: give two numbers around 0.5, such as [0.4, 0.6]")
    return min(max(p, low), high)
