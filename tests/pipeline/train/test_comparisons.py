"""What a reward model is trained on: all that a source says of a prompt, in one element. Expected rows are by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from pipeline.lm.load import load
from pipeline.lm.templates import Chat
from pipeline.train.batches import tokenise
from pipeline.train.rm import Comparisons
from pipeline.train.rows import Row, Source, Tally, read
from tests.pipeline.train.row_files import ALL, Fields, jsonl, rows_of, user
from tests.pipeline.train.tiny_jobs import run_job
from tests.support import Command

FIRST = [
    {"id": "a", "prompt": "Hi", "chosen": "Hello.", "rejected": "Go.", "chosen_probability": 0.8},
    {"id": "b", "prompt": "Hi", "chosen": "Hm.", "rejected": "Go.", "chosen_probability": 0.6, "tags": ["x"]},
    {"id": "c", "prompt": "Hi", "chosen": "Go.", "rejected": "Hello.", "label_source": "human"},
]
OTHER = {"id": "o", "prompt": "Why?", "chosen": "Because.", "rejected": "No.", "chosen_probability": 0.9}
MIXED = [FIRST[0], OTHER, FIRST[1], FIRST[2]]
RANKED = {"id": "r", "prompt": "Hi", "completions": ["Go.", "Hello.", "Hm.", "Hm. "], "scores": [-1, 2, 0.5, 0.5]}


def by_id(rows: list[Row]) -> dict[str, Any]:
    return {row.id: (row.completions, [tuple(each) for each in row.comparisons]) for row in rows}


def test_pairs_of_one_prompt_are_one_row_wherever_they_stand(tmp_path: Path) -> None:
    tallies: list[Tally] = []
    rows = rows_of(jsonl(tmp_path / "a.jsonl", *MIXED), "comparisons", tallies=tallies)
    assert by_id(rows) == {
        "a": (("Hello.", "Go.", "Hm."), [(0, 1, 0.8), (2, 1, 0.6), (1, 0, 1.0)]),
        "o": (("Because.", "No."), [(0, 1, 0.9)]),
    }
    assert [(row.label_source, row.tags) for row in rows] == [("mixed", ("x",)), ("given", ())]
    assert (tallies[0].rows, tallies[0].used) == (4, 4)
    assert len(rows_of(tmp_path / "a.jsonl", "pairs")) == 4


def test_a_ranking_is_all_its_comparisons_but_ties(tmp_path: Path) -> None:
    path = jsonl(
        tmp_path / "a.jsonl", RANKED, {**RANKED, "prompt": "Why?", "completions": ["a", "b"], "scores": [1, 0]}
    )
    rows = rows_of(path, "comparisons")
    assert [[tuple(each) for each in row.comparisons] for row in rows] == [
        [(1, 0, 1.0), (2, 0, 1.0), (3, 0, 1.0), (1, 2, 1.0), (1, 3, 1.0)],
        [(0, 1, 1.0)],
    ]


def test_a_ranking_and_pairs_of_its_prompt_are_one_row(tmp_path: Path) -> None:
    pair = {"prompt": "Hi", "chosen": "Yes.", "rejected": "Go.", "chosen_probability": 0.7}
    (row,) = rows_of(
        jsonl(tmp_path / "a.jsonl", {**RANKED, "completions": ["Go.", "Hello."], "scores": [0, 1]}, pair), "comparisons"
    )
    assert row.completions == ("Go.", "Hello.", "Yes.")
    assert row.comparisons == ((1, 0, 1.0), (2, 0, 0.7))


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"completions": ["b", "c"], "scores": [1, 1]}, "tie"),
        ({"completions": ["b", "b "], "scores": [1, 2]}, "same_text"),
        ({"completions": ["b"], "scores": [1]}, "single"),
        ({"chosen": "b", "rejected": "c", "chosen_probability": 0.5}, "tie"),
    ],
)
def test_a_row_that_compares_nothing_is_left_out(tmp_path: Path, row: Fields, reason: str) -> None:
    tallies: list[Tally] = []
    rows_of(jsonl(tmp_path / "a.jsonl", {"prompt": "a", **row}, OTHER), "comparisons", tallies=tallies)
    assert tallies[0].left_out == {reason: 1}


def test_a_weight_takes_a_prompt_with_all_its_comparisons(tmp_path: Path) -> None:
    pairs = [{**pair, "id": None, "prompt": f"{n}?"} for pair in FIRST for n in range(400)]
    path = jsonl(tmp_path / "a.jsonl", *pairs)
    tallies: list[Tally] = []
    rows = rows_of(path, "comparisons", weight=1.5, tallies=tallies)
    assert {len(row.comparisons) for row in rows} == {3}
    # Three standard deviations of a binomial half of 400 are 30.
    assert len(rows) == pytest.approx(600, abs=30)
    assert (tallies[0].rows, tallies[0].used) == (1200, 1200)
    half = rows_of(path, "comparisons", weight=0.5, tallies=tallies)
    assert tallies[1].used == 3 * len(half) < 1200


def test_a_prompt_of_two_sources_is_an_element_of_each(tmp_path: Path) -> None:
    sources = [Source(str(jsonl(tmp_path / f"{n}.jsonl", *FIRST[:2]))) for n in range(2)]
    rows = list(read(sources, kind="comparisons", split="train", shares=ALL))
    assert [len(row.comparisons) for row in rows] == [2, 2]


def test_an_element_is_in_one_split_alone(tmp_path: Path) -> None:
    pairs = [{**pair, "prompt": f"{n}?", "id": None} for pair in FIRST for n in range(300)]
    path = jsonl(tmp_path / "a.jsonl", *pairs)
    train, test = (rows_of(path, "comparisons", split, shares=None) for split in ("train", "test"))
    assert {len(row.comparisons) for row in (*train, *test)} == {3}
    assert len(test) == len({row.prompt[0]["content"] for row in rows_of(path, "pairs", "test", shares=None)}) > 10
    assert len(train) + len(test) == 300


def test_the_loss_of_a_prompt_is_the_mean_of_its_comparisons_under_their_own_labels(
    start: Path, tmp_path: Path
) -> None:
    """Against a plain loop over transformers' own scores; a prompt of three pairs weighs as much as one of one."""
    rows = rows_of(jsonl(tmp_path / "a.jsonl", *MIXED), "comparisons")
    loaded = load(str(start), head="score")
    chat = Chat(loaded.tokenizer)
    torch.nn.init.normal_(loaded.model.score.weight, std=0.5)
    data = tokenise(rows, chat, max_length=512, too_long="drop")

    def score(prompt: str, answer: str) -> float:
        tokens = chat.prompt([user(prompt)], reasoning=False).token_ids + chat.completion(answer).token_ids  # type: ignore[list-item]
        return loaded.model(torch.tensor([tokens])).logits.item()

    def loss(pair: dict[str, Any]) -> float:
        gap = score(pair["prompt"], pair["chosen"]) - score(pair["prompt"], pair["rejected"])
        p = pair.get("chosen_probability", 1.0)
        return p * math.log1p(math.exp(-gap)) + (1 - p) * math.log1p(math.exp(gap))

    terms = Comparisons(0.0)(loaded.model, data, range(2))
    assert terms.losses.tolist() == pytest.approx([sum(map(loss, FIRST)) / 3, loss(OTHER)], abs=1e-5)
    assert terms.metrics["scores/accuracy"].shape == (4,)
    assert data.num_comparisons == 4


