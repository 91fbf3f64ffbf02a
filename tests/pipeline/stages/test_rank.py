from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from constitution.principles import Constitution
from constitution.ranking import bradley_terry
from pipeline.config.settings import CritiqueReviseSettings, RankSettings
from pipeline.engines.base import Reply, Request
from pipeline.errors import RequestFailed
from pipeline.records import Outcome, Record
from pipeline.stages.asking import Voice
from pipeline.stages.critique_revise import CritiqueRevise, critique_revise
from pipeline.stages.rank import Rank, candidates, rank, tally
from tests.support import Told, a_or_b, label_reply, run_stage, shown

CONSTITUTION = Constitution.default()
Judge = Callable[[str, str], float | Reply]


def record_of(
    *drafts: str, chains: dict[int, list[tuple[str, str]]] | None = None, given: tuple[str, ...] = ()
) -> Record:
    """chains: sample -> (revision, verdict) of its rounds."""
    record = Record("r1", [{"role": "user", "content": "Why?"}], 0, given=list(given))
    if drafts:
        completions = [
            {"sample": n, "text": text, "model": "m", "finish_reason": "stop"} for n, text in enumerate(drafts)
        ]
        record.lines["generate"] = {"id": "r1", "completions": completions}
    if chains is not None:
        record.lines["critique-revise"] = {
            "id": "r1",
            "chains": [
                {"sample": n, "rounds": [{"revision": text, "verdict": verdict} for text, verdict in rounds]}
                for n, rounds in chains.items()
            ],
        }
    return record


def judge(say: Judge) -> Told:
    def answer(request: Request) -> Reply:
        said = say(*shown(request))
        return said if isinstance(said, Reply) else a_or_b(said)

    return Told(answer)


def ranked(folder: Path, engine: Told, record: Record, *, seed: int = 0, **settings: Any) -> Outcome:
    using = Rank(CONSTITUTION, Voice(engine, CONSTITUTION.wording), RankSettings(**settings), seed)
    return run_stage(folder, rank, record, using=using)


def by_value(**values: float) -> Judge:
    """A judge without position bias: logistic in the difference of the texts' values."""
    return lambda a, b: 1 / (1 + math.exp(values[b] - values[a]))


def line_of(outcome: Outcome) -> dict[str, Any]:
    assert outcome.line, outcome.failures
    return outcome.line


def test_candidates_come_in_order_with_scores_and_ranks(tmp_path: Path) -> None:
    line = line_of(ranked(tmp_path, judge(by_value(a=0, b=2, c=1)), record_of("a", "b", "c")))
    assert line["id"] == "r1"
    assert [(c["origin"], c["sample"], c["round"], c["model"], c["text"], c["rank"]) for c in line["candidates"]] == [
        ("draft", 0, 0, "m", "a", 3), ("draft", 1, 0, "m", "b", 1), ("draft", 2, 0, "m", "c", 2),
    ]  # fmt: skip
    scores = [c["score"] for c in line["candidates"]]
    assert sum(scores) == pytest.approx(0, abs=1e-6)
    assert scores[1] > scores[2] > scores[0]
    principle = CONSTITUTION.draw_many(0, "r1", 1)[0].id
    for comparison in line["comparisons"]:
        assert comparison["principle"] == principle
        assert comparison["p_ab"] == pytest.approx(comparison["p_ba"])
        assert comparison["p"] == pytest.approx(comparison["p_ab"])
        assert (comparison["status"], comparison["method"], comparison["label_mass"]) == (
            "ok",
            "logprobs",
            pytest.approx(1),
        )
    assert [(c["a"], c["b"]) for c in line["comparisons"]] == [(0, 1), (0, 2), (1, 2)]
    assert line["comparisons"][0]["p"] == pytest.approx(1 / (1 + math.exp(2)))


