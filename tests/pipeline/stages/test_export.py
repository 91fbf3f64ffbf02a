import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.settings import ExportSettings, SplitSettings
from pipeline.dataset_folder import read_card, verify
from pipeline.errors import CorruptError, IncompleteError, UsageError
from pipeline.stages.export import ExportReport, export, export_run
from pipeline.store import RunFolder, StageWriter
from tests.pipeline.stages.lines import candidate, comparison, entry

SFT, PREFERENCE, TEST = (
    SplitSettings(sft=1.0, preference=0.0, test=0.0),
    SplitSettings(sft=0.0, preference=1.0, test=0.0),
    SplitSettings(sft=0.0, preference=0.0, test=1.0),
)
COMMON = ["id", "prompt", "tags", "principles", "label_source"]
Record = dict[str, Any]


def record(id: str = "r1", **changes: Any) -> Record:
    """Two drafts; the first improved twice, the second made worse, then improved. Every text differs."""
    user = {"role": "user", "content": f"Question {id}?"}
    whole = {
        "prompt": {"id": id, "messages": [user], "tags": ["t"], "source": "p.jsonl"},
        "drafts": [("a0", "stop"), ("b0", "stop")],
        "chains": [
            [entry("a1", "improved", 0.9), entry("a2", "improved", 0.7, "warm")],
            [entry("b1", "worse", 0.2), entry("b2", "same", 0.5, "warm")],
        ],
        "candidates": [
            candidate("draft", 0, 0, "a0", -0.5, 3),
            candidate("revision", 0, 2, "a2", 1.5, 1),
            candidate("draft", 1, 0, "b0", -1.5, 4),
            candidate("revision", 1, 2, "b2", 0.5, 2),
        ],
        "comparisons": [
            comparison(0, 1, 0.2),
            comparison(0, 2, 0.6),
            comparison(0, 3, 0.52, "tie"),
            comparison(1, 2, 0.85),
            comparison(1, 3, 0.7),
            comparison(2, 3, None, "abstain"),
        ],
    }
    return {**whole, **changes}


def write(folder: Path, records: Iterable[Record], *, stages: int = 3, **settings: Any) -> ExportReport:
    """Exports; stages: 1 drafts only, 2 with chains, 3 with ranking."""
    records = list(records)
    lines: list[list[Record]] = [[], [], [], []]
    for r in records:
        id = r["prompt"]["id"]
        drafts = [
            {"sample": n, "text": text, "model": "m", "finish_reason": reason, "num_tokens": 3}
            for n, (text, reason) in enumerate(r["drafts"])
        ]
        lines[0].append(r["prompt"])
        lines[1].append({"id": id, "completions": drafts})
        lines[2].append({"id": id, "chains": [{"sample": n, "rounds": c} for n, c in enumerate(r["chains"])]})
        lines[3].append({"id": id, "candidates": r["candidates"], "comparisons": r["comparisons"]})
    return export(
        folder,
        lines[0],
        drafts=lines[1],
        chains=lines[2] if stages > 1 else None,
        ranked=lines[3] if stages > 2 else None,
        settings=ExportSettings(**settings),
        tie_band=0.05,
        left_out=folder.with_name(f"{folder.name}-left-out.jsonl"),
    )


def rows(folder: Path, name: str, split: str = "train") -> list[Record]:
    import pyarrow.parquet as pq

    files = verify(folder / name)
    return pq.read_table(files[split]).to_pylist() if split in files else []


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def parquet(folder: Path) -> dict[str, bytes]:
    """The current versions' files."""
    return {
        f"{card.parent.name}/{split}": path.read_bytes()
        for card in folder.glob("*/README.md")
        for split, path in verify(card.parent).items()
    }


def completions(found: list[Record]) -> dict[str, str]:
    return {row["id"]: row["completion"][0]["content"] for row in found}


def test_the_best_answers_and_the_pairs_are_rows(tmp_path: Path) -> None:
    write(tmp_path / "sft", [record()], split=SFT)
    (row,) = rows(tmp_path / "sft", "sft")
    assert row == {
        "id": "r1/revision-0-2",
        "prompt": [{"role": "user", "content": "Question r1?"}],
        "completion": [{"role": "assistant", "content": "a2"}],
        "tags": ["t"],
        "principles": ["calm", "kind", "warm"],
        "label_source": "ai",
    }
    write(tmp_path / "preference", [record()], split=PREFERENCE)
    (row,) = rows(tmp_path / "preference", "preference")
    assert row == {
        "id": "r1/revision-0-2:draft-1",
        "prompt": [{"role": "user", "content": "Question r1?"}],
        "chosen": [{"role": "assistant", "content": "a2"}],
        "rejected": [{"role": "assistant", "content": "b0"}],
        "chosen_probability": 0.85,
        "score_chosen": 1.5,
        "score_rejected": -1.5,
        "tags": ["t"],
        "principles": ["calm", "kind", "warm"],
        "label_source": "ai",
    }


