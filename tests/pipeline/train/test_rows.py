"""Which rows are read from where, and what is refused. Expected rows are written by hand."""

from __future__ import annotations

import hashlib
import itertools
import shutil
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pipeline.config.settings import ExportSettings, SplitSettings
from pipeline.errors import CorruptError, IncompleteError, UsageError
from pipeline.stages.export import export_run
from pipeline.store import RunFolder
from pipeline.train.rows import SPLITS, Row, Source, Tally, parse_source, read
from tests.pipeline.train.row_files import ALL, Fields, assistant, jsonl, parquet, refusal, rows_of, user
from tests.support import play

# What teaches nothing


def test_rows_with_nothing_to_learn_are_left_out_and_counted_by_reason(tmp_path: Path) -> None:
    pair = {"prompt": "Hi", "chosen": "Hello.", "rejected": "Go."}
    path = jsonl(
        tmp_path / "a.jsonl",
        {**pair, "chosen": " \n"},
        pair,
        {**pair, "rejected": " Hello.\n"},
        {**pair, "chosen_probability": 0.5},
        {**pair, "rejected": ""},
        {**pair, "prompt": " "},
        {"chosen": [user("a"), assistant("b")], "rejected": [user("A"), assistant("c")]},
        {"chosen": [user("a")], "rejected": [user("a"), assistant("c")]},
    )
    tallies: list[Tally] = []
    assert len(rows_of(path, "pairs", tallies=tallies)) == 1
    (tally,) = tallies
    assert (tally.rows, tally.used, tally.other_split) == (8, 1, 0)
    assert tally.left_out == {"empty": 3, "same_text": 1, "tie": 1, "no_prompt": 1, "different_prompts": 1}
    assert tally.first["empty"] == f"{path}:1"
    assert tally.first["different_prompts"] == f"{path}:7"
    ranked = {"prompt": "Hi", "completions": ["a", "b"], "scores": [1, 2]}
    path = jsonl(
        tmp_path / "b.jsonl",
        {**ranked, "scores": [2, 2.0]},
        ranked,
        {**ranked, "completions": ["a"], "scores": [1]},
        {**ranked, "completions": ["a", ""]},
    )
    assert len(rows_of(path, "ranked", tallies=tallies)) == 1
    assert tallies[1].left_out == {"tie": 1, "single": 1, "empty": 1}


def test_plain_texts_are_trained_on_unless_their_split_says_otherwise(tmp_path: Path) -> None:
    rows: list[Fields] = [{"text": "Kept.", "split": "test"}, *({"text": f"Page {n}."} for n in range(30))]
    for path in (jsonl(tmp_path / "a.jsonl", *rows), parquet(tmp_path / "a.parquet", *rows)):
        found = rows_of(path, "language", shares=SplitSettings(sft=0.1, preference=0.1, test=0.8))
        assert [(row.prompt, row.completions) for row in found] == [([], (f"Page {n}.",)) for n in range(30)]
        assert len({row.id for row in found}) == 30
    assert len(rows_of(path, "language", weight=2.0)) == 60
    folder = tmp_path / "folder"
    folder.mkdir()
    jsonl(folder / "train.jsonl", *rows[1:4])
    assert len(rows_of(f"hf:{folder}", "language")) == 3


def test_a_source_of_language_holds_texts_or_conversations(tmp_path: Path) -> None:
    text, turns = {"text": "A page."}, {"text": "\n\nHuman: Hi\n\nAssistant: Hello."}
    path = jsonl(tmp_path / "a.jsonl", text, {"text": ""}, turns)
    assert refusal(UsageError, path, "language").startswith(f"{path}:3: a conversation, unlike the rows before")
    path = jsonl(tmp_path / "b.jsonl", turns, text)
    assert refusal(UsageError, path, "language").startswith(f"{path}:2: a plain text, unlike the rows before")


@pytest.mark.parametrize(
    ("kind", "rows", "message"),
    [
        ("sft", [], "0 of 0 rows used"),
        ("sft", [{"prompt": "a", "completion": ""}], "left out: empty 1 (first {path}:1)"),
        (
            "ranked",
            [{"prompt": "a", "completions": ["b", "c"], "scores": [1, 1]}] * 2,
            "left out: tie 2 (first {path}:1)",
        ),
        ("sft", [{"prompt": "a", "completion": "b", "split": "test"}], "1 in the other split"),
    ],
)
def test_a_source_with_nothing_to_train_on_is_an_error_that_says_why(
    tmp_path: Path, kind: str, rows: list[Fields], message: str
) -> None:
    path = jsonl(tmp_path / "a.jsonl", *rows)
    said = refusal(IncompleteError, path, kind)
    assert message.format(path=path) in said
    assert "nothing to train on" in said
    assert IncompleteError.exit_code == 3
    assert len(rows_of(path, kind, "test")) == message.startswith("1 in")