def test_the_digest_tells_labels_of_comparisons_apart(tmp_path: Path, start: Path) -> None:
    chat = Chat(AutoTokenizer.from_pretrained(start))
    rows = rows_of(jsonl(tmp_path / "a.jsonl", *FIRST), "comparisons")
    other = rows_of(jsonl(tmp_path / "b.jsonl", {**FIRST[0], "chosen_probability": 0.7}, *FIRST[1:]), "comparisons")
    fewer = rows_of(jsonl(tmp_path / "c.jsonl", *FIRST[:2]), "comparisons")
    assert other[0].completions == rows[0].completions == fewer[0].completions
    found = {tokenise(each, chat, max_length=512, too_long="drop").digest for each in (rows, other, fewer)}
    assert len(found) == 3


def test_a_batch_is_so_many_prompts_and_the_counts_name_both(start: Path, tmp_path: Path) -> None:
    pairs = [{**pair, "prompt": f"{n}?", "id": None, "split": "train"} for n in range(8) for pair in FIRST]
    pairs += [{**FIRST[0], "split": "test"}, {**FIRST[1], "split": "test"}]
    report = run_job("rm", jsonl(tmp_path / "a.jsonl", *pairs), start, tmp_path / "rm", keys={"batch_size": 4})
    assert report.outcome.step == 2
    assert [(c["rows"], c["comparisons"]) for c in report.counts.values()] == [(8, 24), (1, 2)]
    lines = (tmp_path / "rm" / "README.md").read_text().splitlines()
    assert any(line.startswith("| train | rows 8, comparisons 24, cut 0") for line in lines)


def test_train_rm_takes_rankings(cai: Command, tmp_path: Path) -> None:
    rows = [{**RANKED, "prompt": f"{n}?", "split": "train"} for n in range(9)]
    jsonl(tmp_path / "ranked.jsonl", *rows, {**OTHER, "split": "test"})
    done = cai("train-rm", "--model", "nano", "--data", "ranked.jsonl", "--out", "rm", "--json")
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout)["counts"]["train-rm"]
    assert [(counts[split]["rows"], counts[split]["comparisons"]) for split in ("train", "test")] == [(9, 45), (1, 1)]
    AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm")