def test_texts_cut_at_max_tokens_or_empty_make_no_row(tmp_path: Path) -> None:
    chains = [
        [entry("a1", "improved", 0.9, finish_reason="length")],
        [entry(" ", "improved", 0.8), entry("b2", "worse", 0.1)],
    ]
    report = write(tmp_path, [record(chains=chains)], stages=2, sft="all", split=SFT, filters=())
    assert completions(rows(tmp_path, "sft")) == {"r1/revision-1-2": "b2"}
    assert report.dropped["sft"] == {"cut": 1, "empty": 1}


def test_a_given_answer_keeps_its_label(tmp_path: Path) -> None:
    given = record(candidates=[candidate("given", 0, 0, "g0", 1.0, 1), candidate("draft", 0, 0, "a0", -1.0, 2)])
    given["comparisons"] = [comparison(0, 1, 0.8)]
    write(tmp_path, [given], split=SFT)
    (row,) = rows(tmp_path, "sft")
    assert (row["id"], row["label_source"]) == ("r1/given-0", "given")


def test_faults_on_either_side_drop_the_pair(tmp_path: Path) -> None:
    cut = write(tmp_path / "cut", [record(drafts=[("a0", "stop"), ("b0", "length")])], split=PREFERENCE)
    assert cut.dropped["preference"] == {"cut": 1}
    same = [candidate("draft", 0, 0, "a0", 1.0, 1), candidate("draft", 1, 0, "a0 ", -1.0, 2)]
    twice = record(drafts=[("a0", "stop"), ("a0 ", "stop")], candidates=same, comparisons=[comparison(0, 1, 0.9)])
    report = write(tmp_path / "same", [twice], split=PREFERENCE)
    assert report.dropped["preference"] == {"same_text": 1}
    assert rows(tmp_path / "cut", "preference") == rows(tmp_path / "same", "preference") == []


def test_ranked_rows_hold_the_sound_candidates_best_first(tmp_path: Path) -> None:
    report = write(tmp_path, [record(drafts=[("a0", "length"), ("b0", "stop")])], split=PREFERENCE)
    (row,) = rows(tmp_path, "ranked")
    assert [message["content"] for [message] in row["completions"]] == ["a2", "b2", "b0"]
    assert row["scores"] == [1.5, 0.5, -1.5]
    assert report.dropped["ranked"] == {"cut": 1}


def contract() -> dict[str, set[str]]:
    return {
        "sft": {"completion"},
        "preference": {"chosen", "rejected", "chosen_probability", "score_chosen", "score_rejected"},
        "ranked": {"completions", "scores"},
        "prompts": set(),
        "chains": {"completions", "chains", "candidates", "comparisons", "grades", "source"},
    }


def test_datasets_loads_every_version_with_the_contracts_columns(tmp_path: Path) -> None:
    from datasets import load_dataset

    folder, cache = tmp_path / "datasets", str(tmp_path / "cache")
    for version, count in (("v0001", 40), ("v0002", 60)):
        report = write(folder, [record(f"r{i}") for i in range(count)])
        for name, columns in contract().items():
            loaded = load_dataset(str(folder / name), split="train", cache_dir=cache)
            assert set(loaded.column_names) == {*COMMON, *columns}
            assert len(loaded) == report.datasets[name].rows["train"]
            assert report.datasets[name].version == version
            assert loaded["id"][:] == sorted(loaded["id"][:])
            test = load_dataset(str(folder / name), split="test", cache_dir=cache)
            assert len(test) == report.datasets[name].rows["test"]
        assert sum(report.prompts.values()) == count
    chains = load_dataset(str(folder / "chains"), split="train", cache_dir=cache)
    first = chains[0]["chains"][0]["rounds"][1]
    assert (first["revision"], first["principle"], first["p"]) == ("a2", "warm", 0.7)
    assert chains[0]["comparisons"][5]["p"] is None


def test_text_format_gives_strings_that_join(tmp_path: Path) -> None:
    messages = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "Bye"},
    ]
    whole = record()
    whole["prompt"]["messages"] = messages
    write(tmp_path, [whole], split=SFT, format="text")
    (row,) = rows(tmp_path, "sft")
    joined = "Be kind.\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Bye\n\nAssistant: a2"
    assert row["prompt"] + row["completion"] == joined
    (row,) = rows(tmp_path, "ranked")
    assert row["completions"] == [" a2", " b2", " a0", " b0"]


def test_a_split_without_rows_has_no_file_and_is_not_named(tmp_path: Path) -> None:
    write(tmp_path, [record()], split=TEST)
    assert sorted(read_card(tmp_path / "prompts")["files"]) == ["test.parquet"]
    assert "train" not in (tmp_path / "prompts" / "README.md").read_text().split("---\n")[1]


