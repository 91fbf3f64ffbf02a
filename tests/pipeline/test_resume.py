"""What later calls on the same run do: nothing twice, nothing else differently."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from constitution.principles import default_path
from pipeline.dataset_folder import read_card, verify
from tests.support import Command, Server, lines, play, published, write_prompts

Serve = Callable[..., Server]
STAGES = ("generate", "critique-revise", "rank")
DATASETS = ("sft", "preference", "ranked", "prompts", "chains")
MARKER = "(an edited principle)"


def tree(path: Path, *, shard_size: int = 1000, **sections: dict[str, Any]) -> dict[str, Any]:
    return {"prompts": {"sources": [{"path": str(path)}], "shard_size": shard_size}, **sections}


@pytest.fixture(scope="module")
def usual(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run over 30 prompts, all stages at once, in one shard; `p.jsonl` lies beside it."""
    folder = tmp_path_factory.mktemp("usual")
    play(folder / "r", tree(write_prompts(folder / "p.jsonl", 30)))
    return folder / "r"


@pytest.mark.parametrize("concurrency", [1, 2, 7, 256])
def test_any_window_gives_the_same_bytes(usual: Path, tmp_path: Path, concurrency: int) -> None:
    play(tmp_path / "r", tree(usual.parent / "p.jsonl", engine={"concurrency": concurrency}))
    assert published(tmp_path / "r") == published(usual)


def test_stages_one_by_one_give_the_same_bytes_as_all_at_once(usual: Path, tmp_path: Path) -> None:
    for names in [("generate",), ("critique-revise",), ("rank",)]:
        play(tmp_path / "r", tree(usual.parent / "p.jsonl"), names, export=names == ("rank",))
    assert published(tmp_path / "r") == published(usual)