def test_p_ab_and_p_ba_are_both_of_a_being_better(tmp_path: Path) -> None:
    # Whoever is shown first gains 0.2: a is better with 0.7 where it is first, with 0.3 where it is second.
    engine = judge(lambda first, second: 0.7)
    (comparison,) = line_of(ranked(tmp_path, engine, record_of("a", "b")))["comparisons"]
    assert (comparison["p_ab"], comparison["p_ba"]) == (pytest.approx(0.7), pytest.approx(0.3))
    assert (comparison["p"], comparison["status"]) == (pytest.approx(0.5), "tie")
    assert tally(ranked(tmp_path / "2", engine, record_of("a", "b")))["same_position"] == 1


def test_identical_texts_are_one_candidate(tmp_path: Path) -> None:
    engine = judge(by_value(x=0, y=1))
    record = record_of("x", "y", "x", chains={0: [("y", "improved")], 1: [("z", "worse")], 2: [("x", "same")]})
    line = line_of(ranked(tmp_path, engine, record))
    assert [(c["origin"], c["sample"], c["text"]) for c in line["candidates"]] == [("draft", 0, "x"), ("draft", 1, "y")]
    assert engine.kinds() == {"comparison": 2}


def test_a_single_text_is_ranked_without_a_question(tmp_path: Path) -> None:
    engine = judge(by_value())
    line = line_of(ranked(tmp_path, engine, record_of("x", "x")))
    assert [(c["score"], c["rank"]) for c in line["candidates"]] == [(0.0, 1)]
    assert (line["comparisons"], engine.requests) == ([], [])


@pytest.mark.parametrize(
    ("which", "texts"),
    [("ends", ["a", "a2", "b", "b1"]), ("all", ["a", "a1", "a2", "a3", "b", "b1", "b2"])],
)
def test_a_chain_gives_its_end_or_all_its_revisions(tmp_path: Path, which: str, texts: list[str]) -> None:
    chains = {
        0: [("a1", "improved"), ("a2", "abstain"), ("a3", "worse")],
        1: [("b1", "same"), ("b2", "worse")],
    }
    line = line_of(ranked(tmp_path, judge(lambda a, b: 0.8), record_of("a", "b", chains=chains), candidates=which))
    assert [c["text"] for c in line["candidates"]] == texts
    assert {c["text"]: c["round"] for c in line["candidates"]}["a2"] == 2


def test_given_answers_are_ranked_alone_or_beside_drafts(tmp_path: Path) -> None:
    line = line_of(ranked(tmp_path / "1", judge(by_value(g=0, h=1)), record_of(given=("g", "h"))))
    assert [(c["origin"], c["model"], c["rank"]) for c in line["candidates"]] == [("given", "", 2), ("given", "", 1)]
    line = line_of(ranked(tmp_path / "2", judge(by_value(g=0, a=1)), record_of("a", given=("g",))))
    assert sorted((c["origin"], c["text"]) for c in line["candidates"]) == [("draft", "a"), ("given", "g")]


def test_nothing_to_rank_is_a_failure(tmp_path: Path) -> None:
    outcome = ranked(tmp_path, judge(by_value()), record_of())
    assert outcome.line is None
    assert [f.reason for f in outcome.failures] == ["no_candidates"]


def test_above_six_candidates_a_circulant_schedule_is_asked_all_at_once(tmp_path: Path) -> None:
    names = [f"t{n}" for n in range(8)]
    engine = judge(by_value(**{name: float(n % 3) for n, name in enumerate(names)}))
    waiting = most = 0
    tell = engine.ask

    async def ask(request: Request, priority: int = 0) -> Reply:
        nonlocal waiting, most
        waiting += 1
        most = max(most, waiting)
        reply = await tell(request, priority)
        waiting -= 1
        return reply

    engine.ask = ask  # type: ignore[method-assign]
    line = line_of(ranked(tmp_path, engine, record_of(*names)))
    ring = {tuple(sorted((a, (a + d) % 8))) for a in range(8) for d in (1, 2, 4)}
    scheduled = [(c["a"], c["b"]) for c in line["comparisons"]][: len(ring)]
    assert set(scheduled) == ring
    assert len(ring) == 20
    assert most == 2 * 20


