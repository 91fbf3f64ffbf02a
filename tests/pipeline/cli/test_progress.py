"""What the stages say at their end: balances, losses and where their reasons are."""

from __future__ import annotations

import json

from tests.support import Command, write_prompts

SCRIPTED = ("--set", "engine.backend=scripted")


def test_lost_samples_are_counted_and_their_reasons_named(cai: Command) -> None:
    prompts = write_prompts(cai.folder / "p.jsonl", 6)
    assert cai("generate", "--run", "r", "--prompts", prompts, *SCRIPTED).returncode == 0
    (cai.folder / "script.yaml").write_text("rules: [{last: Reply with the new answer only, text: ''}]")
    lost = cai("critique-revise", "--run", "r", *SCRIPTED, "--set", f"engine.script={cai.folder}/script.yaml")
    assert lost.returncode == 3
    assert "critique-revise: in 6, ok 6, filtered 0, failed 0 (lost_samples 12, samples 12)" in lost.stdout
    assert "12 failed, each with its reason: r/failed/critique-revise.jsonl" in lost.stdout
    assert "critique-revise: lost samples 12 of 12" in lost.stderr


def test_answers_behind_the_prompt_are_counted(cai: Command) -> None:
    row = {"transcript": "\n\nHuman: Why?\n\nAssistant: Because."}
    (cai.folder / "p.jsonl").write_text(json.dumps(row) + "\n")
    done = cai("generate", "--run", "r", "--prompts", "p.jsonl", *SCRIPTED)
    assert "1 answers behind the prompt left out" in done.stderr
