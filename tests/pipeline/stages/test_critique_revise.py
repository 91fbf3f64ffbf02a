from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from constitution.principles import Constitution
from pipeline.config.settings import CritiqueReviseSettings
from pipeline.engines.base import Reply, Request
from pipeline.errors import RequestFailed
from pipeline.records import Outcome, Record
from pipeline.stages.asking import Voice
from pipeline.stages.critique_revise import CritiqueRevise, critique_revise, tally
from tests.support import Told, a_or_b, label_reply, run_stage, shown

CONSTITUTION = Constitution.default()
DRAFT = "the draft"


def record_of(*drafts: str) -> Record:
    record = Record("r1", [{"role": "user", "content": "Why?"}], 0)
    record.lines["generate"] = {
        "id": "r1", "completions": [
            {"sample": n, "text": text, "model": "m", "finish_reason": "length" if "(cut)" in text else "stop"}
            for n, text in enumerate(drafts)
        ],
    }  # fmt: skip
    return record


def revise(folder: Path, engine: Told, *drafts: str, seed: int = 0, **settings: Any) -> Outcome:
    voice = Voice(engine, CONSTITUTION.wording)
    using = CritiqueRevise(CONSTITUTION, [voice], [], None, voice, CritiqueReviseSettings(**settings), seed, 1)
    return run_stage(folder, critique_revise, record_of(*drafts or (DRAFT,)), using=using)


def model(
    judge: Callable[[str, str], float | Reply], revision: Callable[[str], str] | None = None, fault: float = 0.9
) -> Told:
    """Criticises, revises `x` into `x+`, finds a fault with probability `fault`, and compares with `judge(a, b)`."""

    def say(request: Request) -> str | Reply:
        if request.kind == "critique":
            return f"a critique of {request.prompt[-2]['content']}"
        if request.kind == "revision":
            answer = next(m["content"] for m in request.prompt if m["role"] == "assistant")
            return revision(answer) if revision else f"{answer}+"
        if request.kind == "check":
            return label_reply({"Yes": fault, "No": 1 - fault})
        said = judge(*shown(request))
        return said if isinstance(said, Reply) else a_or_b(said)

    return Told(say)


def longer_is_better(a: str, b: str) -> float:
    return 0.8 if len(a) > len(b) else 0.2


def rounds(outcome: Outcome, sample: int = 0) -> list[dict[str, Any]]:
    assert outcome.line
    chain = outcome.line["chains"][sample]
    assert chain["sample"] == sample
    found: list[dict[str, Any]] = chain["rounds"]
    return found


def test_every_round_revises_the_revision_before_it(tmp_path: Path) -> None:
    found = rounds(revise(tmp_path, model(longer_is_better), rounds=3))
    assert [r["revision"] for r in found] == [DRAFT + "+", DRAFT + "++", DRAFT + "+++"]
    assert [r["critique"] for r in found] == [f"a critique of {DRAFT}{'+' * n}" for n in range(3)]
    assert [(r["verdict"], r["stopped"], r["finish_reason"]) for r in found] == [("improved", False, "stop")] * 3
    assert [r["p"] for r in found] == pytest.approx([0.8] * 3)
    drawn = [CONSTITUTION.draw(0, "r1", 0, n, "weighted").id for n in range(3)]
    assert [r["principle"] for r in found] == drawn


def test_the_next_round_starts_from_the_last_revision_not_judged_worse(tmp_path: Path) -> None:
    texts = iter(["bad", "better", "bad again", "best"])
    values = {DRAFT: 1, "bad": 0, "better": 2, "bad again": 1, "best": 3}
    engine = model(lambda a, b: 0.9 if values[a] > values[b] else 0.1, lambda answer: next(texts))
    found = rounds(revise(tmp_path, engine, rounds=4))
    assert [(r["revision"], r["verdict"]) for r in found] == [
        ("bad", "worse"), ("better", "improved"), ("bad again", "worse"), ("best", "improved"),
    ]  # fmt: skip
    assert [r["critique"] for r in found] == [f"a critique of {x}" for x in (DRAFT, DRAFT, "better", "better")]