@pytest.mark.parametrize(
    ("kind", "row", "message"),
    [
        ("sft", {"question": "a"}, "no \"completion\"; columns found: 'question'"),
        ("sft", {"completion": "a"}, 'there is no "prompt"'),
        ("sft", {"instruction": "a"}, 'no "output"'),
        ("sft", {"prompt": "a", "completion": 3}, '"completion" is int, not text'),
        ("sft", {"prompt": "a", "completion": ["b"]}, 'a message without "role" and "content"'),
        ("sft", {"prompt": "a", "completion": "b\0"}, 'NUL at character 1 of "completion"'),
        ("sft", {"prompt": [user("a"), assistant("b")], "completion": "c"}, '"prompt" ends with an assistant turn'),
        ("sft", {"messages": [{"role": "tool", "content": "a"}]}, "unknown role 'tool'"),
        ("sft", {"prompt": "a", "completion": "b", "label_source": 1}, '"label_source" is int, not text'),
        ("pairs", {"prompt": "a", "completion": "b"}, 'no "chosen"'),
        ("pairs", {"prompt": "a", "chosen": "b"}, 'no "rejected"'),
        ("pairs", {"chosen": "b", "rejected": "c"}, 'there is no "prompt"'),
        (
            "pairs",
            {"prompt": "a", "chosen": [user("x"), assistant("b")], "rejected": "c"},
            "does not begin with the prompt",
        ),
        ("pairs", {"prompt": "a", "chosen": "b", "rejected": "c", "chosen_probability": 1.5}, "1.5, not in [0, 1]"),
        ("pairs", {"prompt": "a", "chosen": "b", "rejected": "c", "chosen_probability": "high"}, "no finite number"),
        ("ranked", {"prompt": "a", "completions": ["b", "c"]}, 'no "scores"'),
        ("ranked", {"prompt": "a", "completions": "b", "scores": [1]}, '"completions" is str, not a list'),
        ("ranked", {"prompt": "a", "completions": ["b", "c"], "scores": [1]}, "2 completions and 1 scores"),
        ("ranked", {"prompt": "a", "completions": ["b", "c"], "scores": [1, None]}, 'None in "scores"'),
        ("ranked", {"prompt": "a", "completions": ["b", "c"], "scores": [1, True]}, 'True in "scores"'),
    ],
)
def test_a_malformed_row_is_refused_with_file_line_and_reason(
    tmp_path: Path, kind: str, row: Fields, message: str
) -> None:
    good = {"prompt": "a", "completion": "b", "chosen": "b", "rejected": "c"}
    path = jsonl(tmp_path / "a.jsonl", good, row)
    said = refusal(UsageError, path, kind)
    assert said.startswith(f"{path}:2: ")
    assert message in said
    assert UsageError.exit_code == 2


