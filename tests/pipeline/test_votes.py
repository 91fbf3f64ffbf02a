"""A run whose judge gives no log-probabilities: sampled votes, one reply in the journal for all votes of a question."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable

import pytest

from tests.support import Command, Server, lines, write_prompts

SCRIPT = """
rules:
  - {asks: labels, faults: [{kind: no_logprobs}]}
  - {last: '^Question', text: ['kind {hash8}', 'rude {hash8}']}
  - {last: 'A or B', prompt: '(?s)answer A\\nkind.*answer B\\nrude', text: 'A'}
  - {last: 'A or B', prompt: '(?s)answer A\\nrude.*answer B\\nkind', text: '(B)'}
  - {last: 'A or B', prompt: '(?s)answer A\\nkind', text: 'A'}
  - {last: 'A or B', text: 'I cannot say.'}
"""
SURE = 8.5 / 9
"""The share of a label that all eight votes are for."""


def test_a_judge_without_log_probabilities_ranks_by_votes(cai: Command, serve: Callable[..., Server]) -> None:
    """Kind beats rude in both orders, two kind ones are each better when shown first, two rude ones get no vote."""
    server = serve(SCRIPT)
    prompts = write_prompts(cai.folder / "p.jsonl", 12)
    assert cai("generate", "--run", "r", "--prompts", prompts, *server.options()).returncode == 0
    before = server.num_received()
    done = cai("rank", "--run", "r", *server.options())
    assert done.returncode == 3, done.stderr  # the records with two rude drafts cannot be ranked

    drafts = {line["id"]: [c["text"][:4] for c in line["completions"]] for line in lines(cai.folder / "r", "generate")}
    ranked = {line["id"]: line["comparisons"] for line in lines(cai.folder / "r", "rank")}
    assert set(ranked) == {name for name, texts in drafts.items() if texts != ["rude", "rude"]}
    sides = {("kind", "rude"): (SURE, SURE), ("rude", "kind"): (1 - SURE, 1 - SURE), ("kind", "kind"): (SURE, 1 - SURE)}
    for name, (comparison,) in ranked.items():
        p_ab, p_ba = sides[drafts[name][0], drafts[name][1]]
        assert (comparison["method"], comparison["label_mass"]) == ("votes", pytest.approx(1.0))
        assert (comparison["p_ab"], comparison["p_ba"]) == (pytest.approx(p_ab), pytest.approx(p_ba))
        assert comparison["p"] == pytest.approx((p_ab + p_ba) / 2)
    assert {tuple(texts) for texts in drafts.values()} == {*sides, ("rude", "rude")}

    votes = [line["body"] for line in server.received(before) if "logprobs" not in line["body"]]
    assert len(votes) == 12 * 2 * 8
    seeds = Counter(json.dumps(body["messages"]) for body in votes)
    assert set(seeds.values()) == {8}
    assert server.repeated() == sum("logprobs" in line["body"] and line["try"] > 1 for line in server.received())
    journal = [json.loads(line) for path in cai.folder.glob("r/journal/*") for line in path.read_text().splitlines()]
    assert Counter(line["reply"].get("method", "text") for line in journal) == {"votes": 24, "text": 24}

    asked = server.num_received()
    assert cai("rank", "--run", "r", *server.options()).returncode == 3
    assert server.num_received() == asked
