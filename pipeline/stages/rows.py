"""One record's published lines -> its rows in the datasets, before filters.

Which texts are trained on and which two are a pair is decided here. A loss is a word that says why there is no row.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

from constitution.verdicts import ensemble
from pipeline.errors import CorruptError
from pipeline.records import Line
from pipeline.stages.filters import is_same


class Trace(NamedTuple):
    """What the stages said of one record; None where a stage has no line of it."""

    prompt: Line
    drafts: Line | None
    chains: Line | None
    ranked: Line | None


class Target(NamedTuple):
    """A text to learn from or to compare.

    name: draft-SAMPLE, revision-SAMPLE-ROUND (from 1) or given-SAMPLE; unique in its record.
    revised: the text that it revised, None if it is no revision. principles: those of the rounds that led to it.
    """

    name: str
    text: str
    finish_reason: str
    revised: str | None
    principles: frozenset[str]
    label_source: str = "ai"

    @property
    def sample(self) -> int:
        return int(self.name.split("-")[1])

    @property
    def round(self) -> int:
        """0 for a draft or a given answer."""
        return int((*self.name.split("-"), "0")[2])


class Direct(NamedTuple):
    """The judge's own verdict on two texts. p: that the first is better, mean over principles, or None."""

    status: str
    p: float | None
    principles: frozenset[str]


class Pair(NamedTuple):
    """p: probability that chosen is better, above 0.5. scores: None for a text that was not ranked."""

    chosen: Target
    rejected: Target
    p: float
    score_chosen: float | None
    score_rejected: float | None
    principles: frozenset[str]


def sft_targets(trace: Trace, which: str) -> Iterator[Target | str]:
    """The completions to imitate: best (of the ranking), last (of each chain), all, or improved revisions."""
    if which == "best":
        yield _best(trace)
        return
    if trace.chains is None:
        yield "no_chain"
        return
    for chain in _chains(trace):
        if which == "last":
            yield _last(trace, chain["sample"])
            continue
        if not chain["rounds"]:
            yield "no_revision"
        for target, entry in _revisions(trace, chain["sample"]):
            verdict = entry["verdict"]
            yield target if which == "all" or verdict == "improved" else f"verdict_{verdict}"


def candidate_targets(trace: Trace) -> list[Target]:
    """The ranked candidates, in the order of the rank line."""
    return [_candidate(trace, candidate) for candidate in trace.ranked["candidates"]] if trace.ranked else []


def pairs(trace: Trace, which: str, *, tie_band: float, margin: float) -> Iterator[Pair | str]:
    """Preference pairs, labelled by the direct comparison of just these two texts: best-worst, all, revision-draft.

    tie_band: |p - 0.5| up to this is a tie. margin: p - 0.5 must reach this.
    """
    if which == "revision-draft":
        if trace.chains is None:
            yield "no_chain"
        for chain in _chains(trace):
            compared = _revision_draft(trace, chain["sample"])
            yield _labelled(*compared, tie_band, margin) if compared else "no_revision"
        return
    if trace.ranked is None:
        yield "not_ranked"
        return
    targets = candidate_targets(trace)
    candidates = trace.ranked["candidates"]
    if len(candidates) < 2:
        yield "single_candidate"
        return
    places = sorted(range(len(candidates)), key=lambda place: candidates[place]["rank"])
    wanted = [(places[0], places[-1])] if which == "best-worst" else itertools.combinations(places, 2)
    for high, low in wanted:
        scores = (candidates[high]["score"], candidates[low]["score"])
        pair = _labelled(targets[high], targets[low], direct(trace.ranked, high, low), scores, tie_band, margin)
        contradicts = isinstance(pair, Pair) and pair.chosen is not targets[high]
        yield "contradicted" if which == "best-worst" and contradicts else pair


def direct(ranked: Line, first: int, second: int) -> Direct | None:
    """What the judge said when asked about these two candidates, None if it was not asked."""
    found = [c for c in ranked["comparisons"] if {c["a"], c["b"]} == {first, second}]
    if not found:
        return None
    counted = [c for c in found if c.get("p") is not None]
    principles = frozenset(c["principle"] for c in counted)
    if not counted:
        return Direct(found[0]["status"], None, principles)
    status = "ok" if any(c["status"] == "ok" for c in counted) else "tie"
    return Direct(status, ensemble([c["p"] if c["a"] == first else 1 - c["p"] for c in counted]), principles)


def _labelled(
    first: Target,
    second: Target,
    verdict: Direct | None,
    scores: tuple[float | None, float | None],
    tie_band: float,
    margin: float,
) -> Pair | str:
    if verdict is None:
        return "not_compared"
    if verdict.p is None:
        return f"comparison_{verdict.status}"
    distance = abs(verdict.p - 0.5)
    if verdict.status == "tie" or distance <= tie_band:
        return "tie"
    if distance < margin:
        return "margin"
    principles = verdict.principles | first.principles | second.principles
    if verdict.p > 0.5:
        return Pair(first, second, verdict.p, *scores, principles)
    return Pair(second, first, 1 - verdict.p, scores[1], scores[0], principles)