def test_runs_that_add_prompts_end_with_the_bytes_of_one_run_over_all(tmp_path: Path) -> None:
    helpful = tmp_path / "helpful.jsonl"
    helpful.write_text("".join(json.dumps({"prompt": f"h{i}", "completion": f"c{i}"}) + "\n" for i in range(200)))
    settings = {"helpful": {"path": str(helpful), "share": 0.25}}
    records = [record(f"r{i:02d}") for i in range(60)]
    for count in (10, 25, 60):
        write(tmp_path / "many", records[:count], **settings)
    write(tmp_path / "one", records, **settings)
    write(tmp_path / "backwards", reversed(records), **settings)
    assert parquet(tmp_path / "many") == parquet(tmp_path / "one")
    assert tree(tmp_path / "backwards") == tree(tmp_path / "one")


def test_the_same_rows_make_no_new_version(tmp_path: Path) -> None:
    write(tmp_path, [record()], split=SFT)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    report = write(tmp_path, [record()], split=SFT)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()} == before
    assert not any(published.is_new for published in report.datasets.values())
    write(tmp_path, [record()], split=SFT, margin=0.1, pairs="all")
    assert read_card(tmp_path / "sft")["version"] == "v0001"


def test_nothing_in_a_dataset_names_a_folder_or_a_time(tmp_path: Path) -> None:
    for name in ("x", "y"):
        helpful = tmp_path / name / "helpful.jsonl"
        helpful.parent.mkdir()
        helpful.write_text('{"prompt": "a", "completion": "b"}\n')
        write(tmp_path / name / "out", [record()], helpful={"path": str(helpful), "share": 0.5})
    assert tree(tmp_path / "x" / "out") == tree(tmp_path / "y" / "out")


# Splits, helpful data, the report


def test_a_record_is_in_train_of_its_own_dataset_only(tmp_path: Path) -> None:
    report = write(tmp_path, [record(f"r{i}") for i in range(80)])
    prompts = report.prompts
    assert {name: published.rows for name, published in report.datasets.items()} == {
        "sft": {"train": prompts["sft"], "test": prompts["test"]},
        "preference": {"train": prompts["preference"], "test": prompts["test"]},
        **{
            name: {"train": prompts["sft"] + prompts["preference"], "test": prompts["test"]}
            for name in ("ranked", "prompts", "chains")
        },
    }
    assert prompts["test"] > 0
    train = {row["id"].partition("/")[0] for row in rows(tmp_path, "sft")}
    assert not train & {row["id"].partition("/")[0] for row in rows(tmp_path, "preference")}
    report.check()