def test_the_best_and_the_worst_are_compared_directly_if_the_schedule_skipped_them(tmp_path: Path) -> None:
    # Candidates 0 and 3 of 8 do not meet on the ring of distances 1, 2, 4.
    values = {f"t{n}": 0.0 for n in range(8)} | {"t0": 2.0, "t3": -2.0}
    engine = judge(by_value(**values))
    line = line_of(ranked(tmp_path, engine, record_of(*values)))
    ranks = [c["rank"] for c in line["candidates"]]
    assert (ranks[0], ranks[3]) == (1, 8)
    *others, last = line["comparisons"]
    assert (last["a"], last["b"]) == (0, 3)
    assert last["p"] == pytest.approx(1 / (1 + math.exp(-4)))
    assert (0, 3) not in [(c["a"], c["b"]) for c in others]
    # The extra comparison labels a pair; the scores are those of the schedule.
    expected = bradley_terry(8, [(c["a"], c["b"], c["p"]) for c in others])
    assert [c["score"] for c in line["candidates"]] == expected


def test_up_to_six_candidates_all_pairs_meet(tmp_path: Path) -> None:
    values = {f"t{n}": float(n) for n in range(6)}
    engine = judge(by_value(**values))
    line = line_of(ranked(tmp_path, engine, record_of(*values)))
    assert len(line["comparisons"]) == 15
    assert len(engine.requests) == 30


def test_in_single_order_each_pair_is_asked_once_and_the_order_varies(tmp_path: Path) -> None:
    values = {f"t{n}": float(n) for n in range(6)}
    engine = judge(by_value(**values))
    line = line_of(ranked(tmp_path, engine, record_of(*values), order="single"))
    assert len(engine.requests) == 15
    assert {("p_ab" in c, "p_ba" in c) for c in line["comparisons"]} == {(True, False), (False, True)}
    for comparison in line["comparisons"]:
        a, b = (line["candidates"][comparison[side]]["text"] for side in "ab")
        assert comparison["p"] == pytest.approx(1 / (1 + math.exp(values[b] - values[a])))
    assert [c["rank"] for c in line["candidates"]] == [6, 5, 4, 3, 2, 1]


@pytest.mark.parametrize(("order", "p", "status"), [("agree-or-tie", 0.5, "tie"), ("average", 0.675, "ok")])
def test_orders_that_disagree_are_a_tie_or_are_averaged(tmp_path: Path, order: str, p: float, status: str) -> None:
    engine = judge(lambda first, second: 0.9 if first == "a" else 0.55)
    (comparison,) = line_of(ranked(tmp_path, engine, record_of("a", "b"), order=order))["comparisons"]
    assert (comparison["p_ab"], comparison["p_ba"]) == (pytest.approx(0.9), pytest.approx(0.45))
    assert (comparison["p"], comparison["status"]) == (pytest.approx(p), status)


def test_the_tie_band_decides_what_is_a_tie(tmp_path: Path) -> None:
    engine = judge(lambda first, second: 0.58 if first == "a" else 0.42)
    for band, status in ((0.1, "tie"), (0.05, "ok")):
        (comparison,) = line_of(ranked(tmp_path, engine, record_of("a", "b"), tie_band=band))["comparisons"]
        assert (comparison["status"], comparison["p"]) == (status, pytest.approx(0.58))
    assert len(engine.requests) == 2