def test_rows_before_a_bad_line_come_before_its_error(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", {"prompt": "a", "completion": "b"}, {"prompt": "a"})
    rows = read([Source(str(path))], kind="sft", split="train", shares=ALL)
    assert next(rows).completions == ("b",)
    with pytest.raises(UsageError, match=r'a\.jsonl:2: no "completion"'):
        next(rows)


# Splits and weights


def test_a_row_without_a_split_is_divided_by_the_hash_of_its_first_turn(tmp_path: Path) -> None:
    texts = [f"question {n}" for n in range(2000)]
    path = jsonl(tmp_path / "a.jsonl", *({"prompt": f" {text.upper()}?\n", "completion": "b"} for text in texts))

    def is_test(text: str) -> bool:
        return int(hashlib.sha256(f"split\0{text}?".encode()).hexdigest()[:16], 16) >= 0.9 * 2**64

    train, test = (rows_of(path, split=split, shares=None) for split in ("train", "test"))
    found = [[row.prompt[0]["content"].strip(" ?\n").lower() for row in rows] for rows in (train, test)]
    assert found == [[text for text in texts if not is_test(text)], [text for text in texts if is_test(text)]]
    # 10 % of 2,000; three standard deviations are 40.
    assert len(test) == pytest.approx(200, abs=40)


def test_a_split_column_comes_before_the_hash(tmp_path: Path) -> None:
    names = ("train", "test", "validation", "train", None)
    rows = [{"prompt": f"p{n}", "completion": "b", "split": name} for n, name in enumerate(names)]
    path = jsonl(tmp_path / "a.jsonl", *rows)
    assert [row.prompt[0]["content"] for row in rows_of(path)] == ["p0", "p3", "p4"]
    assert [row.prompt[0]["content"] for row in rows_of(path, split="test")] == ["p1", "p2"]


def test_a_weight_repeats_rows_and_takes_a_share_of_them_by_hash(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", *({"prompt": f"p{n}", "completion": "b", "id": n} for n in range(1000)))

    def times(weight: float) -> Counter[str]:
        return Counter(row.id for row in rows_of(path, weight=weight))

    assert times(2.0) == dict.fromkeys(map(str, range(1000)), 2)
    small, large, more = times(0.3), times(0.6), times(2.6)
    # Three standard deviations of a binomial share of 1,000 are 0.046.
    assert small.total() / 1000 == pytest.approx(0.3, abs=0.046)
    assert large.total() / 1000 == pytest.approx(0.6, abs=0.046)
    assert small.keys() < large.keys()
    assert more == Counter({id: 3 if id in large else 2 for id in map(str, range(1000))})
    in_order = [int(row.id) for row in rows_of(path, weight=2.6)]
    assert in_order == sorted(in_order)
    assert max(Counter(row.id for row in rows_of(path, split="test", weight=2.6, shares=None)).values()) == 1


def test_sources_come_one_after_the_other_in_their_order(tmp_path: Path) -> None:
    first = jsonl(tmp_path / "b.jsonl", {"prompt": "2", "completion": "x"}, {"prompt": "1", "completion": "x"})
    second = parquet(tmp_path / "a.parquet", {"prompt": "3", "completion": "x"})
    sources = [parse_source(f"{first}@2"), parse_source(str(second))]
    rows = list(read(sources, kind="sft", split="train", shares=ALL))
    assert [row.prompt[0]["content"] for row in rows] == ["2", "2", "1", "1", "3"]
    assert rows == list(read(sources, kind="sft", split="train", shares=ALL))


def test_a_source_is_a_path_and_perhaps_a_weight(tmp_path: Path) -> None:
    assert parse_source("runs/first") == Source("runs/first", 1.0)
    assert parse_source("a.jsonl@2.5") == Source("a.jsonl", 2.5)
    assert parse_source("hf:org/name?split=train@0.5") == Source("hf:org/name?split=train", 0.5)
    assert parse_source("a@home.jsonl") == Source("a@home.jsonl", 1.0)
    here = tmp_path / "here.jsonl"
    here.touch()
    with pytest.raises(UsageError, match=r"'two' is no number; write .*here\.jsonl@WEIGHT"):
        parse_source(f"{here}@two")
    odd = tmp_path / "run@2"
    odd.mkdir()
    assert parse_source(str(odd)) == Source(str(odd), 1.0)
    assert parse_source(f"{odd}@3") == Source(str(odd), 3.0)
    for weight in ("0", "-1", "nan", "inf"):
        with pytest.raises(UsageError, match=f"the weight {weight} is not above 0"):
            parse_source(f"a.jsonl@{weight}")


# Run folders, data sets


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run of the scripted engine, its prompts of one turn and of three, one with a system text."""
    folder = tmp_path_factory.mktemp("runs")
    prompts = [{"messages": [user(f"Question {n}?")]} for n in range(30)]
    prompts += [
        {"messages": [{"role": "system", "content": "Be brief."}, user(f"{n}?"), assistant("Ja."), user("Two?")]}
        for n in range(10)
    ]
    path = jsonl(folder / "prompts.jsonl", *prompts)
    play(folder / "r", {"prompts": {"sources": [{"path": str(path)}]}})
    return folder / "r"


def tables(run: Path, name: str) -> dict[str, list[Fields]]:
    return {path.stem: pq.read_table(path).to_pylist() for path in (run / "datasets" / name).rglob("*.parquet")}


def test_a_run_gives_its_own_datasets_with_their_own_split(run: Path) -> None:
    for split in ("train", "test"):
        expected = {name: tables(run, name)[split] for name in ("sft", "preference", "ranked")}
        assert all(expected.values())
        assert rows_of(run, "sft", split) == [
            Row(e["id"], e["prompt"], (e["completion"][0]["content"],), 1.0, (), "ai") for e in expected["sft"]
        ]
        assert rows_of(run, "pairs", split) == [
            Row(
                e["id"],
                e["prompt"],
                (e["chosen"][0]["content"], e["rejected"][0]["content"]),
                e["chosen_probability"],
                (),
                "ai",
            )
            for e in expected["preference"]
        ]
        assert rows_of(run, "ranked", split) == [
            Row(e["id"], e["prompt"], tuple(c[0]["content"] for c in e["completions"]), 1.0, tuple(e["scores"]), "ai")
            for e in expected["ranked"]
        ]
    assert rows_of(run / "datasets" / "preference", "pairs") == rows_of(run, "pairs")


def test_a_reward_model_sees_each_prompt_of_a_run_once_with_every_label_of_its_pairs(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "prompts.jsonl", *({"prompt": f"Question {n}?"} for n in range(12)))
    play(tmp_path / "r", {"prompts": {"sources": [{"path": str(path)}]}, "export": {"pairs": "all"}})
    pairs = [row for split in SPLITS for row in rows_of(tmp_path / "r", "pairs", split)]
    found = [row for split in SPLITS for row in rows_of(tmp_path / "r", "comparisons", split)]
    prompts = [row.prompt[0]["content"] for row in found]
    assert len(prompts) == len(set(prompts)) == len({row.prompt[0]["content"] for row in pairs}) < len(pairs)
    labels = Counter(
        (row.prompt[0]["content"], row.completions[c.first], row.completions[c.second], c.probability)
        for row in found
        for c in row.comparisons
    )
    assert labels == Counter((row.prompt[0]["content"], *row.completions, row.probability) for row in pairs)


def test_a_run_exported_as_text_gives_the_same_rows(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    export_run(RunFolder(copy), ExportSettings(format="text"), tie_band=0.05)
    assert isinstance(tables(copy, "sft")["train"][0]["prompt"], str)
    for kind, split in itertools.product(("sft", "pairs", "ranked"), ("train", "test")):
        assert rows_of(copy, kind, split) == rows_of(run, kind, split)


def test_a_dataset_that_is_missing_emptied_or_damaged_is_an_error(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    file = next((copy / "datasets" / "preference").rglob("train.parquet"))
    damaged = bytearray(file.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    file.write_bytes(damaged)
    assert str(file) in refusal(CorruptError, copy, "pairs")
    assert str(file) in refusal(CorruptError, copy / "datasets" / "preference", "pairs")
    shutil.rmtree(copy / "datasets" / "preference")
    assert f"cai export --run {copy}" in refusal(UsageError, copy, "pairs")
    export_run(RunFolder(copy), ExportSettings(split=SplitSettings(sft=0, preference=1, test=0)), tie_band=0.05)
    assert "0 of 0 rows used" in refusal(IncompleteError, copy, "sft")


def test_a_folder_of_files_is_read_with_its_own_splits(tmp_path: Path) -> None:
    def rows(*names: str) -> list[Fields]:
        return [{"prompt": [user(name)], "completion": [assistant("x")]} for name in names]

    folder = tmp_path / "set"
    folder.mkdir()
    parquet(folder / "train-00000.parquet", *rows("a", "b"))
    assert [row.prompt[0]["content"] for row in rows_of(folder)] == ["a", "b"]
    assert rows_of(folder, split="test") == []
    parquet(folder / "validation-00000.parquet", *rows("c"))
    assert [row.prompt[0]["content"] for row in rows_of(folder, split="test")] == ["c"]
    parquet(folder / "test-00000.parquet", *rows("d"))
    for path in (folder, f"hf:{folder}"):
        assert [row.prompt[0]["content"] for row in rows_of(path)] == ["a", "b"]
        assert [row.prompt[0]["content"] for row in rows_of(path, split="test")] == ["d"]
    # A split that was named is divided like a file.
    named = [rows_of(f"hf:{folder}?split=test", split=split, shares=None) for split in ("train", "test")]
    assert [row.prompt[0]["content"] for rows in named for row in rows] == ["d"]


def test_splits_and_options_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    jsonl(folder / "test.jsonl", {"prompt": "a", "completion": "b"})
    assert "its splits are test; name one" in refusal(UsageError, folder)
    assert [row.completions for row in rows_of(f"hf:{folder}?split=test")] == [("b",)]
    assert "no train split" in refusal(UsageError, f"hf:{folder}?split=train")
    assert "column= is for prompts" in refusal(UsageError, f"hf:{folder}?column=a")
    (tmp_path / "none").mkdir()
    assert f"hf:{tmp_path}/none" in refusal(UsageError, tmp_path / "none")


def test_a_file_that_is_missing_cut_or_unknown_is_refused(tmp_path: Path) -> None:
    assert "no such file" in refusal(UsageError, tmp_path / "a.jsonl")
    assert "unknown kind of file" in refusal(UsageError, tmp_path / "a.csv")
    path = parquet(tmp_path / "a.parquet", {"prompt": "a", "completion": "b"})
    path.write_bytes(path.read_bytes()[:-20])
    assert "a.parquet: not readable as Parquet" in refusal(UsageError, path)
    path.write_bytes(b"")
    assert "a.parquet: not readable as Parquet" in refusal(UsageError, path)