def _best(trace: Trace) -> Target | str:
    if trace.ranked is None:
        return "not_ranked"
    candidate = min(trace.ranked["candidates"], key=lambda candidate: candidate["rank"])
    asked = {c["principle"] for c in (*trace.ranked["comparisons"], *trace.ranked.get("grades", ()))}
    target = _candidate(trace, candidate)
    return target._replace(principles=target.principles | asked)


def _candidate(trace: Trace, candidate: Line) -> Target:
    sample, text = candidate["sample"], candidate["text"]
    if candidate["origin"] == "given":
        return Target(f"given-{sample}", text, "stop", None, frozenset(), "given")
    if candidate["origin"] == "draft":
        found = _draft(trace, sample)
    else:
        found = dict(enumerate((target for target, _ in _revisions(trace, sample)), start=1)).get(candidate["round"])
    if found is None or found.text != text:
        raise CorruptError(
            f"rank: {trace.prompt['id']}: {candidate['origin']} {sample}/{candidate['round']} is not the text that the "
            "earlier stages hold; run `cai rank` again"
        )
    return found


def _draft(trace: Trace, sample: int) -> Target | None:
    for completion in trace.drafts["completions"] if trace.drafts else ():
        if completion["sample"] == sample:
            return Target(f"draft-{sample}", completion["text"], completion["finish_reason"], None, frozenset())
    return None


def _chains(trace: Trace) -> list[Line]:
    return trace.chains["chains"] if trace.chains else []


def _revisions(trace: Trace, sample: int) -> Iterator[tuple[Target, Line]]:
    """Every round of a sample's chain: its revision, and its entry.

    A round starts from the last revision that was not judged worse, so its principles are those of these rounds.
    """
    draft = _draft(trace, sample)
    before, ended = (draft.text, draft.finish_reason) if draft else (None, "stop")
    led_here: frozenset[str] = frozenset()
    rounds: list[Line] = next((chain["rounds"] for chain in _chains(trace) if chain["sample"] == sample), [])
    for n, entry in enumerate(rounds, start=1):
        principles = led_here | ({entry["principle"]} if entry["principle"] else set())
        name = f"revision-{sample}-{n}"
        # A copy of a text that was cut is cut too, however its own reply ended.
        is_copy = before is not None and is_same(entry["revision"], before)
        finish_reason = ended if is_copy else entry["finish_reason"]
        yield Target(name, entry["revision"], finish_reason, before, principles), entry
        if entry["verdict"] != "worse":
            before, ended, led_here = entry["revision"], finish_reason, principles


def _last(trace: Trace, sample: int) -> Target | str:
    """Where the chain ended: its last revision that was not judged worse. A copy stands for what it copied."""
    kept = [target for target, entry in _revisions(trace, sample) if entry["verdict"] != "worse"]
    changed = [target for target in kept if target.text != target.revised]
    return (changed or kept)[-1] if kept else "no_revision"


class _Compared(NamedTuple):
    """Arguments of `_labelled` that come from the record."""

    first: Target
    second: Target
    verdict: Direct | None
    scores: tuple[float | None, float | None]


def _revision_draft(trace: Trace, sample: int) -> _Compared | None:
    """The chain's last revision that was compared with the draft itself, in ranking or in its own round.

    Revisions that were kept go before those that were judged worse; the label is the comparison's in any case.
    """
    draft = _draft(trace, sample)
    if draft is None:
        return None
    changed = [found for found in _revisions(trace, sample) if found[0].text != draft.text]
    last_first = sorted(reversed(changed), key=lambda found: found[1]["verdict"] == "worse")
    candidates = trace.ranked["candidates"] if trace.ranked else []
    places = {candidate["text"]: place for place, candidate in enumerate(candidates)}
    compared = [_compared(trace, target, entry, draft, places) for target, entry in last_first]
    return next((found for found in compared if found.verdict is not None), next(iter(compared), None))


def _compared(trace: Trace, target: Target, entry: Line, draft: Target, places: dict[str, int]) -> _Compared:
    """A revision against the draft: as ranking found, else as the round itself found if it revised the draft."""
    here, there = places.get(target.text), places.get(draft.text)
    scores = [
        None if at is None or trace.ranked is None else trace.ranked["candidates"][at]["score"] for at in (here, there)
    ]
    verdict = direct(trace.ranked, here, there) if trace.ranked and here is not None and there is not None else None
    if verdict is None and target.revised == draft.text:
        verdict = _verified(entry)
    return _Compared(target, draft, verdict, (scores[0], scores[1]))


def _verified(entry: Line) -> Direct | None:
    """The verdict of a round on its own revision, None if it was not asked for."""
    principles = frozenset({entry["principle"]})
    if entry["verdict"] == "unverified":
        return None
    if entry["verdict"] == "abstain":
        return Direct("abstain", None, principles)
    return Direct("tie" if entry["verdict"] == "same" else "ok", entry["p"], principles)