@pytest.mark.parametrize(("principles", "num"), [(1, 1), (3, 3), ("all", len(CONSTITUTION)), (1000, len(CONSTITUTION))])
def test_a_pair_is_judged_under_one_some_or_all_principles(tmp_path: Path, principles: Any, num: int) -> None:
    engine = judge(by_value(a=1, b=0))
    line = line_of(ranked(tmp_path, engine, record_of("a", "b"), principles=principles))
    assert len({c["principle"] for c in line["comparisons"]}) == len(line["comparisons"]) == num
    drawn = CONSTITUTION if principles == "all" else CONSTITUTION.draw_many(0, "r1", principles)
    assert [c["principle"] for c in line["comparisons"]] == [principle.id for principle in drawn]


def test_after_a_chain_of_thought_the_verdict_is_clamped(tmp_path: Path) -> None:
    def say(request: Request) -> str | Reply:
        if request.kind == "reasoning":
            return f"{shown(request)[0]} comes first"
        assert request.prompt[1]["content"] == f"{shown(request)[0]} comes first"
        return a_or_b(0.99 if shown(request)[0] == "a" else 0.45)

    engine = Told(say)
    (comparison,) = line_of(ranked(tmp_path, engine, record_of("a", "b"), chain_of_thought=True))["comparisons"]
    assert (comparison["p_ab"], comparison["p_ba"]) == (pytest.approx(0.6), pytest.approx(0.55))
    assert comparison["p"] == pytest.approx(0.575)
    assert engine.kinds() == {"reasoning": 2, "comparison": 2}
    own = ranked(tmp_path, engine, record_of("a", "b"), chain_of_thought=True, clamp=(0.2, 0.8))
    assert line_of(own)["comparisons"][0]["p_ab"] == pytest.approx(0.8)
    assert len(engine.requests) == 4


def test_a_candidate_whom_no_verdict_connects_is_unrankable(tmp_path: Path) -> None:
    engine = judge(lambda a, b: a_or_b(0.9, mass=0.01) if "c" in (a, b) else (0.8 if a == "a" else 0.2))
    outcome = ranked(tmp_path, engine, record_of("a", "b", "c"))
    line = line_of(outcome)
    assert [c["text"] for c in line["candidates"]] == ["a", "b"]
    assert [(c["a"], c["b"], c["status"]) for c in line["comparisons"]] == [(0, 1, "ok")]
    assert [f[:4] for f in outcome.failures] == [(2, 0, "comparison", "unrankable")]


def test_an_abstention_beside_other_verdicts_has_no_p(tmp_path: Path) -> None:
    engine = judge(lambda a, b: a_or_b(0.9, mass=0.05) if {a, b} == {"a", "c"} else (0.8 if a < b else 0.2))
    line = line_of(ranked(tmp_path, engine, record_of("a", "b", "c")))
    statuses = {(c["a"], c["b"]): ("p" in c, c["status"]) for c in line["comparisons"]}
    assert statuses == {(0, 1): (True, "ok"), (1, 2): (True, "ok"), (0, 2): (False, "abstain")}
    assert [c["rank"] for c in line["candidates"]] == [1, 2, 3]


def test_a_record_without_any_verdict_fails(tmp_path: Path) -> None:
    outcome = ranked(tmp_path, judge(lambda a, b: a_or_b(0.9, mass=0.01)), record_of("a", "b"))
    assert outcome.line is None
    assert [(f.sample, f.reason) for f in outcome.failures] == [(0, "unrankable"), (1, "unrankable")]


def test_a_failed_comparison_is_a_line_and_a_failure(tmp_path: Path) -> None:
    def say(a: str, b: str) -> float:
        if {a, b} == {"a", "c"}:
            raise RequestFailed("timeout", "no reply", 2)
        return 0.8 if a < b else 0.2

    outcome = ranked(tmp_path, judge(say), record_of("a", "b", "c"))
    counts = tally(outcome)
    assert (counts["comparisons"], counts["lost_comparisons"], counts["comparison_failed"]) == (3, 1, 1)
    failed = [c for c in line_of(outcome)["comparisons"] if c["status"] == "failed"]
    assert [(c["a"], c["b"], "p" in c) for c in failed] == [(0, 2, False)]
    assert [f[:4] for f in outcome.failures] == [(0, 0, "comparison", "timeout")]


