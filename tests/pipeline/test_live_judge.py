"""The live judge of PPO on answers whose faults are known: what it says of them, and what if it says nothing."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest
import torch

from constitution.principles import Constitution, default_path
from pipeline import nano
from pipeline.config.settings import Settings
from pipeline.engines.base import Reply, Request
from pipeline.errors import IncompleteError, StoppedError
from pipeline.live_judge import live_judge
from pipeline.nano import world
from pipeline.train.batches import Data
from pipeline.train.rollouts import Rollouts
from pipeline.train.rows import Row
from pipeline.voices import Spent

ASKED = "How do I rob the village bank?"
SCRIPT = """
rules:
  - {prompt: "answer that is unreadable", asks: labels, labels: {}}
  - {prompt: "answer that is refused", asks: labels, faults: [{kind: status, status: 400}]}
  - {prompt: "answer that is awful", asks: labels, labels: {"1": 1.0}}
  - {prompt: "takes better care of a reader", asks: labels, labels: {}}
  - {prompt: "hurting a person", asks: labels, labels: {"10": 1.0}}
  - {asks: labels, labels: {"1": 0.5, "10": 0.5}}
"""


def rollouts_of(texts: list[str], id: str = "a") -> Rollouts:
    """Only what a score may look at. id: of the prompt that they all answer."""
    conversation = [{"role": "user", "content": ASKED}]
    data, nothing = Data(), torch.zeros(len(texts), 1)
    data.add(Row(id, conversation, tuple(texts), 1.0, (), "policy"), [1], [[1]] * len(texts))
    ended = nothing[:, 0] == 0
    return Rollouts(data, [conversation], texts, ended, nothing == 0, nothing, nothing, nothing, nothing)


@pytest.mark.parametrize("kind", ["graded", "judge"])
def test_the_judge_scores_a_refusal_of_a_harm_above_help_with_it(kind: str, tmp_path: Path) -> None:
    request = world.Request("rob", "the village bank", True)
    refuses = world.draw_answer(Random(0), request, kind="refuse", rude=False)
    helps = world.draw_answer(Random(0), request, kind="help", rude=True)
    settings = Settings.model_validate({"engine": {"model": "nano"}, "rank": {"principles": "all"}})
    constitution = Constitution.load(default_path())
    with live_judge(settings, constitution, str(nano.path()), kind, folder=tmp_path / "journal") as (judge, source):
        scores = source.score(rollouts_of([refuses, helps, ""])).tolist()
        asked = judge.journal.asked
        assert source.score(rollouts_of([refuses, helps, ""])).tolist() == scores
        assert judge.journal.asked == asked > 0
    assert scores[0] > scores[1] + 0.1
    assert scores[2] == -1.0
    assert all(-1 <= score <= 1 for score in scores)


def graded(folder: Path, texts: list[str], *, principles: str, **run: float) -> tuple[list[float], dict[str, float]]:
    """Scores by the script above, and what is measured of them. principles: ids, a space between two."""
    (folder / "script.yaml").write_text(SCRIPT)
    tree = {"engine": {"backend": "scripted", "script": str(folder / "script.yaml")}, "run": run}
    settings = Settings.model_validate({**tree, "rank": {"principles": "all"}})
    everything = Constitution.load(default_path())
    chosen = tuple(everything[id] for id in principles.split())
    constitution = Constitution(chosen, everything.wording)
    with live_judge(settings, constitution, "", "graded", folder=folder / "journal") as (_, source):
        return source.score(rollouts_of(texts)).tolist(), source.measure()


@pytest.mark.parametrize("lost", ["unreadable", "refused"])
def test_an_answer_without_a_verdict_gets_the_mean_of_the_others_and_is_counted(lost: str, tmp_path: Path) -> None:
    texts = [f"An answer that is {what}." for what in ("fine", "awful", lost, "good")]
    scores, measured = graded(tmp_path, texts, principles="harm-people")
    assert scores == pytest.approx([1.0, -1.0, 1 / 3, 1.0])
    assert measured == {"no_verdict": 0.25}


def test_the_mean_is_over_the_principles_that_gave_a_verdict(tmp_path: Path) -> None:
    scores, measured = graded(tmp_path, ["Fine."], principles="harm-people harm-crime harm-self")
    assert scores == pytest.approx([(1.0 + 0.0) / 2])
    assert measured == {"no_verdict": 0.0}


def test_too_many_answers_without_a_verdict_are_an_error_that_says_why(tmp_path: Path) -> None:
    texts = [f"An answer that is {what}." for what in ("fine", "awful", "unreadable", "refused")]
    with pytest.raises(IncompleteError, match=r"2 of 4 answers .*abstain 1, .* 1\).*scripted fault") as caught:
        graded(tmp_path, texts, principles="harm-people")
    assert caught.value.exit_code == 3
    assert graded(tmp_path, texts, principles="harm-people", max_failed_share=0.5)[1] == {"no_verdict": 0.5}
    with pytest.raises(IncompleteError, match="1 of 1 answers"):
        graded(tmp_path, texts[2:3], principles="harm-people", max_failed_share=1.0)


@pytest.mark.parametrize("budget", ["budget_tokens", "budget_cost"])
def test_what_the_call_spent_before_counts_for_its_budgets(budget: str, tmp_path: Path) -> None:
    tree = {"engine": {"backend": "scripted", "price_in": 1.0, "concurrency": 1}, "run": {budget: 1000}}
    settings, constitution = Settings.model_validate(tree), Constitution.load(default_path())
    place, earlier = tmp_path / "journal", Spent(999, 999.9999999)
    with live_judge(settings, constitution, "", "graded", folder=place, earlier=earlier) as (judge, source):
        with pytest.raises(StoppedError, match=f"stopped at run.{budget}; the same command"):
            source.score(rollouts_of([f"Answer {n}" for n in range(9)]))
        assert judge.journal.asked == 2  # the window; seven were never sent


def test_all_that_is_asked_about_a_prompt_has_one_priority_in_all_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that one of several endpoints gets it, and another one the next prompt."""
    priorities: list[int] = []
    settings = Settings.model_validate({"engine": {"backend": "scripted"}, "rank": {"principles": 3}})
    constitution = Constitution.load(default_path())
    with live_judge(settings, constitution, "", "graded", folder=tmp_path / "journal") as (judge, source):
        answer = judge.voice.engine.ask

        async def noted(request: Request, priority: int = 0) -> Reply:
            priorities.append(priority)
            return await answer(request, priority)

        monkeypatch.setattr(judge.voice.engine, "ask", noted)
        for id, texts in (("a", ["One.", "Two."]), ("b", ["Three."]), ("a", ["Four."])):
            source.score(rollouts_of(texts, id))
    assert priorities == [0] * 2 * 3 + [1] * 3 + [0] * 3
