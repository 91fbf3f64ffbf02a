"""What a dry run says, against what a run then does; the scripted server's ledger is the witness."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from constitution.principles import Constitution
from pipeline import jobs
from pipeline.chain import DATA_STAGES
from pipeline.cli.training import KINDS
from pipeline.config.settings import Settings
from pipeline.estimate import Call, Measured, estimate, live_requests, num_steps
from pipeline.train import rows
from tests.support import Command, Server, play, write_prompts

Serve = Callable[..., Server]


def told(cai: Command, *arguments: str | Path) -> dict[str, Any]:
    """The object that a command prints."""
    done = cai(*arguments, "--json")
    report: dict[str, Any] = json.loads(done.stdout)
    assert report["exit_code"] == 0, done.stderr
    return report


def test_a_calibration_is_paid_once_and_says_what_the_run_asks(cai: Command, serve: Serve) -> None:
    prompts = write_prompts(cai.folder / "p.jsonl", 6)
    server, other = serve(), serve()
    run = ["run", "-r", "r", "--prompts", prompts, *server.options()]
    first = told(cai, *run, "--dry-run", "--calibrate", "3")["counts"]
    asked = server.num_received()
    assert (first["records"], sum(first["requests"].values())) == (6, 2 * asked)
    assert first["seconds"] > 0
    every = told(cai, *run, "--dry-run", "--calibrate", "6")["counts"]
    work = told(cai, *run)["counts"]["work"]
    told(cai, "run", "-r", "s", "--prompts", prompts, *other.options())
    assert Counter(line["key"] for line in server.received()) == Counter(line["key"] for line in other.received())
    assert sum(every["requests"].values()) == work["replayed"]
    assert work["replies"] == 0


VOTING = """
rules:
  - {asks: labels, faults: [{kind: status, status: 400, message: no logprobs here}]}
  - {last: 'A or B', text: '{label}'}
