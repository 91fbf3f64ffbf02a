"""The demo's table on a run whose texts are graded by hand."""

from random import Random

import pytest

from pipeline.evaluate.behaviour import behaviour, main, table
from pipeline.nano import world
from pipeline.store import RunFolder, StageWriter

COMPARISONS = [
    {"p_ab": 0.9, "p_ba": 0.8, "status": "ok"},
    {"p_ab": 0.9, "p_ba": 0.4, "status": "ok"},
    {"p_ab": 0.6, "p_ba": 0.4, "status": "tie"},
    {"status": "failed"},
]


def publish(run: RunFolder, stage: str, lines: list[dict]) -> None:
    StageWriter(run, stage, "by hand").publish(0, lines, prompts=2, num_in=2, inputs={})


@pytest.fixture
def run(tmp_path):
    """A harmful request (both drafts help, one rudely; the final refuses) and a benign one (a refusal; it stays)."""
    rng, run = Random(0), RunFolder(tmp_path / "r", create=True)
    requests = [world.draw_request(rng, harmful=True), world.draw_request(rng, harmful=False)]
    prompts = [world.ask(rng, request) for request in requests]
    helps = [world.draw_answer(rng, requests[0], kind="help", rude=rude) for rude in (False, True)]
    refusals = [world.draw_answer(rng, request, kind="refuse", rude=False) for request in requests]
    publish(run, "prompts", [{"id": i, "messages": p, "tags": []} for i, p in zip("ab", prompts, strict=True)])
    drafts = {"a": [*helps], "b": [refusals[1]]}
    publish(run, "generate", [{"id": i, "completions": [{"text": t} for t in drafts[i]]} for i in "ab"])
    rounds = [
        {"principle": "harm-crime", "verdict": "improved", "stopped": False},
        {"principle": "", "verdict": "same", "stopped": True},
    ]
    publish(run, "critique-revise", [{"id": i, "chains": [{"rounds": rounds}]} for i in "ab"])
    finals = {"a": [refusals[0], helps[0]], "b": [refusals[1], "word salad"]}
    lines = [
        {
            "id": i,
            "candidates": [{"rank": n, "text": t} for n, t in enumerate(finals[i], 1)],
            "comparisons": COMPARISONS,
        }
        for i in "ab"
    ]
    publish(run, "rank", lines)
    return run


def test_drafts_and_final_answers_are_graded_over_the_requests_that_concern_the_fault(run):
    found = behaviour(run)
    shares = {fault: (rate.hits, rate.cases) for fault, rate in found.drafts.items()}
    assert shares == {"harmful": (2, 2), "evasive": (1, 1), "rude": (1, 3), "garbled": (0, 3)}
    shares = {fault: (rate.hits, rate.cases) for fault, rate in found.finals.items()}
    assert shares == {"harmful": (0, 1), "evasive": (1, 1), "rude": (0, 2), "garbled": (0, 2)}


def test_verdicts_are_counted_by_principle_without_the_rounds_that_did_not_take_place(run):
    assert behaviour(run).verdicts == {"harm-crime": {"improved": 2}}


def test_comparisons_that_follow_the_position_are_counted_with_and_without_ties(run):
    found = behaviour(run)
    assert (found.same_position.hits, found.same_position.cases) == (4, 6)
    assert (found.decided.hits, found.decided.cases) == (2, 4)


def test_the_table_has_a_line_for_every_fault_and_principle(run):
    lines = list(table(behaviour(run)))
    assert [line.split()[0] for line in lines[1:5]] == ["harmful", "evasive", "rude", "garbled"]
    assert any(line.split() == ["harm-crime", "2", "0", "0", "0"] for line in lines)


def test_a_run_whose_prompts_are_of_another_world_is_refused(tmp_path, monkeypatch, capsys):
    other = RunFolder(tmp_path / "other", create=True)
    hello = [{"role": "user", "content": "Hello?"}]
    publish(other, "prompts", [{"id": i, "messages": hello, "tags": []} for i in "ab"])
    publish(other, "generate", [{"id": i, "completions": [{"text": "Hello."}]} for i in "ab"])
    monkeypatch.setattr("sys.argv", ["behaviour", str(other.path)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert "other: no draft for a prompt of the toy's world" in capsys.readouterr().err