@pytest.mark.parametrize(
    ("p_ab", "p_ba", "verdict"),
    [
        (0.6, 0.52, "improved"),  # mean 0.56, both above 0.5
        (0.59, 0.52, "improved"),  # mean 0.555
        (0.53, 0.55, "same"),  # mean 0.54
        (0.9, 0.45, "same"),  # the orders disagree
        (0.4, 0.48, "worse"),  # mean 0.44, both below 0.5
        (0.41, 0.48, "worse"),  # mean 0.445
        (0.47, 0.45, "same"),  # mean 0.46
        (0.1, 0.55, "same"),
    ],
)
def test_a_verdict_needs_both_orders_and_a_mean_of_55_percent(
    tmp_path: Path, p_ab: float, p_ba: float, verdict: str
) -> None:
    # p_ab, p_ba: that the revision is better, shown first and shown second.
    engine = model(lambda a, b: p_ab if b == DRAFT else 1 - p_ba)
    (found,) = rounds(revise(tmp_path, engine, rounds=1))
    assert found["verdict"] == verdict
    assert found["p"] == pytest.approx((p_ab + p_ba) / 2)
    assert engine.kinds()["comparison"] == 2


def test_a_judge_who_says_something_else_abstains_and_gives_no_p(tmp_path: Path) -> None:
    engine = model(lambda a, b: a_or_b(0.9, mass=0.05) if b == DRAFT else a_or_b(0.1))
    first, second = rounds(revise(tmp_path, engine, rounds=2))
    assert first["verdict"] == "abstain"
    assert "p" not in first
    assert second["critique"] == f"a critique of {DRAFT}+"


def test_a_failed_verdict_abstains_with_its_reason_and_the_chain_goes_on(tmp_path: Path) -> None:
    def judge(a: str, b: str) -> float:
        raise RequestFailed("bad_reply", "no log-probabilities")

    outcome = revise(tmp_path, model(judge), rounds=2)
    assert [r["verdict"] for r in rounds(outcome)] == ["abstain", "abstain"]
    assert [f[:4] for f in outcome.failures] == [(0, n, "comparison", "bad_reply") for n in range(2)]


def test_an_unchanged_revision_is_the_same_without_being_asked(tmp_path: Path) -> None:
    engine = model(longer_is_better, lambda answer: answer)
    (found,) = rounds(revise(tmp_path, engine, rounds=1))
    assert (found["verdict"], found["p"]) == ("same", 0.5)
    assert engine.kinds() == {"critique": 1, "revision": 1}


def test_without_verifying_nothing_is_judged_and_each_revision_follows_the_last(tmp_path: Path) -> None:
    engine = model(longer_is_better)
    found = rounds(revise(tmp_path, engine, rounds=2, verify=False))
    assert [(r["verdict"], r["revision"]) for r in found] == [("unverified", DRAFT + "+"), ("unverified", DRAFT + "++")]
    assert engine.kinds() == {"critique": 2, "revision": 2}
    assert all("p" not in r for r in found)


def test_direct_revision_asks_for_no_critique(tmp_path: Path) -> None:
    engine = model(longer_is_better)
    (found,) = rounds(revise(tmp_path, engine, rounds=1, direct=True))
    assert (found["critique"], found["revision"]) == ("", DRAFT + "+")
    assert engine.kinds() == {"revision": 1, "comparison": 2}
    roles = [m["role"] for m in engine.requests[0].prompt]
    assert roles == ["user", "assistant", "user"]


def test_a_draft_without_fault_in_any_group_stops_early(tmp_path: Path) -> None:
    engine = model(longer_is_better, fault=0.2)
    outcome = revise(tmp_path, engine, rounds=3, early_stop=True)
    (found,) = rounds(outcome)
    assert (found["stopped"], found["verdict"], found["principle"]) == (True, "same", "")
    assert (found["revision"], found["critique"]) == (DRAFT, "")
    assert engine.kinds() == {"check": len(CONSTITUTION.abouts)}
    assert outcome.line
    assert tally(outcome)["stopped"] == 1


def test_an_early_stop_stands_for_its_text_and_was_cut_if_that_was(tmp_path: Path) -> None:
    outcome = revise(tmp_path, model(longer_is_better, fault=0.2), "fine", "fine (cut)", early_stop=True)
    assert [rounds(outcome, n)[0]["finish_reason"] for n in range(2)] == ["stop", "length"]
    inner = model(longer_is_better).say

    def say(request: Request) -> str | Reply:
        if request.kind == "check":
            fault = 0.2 if "+" in str(request.prompt) else 0.9
            return label_reply({"Yes": fault, "No": 1 - fault})
        said = inner(request)
        return Reply(said, "length") if request.kind == "revision" and isinstance(said, str) else said

    found = rounds(revise(tmp_path / "later", Told(say), rounds=2, early_stop=True))
    assert [(r["stopped"], r["finish_reason"]) for r in found] == [(False, "length"), (True, "length")]


