"""A whole run over four servers: one slow, one failing, one that dies and returns. Their ledgers are the witnesses."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import Command, Server, lines, wait_for, write_prompts

PROMPTS, PLACES = 60, 4
SCRIPTS = {
    "plain": "latency_s: 0.01",
    "slow": "latency_s: 0.1",
    "failing": "latency_s: 0.01\nfaults: [{kind: status, status: 500, rate: 0.15}, {kind: reset, rate: 0.18}]",
    "dying": "latency_s: 0.01",
}


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[dict[str, Server]]:
    found = {}
    for name, script in SCRIPTS.items():
        (tmp_path / name).mkdir()
        found[name] = Server(tmp_path / name, script)
    yield found
    for node in found.values():
        node.stop()


def test_a_run_over_four_endpoints_ends_whole_though_one_is_slow_one_fails_and_one_dies(
    cai: Command, nodes: dict[str, Server]
) -> None:
    prompts = write_prompts(cai.folder / "p.jsonl", PROMPTS)
    urls = "engine.base_urls=[{}]".format(", ".join(node.url for node in nodes.values()))
    settings = [urls, f"engine.concurrency={PLACES}"]
    options = [word for setting in settings for word in ("--set", setting)]
    running = cai.start("run", "--run", "r", "--prompts", prompts, "--model", "scripted", "--json", *options)
    wait_for(lambda: nodes["dying"].num_received() > 100)
    nodes["dying"].stop()
    before_death = nodes["dying"].num_received()
    seen = nodes["plain"].num_received()
    wait_for(lambda: nodes["plain"].num_received() > seen + 60)
    nodes["dying"] = Server(nodes["dying"].ledger.parent, SCRIPTS["dying"], url=nodes["dying"].url)
    out, err = running.communicate(timeout=120)
    assert running.returncode == 0, err
    dying = nodes["dying"].url.removesuffix("/v1")
    out_at, back_at = (err.index(f"{dying} is {state}") for state in ("out (unreachable: ", "back"))
    assert out_at < back_at

    ids = [line["id"] for line in lines(cai.folder / "r", "prompts")]
    assert len(ids) == len(set(ids)) == PROMPTS
    for stage in ("generate", "critique-revise", "rank"):
        assert [line["id"] for line in lines(cai.folder / "r", stage)] == ids
        counts = json.loads(out)["counts"][stage]
        assert (counts["in"], counts["ok"], counts["failed"]) == (PROMPTS, PROMPTS, 0)
    assert not [path for path in cai.folder.glob("r/failed/*") if path.read_text()]

    events = [json.loads(line) for node in nodes.values() for line in node.ledger.read_text().splitlines()]
    answered = Counter(event["key"] for event in events if event["event"] == "answered" and event["status"] == 200)
    journal = [json.loads(line) for path in cai.folder.glob("r/journal/*") for line in path.read_text().splitlines()]
    assert len({line["key"] for line in journal}) == len(journal)
    assert len(journal) <= len(answered)
    # What was on its way when the one died may have been answered twice; probes ask for the same token each time.
    probes = {event["key"] for event in events if event["event"] == "received" and "Hello." in str(event["body"])}
    twice = {key: count for key, count in answered.items() if count > 1 and key not in probes}
    assert sum(twice.values()) <= 2 * PLACES
    assert nodes["dying"].num_received() > before_death + 20
    assert nodes["slow"].num_received() > 20
