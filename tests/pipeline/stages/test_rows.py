from typing import Any

import pytest

from pipeline.errors import CorruptError
from pipeline.stages.rows import Pair, Target, Trace, pairs, sft_targets
from tests.pipeline.stages.lines import candidate, comparison, entry

Line = dict[str, Any]


CHAINS = [
    [entry("a1", "improved", 0.9), entry("a2", "improved", 0.7, "warm")],
    [entry("b1", "worse", 0.2), entry("b2", "same", 0.5, "warm")],
]
CANDIDATES = [
    candidate("draft", 0, 0, "a0", -0.5, 3),
    candidate("revision", 0, 2, "a2", 1.5, 1),
    candidate("draft", 1, 0, "b0", -1.5, 4),
    candidate("revision", 1, 2, "b2", 0.5, 2),
]
COMPARISONS = [
    comparison(0, 1, 0.2),
    comparison(0, 2, 0.6),
    comparison(0, 3, 0.52, "tie"),
    comparison(1, 2, 0.85),
    comparison(1, 3, 0.7),
    comparison(2, 3, None, "abstain"),
]


def trace(
    *,
    drafts: tuple[str, ...] = ("a0", "b0"),
    chains: list[list[Line]] | None = CHAINS,
    candidates: list[Line] | None = CANDIDATES,
    comparisons: list[Line] = COMPARISONS,
) -> Trace:
    """Two drafts; the first improved twice, the second made worse, then kept. Every text differs."""
    return Trace(
        {"id": "r1", "messages": [{"role": "user", "content": "Why?"}], "tags": [], "source": "p.jsonl"},
        {"id": "r1", "completions": [{"sample": n, "text": t, "finish_reason": "stop"} for n, t in enumerate(drafts)]},
        None if chains is None else {"id": "r1", "chains": [{"sample": n, "rounds": c} for n, c in enumerate(chains)]},
        None if candidates is None else {"id": "r1", "candidates": candidates, "comparisons": comparisons},
    )


def targets(which: str, **changes: Any) -> tuple[dict[str, str], list[str]]:
    found = list(sft_targets(trace(**changes), which))
    return {t.name: t.text for t in found if isinstance(t, Target)}, [t for t in found if isinstance(t, str)]


def labelled(which: str, *, margin: float = 0.0, **changes: Any) -> tuple[dict[str, float], list[str]]:
    found = list(pairs(trace(**changes), which, tie_band=0.05, margin=margin))
    named = {f"{f.chosen.name}:{f.rejected.name}": f.p for f in found if isinstance(f, Pair)}
    return named, sorted(f for f in found if isinstance(f, str))


@pytest.mark.parametrize(
    ("which", "expected", "lost"),
    [
        ("best", {"revision-0-2": "a2"}, []),
        ("last", {"revision-0-2": "a2", "revision-1-2": "b2"}, []),
        ("all", {"revision-0-1": "a1", "revision-0-2": "a2", "revision-1-1": "b1", "revision-1-2": "b2"}, []),
        ("improved", {"revision-0-1": "a1", "revision-0-2": "a2"}, ["verdict_worse", "verdict_same"]),
    ],
)
def test_sft_takes_the_texts_its_setting_names(which: str, expected: dict[str, str], lost: list[str]) -> None:
    assert targets(which) == (expected, lost)


def test_principles_and_the_revised_text_are_those_that_led_to_the_revision() -> None:
    found = {t.name: (t.revised, set(t.principles)) for t in sft_targets(trace(), "all") if isinstance(t, Target)}
    assert found == {
        "revision-0-1": ("a0", {"kind"}),
        "revision-0-2": ("a1", {"kind", "warm"}),
        "revision-1-1": ("b0", {"kind"}),
        # The first revision was judged worse, so the second round started from the draft again.
        "revision-1-2": ("b0", {"warm"}),
    }