def grader(**grades: dict[str, float]) -> Told:
    def say(request: Request) -> Reply:
        if request.kind == "comparison":
            return a_or_b(0.7)
        found = re.search(r"(?s) answer\n(.*?)\n~:~ ", request.prompt[0]["content"])
        assert found
        return label_reply(grades[found[1]])

    return Told(say)


def test_graded_scores_are_mean_grades_between_minus_1_and_1(tmp_path: Path) -> None:
    engine = grader(a={"10": 1.0}, b={"1": 1.0}, c={"5": 0.5, "6": 0.5})
    line = line_of(ranked(tmp_path, engine, record_of("a", "b", "c"), mode="graded", principles=2))
    assert [c["score"] for c in line["candidates"]] == pytest.approx([1.0, -1.0, 0.0])
    assert [c["rank"] for c in line["candidates"]] == [1, 3, 2]
    assert len(line["grades"]) == 6
    assert {(g["candidate"], g["grade"]) for g in line["grades"]} == {(0, 10.0), (1, 1.0), (2, 5.5)}
    # Only the best and the worst are compared, once under each principle.
    assert {(c["a"], c["b"]) for c in line["comparisons"]} == {(0, 1)}
    assert engine.kinds() == {"grade": 6, "comparison": 4}


def test_a_candidate_whose_grade_abstains_is_left_out_with_its_reason(tmp_path: Path) -> None:
    engine = grader(a={"10": 1.0}, b={"1": 0.05}, c={"5": 1.0})
    outcome = ranked(tmp_path, engine, record_of("a", "b", "c"), mode="graded")
    assert [c["text"] for c in line_of(outcome)["candidates"]] == ["a", "c"]
    assert [g["candidate"] for g in line_of(outcome)["grades"]] == [0, 1]
    assert [f[:4] for f in outcome.failures] == [(1, 0, "grade", "abstain")]


def test_what_the_revision_was_verified_with_is_not_asked_again(tmp_path: Path) -> None:
    one = Constitution(CONSTITUTION.principles[:1], CONSTITUTION.wording)

    def say(request: Request) -> str | Reply:
        if request.kind == "comparison":
            return a_or_b(0.9 if shown(request)[0] == "better" else 0.2)
        return "better"

    engine = Told(say)
    voice = Voice(engine, one.wording)
    record = record_of("draft")
    using = CritiqueRevise(one, [voice], [], None, voice, CritiqueReviseSettings(rounds=1), 0, 1)
    outcome = run_stage(tmp_path, critique_revise, record, using=using)
    record.lines["critique-revise"] = line_of(outcome)
    before = len(engine.requests)
    line = line_of(run_stage(tmp_path, rank, record, using=Rank(one, voice, RankSettings(), 0)))
    assert len(engine.requests) == before
    (comparison,) = line["comparisons"]
    # (a, b) is (draft, revision) here and (revision, draft) there: the probabilities are each other's complement.
    assert comparison["p"] == pytest.approx(1 - line_of(outcome)["chains"][0]["rounds"][0]["p"])


def test_the_end_of_a_chain_is_named_after_the_round_that_wrote_it_not_after_its_copies():
    rounds = [
        {"revision": "worse", "verdict": "worse"},
        {"revision": "new", "verdict": "improved"},
        {"revision": "new", "verdict": "same"},
    ]
    lines = {
        "generate": {"completions": [{"sample": 0, "text": "old", "model": "m"}]},
        "critique-revise": {"chains": [{"sample": 0, "rounds": rounds}]},
    }
    record = Record("r", [{"role": "user", "content": "?"}], 0, lines=lines)
    found = candidates(record, "ends")
    assert [(c.origin, c.round, c.text) for c in found] == [("draft", 0, "old"), ("revision", 2, "new")]
    assert [c.round for c in candidates(record, "all")] == [0, 1, 2]
