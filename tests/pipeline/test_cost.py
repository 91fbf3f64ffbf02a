"""What a run's tokens cost, and that it stops at the budget for it."""

from __future__ import annotations

import json

import pytest

from tests.support import Command, write_prompts


def test_a_run_stops_at_its_budget_for_cost_and_goes_on_after_it(cai: Command) -> None:
    prompts = write_prompts(cai.folder / "prompts.jsonl", 12)
    cai.folder.joinpath("cai.yaml").write_text(
        "engine: {backend: scripted, price_in: 2.0, price_out: 8.0, concurrency: 2}\n"
        "judge: {price_in: 0, price_out: 0}\n"
    )
    spent = []
    for budget, code in ((0.002, 75), (1000, 0)):
        done = cai("generate", "--prompts", prompts, "--set", f"run.budget_cost={budget}", "--json")
        assert done.returncode == code, done.stderr
        work = json.loads(done.stdout)["counts"]["work"]
        assert work["cost"] == pytest.approx(
            (2 * work["prompt_tokens"] + 8 * work["completion_tokens"]) / 1e6, abs=1e-6
        )
        summary = json.loads((cai.folder / "runs/first/summary.json").read_text())
        assert summary["counts"]["work"]["cost"] == work["cost"]
        spent.append(work["cost"])
        if code:
            assert work["cost"] >= budget
            assert "run.budget_cost" in done.stderr
    assert spent[1] > 0
    judged = cai("rank")
    assert "; cost 0.00" in judged.stderr
    assert "cost 0" in cai("status").stdout
