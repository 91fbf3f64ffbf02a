"""`cai score`: what scores are, what becomes one row, which answers a group takes, and what can be trained on it."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from pipeline.errors import IncompleteError, UsageError
from pipeline.lm.templates import Chat
from pipeline.train.quality import ALL, Grouping, borders, parse_grouping
from pipeline.train.rows import Source, parse_source, read
from pipeline.train.score import ScoreJob, ScoreReport, plan_score, run_score
from tests.pipeline.lm.tiny import save_tiny, tiny_tokenizer
from tests.pipeline.train.tiny_jobs import run_job, write_rows


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("policy"))


@pytest.fixture(scope="module")
def reward_model(policy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A head that was trained away from zero."""
    folder = tmp_path_factory.mktemp("reward")
    run_job("rm", write_rows(folder / "rows.jsonl"), policy, folder / "rm", keys={"learning_rate": 1e-2})
    return folder / "rm"


def write_lines(path: Path, *lines: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def score(out: Path, model: Path, *sources: Path | str, kind: Any = "reward", **options: Any) -> ScoreReport:
    found = [parse_source(str(source)) for source in sources]
    return run_score(ScoreJob(sources=found, model=str(model), kind=kind, out=out, **options))


def published(folder: Path, split: str = "train") -> list[dict[str, Any]]:
    files = sorted(folder.rglob(f"{split}.parquet"))
    return [row for file in files for row in pq.read_table(file).to_pylist()]


def texts(row: dict[str, Any]) -> list[str]:
    return [completion[0]["content"] for completion in row["completions"]]


def by_itself(model: Any, chat: Chat, prompt: list[dict[str, str]], text: str) -> Any:
    """The whole conversation in one plain forward pass, and how many of its tokens are the answer's."""
    answer = chat.completion(text).token_ids
    tokens = torch.tensor([chat.prompt(prompt, reasoning=False).token_ids + answer])
    return model(tokens).logits.detach(), tokens, len(answer)


def test_a_reward_models_scores_are_those_that_transformers_reads(reward_model: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl")
    score(tmp_path / "scored", reward_model, data, microbatch_tokens=300)
    model = AutoModelForSequenceClassification.from_pretrained(reward_model).eval()
    chat = Chat(AutoTokenizer.from_pretrained(reward_model))
    rows = published(tmp_path / "scored")
    assert len(rows) == 24
    for row in rows:
        expected = [by_itself(model, chat, row["prompt"], text)[0].item() for text in texts(row)]
        assert row["scores"] == pytest.approx(expected, abs=1e-5)
        assert row["scores"] == sorted(row["scores"], reverse=True)


def test_a_policys_score_is_its_log_probability_per_token(policy: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl")
    score(tmp_path / "scored", policy, data, kind="policy")
    model, chat = AutoModelForCausalLM.from_pretrained(policy).eval(), Chat(AutoTokenizer.from_pretrained(policy))
    for row in published(tmp_path / "scored"):
        for text, found in zip(texts(row), row["scores"], strict=True):
            logits, tokens, length = by_itself(model, chat, row["prompt"], text)
            logps = logits[0].log_softmax(dim=-1)[-length - 1 : -1].gather(1, tokens[0, -length:, None])
            assert found == pytest.approx(logps.mean().item(), abs=1e-5)


def test_answers_to_one_prompt_from_several_sources_are_one_row(reward_model: Path, tmp_path: Path) -> None:
    first = write_lines(
        tmp_path / "drafts.jsonl",
        {"prompt": "Hi", "completion": "Go.", "label_source": "ai", "tags": ["rude"], "split": "train"},
        {"prompt": "Why?", "completion": "Because.", "label_source": "ai", "split": "train"},
    )
    second = write_lines(
        tmp_path / "pairs.jsonl",
        {"prompt": "Hi", "chosen": "Hello.", "rejected": "Go.", "tags": ["human"], "split": "train"},
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}], "split": "train"},
        {"prompt": "Hi", "completions": ["Hello!", "Hm."], "split": "test"},
    )
    report = score(tmp_path / "scored", reward_model, first, second)
    rows = {row["prompt"][0]["content"]: row for row in published(tmp_path / "scored")}
    assert sorted(texts(rows["Hi"])) == ["Go.", "Hello.", "Yes?"]
    assert (rows["Hi"]["label_source"], rows["Hi"]["tags"]) == ("mixed", ["human", "rude"])
    assert texts(rows["Why?"]) == ["Because."]
    assert rows["Why?"]["label_source"] == "ai"
    (held_out,) = published(tmp_path / "scored", "test")
    assert sorted(texts(held_out)) == ["Hello!", "Hm."]
    assert report.summary["prompts"] == {"train": 2, "test": 1}
    assert report.summary["completions"] == 6
    assert report.summary["means"]["label_source ai"]["completions"] == 2
    assert report.summary["means"]["tag rude"]["completions"] == 3