def test_a_chain_ends_with_its_last_changed_revision_that_was_not_judged_worse() -> None:
    stopped = entry("a1", "same", 0.5, "", stopped=True)
    assert targets("last", chains=[[entry("a1", "improved", 0.9), stopped]]) == ({"revision-0-1": "a1"}, [])
    assert targets("last", chains=[[entry("a1", "worse", 0.1)], []]) == ({}, ["no_revision", "no_revision"])
    assert targets("last", chains=None) == ({}, ["no_chain"])
    assert targets("best", candidates=None) == ({}, ["not_ranked"])


def test_best_and_worst_are_a_pair_with_their_own_probability() -> None:
    (pair,) = pairs(trace(), "best-worst", tie_band=0.05, margin=0.0)
    assert isinstance(pair, Pair)
    assert (pair.chosen.text, pair.rejected.text, pair.p) == ("a2", "b0", 0.85)
    assert (pair.score_chosen, pair.score_rejected) == (1.5, -1.5)
    assert pair.principles == {"calm", "kind", "warm"}


def test_probabilities_of_one_pair_are_averaged_over_principles_whichever_came_first() -> None:
    comparisons = [comparison(1, 2, 0.9), comparison(2, 1, 0.3, principle="kind"), comparison(1, 2, None, "abstain")]
    found, _ = labelled("best-worst", comparisons=comparisons)
    assert found == {"revision-0-2:draft-1": pytest.approx((0.9 + 0.7) / 2)}


def test_all_pairs_are_labelled_by_their_comparisons_alone() -> None:
    assert labelled("all") == (
        {
            "revision-0-2:draft-0": 0.8,
            "draft-0:draft-1": 0.6,
            "revision-0-2:draft-1": 0.85,
            "revision-0-2:revision-1-2": 0.7,
        },
        ["comparison_abstain", "tie"],
    )


@pytest.mark.parametrize(
    ("comparisons", "reason"),
    [
        ([comparison(0, 1, 0.2)], "not_compared"),
        ([comparison(1, 2, None, "failed")], "comparison_failed"),
        ([comparison(1, 2, 0.52, "tie")], "tie"),
        ([comparison(1, 2, 0.95), comparison(1, 2, 0.1, principle="kind")], "tie"),
        ([comparison(1, 2, 0.3)], "contradicted"),
        ([comparison(1, 2, 0.6)], "margin"),
    ],
)
def test_a_pair_without_a_clear_direct_comparison_says_why(comparisons: list[Line], reason: str) -> None:
    assert labelled("best-worst", comparisons=comparisons, margin=0.2) == ({}, [reason])


def test_revision_and_draft_are_labelled_by_the_judge_not_by_their_origin() -> None:
    assert labelled("revision-draft") == ({"revision-0-2:draft-0": 0.8}, ["comparison_abstain"])
    turned = [comparison(0, 1, 0.8), comparison(2, 3, 0.4)]
    assert labelled("revision-draft", comparisons=turned) == (
        {"draft-0:revision-0-2": 0.8, "revision-1-2:draft-1": 0.6},
        [],
    )


def test_without_a_ranking_a_round_that_revised_the_draft_labels_the_pair() -> None:
    chains = [[entry("a1", "improved", 0.9), entry("a2", "improved", 0.7)], [entry("b1", "worse", 0.2)]]
    assert labelled("revision-draft", chains=chains, candidates=None) == (
        {"revision-0-1:draft-0": 0.9, "draft-1:revision-1-1": 0.8},
        [],
    )


def test_an_unverified_or_missing_revision_makes_no_pair() -> None:
    chains = [[entry("a1", "unverified", None)], []]
    assert labelled("revision-draft", chains=chains, candidates=None) == ({}, ["no_revision", "not_compared"])
    assert labelled("revision-draft", chains=None) == ({}, ["no_chain"])
    assert labelled("all", candidates=CANDIDATES[:1]) == ({}, ["single_candidate"])
    assert labelled("all", candidates=None) == ({}, ["not_ranked"])


def test_a_ranking_of_other_texts_than_the_stages_hold_is_corruption() -> None:
    with pytest.raises(CorruptError, match="cai rank"):
        labelled("all", drafts=("other", "b0"))
    with pytest.raises(CorruptError, match="revision 0/2"):
        labelled("all", chains=[CHAINS[0][:1], CHAINS[1]])
