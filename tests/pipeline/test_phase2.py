"""Phase 2 with the scripted engine: which prompts are sampled, what becomes of the samples, and what is done again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.settings import SplitSettings
from pipeline.dataset_folder import read_card, verify
from pipeline.errors import UsageError
from pipeline.splits import split_of
from pipeline.standing import standing
from pipeline.store import RunFolder
from tests.support import Command, Server, lines, play, published, write_prompts

Serve = Callable[..., Server]
GENERATE, RANK = ("generate",), ("rank",)
SHARES = SplitSettings(sft=0.4, preference=0.4, test=0.2)


def tree(path: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    prompts = {"sources": [{"path": str(path)}], "shard_size": 10}
    return {"prompts": prompts, "export": {"split": SHARES.model_dump()}, **sections}


@pytest.fixture(scope="module")
def ranked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run over 30 prompts through both phases, exported before and after the second; `p.jsonl` lies beside it."""
    folder = tmp_path_factory.mktemp("ranked")
    settings = tree(write_prompts(folder / "p.jsonl", 30))
    play(folder / "r", settings)
    play(folder / "r", settings, GENERATE, phase=2, export=False)
    play(folder / "r", settings, RANK, phase=2)
    return folder / "r"


def splits(run: Path) -> dict[str, str]:
    return {line["id"]: split_of(line["messages"], SHARES) for line in lines(run, "prompts")}


def rows(run: Path, dataset: str, split: str = "train") -> list[dict[str, Any]]:
    import pyarrow.parquet as pq

    return pq.read_table(verify(run / "datasets" / dataset)[split]).to_pylist()


def record_of(row: dict[str, Any]) -> str:
    return row["id"].partition("/")[0]


def test_prompts_that_sft_did_not_imitate_are_sampled_and_all_are_accounted_for(ranked: Path) -> None:
    sampled = [line["id"] for line in lines(ranked, "phase2/generate")]
    assert sampled == [id for id, split in splits(ranked).items() if split != "sft"]
    manifest = RunFolder(ranked, phase=2).manifest("generate")
    assert manifest is not None
    counts = manifest.counts
    assert counts["in"] == counts["ok"] == len(sampled)
    assert counts["in"] + counts["not_taken"] == 30
    assert [line["id"] for line in lines(ranked, "phase2/rank")] == sampled


def test_preferences_come_from_samples_and_their_prompts_are_neither_imitated_nor_mixed(ranked: Path) -> None:
    split = splits(ranked)
    for name in ("preference", "ranked"):
        assert {split[record_of(row)] for row in rows(ranked, name)} == {"preference"}
        assert {split[record_of(row)] for row in rows(ranked, name, "test")} == {"test"}
        assert all("/phase2" in row["id"] for row in rows(ranked, name))
    assert {split[record_of(row)] for row in rows(ranked, "sft")} == {"sft"}
    texts = {c["text"] for line in lines(ranked, "phase2/generate") for c in line["completions"]}
    assert {row["chosen"][0]["content"] for row in rows(ranked, "preference")} <= texts


def test_the_label_of_a_pair_of_samples_is_what_the_judge_said_of_just_these_two(ranked: Path) -> None:
    found = {line["id"]: line for line in lines(ranked, "phase2/rank")}
    for row in rows(ranked, "preference"):
        line = found[record_of(row)]
        texts = [candidate["text"] for candidate in line["candidates"]]
        chosen = texts.index(row["chosen"][0]["content"])
        asked = [c["p"] if c["a"] == chosen else 1 - c["p"] for c in line["comparisons"]]
        assert row["chosen_probability"] == pytest.approx(sum(asked) / len(asked)) > 0.5


@pytest.mark.parametrize(("pairs", "phases"), [("samples", {True}), ("revisions", {False}), ("both", {True, False})])
def test_pairs_come_from_the_phase_that_is_asked_for(
    ranked: Path, tmp_path: Path, pairs: str, phases: set[bool]
) -> None:
    shutil.copytree(ranked, tmp_path / "r")
    play(tmp_path / "r", tree(ranked.parent / "p.jsonl", recipe={"pairs": pairs}), RANK, phase=2)
    for name in ("preference", "ranked"):
        assert {"/phase2" in row["id"] for row in rows(tmp_path / "r", name)} == phases
    assert read_card(tmp_path / "r" / "datasets" / "sft")["version"] == "v0001"


def test_what_is_left_to_do_follows_the_samples(ranked: Path, tmp_path: Path) -> None:
    run = tmp_path / "r"
    shutil.copytree(ranked, run)
    assert standing(RunFolder(run)).to_do == []
    shutil.rmtree(run / "phase2")
    assert standing(RunFolder(run)).to_do == ["export"]
    settings = tree(ranked.parent / "p.jsonl")
    play(run, settings, GENERATE, phase=2, export=False)
    play(run, settings, RANK, phase=2)
    assert published(run) == published(ranked)


def test_samples_without_a_draft_to_rank_are_named(ranked: Path, tmp_path: Path) -> None:
    play(tmp_path / "r", tree(ranked.parent / "p.jsonl"), export=False)
    with pytest.raises(UsageError, match=r"cai generate --run .* --phase 2"):
        play(tmp_path / "r", tree(ranked.parent / "p.jsonl"), RANK, phase=2)


@pytest.mark.parametrize("place", ["phase2/generate", "phase2/rank"])
def test_a_call_killed_in_phase_2_goes_on_and_asks_nothing_twice(cai: Command, serve: Serve, place: str) -> None:
    server = serve()
    write_prompts(cai.folder / "p.jsonl", 12)
    split = ["--set", f"export.split={SHARES.model_dump_json()}"]
    assert cai("run", "--run", "r", "--prompts", "p.jsonl", *server.options(*split)).returncode in (0, 3)
    stage = place.partition("/")[2]
    if stage == "rank":
        assert cai("generate", "--run", "r", "--phase", "2").returncode == 0
    killed = cai(stage, "--run", "r", "--phase", "2", fault=f"before:1:replace r/{place}/.manifest")
    assert killed.returncode == -9
    assert not (cai.folder / "r" / place / "manifest.json").exists()
    for again in ("generate", "rank"):
        assert cai(again, "--run", "r", "--phase", "2").returncode == 0
    assert server.repeated() == 0
    drafted = [line["id"] for line in lines(cai.folder / "r", "phase2/generate")]
    assert [line["id"] for line in lines(cai.folder / "r", "phase2/rank")] == drafted != []


def test_records_are_shown_with_their_samples(cai: Command, ranked: Path) -> None:
    sampled = lines(ranked, "phase2/generate")[0]
    shown = cai("show", "--run", ranked, sampled["id"]).stdout
    assert "phase 2, sample 0" in shown
    assert sampled["completions"][0]["text"].splitlines()[0] in shown
    report = json.loads(cai("show", "--run", ranked, sampled["id"], "--json").stdout)
    assert report["outputs"]["records"][0]["phase2/generate"] == sampled
