"""A policy's own answers in training: what is drawn and kept, exact resume, and SFT chosen by reward."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.config.settings import TrainRrhfSettings, TrainSettings
from pipeline.errors import StoppedError, UsageError
from pipeline.lm.forward import completion_logps, prepare
from pipeline.lm.load import load
from pipeline.lm.templates import Chat
from pipeline.train.batches import Data, batch_at, tokenise
from pipeline.train.loop import silence_dropout
from pipeline.train.resample import Resampler
from pipeline.train.rows import Source, read
from pipeline.train.sampling import Sample, Sampler, make_sampler
from pipeline.train.scorers import Scorer, mean_logps, open_scorer
from tests.pipeline.lm.tiny import save_tiny, tiny_tokenizer
from tests.pipeline.train.tiny_jobs import metrics, run_job, write_rows


@pytest.fixture(scope="module")
def start(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that has learned to end its answers."""
    folder = tmp_path_factory.mktemp("start")
    run_job("sft", data, save_tiny(folder / "random"), folder / "sft", keys={"epochs": 10, "learning_rate": 5e-3})
    return folder / "sft"


@pytest.fixture(scope="module")
def reward_model(start: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Scorer:
    out = tmp_path_factory.mktemp("reward") / "rm"
    run_job("rm", data, start, out, keys={"learning_rate": 1e-2})
    return open_scorer(str(out), "reward")


class Shortest:
    """A reward that can be worked out by hand: the fewer tokens, the better."""

    def __init__(self, start: Path) -> None:
        self.fingerprint = load(str(start)).fingerprint

    def __call__(self, data: Data, *, max_tokens: int) -> Tensor:
        lengths = [len(completion) for row in range(len(data)) for completion in data.group(row).completions]
        return -torch.tensor(lengths, dtype=torch.float32)


def tokens_of(start: Path, data: Path, kind: str = "ranked") -> tuple[Any, Data]:
    loaded = load(str(start))
    prepare(loaded.model)
    rows = read([Source(str(data))], kind=kind, split="train")  # type: ignore[arg-type]
    return loaded.model, tokenise(rows, Chat(loaded.tokenizer), max_length=512, too_long="drop")


# Sampling


def sampler(temperature: float, max_tokens: int = 12) -> Sampler:
    return Sampler(frozenset({2}), max_tokens, 512, temperature, TrainSettings())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_samples_are_those_of_the_weights_as_they_are(start: Path, data: Path, checkpointing: bool) -> None:
    """Greedy answers against a plain loop without a cache, before and after the weights change."""
    model, tokens = tokens_of(start, data)
    silence_dropout(model, TrainSettings(gradient_checkpointing=checkpointing))
    draw, prompts = sampler(0.0), [tokens.group(row).prompt.tolist() for row in range(5)]
    found = []
    for _ in range(2):
        samples = draw(model, prompts, [0] * 5)
        found.append([sample.tokens for sample in samples])
        plain = AutoModelForCausalLM.from_pretrained(start).eval()
        plain.load_state_dict(model.state_dict())
        for prompt, sample in zip(prompts, samples, strict=True):
            row = list(prompt)
            while len(row) - len(prompt) < 12 and row[len(prompt) :][-1:] != [2]:
                row.append(plain(torch.tensor([row])).logits[0, -1].argmax().item())
            assert row[len(prompt) :] == sample.tokens
            assert sample.is_whole == (sample.tokens[-1] == 2)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(torch.linspace(0.5, 1.5, parameter.shape[-1]))
    assert found[0] != found[1]
    assert model.training == checkpointing
    completion_logps(model, [tokens.group(0)]).tokens.sum().backward()  # nothing of the decoding stays in the way


def test_a_sample_depends_on_its_seed_and_not_on_its_batch_mates(start: Path, data: Path) -> None:
    model, tokens = tokens_of(start, data)
    prompts = [tokens.group(row).prompt.tolist() for row in range(4)]
    together = sampler(1.0)(model, prompts, [1, 2, 3, 4])
    assert together == [sampler(1.0)(model, [prompt], [n])[0] for n, prompt in enumerate(prompts, start=1)]
    assert together != sampler(1.0)(model, prompts, [5, 6, 7, 8])


def test_a_sample_is_no_longer_than_the_longest_completion_and_stays_within_the_context(
    start: Path, data: Path
) -> None:
    model, tokens = tokens_of(start, data)
    longest = max(len(completion) for row in range(len(tokens)) for completion in tokens.group(row).completions)
    made = make_sampler(model, frozenset(), tokens, TrainSettings(), temperature=1.0)
    assert made.max_tokens == longest
    assert made.eos == {2}  # the model's own configuration
    assert len(sampler(1.0, 100)._replace(context=40, eos=frozenset())(model, [[5] * 33], [0])[0].tokens) == 7


# Resampling


def resampled(tokens: Data, score: Any, generate: Any, **keys: Any) -> Resampler:
    settings = TrainRrhfSettings(batch_size=8, **keys)
    return Resampler(tokens, settings, every=2, seed=3, generate=generate, score=score)


def test_the_prompts_of_the_next_batches_get_whole_new_answers_with_their_scores(start: Path, data: Path) -> None:
    model, tokens = tokens_of(start, data)
    own = {row: len(tokens.group(row).completions) for row in range(len(tokens))}
    asked: list[list[int]] = []

    def generate(model: Any, prompts: Sequence[list[int]], seeds: Sequence[int]) -> list[Sample]:
        """Of every prompt's four samples: one that is new, the same again, one that was cut, one that is empty."""
        asked.extend(prompts)
        assert len(set(seeds)) == len(seeds)
        drawn = [Sample([7, 8, 2], True), Sample([7, 8, 2], True), Sample([9, 9, 9], False), Sample([2], True)]
        return [drawn[n % 4] for n in range(len(prompts))]

    refresh = resampled(tokens, Shortest(start), generate)
    refresh(model, 0)
    size: dict[str, Any] = {"num_rows": len(tokens), "batch_size": 8, "seed": 3}
    coming = {*batch_at(0, **size), *batch_at(1, **size)}
    assert set(tokens.fresh) == coming
    assert len(asked) == 4 * len(coming)
    for row in range(len(tokens)):
        fresh = tokens.group(row).completions[own[row] :]
        assert [tokens.tolist() for tokens in fresh] == [[7, 8, 2]] * (row in coming)
        assert tokens.row_scores(row)[own[row] :] == [-3.0] * (row in coming)
    refresh(model, 1)  # no drawing is due
    assert len(asked) == 4 * len(coming)
    refresh(model, 2)
    assert set(tokens.fresh) == {*batch_at(2, **size), *batch_at(3, **size)}


def test_an_answer_that_is_there_already_is_not_added(start: Path, data: Path) -> None:
    model, tokens = tokens_of(start, data)

    def generate(model: Any, prompts: Sequence[list[int]], seeds: Sequence[int]) -> list[Sample]:
        known = {tuple(tokens.group(row).prompt.tolist()): row for row in range(len(tokens))}
        return [Sample(tokens.group(known[tuple(p)]).completions[1].tolist(), True) for p in prompts]

    resampled(tokens, Shortest(start), generate)(model, 0)
    assert tokens.fresh == {}


def test_fresh_answers_count_in_a_rows_length(start: Path, data: Path) -> None:
    model, tokens = tokens_of(start, data)
    before = tokens.num_tokens(3), tokens.num_completion_tokens(3)
    digest = tokens.digest
    resampled(tokens, Shortest(start), lambda model, prompts, seeds: [Sample([7, 8, 2], True)] * len(prompts))(model, 0)
    row = next(iter(tokens.fresh))
    group = tokens.group(row)
    assert tokens.num_completion_tokens(row) == sum(map(len, group.completions))
    assert tokens.num_tokens(row) == len(group.prompt) + sum(map(len, group.completions))
    assert tokens.digest == digest
    tokens.fresh = {}
    assert (tokens.num_tokens(3), tokens.num_completion_tokens(3)) == before


def test_what_was_drawn_outlives_a_checkpoint(start: Path, data: Path) -> None:
    model, tokens = tokens_of(start, data)
    draws = count()

    def generate(model: Any, prompts: Sequence[list[int]], seeds: Sequence[int]) -> list[Sample]:
        return [Sample([5 + next(draws) % 7, 8, 2], True) for _ in prompts]

    refresh = resampled(tokens, Shortest(start), generate)
    refresh(model, 0)
    expected = [(tokens.group(row).completions, tokens.row_scores(row)) for row in range(len(tokens))]
    saved = refresh.tensors()
    tokens.fresh = {}
    refresh.load(saved)
    for row, (completions, scores) in enumerate(expected):
        found = tokens.group(row).completions
        assert [one.tolist() for one in found] == [one.tolist() for one in completions]
        assert tokens.row_scores(row) == scores


KEYS = {"epochs": 4, "eval_every": 5, "resample_every": 2, "num_samples": 2}  # 12 steps


def test_training_with_fresh_answers_stopped_at_every_step_gives_the_same_bytes(
    start: Path, data: Path, reward_model: Scorer, tmp_path: Path
) -> None:
    run_job("rrhf", data, start, tmp_path / "whole", keys=KEYS, score=reward_model)
    out = tmp_path / "stopped"
    for _ in range(11):
        with pytest.raises(StoppedError):
            run_job("rrhf", data, start, out, keys=KEYS, score=reward_model, should_stop=lambda: True)
    assert run_job("rrhf", data, start, out, keys=KEYS, score=reward_model, should_stop=lambda: True).is_new
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()
    assert metrics(out) == metrics(tmp_path / "whole")
    assert all(line["ranking/candidates"] > 2.5 for line in metrics(out))  # the data's own are 2 or 3


def test_fresh_answers_change_what_is_learned(start: Path, data: Path, reward_model: Scorer, tmp_path: Path) -> None:
    for name, keys in (("with", KEYS), ("without", {**KEYS, "resample_every": None})):
        run_job("rrhf", data, start, tmp_path / name, keys=keys, score=reward_model)
    found, plain = metrics(tmp_path / "with"), metrics(tmp_path / "without")
    assert found[0]["ranking/candidates"] > plain[0]["ranking/candidates"]
    assert found[0]["scores/best"] >= plain[0]["scores/best"]  # the best of more, under the same weights
    assert (tmp_path / "with" / "model.safetensors").read_bytes() != (
        tmp_path / "without" / "model.safetensors"
    ).read_bytes()


def test_an_adapter_samples_its_own_answers(start: Path, data: Path, reward_model: Scorer, tmp_path: Path) -> None:
    """With LoRA the policy is the frozen start and its adapter, in decoding, too."""
    keys = {**KEYS, "learning_rate": 1e-2, "lora": {"r": 4}}
    run_job("rrhf", data, start, tmp_path / "rrhf", keys=keys, score=reward_model)
    assert all(line["ranking/candidates"] > 2.5 for line in metrics(tmp_path / "rrhf"))


def test_a_reward_models_scores_replace_those_of_the_data(start: Path, data: Path, tmp_path: Path) -> None:
    """By the judge the longest of these answers is the best, by the reward the shortest."""
    run_job("rrhf", data, start, tmp_path / "rrhf", keys={"batch_size": 24}, score=Shortest(start))
    _, tokens = tokens_of(start, data)
    best = [-min(len(completion) for completion in tokens.group(row).completions) for row in range(len(tokens))]
    assert math.isclose(metrics(tmp_path / "rrhf")[0]["scores/best"], sum(best) / len(best), rel_tol=1e-6)


def test_resampling_without_a_reward_model_is_refused(start: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="give a reward model"):
        run_job("rrhf", data, start, tmp_path / "rrhf", keys={"resample_every": 2})


def test_a_reward_model_with_other_tokens_is_refused(data: Path, start: Path, tmp_path: Path) -> None:
    other = save_tiny(tmp_path / "other")
    tiny_tokenizer(text=["other words than these"] * 9).save_pretrained(other)
    for trainer in ("sft", "rrhf"):
        with pytest.raises(UsageError, match="another tokenizer"):
            run_job(trainer, data, start, tmp_path / trainer, score=Shortest(other))


# What a policy's own log-probability is worth


def test_after_rrhf_the_policy_orders_held_out_pairs_as_a_reward_model(tmp_path: Path) -> None:
    """A world with one rule: an answer that says please is better. Chance is one half."""
    data = tmp_path / "rows.jsonl"
    write_rows(data, 96, num_test=60, better="please")
    start = save_tiny(tmp_path / "start")
    right = {}
    run_job("rrhf", data, start, tmp_path / "rrhf", keys={"epochs": 6, "learning_rate": 3e-3})
    for name, model in (("before", start), ("after", tmp_path / "rrhf")):
        loaded = load(str(model))
        prepare(loaded.model)
        rows = list(read([Source(str(data))], kind="pairs", split="test"))
        tokens = tokenise(rows, Chat(loaded.tokenizer), max_length=512, too_long="drop")
        with torch.no_grad():
            p = mean_logps(loaded.model, [tokens.group(row) for row in range(60)]).view(-1, 2)
        right[name] = (p[:, 0] > p[:, 1]).float().mean().item()
    assert right["before"] < 0.6
    assert right["after"] > 0.85  # 60 pairs: five standard deviations above chance


# SFT chosen by reward


def test_sft_keeps_the_weights_whose_answers_score_best(start: Path, data: Path, tmp_path: Path) -> None:
    keys = {"epochs": 4, "learning_rate": 3e-3}
    report = run_job("sft", data, start, tmp_path / "sft", keys=keys, score=Shortest(start))
    evaluations = [line for line in metrics(tmp_path / "sft") if "eval/reward" in line]
    assert len(evaluations) == 4
    best = max(evaluations, key=lambda line: line["eval/reward"])
    assert report.outcome.step == best["step"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "sft").eval()
    chat = Chat(AutoTokenizer.from_pretrained(tmp_path / "sft"))
    lengths = []
    rows = list(read([Source(str(data))], kind="sft", split="test"))
    longest = max(
        len(chat.completion(row.completions[0]).token_ids)
        for row in read([Source(str(data))], kind="sft", split="train")
    )
    for row in rows:
        prompt = chat.prompt(row.prompt, reasoning=False).token_ids
        answer = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=longest, eos_token_id=[2])
        lengths.append(answer.shape[1] - len(prompt))
    assert math.isclose(best["eval/reward"], -sum(lengths) / len(lengths), rel_tol=1e-6)


def test_another_choice_of_weights_than_the_loss_stays(start: Path, data: Path, tmp_path: Path) -> None:
    keys = {"select": "max eval/logps/completion"}
    run_job("sft", data, start, tmp_path / "sft", keys=keys, score=Shortest(start))
    assert "| select | max eval/logps/completion |" in (tmp_path / "sft" / "README.md").read_text()