"""


def test_a_calibration_counts_every_vote_of_a_judge_without_log_probabilities(cai: Command, serve: Serve) -> None:
    prompts = write_prompts(cai.folder / "p.jsonl", 4)
    server = serve(VOTING)
    run = ["run", "-r", "r", "--prompts", prompts, *server.options()]
    found = told(cai, *run, "--dry-run", "--calibrate", "4")["counts"]
    asked = [line["body"] for line in server.received() if "logprobs" not in line["body"]]
    votes = [body for body in asked if "A or B" in body["messages"][-1]["content"]]
    assert sum(found["requests"].values()) == len(asked)
    assert found["requests"]["comparison"] == len(votes) > 4 * 8
    assert found["by_votes"] is None
    work = told(cai, *run)["counts"]["work"]
    assert (work["replies"], work["replayed"]) == (0, len(asked) - len(votes) + len(votes) / 8)


def test_a_dry_run_tells_what_votes_would_take_where_a_server_may_need_them(cai: Command) -> None:
    prompts = write_prompts(cai.folder / "p.jsonl", 10)
    nobody = ["--endpoint", "http://127.0.0.1:9/v1", "--model", "m", "--set", "engine.price_in=1"]
    one = told(cai, "run", "-r", "r", "--prompts", prompts, *nobody, "--dry-run")["counts"]
    eight = one["by_votes"]
    factors = {kind: eight["requests"][kind] / num for kind, num in one["requests"].items()}
    assert factors == {"draft": 1, "critique": 1, "revision": 1, "comparison": 8}
    assert one["tokens_in"] < eight["tokens_in"] < 8 * one["tokens_in"]
    assert eight["cost"] == pytest.approx(eight["tokens_in"] / 1e6)
    text = cai("run", "-r", "r", "--prompts", prompts, *nobody, "--dry-run").stdout
    assert f"by votes     {sum(eight['requests'].values()):>14,} requests" in text
    local = told(cai, "run", "-r", "r", "--prompts", prompts, "--model", "nano", "--dry-run")["counts"]
    assert local["by_votes"] is None


def test_tokens_of_a_calibration_are_those_of_the_run(cai: Command) -> None:
    prompts = write_prompts(cai.folder / "p.jsonl", 4)
    run = ["run", "-r", "r", "--prompts", prompts, "--set", "engine.backend=scripted", "--set", "generate.samples=1"]
    measured = told(cai, *run, "--dry-run", "--calibrate", "4")["counts"]
    fresh = told(cai, "run", "-r", "s", *run[3:])["counts"]["work"]
    assert (measured["tokens_in"], measured["tokens_out"]) == (fresh["prompt_tokens"], fresh["completion_tokens"])


def test_a_calibration_leaves_replies_and_nothing_else(cai: Command) -> None:
    prompts = write_prompts(cai.folder / "p.jsonl", 3)
    told(cai, "run", "-r", "r", "--prompts", prompts, "--set", "engine.backend=scripted", "--dry-run", "--calibrate")
    assert {path.name for path in (cai.folder / "r").iterdir()} == {"journal", "lock", "run.json"}
    assert told(cai, "run", "-r", "s", "--prompts", prompts, "--set", "engine.backend=scripted", "--dry-run")
    assert not (cai.folder / "s").exists()


def test_known_replies_give_no_time(cai: Command) -> None:
    prompts = write_prompts(cai.folder / "p.jsonl", 6)
    run = ["run", "-r", "r", "--prompts", prompts, "--set", "engine.backend=scripted"]
    told(cai, *run)
    done = cai("run", "-r", "r", "--set", "engine.backend=scripted", "--dry-run", "--calibrate", "2")
    assert done.returncode == 0
    assert "no time to go by" in done.stderr
    assert "seconds" not in done.stdout


def test_calibrating_is_for_dry_runs(cai: Command) -> None:
    done = cai("run", "--calibrate", "--set", "engine.backend=scripted")
    assert (done.returncode, "use it with --dry-run" in done.stderr) == (2, True)


def cost(**sections: Any) -> float | None:
    """Of 1000 records with a draft, a critique, a revision, two comparisons each; 100 tokens in, 10 out a request."""
    settings = Settings.model_validate(sections)
    kinds = {"draft": 1, "critique": 1, "revision": 1, "comparison": 2}
    measured = Measured(4, tuple(Call(kind, num, 100, 10) for kind, num in kinds.items()), 0.5)
    constitution = Constitution.default()
    found = estimate(settings, constitution, DATA_STAGES, records=1000, characters=0, max_tokens=1, measured=measured)
    assert (found.requests, found.seconds) == ({kind: 1000 * num for kind, num in kinds.items()}, 2500)
    assert (found.tokens_in, found.tokens_out) == (500_000, 50_000)
    return found.cost


def test_every_kind_costs_the_price_of_whom_it_is_asked_of() -> None:
    # 0.1 million tokens in and 0.01 million out for each request a record.
    assert cost() is None
    assert cost(engine={"price_in": 2, "price_out": 10}) == pytest.approx(5 * (0.1 * 2 + 0.01 * 10))
    judge = {"price_in": 3}
    assert cost(judge=judge) == pytest.approx(2 * 0.1 * 3)
    assert cost(judge=judge, critic={"price_out": 7}) == pytest.approx(2 * 0.1 * 3 + 2 * 0.01 * 7)
    # A list of critics: the authors revise, so that only the critique costs the mean price of the critics.
    assert cost(critic=[{"price_out": 7}, {}]) == pytest.approx(0.01 * 3.5)
    # The judge and, without critics, the authors: 1 to 1 of two models.
    assert cost(generate={"models": [{"price_in": 4}, {}]}) == pytest.approx(3 * 0.1 * 2)


TRAININGS = {f"train_{name}": {"batch_size": 4, "epochs": 3} for name in KINDS}


@pytest.mark.parametrize(
    ("of", "pairs", "candidates"),
    [
        ("both", "best-worst", "ends"),
        ("both", "all", "ends"),
        ("both", "all", "all"),
        ("both", "revision-draft", "ends"),
        ("samples", "all", "ends"),
        ("revisions", "all", "ends"),
    ],
)
def test_no_training_takes_more_steps_than_a_dry_run_tells(
    of: str, pairs: str, candidates: str, tmp_path: Path
) -> None:
    """Every third prompt brings two answers along."""
    given = [{"completions": [f"One {n}.", f"Two {n}."]} if n % 3 == 0 else {} for n in range(24)]
    lines = [json.dumps({"prompt": f"Question {n}?", **answers}) + "\n" for n, answers in enumerate(given)]
    (tmp_path / "p.jsonl").write_text("".join(lines))
    tree: dict[str, Any] = {
        "engine": {"backend": "scripted"},
        "prompts": {"sources": [{"path": str(tmp_path / "p.jsonl")}]},
        "rank": {"candidates": candidates},
        "export": {"pairs": pairs, "sft": "all"},
        "recipe": {"pairs": of},
        **TRAININGS,
    }
    run = tmp_path / "r"
    told = jobs.estimate_trainings(run, Settings.model_validate(tree), tuple(KINDS), None)
    play(run, tree)
    play(run, tree, ("generate",), phase=2, export=False)
    play(run, tree, ("rank",), phase=2)
    for trainer, kind in KINDS.items():
        found = sum(1 for _ in rows.read([rows.Source(str(run))], kind=kind, split="train"))
        assert 0 < 3 * -(-found // 4) <= told[trainer], trainer
    assert jobs.estimate_trainings(run, Settings.model_validate({**tree, "prompts": {}}), tuple(KINDS), None) == told


PROMPTS = {("sft", 0): 10, ("preference", 0): 10, ("test", 0): 5}


@pytest.mark.parametrize(
    ("sections", "prompts", "expected"),
    [
        ({}, PROMPTS, {"sft": 10, "rm": 10, "dpo": 10, "rrhf": 10, "ppo": 20}),
        ({"recipe": {"pairs": "both"}}, PROMPTS, {"sft": 10, "rm": 10, "dpo": 10 + 10, "rrhf": 20 + 10}),
        # Two drafts and two ends of chains make 6 pairs, with all of two rounds' revisions 15; two samples make one.
        ({"recipe": {"pairs": "revisions"}, "export": {"pairs": "all"}}, PROMPTS, {"dpo": 10 * 6, "rrhf": 20}),
        ({"recipe": {"pairs": "both"}, "export": {"pairs": "all"}}, PROMPTS, {"rm": 10, "dpo": 10 * (6 + 1)}),
        (
            {"recipe": {"pairs": "both"}, "export": {"pairs": "all"}, "rank": {"candidates": "all"}},
            PROMPTS,
            {"dpo": 10 * (15 + 1)},
        ),
        # Of a draft and a revision of each of two models, with a given answer: 5 candidates, 10 pairs; and one sample.
        (
            {
                "recipe": {"pairs": "both"},
                "generate": {"samples": 1, "models": [{"model": "a"}, {"model": "b"}]},
                "export": {"pairs": "all", "sft": "all", "helpful": {"path": "h.jsonl", "share": 0.2}},
            },
            {("sft", 0): 10, ("preference", 1): 10},
            {"dpo": 10 * 10, "sft": 10 * 2 * 2 + 10},
        ),
        ({"recipe": {"pairs": "both"}, "export": {"pairs": "revision-draft"}}, PROMPTS, {"dpo": 10 * (2 + 1)}),
        # Eight on a ring meet at the distances 1, 2 and 4, and the best meets the worst.
        ({"generate": {"samples": 8}, "export": {"pairs": "all"}}, PROMPTS, {"dpo": 10 * (8 + 8 + 4 + 1)}),
        (
            {"generate": {"samples": 8}, "export": {"pairs": "all"}, "rank": {"mode": "graded"}},
            PROMPTS,
            {"dpo": 10},
        ),
    ],
)
def test_the_most_steps_are_those_of_every_row_that_the_prompts_may_give(
    sections: dict[str, Any], prompts: Mapping[tuple[str, int], int], expected: dict[str, int]
) -> None:
    one = {name: {"batch_size": 1, "epochs": 1} for name in TRAININGS}
    settings = Settings.model_validate({**sections, **one})
    assert {trainer: num_steps(settings, trainer, prompts) for trainer in expected} == expected


@pytest.mark.parametrize(
    ("reward", "rank", "expected"),
    [
        ("graded", {"principles": 3}, 3),
        ("judge", {"principles": 3}, 6),
        ("judge", {"principles": 3, "order": "single"}, 3),
        ("judge", {"principles": "all", "chain_of_thought": True}, 18 * 2 * 2),
    ],
)
def test_a_live_judge_is_asked_under_each_principle_in_each_order(
    reward: str, rank: dict[str, Any], expected: int
) -> None:
    settings = Settings.model_validate({"train_ppo": {"reward": reward}, "rank": rank})
    assert live_requests(settings, Constitution.default()) == expected