def test_the_same_call_gives_the_same_bytes_and_load_dataset_loads_them(reward_model: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl")
    for name in ("one", "other"):
        score(tmp_path / name, reward_model, data)
    one, other = (
        {str(path.relative_to(tmp_path / name)): path.read_bytes() for path in (tmp_path / name).rglob("*.*")}
        for name in ("one", "other")
    )
    assert one == other
    assert sorted(one) == ["README.md", "v0001/test.parquet", "v0001/train.parquet"]
    loaded = datasets.load_dataset(str(tmp_path / "one"), split="train", cache_dir=str(tmp_path / "cache"))
    assert loaded.to_list() == published(tmp_path / "one")
    assert not list(tmp_path.glob(".*"))


def test_the_summary_is_that_of_the_scores(reward_model: Path, tmp_path: Path) -> None:
    report = score(tmp_path / "scored", reward_model, write_rows(tmp_path / "rows.jsonl"))
    rows = published(tmp_path / "scored") + published(tmp_path / "scored", "test")
    scores = sorted(value for row in rows for value in row["scores"])
    summary = report.summary
    assert summary["completions"] == len(scores) == sum(summary["histogram"]["counts"])
    assert summary["mean"] == pytest.approx(sum(scores) / len(scores))
    assert (summary["quantiles"]["0"], summary["quantiles"]["1"]) == (scores[0], scores[-1])
    middle = len(scores) // 2
    median = scores[middle] if len(scores) % 2 else (scores[middle - 1] + scores[middle]) / 2
    assert summary["quantiles"]["0.5"] == pytest.approx(median)


def test_the_summary_says_how_often_the_order_is_the_one_that_the_rows_had(reward_model: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl")
    report = score(tmp_path / "scored", reward_model, data)
    found = {tuple(sorted(texts(row))): row for row in published(tmp_path / "scored")}
    right = total = 0
    for row in read([Source(str(data))], kind="ranked", split="train"):
        scored = found[tuple(sorted(row.completions))]
        place = {text: n for n, text in enumerate(texts(scored))}
        for i in range(len(row.completions)):
            for j in range(i + 1, len(row.completions)):  # tiny_jobs writes the best first
                total += 1
                right += place[row.completions[i]] < place[row.completions[j]]
    assert report.summary["agreement"]["train"] == right / total


def test_rows_without_a_score_of_before_are_read_in_every_layout(reward_model: Path, tmp_path: Path) -> None:
    data = write_lines(
        tmp_path / "rows.jsonl",
        {"prompt": "a", "completions": ["b", "c"], "split": "test"},
        {"prompt": "d", "chosen": "e", "rejected": "f", "chosen_probability": 0.5, "split": "test"},
        {"prompt": "g", "completions": [], "split": "test"},
        {"prompt": "g", "completions": [""], "split": "test"},
    )
    report = score(tmp_path / "scored", reward_model, data)
    assert [sorted(texts(row)) for row in published(tmp_path / "scored", "test")] != []
    assert report.summary["completions"] == 4
    assert report.summary["agreement"] == {}
    assert report.tallies[1].left_out == {"empty": 2}


# Groups


@pytest.mark.parametrize(
    ("grouping", "expected"),
    [
        (Grouping("top-quantile", 0.2), [9.0]),  # two of ten: 9 and 10
        (Grouping("top-quantile", 0.25), [8.0]),  # 2.5 of ten: three
        (Grouping("top-quantile", 1.0), [1.0]),
        (Grouping("graded", 2), [6.0]),
        (Grouping("graded", 5), [3.0, 5.0, 7.0, 9.0]),
        (Grouping("best-of-n"), []),
        (ALL, []),
    ],
)
def test_borders_cut_the_scores_into_bands_of_equal_size(grouping: Grouping, expected: Sequence[float]) -> None:
    assert borders([3, 1, 2, 10, 9, 8, 7, 4, 5, 6], grouping) == expected


def test_equal_scores_stay_in_one_band() -> None:
    assert borders([1, 2, 2, 2, 3], Grouping("graded", 3)) == [2.0, 3.0]
    assert borders([1, 1, 1], Grouping("top-quantile", 0.1)) == [1.0]


@pytest.mark.parametrize("text", ["best", "best-of-n=3", "top-quantile", "top-quantile=0", "graded=1", "graded=x"])
def test_a_group_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="use best-of-n, top-quantile"):
        parse_grouping(text)


def test_best_of_n_is_the_first_answer_of_every_prompt(reward_model: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl")
    score(tmp_path / "all", reward_model, data)
    score(tmp_path / "best", reward_model, data, grouping=Grouping("best-of-n"))
    for split in ("train", "test"):
        expected = [
            (row["prompt"], row["completions"][0], row["scores"][0]) for row in published(tmp_path / "all", split)
        ]
        found = [(row["prompt"], row["completion"], row["score"]) for row in published(tmp_path / "best", split)]
        assert found == expected


def test_the_top_quantile_are_the_best_of_all_answers(reward_model: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl")
    score(tmp_path / "all", reward_model, data)
    score(tmp_path / "top", reward_model, data, grouping=Grouping("top-quantile", 0.2))
    rows = published(tmp_path / "all") + published(tmp_path / "all", "test")
    scores = sorted((value for row in rows for value in row["scores"]), reverse=True)
    top = [row["score"] for split in ("train", "test") for row in published(tmp_path / "top", split)]
    assert sorted(top, reverse=True) == scores[: math.ceil(0.2 * len(scores))]


def test_every_answer_has_a_grade_and_higher_grades_have_higher_scores(reward_model: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl")
    report = score(tmp_path / "graded", reward_model, data, grouping=Grouping("graded", 4))
    grades = []
    for n in range(1, 5):
        folder = tmp_path / "graded" / f"grade-{n}"
        rows = published(folder) + published(folder, "test")
        assert {row["grade"] for row in rows} == {n}
        grades.append([row["score"] for row in rows])
    assert sum(map(len, grades)) == report.summary["completions"]
    assert max(map(len, grades)) - min(map(len, grades)) <= 1
    assert all(max(low) < min(high) for low, high in itertools.pairwise(grades))


@pytest.mark.parametrize(
    ("group", "trainer", "part"),
    [("", "rrhf", ""), ("best-of-n", "sft", ""), ("top-quantile=0.5", "sft", ""), ("graded=2", "sft", "grade-2")],
)
def test_a_choice_can_be_trained_on(
    group: str, trainer: str, part: str, policy: Path, reward_model: Path, tmp_path: Path
) -> None:
    data, grouping = write_rows(tmp_path / "rows.jsonl"), parse_grouping(group) if group else ALL
    report = score(tmp_path / "scored", reward_model, data, grouping=grouping)
    made = run_job(trainer, tmp_path / "scored" / part, policy, tmp_path / trainer)
    assert made.counts["train"]["rows"] == report.parts[tmp_path / "scored" / part].rows["train"] > 0
    assert (tmp_path / trainer / "model.safetensors").exists()


def test_grades_of_an_earlier_call_are_no_longer_current(reward_model: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl")
    score(tmp_path / "graded", reward_model, data, grouping=Grouping("graded", 4))
    report = score(tmp_path / "graded", reward_model, data, grouping=Grouping("graded", 2))
    assert [sum(made.rows.values()) > 0 for made in report.parts.values()] == [True, True, False, False]
    assert list(read([Source(str(tmp_path / "graded" / "grade-2"))], kind="sft", split="train"))
    with pytest.raises(IncompleteError, match="0 of 0 rows used"):
        list(read([Source(str(tmp_path / "graded" / "grade-3"))], kind="sft", split="train"))


# What a dry run tells


def test_a_plan_counts_what_is_scored_and_writes_nothing(reward_model: Path, tmp_path: Path) -> None:
    data = write_lines(
        tmp_path / "rows.jsonl",
        {"prompt": "word " * 600, "completion": "b", "split": "train"},
        {"prompt": "a", "completion": "b", "split": "train"},
        {"prompt": "a", "completions": ["b", "c d"], "split": "test"},
    )
    job = ScoreJob(sources=[Source(str(data))], model=str(reward_model), kind="reward", out=tmp_path / "scored")
    chat = Chat(AutoTokenizer.from_pretrained(reward_model))
    prompt = len(chat.prompt([{"role": "user", "content": "a"}], reasoning=False).token_ids)
    answers = {text: len(chat.completion(text).token_ids) for text in ("b", "c d")}
    assert plan_score(job) == {
        "train": {"rows": 1, "completions": 1, "tokens": prompt + answers["b"], "too_long": 1},
        "test": {"rows": 1, "completions": 2, "tokens": prompt + sum(answers.values()), "too_long": 0},
    }
    assert not (tmp_path / "scored").exists()


def test_a_plan_refuses_what_the_call_refuses(policy: Path, reward_model: Path, tmp_path: Path) -> None:
    data = [Source(str(write_rows(tmp_path / "rows.jsonl")))]
    (tmp_path / "out" / "videos").mkdir(parents=True)
    with pytest.raises(UsageError, match="not empty"):
        plan_score(ScoreJob(sources=data, model=str(reward_model), kind="reward", out=tmp_path / "out"))
    with pytest.raises(UsageError, match="no reward model"):
        plan_score(ScoreJob(sources=data, model=str(policy), kind="reward", out=tmp_path / "scored"))
    with pytest.raises(UsageError, match="no such folder; check its name"):
        plan_score(ScoreJob(sources=data, model=str(tmp_path / "none"), kind="reward", out=tmp_path / "scored"))


# What is refused


def test_a_language_model_is_no_reward_model(policy: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no reward model"):
        score(tmp_path / "scored", policy, write_rows(tmp_path / "rows.jsonl"))


def test_a_tokenizer_that_is_not_the_models_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    save_tiny(tmp_path / "small", vocab_size=300)
    with pytest.raises(UsageError, match="300 embeddings; give its own tokenizer"):
        score(tmp_path / "scored", tmp_path / "small", tmp_path / "none.jsonl", kind="policy")


def test_a_model_without_a_chat_template_is_told_what_helps_here(tmp_path: Path) -> None:
    save_tiny(tmp_path / "raw")
    tiny_tokenizer(template=None).save_pretrained(tmp_path / "raw")
    (tmp_path / "raw" / "chat_template.jinja").unlink()
    with pytest.raises(UsageError, match=r"no chat template; .* put a chat_template\.jinja in its folder"):
        score(tmp_path / "scored", tmp_path / "raw", tmp_path / "none.jsonl", kind="policy")


def test_a_folder_with_something_else_in_it_is_left_alone(reward_model: Path, tmp_path: Path) -> None:
    (tmp_path / "out" / "videos").mkdir(parents=True)
    with pytest.raises(UsageError, match="not empty"):
        score(tmp_path / "out", reward_model, write_rows(tmp_path / "rows.jsonl"))
    assert (tmp_path / "out" / "videos").is_dir()


def test_nothing_to_score_is_an_error_that_says_why(reward_model: Path, tmp_path: Path) -> None:
    data = write_lines(tmp_path / "rows.jsonl", {"prompt": "a", "completion": " "})
    with pytest.raises(IncompleteError, match="empty 1"):
        score(tmp_path / "scored", reward_model, data)
    assert not (tmp_path / "scored").exists()


def test_rows_that_are_all_too_long_are_an_error_that_says_so(reward_model: Path, tmp_path: Path) -> None:
    data = write_lines(tmp_path / "rows.jsonl", {"prompt": "word " * 600, "completion": "b", "split": "train"})
    with pytest.raises(IncompleteError, match=r"rows\.jsonl, train: 1 of 1 .*; 1 longer than .* context of 512 tokens"):
        score(tmp_path / "scored", reward_model, data)


def test_a_row_longer_than_the_context_is_left_out_and_counted(reward_model: Path, tmp_path: Path) -> None:
    data = write_lines(
        tmp_path / "rows.jsonl",
        {"prompt": "word " * 600, "completion": "b", "split": "train"},
        {"prompt": "a", "completion": "b", "split": "train"},
    )
    report = score(tmp_path / "scored", reward_model, data)
    assert report.summary["left_out"]["too_long"] == 1
    assert len(published(tmp_path / "scored")) == 1