@pytest.mark.parametrize("shard_size", [1, 8, 29])
def test_any_sharding_gives_the_same_lines_and_the_same_datasets(usual: Path, tmp_path: Path, shard_size: int) -> None:
    run = tmp_path / "r"
    play(run, tree(usual.parent / "p.jsonl", shard_size=shard_size))
    for stage in ("prompts", *STAGES):
        assert len(list((run / stage).glob("part-*"))) == -(-30 // shard_size)
        assert lines(run, stage) == lines(usual, stage)
    assert published(run, ("datasets",)) == published(usual, ("datasets",))


def test_calls_that_add_prompts_end_in_the_datasets_of_one_call_over_all(usual: Path, tmp_path: Path) -> None:
    for num in (1, 9, 10, 21, 30):
        play(tmp_path / "r", tree(write_prompts(tmp_path / "p.jsonl", num)))
    for name in DATASETS:
        many, one = tmp_path / "r" / "datasets" / name, usual / "datasets" / name
        assert read_card(many)["version"] > read_card(one)["version"] == "v0001"
        current = [{split: path.read_bytes() for split, path in verify(folder).items()} for folder in (many, one)]
        assert current[0] == current[1] != {}


def test_a_limit_and_then_none_asks_nothing_twice(cai: Command, serve: Serve, usual: Path) -> None:
    server = serve()
    args = ["run", "--run", "r", "--prompts", usual.parent / "p.jsonl", *server.options()]
    for limit in (["--limit", "4"], ["--limit", "13"], ["--limit", "2"], []):
        done = cai(*args, *limit)
        assert done.returncode in (0, 3), done.stderr
    assert server.repeated() == 0
    # Another engine answered, so the manifests differ; what was asked for does not.
    assert [line["id"] for line in lines(cai.folder / "r", "rank")] == [line["id"] for line in lines(usual, "rank")]


def test_new_prompts_on_a_later_call_are_the_only_ones_asked_about(cai: Command, serve: Serve) -> None:
    server = serve()
    for num in (3, 5):
        prompts = write_prompts(cai.folder / "p.jsonl", num)
        before = server.num_received()
        for stage in STAGES:
            given = ["--prompts", prompts] if stage == "generate" else []
            done = cai(stage, "--run", "r", *given, *server.options())
            assert done.returncode == 0, done.stderr
    texts = [json.dumps(line["body"]) for line in server.received(before)]
    assert texts
    assert all("Question 3:" in text or "Question 4:" in text for text in texts)
    assert server.repeated() == 0


def edited(path: Path, *fields: str) -> Path:
    """The default principles, the first one's fields edited."""
    content = yaml.safe_load(default_path().read_text())
    for field in fields:
        content["principles"][0][field] += f" {MARKER}"
    path.write_text(yaml.safe_dump(content, allow_unicode=True))
    return path


def written(run: Path) -> set[str]:
    """Every critique and revision of a run."""
    rounds = [r for line in lines(run, "critique-revise") for chain in line["chains"] for r in chain["rounds"]]
    return {entry[name] for entry in rounds for name in ("critique", "revision")}


def test_an_edited_principle_asks_only_what_contains_it_or_what_came_of_it(cai: Command, serve: Serve) -> None:
    server = serve()
    prompts = write_prompts(cai.folder / "p.jsonl", 40)
    args = ["run", "--run", "r", *server.options("--set", "critique_revise.rounds=1")]
    assert cai(*args, "--prompts", prompts).returncode == 0
    before, old = server.num_received(), written(cai.folder / "r")
    principles = edited(cai.folder / "mine.yaml", "critique_request", "revision_request", "comparison")
    done = cai(*args, "--constitution", principles)
    assert done.returncode == 0, done.stderr
    assert "constitution: the text of its principles or wording" in done.stderr
    new = written(cai.folder / "r") - old
    texts = ["\n".join(m["content"] for m in line["body"]["messages"]) for line in server.received(before)]
    assert any(MARKER in text for text in texts)
    assert [text for text in texts if MARKER not in text and not any(part in text for part in new)] == []
    assert server.repeated() == 0
    # A run that had these principles from the start ends in the same files.
    assert cai("run", "--run", "s", "--prompts", prompts, "--constitution", principles, *args[3:]).returncode == 0
    assert published(cai.folder / "r", STAGES) == published(cai.folder / "s", STAGES)


def test_an_edited_critique_request_leaves_the_comparisons_of_drafts_alone(tmp_path: Path) -> None:
    prompts, run = write_prompts(tmp_path / "p.jsonl", 20), tmp_path / "r"
    drafts_only = {"names": ("generate", "rank"), "export": False}
    play(run, tree(prompts), **drafts_only)
    path = edited(tmp_path / "mine.yaml", "critique_request", "revision_request")
    chain = play(run, {**tree(prompts), "constitution": str(path)}, **drafts_only)
    assert (chain.journal.asked, chain.journal.replayed) == (0, 40)


def test_a_changed_setting_redoes_only_what_depends_on_it(tmp_path: Path) -> None:
    prompts, run = write_prompts(tmp_path / "p.jsonl", 10), tmp_path / "r"
    play(run, tree(prompts))
    before = published(run, ("generate", "critique-revise"))
    chain = play(run, tree(prompts, rank={"order": "single"}))
    assert chain.journal.asked == 0  # one of two orders: both are known
    assert published(run, ("generate", "critique-revise")) == before
    play(run, tree(prompts, generate={"samples": 3}, rank={"order": "single"}))
    drafts = {json.dumps(c) for line in lines(run, "generate") for c in line["completions"] if c["sample"] < 2}
    play(tmp_path / "s", tree(prompts), ("generate",), export=False)
    assert drafts == {json.dumps(c) for line in lines(tmp_path / "s", "generate") for c in line["completions"]}


def test_lines_are_never_built_on_others_than_they_were_made_from(cai: Command, tmp_path: Path) -> None:
    prompts, run = write_prompts(tmp_path / "p.jsonl", 10), tmp_path / "r"
    play(run, tree(prompts))
    play(run, tree(prompts, generate={"samples": 1}), ("generate",), export=False)
    refused = cai("rank", "--run", "r")
    assert refused.returncode == 2
    assert "generate has changed since this was made from it; run `cai critique-revise --run r` first" in refused.stderr
    for names in [("critique-revise",), ("rank",)]:
        play(run, tree(prompts, generate={"samples": 1}), names, export=names == ("rank",))
    play(tmp_path / "s", tree(prompts, generate={"samples": 1}))
    assert published(run, STAGES) == published(tmp_path / "s", STAGES)


def test_datasets_are_never_built_on_lines_whose_own_source_has_changed(cai: Command, tmp_path: Path) -> None:
    prompts, run = write_prompts(tmp_path / "p.jsonl", 10), tmp_path / "r"
    play(run, tree(prompts), ("generate", "critique-revise"), export=False)
    play(run, tree(prompts, run={"seed": 5}), ("generate",), export=False)
    refused = cai("export", "--run", "r", "--set", "export.pairs=revision-draft")
    assert refused.returncode == 2
    assert "run `cai critique-revise --run r` first" in refused.stderr
    assert not (run / "datasets").exists()
    assert cai("critique-revise", "--run", "r").returncode == 0
    assert cai("export", "--run", "r", "--set", "export.pairs=revision-draft").returncode in (0, 3)


def test_a_record_that_came_back_is_not_missing_from_the_stages_after_it(tmp_path: Path, serve: Serve) -> None:
    run, sections = tmp_path / "r", tree(write_prompts(tmp_path / "p.jsonl", 6), generate={"samples": 1})
    slow, well = serve("rules: [{last: 'Question 3:', faults: [{kind: hang}]}]"), serve()
    at = {"backend": "server", "model": "scripted", "timeout_s": 2}
    play(run, {**sections, "engine": {**at, "base_urls": [slow.url]}}, export=False)
    assert [len(lines(run, stage)) for stage in STAGES] == [5, 5, 5]
    (run / "generate" / "manifest.json").unlink()
    play(run, {**sections, "engine": {**at, "base_urls": [well.url]}}, export=False)
    assert [len(lines(run, stage)) for stage in STAGES] == [6, 6, 6]


def test_frozen_refuses_what_changed_and_shows_it(cai: Command, usual: Path) -> None:
    args = ["--prompts", usual.parent / "p.jsonl", "--set", "engine.backend=scripted", "--frozen"]
    assert cai("generate", "--run", "r", *args).returncode == 0
    before = published(cai.folder / "r")
    assert cai("generate", "--run", "r", *args).returncode == 0
    principles = edited(cai.folder / "mine.yaml", "comparison")
    changed = cai(
        "generate", "--run", "r", *args, "--set", "generate.samples=3", "--constitution", principles, "--seed", "5"
    )
    assert changed.returncode == 2
    for difference in ("generate.samples: 2 -> 3", "run.seed: 0 -> 5", "constitution: the text"):
        assert difference in changed.stderr
    assert published(cai.folder / "r") == before
    config = yaml.safe_load((cai.folder / "r" / "config.yaml").read_text())
    assert (config["generate"]["samples"], config["run"]["seed"]) == (2, 0)


def test_frozen_refuses_another_model_under_the_same_name(cai: Command, usual: Path) -> None:
    script = cai.folder / "script.yaml"
    script.write_text("{}")
    settings = ["--set", "engine.backend=scripted", "--set", f"engine.script={script}"]
    args = ["generate", "--run", "r", "--prompts", usual.parent / "p.jsonl", *settings]
    assert cai(*args).returncode == 0
    script.write_text("salt: other weights")
    refused = cai(*args, "--frozen")
    assert refused.returncode == 2
    assert "--frozen, but the model that generate asks, or a stage before it, has changed" in refused.stderr
    assert cai(*args).returncode == 0


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def nth_line(path: Path, number: int) -> int:
    """Offset of the middle of a line, counted from 1."""
    before = path.read_bytes().split(b"\n")[: max(number - 1, 0)]
    return sum(len(line) + 1 for line in before) + 40


@pytest.mark.parametrize(
    ("file", "number", "command"),
    [
        ("journal/segment-00000.jsonl", 5, ["rank", "--set", "rank.tie_band=0.1"]),
        ("prompts/part-00000.jsonl", 2, ["rank", "--set", "rank.tie_band=0.1"]),
        ("generate/part-00000.jsonl", 3, ["rank", "--set", "rank.tie_band=0.1"]),
        ("rank/part-00000.jsonl", 3, ["export"]),
        ("rank/manifest.json", 0, ["rank"]),
        ("prompts/manifest.json", 0, ["generate"]),
        ("failed/generate.jsonl", 1, ["show"]),
    ],
)
def test_a_flipped_bit_is_found_and_nothing_is_built_on_it(
    cai: Command, tmp_path: Path, file: str, number: int, command: list[str]
) -> None:
    run, script = tmp_path / "r", tmp_path / "script.yaml"
    script.write_text("rules: [{last: 'Question 3:', text: ''}]")
    play(run, tree(write_prompts(tmp_path / "p.jsonl", 10), engine={"script": str(script)}))
    flip(run / file, nth_line(run / file, number))
    before = {name: sha for name, sha in published(run).items() if name != file}
    found = cai(command[0], "--run", "r", *command[1:])
    assert found.returncode == 4, found.stderr
    assert f"r/{file}:{number}:" if number else f"r/{file}:" in found.stderr
    assert "Traceback" not in found.stderr
    assert {name: sha for name, sha in published(run).items() if name != file} == before


def test_a_damaged_part_is_made_anew_from_the_journal_as_its_message_says(tmp_path: Path) -> None:
    run, prompts = tmp_path / "r", write_prompts(tmp_path / "p.jsonl", 10)
    play(run, tree(prompts))
    before = published(run)
    (run / "critique-revise" / "manifest.json").unlink()
    flip(run / "critique-revise" / "part-00000.jsonl", 100)
    chain = play(run, tree(prompts))
    assert chain.journal.asked == 0
    assert published(run) == before


def test_the_last_reply_cut_anywhere_is_asked_again_and_nothing_else(tmp_path: Path) -> None:
    run, prompts = tmp_path / "r", write_prompts(tmp_path / "p.jsonl", 4)
    play(run, tree(prompts))
    before, segment = published(run), run / "journal" / "segment-00000.jsonl"
    whole = segment.read_bytes()
    last = len(whole.rstrip(b"\n").rpartition(b"\n")[2]) + 1
    for cut in (1, 2, last // 2, last - 1, last):
        segment.write_bytes(whole[:-cut])
        for stage in STAGES:
            (run / stage / "manifest.json").unlink()
        chain = play(run, tree(prompts))
        assert chain.journal.asked == 1
        assert published(run) == before
        assert segment.read_bytes() == whole
