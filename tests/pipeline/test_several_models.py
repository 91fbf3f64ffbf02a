"""Several models in one run: who is asked what, who is named, and how often a model is loaded.

The ledger of one scripted server that serves every model is the witness.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from constitution.principles import Constitution
from constitution.wording import default_wording
from pipeline.chain import DATA_STAGES, build_stages
from pipeline.config.settings import CritiqueReviseSettings, Settings
from pipeline.engines import transformers
from pipeline.jobs import Job
from pipeline.records import Record
from pipeline.stages.asking import Voice
from pipeline.stages.critique_revise import CritiqueRevise, cast
from pipeline.store import RunFolder
from pipeline.voices import Engines
from tests.support import Command, Server, Told, lines, write_prompts

Serve = Callable[..., Server]
SCRIPT = """
models: [ann, bob, carl, dora, judge]
rules:
  - {last: "^Question", text: "{model} drafts {hash8} {seed}"}
  - {last: "Rewrite", text: "{model} revises {hash8}"}
  - {asks: text, text: "{model} criticises {hash8}"}
"""
NUM_PROMPTS, SAMPLES, ROUNDS = 6, 2, 3


def run(cai: Command, server: Server, **sections: Any) -> Path:
    """Runs the data stages with two generators, ann and bob, and a judge of its own."""
    (cai.folder / "cai.yaml").write_text(
        json.dumps(
            {
                "engine": {"backend": "server", "base_urls": [server.url], "model": "ann"},
                "generate": {"samples": SAMPLES, "models": [{}, {"model": "bob"}]},
                "judge": {"model": "judge"},
                "critique_revise": {"rounds": ROUNDS, "verify": False},
                "export": {"pairs": "all"},
                **sections,
            }
        )
    )
    prompts = write_prompts(cai.folder / "p.jsonl", NUM_PROMPTS)
    for stage in ("generate", "critique-revise", "rank"):
        done = cai(stage, "--run", "r", *(["--prompts", prompts] if stage == "generate" else []))
        assert done.returncode == 0, done.stderr
    return cai.folder / "r"


def asked(server: Server) -> dict[str, Counter[str]]:
    """Kind of question -> how often each model got it."""
    found: dict[str, Counter[str]] = {}
    for request in server.received():
        last = request["body"]["messages"][-1]["content"]
        kind = "draft" if last.startswith("Question") else "revision" if "Rewrite" in last else "critique"
        kind = "judgement" if request["body"].get("logprobs") else kind
        found.setdefault(kind, Counter())[request["body"]["model"]] += 1
    return found


def chains(folder: Path) -> list[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """Every draft with its rounds."""
    found = []
    for drafts, line in zip(lines(folder, "generate"), lines(folder, "critique-revise"), strict=True):
        by_sample = {draft["sample"]: draft for draft in drafts["completions"]}
        found += [(by_sample[chain["sample"]], chain["rounds"]) for chain in line["chains"]]
    assert len(found) == NUM_PROMPTS * 2 * SAMPLES
    return found


def test_every_generator_criticises_and_revises_its_own_drafts(cai: Command, serve: Serve) -> None:
    server = serve(SCRIPT)
    folder = run(cai, server)
    each = NUM_PROMPTS * SAMPLES
    assert {kind: dict(models) for kind, models in asked(server).items() if kind != "judgement"} == {
        "draft": {"ann": each, "bob": each},
        "critique": {"ann": each * ROUNDS, "bob": each * ROUNDS},
        "revision": {"ann": each * ROUNDS, "bob": each * ROUNDS},
    }
    assert asked(server)["judgement"].keys() == {"judge"}
    for draft, rounds in chains(folder):
        assert draft["text"].startswith(f"{draft['model']} drafts")
        assert [(r["critic"], r["model"]) for r in rounds] == [(draft["model"], draft["model"])] * ROUNDS
        assert all(r["critique"].startswith(f"{draft['model']} criticises") for r in rounds)
        assert all(r["revision"].startswith(f"{draft['model']} revises") for r in rounds)


def test_one_critic_criticises_and_revises_every_draft_and_is_named_as_the_writer(cai: Command, serve: Serve) -> None:
    server = serve(SCRIPT)
    folder = run(cai, server, critic={"model": "carl"})
    assert asked(server)["critique"].keys() == asked(server)["revision"].keys() == {"carl"}
    for _, rounds in chains(folder):
        assert {(r["critic"], r["model"]) for r in rounds} == {("carl", "carl")}
    for line in lines(folder, "rank"):
        for candidate in line["candidates"]:
            assert candidate["text"].startswith(f"{candidate['model']} ")
            assert (candidate["model"] == "carl") == (candidate["origin"] == "revision")


def test_critics_of_a_list_take_turns_and_the_author_revises(cai: Command, serve: Serve) -> None:
    server = serve(SCRIPT)
    critics = ["carl", "dora", "ann"]
    folder = run(cai, server, critic=[{"model": name} for name in critics])
    orders: Counter[tuple[str, ...]] = Counter()
    for draft, rounds in chains(folder):
        others = [name for name in critics if name != draft["model"]]
        turns = [r["critic"] for r in rounds]
        assert sorted(turns[: len(others)]) == sorted(others)
        assert turns == [turns[n % len(others)] for n in range(ROUNDS)]
        assert all(r["critique"].startswith(f"{r['critic']} criticises") for r in rounds)
        assert all((r["model"], r["revision"][:12]) == (draft["model"], f"{draft['model']} revises ") for r in rounds)
        orders[tuple(turns)] += 1
    assert asked(server)["revision"].keys() == {"ann", "bob"}
    assert len(orders) > 4  # 2 orders of ann's two critics, 6 of bob's three


def critics_of(critics: list[Told], author: Told, record_id: str) -> list[str]:
    """The critics of a draft by `author`, in the order of their turns."""
    voices = [Voice(engine, default_wording()) for engine in (author, *critics)]
    settings = CritiqueReviseSettings()
    using = CritiqueRevise(Constitution.default(), voices[:1], voices[1:], None, voices[0], settings, 0, 1)
    roles = cast(Record(record_id, [], 0), {"sample": 0, "model": author.name}, using)
    return [voice.engine.name for voice in roles.critics]


def test_another_critic_moves_no_two_against_each_other() -> None:
    author, one, two, three = (Told(lambda request: "", name=name) for name in ("author", "one", "two", "three"))
    for n in range(20):
        among_three = critics_of([one, two, three], author, f"r{n}")
        assert critics_of([three, one], author, f"r{n}") == [name for name in among_three if name != "two"]


def test_an_author_criticises_itself_only_where_there_is_nobody_else() -> None:
    author, twin, other = Told(lambda _: "", name="a"), Told(lambda _: "", name="a"), Told(lambda _: "", name="b")
    assert critics_of([twin], author, "r") == ["a"]
    assert critics_of([twin, other], author, "r") == ["b"]


def test_the_draft_of_a_model_that_is_not_there_any_more_is_refused_and_one_model_takes_over(cai: Command) -> None:
    def call(stage: str, *models: str) -> subprocess.CompletedProcess[str]:
        named = ", ".join(f"{{model: {model}}}" for model in models)
        return cai(stage, "-r", "r", "--set", "engine.backend=scripted", "--set", f"generate.models=[{named}]", *first)

    first = ["--prompts", write_prompts(cai.folder / "p.jsonl", 2)]
    assert call("generate", "ann", "bob").returncode == 0
    first = []
    done = call("critique-revise", "ann", "carl")
    assert done.returncode == 2
    assert "a draft is by 'bob', but generate.models has only ann, carl; name it there" in done.stderr
    assert call("critique-revise", "dora").returncode == 0
    rounds = [r for line in lines(cai.folder / "r", "critique-revise") for c in line["chains"] for r in c["rounds"]]
    assert {(r["critic"], r["model"]) for r in rounds} == {("dora", "dora")}


def test_a_model_that_several_sections_name_is_loaded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loads: list[str] = []
    load = transformers.load

    def counting(model: str, **options: Any) -> Any:
        loads.append(model)
        return load(model, **options)

    monkeypatch.setattr(transformers, "load", counting)
    settings = Settings.model_validate(
        {
            "engine": {"model": "nano", "concurrency": 5},
            "generate": {"models": [{}, {"model": "nano"}, {"style": "few-shot"}, {"context": 256}]},
            "critic": [{"backend": "auto"}, {"context": 256}],
            "judge": {"model": "nano"},
        }
    )
    constitution = Constitution.default()
    engines = Engines(constitution)
    job = Job(RunFolder(tmp_path / "r", create=True), settings, constitution)
    stages = build_stages(job, engines, DATA_STAGES)
    asyncio.run(engines.close())
    assert [stage.name for stage in stages] == list(DATA_STAGES)
    assert len(loads) == 2  # with the model's own context, and with 256 tokens
    assert engines.concurrency == 2 * 5
