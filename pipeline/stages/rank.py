"""AI feedback: candidates, compared and put in order (CAI, Bai et al. 2022, section 4.1; both orders: Lee et al. 2023).

Every scheduled pair is judged under every chosen principle, all at once. The scores are Bradley-Terry strengths of the
soft verdicts, or with `mode: graded` the mean grade. The judge's own probability for the best against the worst
candidate is asked for if it was not scheduled: that labels a preference pair, never a difference of scores.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from constitution.principles import Constitution, Principle
from constitution.prompts import GRADE_LABELS, grade_prompt
from constitution.ranking import bradley_terry, connected, order, schedule
from constitution.verdicts import grade, rescale, same_position
from pipeline.config.settings import RankSettings
from pipeline.driver import Ask
from pipeline.errors import RequestFailed
from pipeline.records import Failure, Line, Outcome, Record
from pipeline.stages.asking import Judgement, Voice, ask_labels, compare, lost, together


@dataclass(frozen=True)
class Rank:
    """What ranking a record needs. with_given: the answers that came with the prompt are candidates too."""

    constitution: Constitution
    judge: Voice
    settings: RankSettings
    seed: int
    with_given: bool = True


class Candidate(NamedTuple):
    """origin: draft | revision | given. round: 0 for a draft or a given answer, n for the n-th revision."""

    origin: str
    sample: int
    round: int
    model: str
    text: str


async def rank(record: Record, ask: Ask, *, using: Rank) -> Outcome:
    """Scores and orders the candidates of a record; fails those that no comparison connects to the others."""
    found = candidates(record, using.settings.candidates, with_given=using.with_given)
    if not found:
        return Outcome(None, (Failure(-1, -1, "rank", "no_candidates", "no draft, revision or given answer", 1),))
    principles = _principles(record, using)
    if using.settings.mode == "graded":
        return await _grade(record, ask, found, principles, using)
    comparisons, failures = await _compare(record, ask, found, schedule(len(found)), principles, using)
    kept = connected(len(found), [(c["a"], c["b"]) for c in comparisons if "p" in c])
    if len(kept) == 1 < len(found):
        kept = []
    failures += [
        Failure(c.sample, c.round, "comparison", "unrankable", "no verdict connects it to the others", 1)
        for index, c in enumerate(found)
        if index not in kept
    ]
    if not kept:
        return Outcome(None, tuple(failures))
    place = {index: new for new, index in enumerate(kept)}
    found = [found[index] for index in kept]
    comparisons = [
        {**c, "a": place[c["a"]], "b": place[c["b"]]} for c in comparisons if {c["a"], c["b"]} <= place.keys()
    ]
    scores = bradley_terry(len(found), [(c["a"], c["b"], c["p"]) for c in comparisons if "p" in c])
    return await _line(record, ask, found, scores, comparisons, failures, principles, using)


def candidates(record: Record, which: str, *, with_given: bool = True) -> list[Candidate]:
    """The texts to rank, each once: given answers and drafts, and of every chain its end, or with `all` every revision.

    A chain's end is its last revision that was not judged worse.
    """
    given = record.given if with_given else ()
    found = [Candidate("given", sample, 0, "", text) for sample, text in enumerate(given)]
    drafts = record.lines.get("generate", {}).get("completions", [])
    found += [Candidate("draft", c["sample"], 0, c["model"], c["text"]) for c in drafts]
    authors = {c["sample"]: c["model"] for c in drafts}
    for chain in record.lines.get("critique-revise", {}).get("chains", []):
        sample, rounds = chain["sample"], list(enumerate(chain["rounds"], start=1))
        kept = [(n, entry) for n, entry in rounds if which == "all" or entry["verdict"] != "worse"]
        if which == "ends":
            # A later round may have copied the text; the round that wrote it is the one to name.
            kept = [(n, entry) for n, entry in kept if entry["revision"] == kept[-1][1]["revision"]][:1]
        # Runs made before rounds named their model have the author's.
        models = [entry.get("model", authors[sample]) for _, entry in kept]
        found += [
            Candidate("revision", sample, n, model, entry["revision"])
            for (n, entry), model in zip(kept, models, strict=True)
        ]
    first: dict[str, Candidate] = {}
    for candidate in sorted(found, key=lambda c: (c.round, c.sample)):
        first.setdefault(candidate.text, candidate)
    return sorted(first.values(), key=lambda c: (c.sample, c.round))


def _principles(record: Record, using: Rank) -> tuple[Principle, ...]:
    if using.settings.principles == "all":
        return tuple(using.constitution)
    return using.constitution.draw_many(using.seed, record.id, using.settings.principles)


async def _compare(
    record: Record,
    ask: Ask,
    found: Sequence[Candidate],
    pairs: Sequence[tuple[int, int]],
    principles: Sequence[Principle],
    using: Rank,
) -> tuple[list[Line], list[Failure]]:
    """A comparison line for every pair and principle; a failed request is one with status `failed`, and a failure."""
    asked = [(a, b, principle) for a, b in pairs for principle in principles]
    judged = await together(_judge(record, ask, found[a], found[b], principle, using) for a, b, principle in asked)
    lines = [
        {"a": a, "b": b, "principle": principle.id, **verdict}
        for (a, b, principle), (verdict, _) in zip(asked, judged, strict=True)
    ]
    return lines, [failure for _, failure in judged if failure]


async def _judge(
    record: Record, ask: Ask, a: Candidate, b: Candidate, principle: Principle, using: Rank
) -> tuple[Line, Failure | None]:
    coin = hashlib.sha256(f"{using.seed}\0{record.id}\0{a.text}\0{b.text}".encode()).digest()[0]
    texts, a_first = (a.text, b.text), coin % 2 == 0
    try:
        judgement = await compare(ask, using.judge, record.messages, texts, principle, using.settings, a_first=a_first)
    except RequestFailed as error:
        return {"status": "failed", "method": "", "label_mass": 0.0}, lost(error, a.sample, a.round)
    return _verdict(judgement), None


def _verdict(judgement: Judgement) -> Line:
    comparison = judgement.comparison
    line: Line = {}
    for name in ("p_ab", "p_ba"):
        value = getattr(comparison, name)
        if value is not None:
            line[name] = value
    if comparison.status in ("ok", "tie"):
        line["p"] = comparison.p
    return {**line, "status": comparison.status, "method": judgement.method, "label_mass": judgement.label_mass}


async def _grade(
    record: Record, ask: Ask, found: list[Candidate], principles: Sequence[Principle], using: Rank
) -> Outcome:
    """Scores are mean grades in [-1, 1] (d-RLAIF, Lee et al. 2023)."""
    voice = using.judge
    asked = [(index, principle) for index in range(len(found)) for principle in principles]

    async def one(index: int, principle: Principle) -> Line | Failure:
        prompt = grade_prompt(record.messages, found[index].text, principle, wording=voice.wording, style=voice.style)
        where = (found[index].sample, found[index].round)
        try:
            reading, method = await ask_labels(ask, voice, prompt, "grade", GRADE_LABELS)
        except RequestFailed as error:
            return lost(error, *where)
        if reading.status != "ok":
            return Failure(
                *where, "grade", "abstain", f"the grades hold {reading.label_mass:.3f} of the probability", 1
            )
        return {
            "candidate": index,
            "principle": principle.id,
            "grade": grade(reading),
            "method": method,
            "label_mass": reading.label_mass,
        }

    answers = await together(one(index, principle) for index, principle in asked)
    failures = [answer for answer in answers if isinstance(answer, Failure)]
    grades = [answer for answer in answers if isinstance(answer, dict)]
    kept = [i for i in range(len(found)) if sum(g["candidate"] == i for g in grades) == len(principles)]
    if not kept:
        return Outcome(None, tuple(failures))
    place = {index: new for new, index in enumerate(kept)}
    grades = [{**g, "candidate": place[g["candidate"]]} for g in grades if g["candidate"] in place]
    found = [found[index] for index in kept]
    scores = [_mean_grade(grades, index) for index in range(len(found))]
    outcome = await _line(record, ask, found, scores, [], failures, principles, using)
    return outcome._replace(line={**outcome.line, "grades": grades} if outcome.line else None)


def _mean_grade(grades: Sequence[Line], index: int) -> float:
    values = [rescale(g["grade"]) for g in grades if g["candidate"] == index]
    return sum(values) / len(values)


async def _line(
    record: Record,
    ask: Ask,
    found: Sequence[Candidate],
    scores: Sequence[float],
    comparisons: list[Line],
    failures: list[Failure],
    principles: Sequence[Principle],
    using: Rank,
) -> Outcome:
    ranks = order(scores, [(c.sample, c.round) for c in found])
    best, worst = ranks.index(min(ranks)), ranks.index(max(ranks))
    if best != worst and not any({c["a"], c["b"]} == {best, worst} for c in comparisons):
        asked, lost_ones = await _compare(record, ask, found, [(best, worst)], principles, using)
        comparisons, failures = comparisons + asked, failures + lost_ones
    lines = [
        {**candidate._asdict(), "score": score, "rank": place}
        for candidate, score, place in zip(found, scores, ranks, strict=True)
    ]
    return Outcome({"id": record.id, "candidates": lines, "comparisons": comparisons}, tuple(failures))


def tally(outcome: Outcome) -> Mapping[str, int]:
    """Comparisons by status, and how many named the same position in both orders; how many requests were lost.

    comparisons: with a reply or lost; with `mode: graded` grades count too. lost_comparisons: also of records that
    failed for it.
    """
    line = outcome.line or {"comparisons": [], "candidates": []}
    counts: Counter[str] = Counter(f"comparison_{c['status']}" for c in line["comparisons"])
    both = [(c["p_ab"], c["p_ba"]) for c in line["comparisons"] if "p_ab" in c and "p_ba" in c]
    counts["both_orders"] = len(both)
    counts["same_position"] = sum(same_position(p_ab, p_ba) for p_ab, p_ba in both)
    counts["candidates"] = len(line["candidates"])
    counts["lost_comparisons"] = sum(f.reason not in _NOT_LOST for f in outcome.failures)
    answered = sum(c["status"] != "failed" for c in line["comparisons"]) + len(line.get("grades", ()))
    counts["comparisons"] = answered + counts["lost_comparisons"]
    return counts


_NOT_LOST = ("unrankable", "no_candidates", "abstain")
"""Reasons that stand for an answer that said nothing, or for no question at all."""