def test_helpful_data_makes_up_its_share(tmp_path: Path) -> None:
    path = tmp_path / "helpful.jsonl"
    lines: list[Record] = [{"prompt": f"h{i}", "completion": f"c{i}"} for i in range(400)]
    lines += [lines[0], {"prompt": "h", "completion": "Assistant: no"}, {"prompt": "unanswered"}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    records = [record(f"r{i}") for i in range(30)]
    report = write(tmp_path / "out", records, split=SFT, helpful={"path": str(path), "share": 0.75})
    found = rows(tmp_path / "out", "sft")
    helpful = [row for row in found if row["id"].startswith("helpful/")]
    assert (len(helpful), len(found)) == (90, 120)
    assert report.helpful == {"wanted": 90, "used": 90}
    assert {row["label_source"] for row in helpful} == {"given"}
    assert {row["prompt"][0]["content"].replace("h", "c") for row in helpful} == {
        row["completion"][0]["content"] for row in helpful
    }
    assert report.dropped["sft"] == {"helpful_role_confusion": 1, "helpful_empty": 1}
    few = write(tmp_path / "few", records * 1, split=SFT, helpful={"path": str(path), "share": 0.99})
    assert few.helpful == {"wanted": 2970, "used": 400}
    with pytest.raises(UsageError, match="no such file"):
        write(tmp_path / "none", records, helpful={"path": str(tmp_path / "none.jsonl"), "share": 0.5})


def test_nothing_left_to_train_on_is_exit_3_with_the_counts(tmp_path: Path) -> None:
    chains = [[entry("a0", "same", 0.5)], [entry("Assistant: b", "improved", 0.9)]]
    report = write(tmp_path, [record(chains=chains)], stages=2, sft="all", split=SFT)
    with pytest.raises(IncompleteError, match=r"datasets/sft.*role_confusion 1, unchanged 1; prompts: sft 1") as caught:
        report.check()
    assert caught.value.exit_code == 3
    alone = write(tmp_path / "drafts", [record()], stages=1)
    with pytest.raises(IncompleteError, match="datasets/sft: nothing left"):
        alone.check()


def test_records_that_a_stage_lost_are_counted(tmp_path: Path) -> None:
    prompts = [record(f"r{i}")["prompt"] for i in range(3)]
    chains = [{"id": "r1", "chains": [{"sample": 0, "rounds": [entry("a1", "improved", 0.9)]}]}]
    report = export(
        tmp_path,
        prompts,
        drafts=None,
        chains=chains,
        ranked=None,
        settings=ExportSettings(split=SFT),
        tie_band=0.05,
        left_out=tmp_path / "left-out.jsonl",
    )
    assert report.dropped["sft"] == {"no_chain": 2}
    assert len(rows(tmp_path, "sft")) == 1


def left_out(folder: Path) -> list[Record]:
    path = folder.with_name(f"{folder.name}-left-out.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_what_made_no_row_is_written_down_with_its_reason(tmp_path: Path) -> None:
    chains = [[entry("a0", "same", 0.5)], [entry("Assistant: b", "improved", 0.9)]]
    folder = tmp_path / "out"
    report = write(folder, [record(chains=chains), record("r2")], stages=2, sft="all", split=SFT)
    assert report.left_out == tmp_path / "out-left-out.jsonl"
    common = {"id": "r1", "stage": "export", "turn": 1, "kind": "sft", "attempts": 1}
    assert left_out(folder) == [
        {**common, "sample": 0, "reason": "unchanged", "detail": "r1/revision-0-1"},
        {**common, "sample": 1, "reason": "role_confusion", "detail": "r1/revision-1-1"},
    ]
    write(folder, [record(drafts=[("a0", "stop"), ("b0", "length")])], split=PREFERENCE)
    assert [
        (line["kind"], line["reason"], line["sample"], line["turn"], line["detail"]) for line in left_out(folder)
    ] == [
        ("preference", "cut", 1, 0, "r1/revision-0-2:draft-1"),
        ("ranked", "cut", 1, 0, "r1"),
    ]
    assert write(folder, [record()], split=SFT).left_out is None
    assert left_out(folder) == []


def test_as_many_losses_are_written_down_as_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "helpful.jsonl"
    path.write_text('{"prompt": "h", "completion": "Assistant: no"}\n')
    helpful = {"path": str(path), "share": 0.5}
    report = write(tmp_path / "out", [record(f"r{i}") for i in range(20)], pairs="all", helpful=helpful)
    found = left_out(tmp_path / "out")
    assert len(found) == sum(sum(counts.values()) for counts in report.dropped.values()) > 20
    assert [line["reason"] for line in found[-1:]] == ["helpful_role_confusion"]
    ids = [line["id"] for line in found[:-1]]
    assert ids == sorted(ids, key=lambda id: int(id[1:]))


def test_a_copy_of_a_text_that_was_cut_makes_no_row(tmp_path: Path) -> None:
    chains = [[entry("a0 ", "same", 0.5), entry("a0", "same", 0.5)], [entry("b1", "improved", 0.9)]]
    cut = record(drafts=[("a0", "length"), ("b0", "length")], chains=chains)
    report = write(tmp_path, [cut], stages=2, sft="all", split=SFT, filters=())
    assert completions(rows(tmp_path, "sft")) == {"r1/revision-1-1": "b1"}
    assert report.dropped["sft"] == {"cut": 2}


def test_a_line_that_belongs_to_no_prompt_is_corruption(tmp_path: Path) -> None:
    settings = ExportSettings()
    with pytest.raises(CorruptError, match="'r9'"):
        export(
            tmp_path,
            [record()["prompt"]],
            drafts=[{"id": "r9", "completions": []}],
            chains=None,
            ranked=None,
            settings=settings,
            tie_band=0.05,
            left_out=tmp_path / "left-out.jsonl",
        )
    assert not list(tmp_path.glob("*left-out*"))


def test_a_run_folder_exports_what_its_stages_published(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "first", create=True)
    whole = record()
    chains = [{"id": "r1", "chains": [{"sample": n, "rounds": rounds} for n, rounds in enumerate(whole["chains"])]}]
    drafts = [
        {"sample": n, "text": text, "model": "m", "finish_reason": "stop", "num_tokens": 3}
        for n, (text, _) in enumerate(whole["drafts"])
    ]
    for stage, lines in (
        ("prompts", [whole["prompt"]]),
        ("generate", [{"id": "r1", "completions": drafts}]),
        ("critique-revise", chains),
    ):
        StageWriter(run, stage, "f").publish(0, lines, prompts=1, num_in=1)
    export_run(run, ExportSettings(split=SFT), tie_band=0.05)
    write(tmp_path / "directly", [whole], stages=2, split=SFT)
    assert tree(run.path / "datasets") == tree(tmp_path / "directly")
    assert completions(rows(run.path / "datasets", "sft")) == {"r1/revision-0-2": "a2", "r1/revision-1-2": "b2"}