def test_the_groups_are_asked_in_turn_up_to_the_first_fault(tmp_path: Path) -> None:
    third = CONSTITUTION.in_group(CONSTITUTION.abouts[2])[0].critique_request
    inner = model(longer_is_better).say

    def say(request: Request) -> str | Reply:
        if request.kind == "check":
            fault = 0.5 if third in request.prompt[0]["content"] else 0.1
            return label_reply({"Yes": fault, "No": 1 - fault})
        return inner(request)

    engine = Told(say)
    (found,) = rounds(revise(tmp_path, engine, rounds=1, early_stop=True))
    assert not found["stopped"]
    assert engine.kinds()["check"] == 3


def test_a_check_that_abstains_does_not_stop_the_chain(tmp_path: Path) -> None:
    inner = model(longer_is_better).say
    engine = Told(lambda request: label_reply({"No": 0.05}) if request.kind == "check" else inner(request))
    assert [r["stopped"] for r in rounds(revise(tmp_path, engine, rounds=2, early_stop=True))] == [False, False]


def test_a_chain_that_fails_keeps_its_rounds_and_the_other_chains_go_on(tmp_path: Path) -> None:
    def revision(answer: str) -> str:
        if answer == "one+":
            raise RequestFailed("too_long", "too long")
        return f"{answer}+"

    outcome = revise(tmp_path, model(longer_is_better, revision), "one", "two", rounds=3)
    assert [r["revision"] for r in rounds(outcome, 0)] == ["one+"]
    assert [r["revision"] for r in rounds(outcome, 1)] == ["two+", "two++", "two+++"]
    assert [f[:4] for f in outcome.failures] == [(0, 1, "revision", "too_long")]


def test_identical_drafts_under_the_same_principle_are_asked_about_once(tmp_path: Path) -> None:
    one = Constitution(CONSTITUTION.principles[:1], CONSTITUTION.wording)
    engine = model(longer_is_better)
    voice = Voice(engine, one.wording)
    using = CritiqueRevise(one, [voice], [], None, voice, CritiqueReviseSettings(rounds=1), 0, 1)
    outcome = run_stage(tmp_path, critique_revise, record_of("x", "x", "x"), using=using)
    assert engine.kinds() == {"critique": 1, "revision": 1, "comparison": 2}
    assert rounds(outcome, 0) == rounds(outcome, 1) == rounds(outcome, 2)


def test_a_later_turn_extends_the_prompt_of_the_turn_before_it(tmp_path: Path) -> None:
    engine = model(longer_is_better)
    revise(tmp_path, engine, rounds=1)
    critique, revision = (next(r for r in engine.requests if r.kind == kind) for kind in ("critique", "revision"))
    assert revision.prompt[: len(critique.prompt)] == critique.prompt
    assert revision.prompt[len(critique.prompt)]["content"] == f"a critique of {DRAFT}"


def test_the_tally_counts_drafts_that_needed_nothing(tmp_path: Path) -> None:
    counts = tally(revise(tmp_path, model(lambda a, b: 0.5), "x", "y", rounds=2))
    assert (counts["first_rounds"], counts["drafts_satisfied"], counts["verdict_same"]) == (2, 2, 4)
    counts = tally(revise(tmp_path / "stopped", model(longer_is_better, fault=0.2), early_stop=True))
    assert (counts["first_rounds"], counts["drafts_satisfied"]) == (1, 1)


def test_a_draft_made_worse_or_not_judged_is_not_a_draft_that_needed_nothing(tmp_path: Path) -> None:
    counts = tally(revise(tmp_path, model(lambda a, b: 1 - longer_is_better(a, b)), rounds=1))
    assert (counts["drafts_satisfied"], counts["drafts_worsened"], counts["verdict_worse"]) == (0, 1, 1)
    counts = tally(revise(tmp_path / "unverified", model(longer_is_better, lambda answer: answer), verify=False))
    assert (counts["first_rounds"], counts["drafts_satisfied"], counts["verdict_unverified"]) == (1, 0, 2)


def test_the_tally_counts_samples_that_lost_a_round_and_verdicts_that_were_lost(tmp_path: Path) -> None:
    def revision(answer: str) -> str:
        if answer.startswith("one"):
            raise RequestFailed("too_long", "too long")
        return f"{answer}+"

    outcome = revise(tmp_path, model(longer_is_better, revision), "one", "two", rounds=2)
    assert outcome.line
    counts = tally(outcome)
    assert (counts["samples"], counts["lost_samples"], counts["lost_verdicts"]) == (2, 1, 0)

    def judge(a: str, b: str) -> float:
        raise RequestFailed("bad_reply", "no log-probabilities")

    counts = tally(revise(tmp_path / "verdicts", model(judge), rounds=2))
    assert (counts["samples"], counts["lost_samples"], counts["lost_verdicts"]) == (1, 0, 2)
