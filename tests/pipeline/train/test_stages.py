"""Trainings from rows to a model folder: what comes out, what stops them, and that stopping changes nothing."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from pipeline.errors import DivergedError, ResourceError, StoppedError, UsageError
from pipeline.lm.forward import prepare
from pipeline.lm.load import load
from pipeline.lm.templates import Chat
from pipeline.train.batches import batch_at, tokenise
from pipeline.train.rows import Source, read
from pipeline.train.rrhf import Ranking
from pipeline.train.sft import Imitation
from tests.pipeline.lm.tiny import save_tiny, tiny_tokenizer
from tests.pipeline.train.tiny_jobs import TRAINERS, metrics, run_job


def stop_after(steps: int) -> Callable[[], bool]:
    asked = count(1)
    return lambda: next(asked) >= steps


@pytest.mark.parametrize("trainer", TRAINERS)
def test_training_stopped_at_every_step_gives_the_same_bytes(
    trainer: str, start: Path, data: Path, tmp_path: Path
) -> None:
    keys = {"epochs": 4, "eval_every": 5}  # 12 steps
    run_job(trainer, data, start, tmp_path / "whole", keys=keys)
    out = tmp_path / "stopped"
    for _ in range(11):
        with pytest.raises(StoppedError):
            run_job(trainer, data, start, out, keys=keys, should_stop=stop_after(1))
        assert not out.exists()
    assert run_job(trainer, data, start, out, keys=keys, should_stop=stop_after(1)).is_new
    weights = "model.safetensors"
    assert (out / weights).read_bytes() == (tmp_path / "whole" / weights).read_bytes()
    assert metrics(out) == metrics(tmp_path / "whole")
    assert len(metrics(out)) == 12
    assert not list(tmp_path.glob(".*.training"))


@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_batch_in_pieces_gives_the_step_of_the_whole_batch(
    trainer: str, start: Path, data: Path, tmp_path: Path
) -> None:
    """Rows are of unequal length, so that a mean of means would differ."""
    for name, tokens in (("whole", 100_000), ("pieces", 60)):
        run_job(trainer, data, start, tmp_path / name, keys={"microbatch_tokens": tokens, "batch_size": 24})
    whole, pieces = (metrics(tmp_path / name)[0] for name in ("whole", "pieces"))
    for name in ("loss", "grad_norm", "eval/loss"):
        assert math.isclose(whole[name], pieces[name], rel_tol=1e-4), name


def test_sft_learns_and_its_folder_loads(start: Path, data: Path, tmp_path: Path) -> None:
    report = run_job("sft", data, start, tmp_path / "sft", keys={"epochs": 8, "learning_rate": 3e-3})
    losses = [line["loss"] for line in metrics(tmp_path / "sft")]
    assert losses[-1] < 0.7 * losses[0]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "sft")
    assert AutoTokenizer.from_pretrained(tmp_path / "sft").chat_template
    assert model.num_parameters() == AutoModelForCausalLM.from_pretrained(start).num_parameters()
    best = min((line for line in metrics(tmp_path / "sft") if "eval/loss" in line), key=lambda line: line["eval/loss"])
    assert report.outcome.step == best["step"]
    assert report.outcome.metrics["eval/loss"] == best["eval/loss"]
    for name in ("README.md", "curves.png", "training.json"):
        assert (tmp_path / "sft" / name).stat().st_size > 100


def test_dpo_starts_at_ln_2_and_the_reference_is_computed_once(
    start: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_job("dpo", data, start, tmp_path / "first")
    first = metrics(tmp_path / "first")[0]
    assert math.isclose(first["loss"], math.log(2), abs_tol=1e-6)
    assert abs(first["rewards/margin"]) <= 1e-6
    monkeypatch.setattr("pipeline.train.reference.compute_logps", None)  # whoever calls it now fails
    run_job("dpo", data, start, tmp_path / "second", keys={"beta": 0.3, "loss": "ipo"})
    assert metrics(tmp_path / "second")[0]["logps/chosen"] == first["logps/chosen"]


def test_a_reward_model_starts_at_ln_2_overfits_and_scores_as_transformers_reads_it(
    start: Path, data: Path, tmp_path: Path
) -> None:
    keys = {"epochs": 60, "learning_rate": 5e-3, "center_coef": 0.0, "eval_every": 180, "warmup": 0.1}
    lines = []
    run_job("rm", data, start, tmp_path / "rm", keys=keys, watch=lambda progress: lines.append(progress.line))
    assert math.isclose(lines[0]["loss"], math.log(2), abs_tol=1e-6)
    assert lines[-1]["scores/accuracy"] == 1.0
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm").eval()
    chat = Chat(AutoTokenizer.from_pretrained(tmp_path / "rm"))
    rows = read([Source(str(data))], kind="pairs", split="train")
    right = 0
    for row in rows:
        scores = []
        for text in row.completions:
            tokens = chat.prompt(row.prompt, reasoning=False).token_ids + chat.completion(text).token_ids
            scores.append(model(torch.tensor([tokens])).logits.item())
        right += scores[0] > scores[1]
    assert right == 24


def test_padding_that_is_the_end_of_a_turn_does_not_hide_it_from_a_reward_model(data: Path, tmp_path: Path) -> None:
    save_tiny(tmp_path / "start")
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token, tokenizer.unk_token = tokenizer.eos_token, "<|pad|>"
    tokenizer.save_pretrained(tmp_path / "start")
    run_job("rm", data, tmp_path / "start", tmp_path / "rm", keys={"learning_rate": 1e-2})
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "rm")
    texts = ["Yes, of course.<|im_end|>", "No.<|im_end|>"]
    together = model(**tokenizer(texts, padding=True, return_tensors="pt")).logits[:, 0]
    hidden = [model.model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0, -1] for text in texts]
    assert torch.allclose(together, model.score(torch.stack(hidden))[:, 0], atol=1e-5)


def test_rrhf_with_one_completion_has_the_gradient_of_sft_where_both_are_summed(start: Path, data: Path) -> None:
    """And of a step, where SFT divides by tokens and RRHF by prompts, that times the tokens of a prompt on average."""
    loaded = load(str(start))
    prepare(loaded.model)
    rows = list(read([Source(str(data))], kind="sft", split="train"))[:6]
    tokens = tokenise(rows, Chat(loaded.tokenizer), max_length=512, too_long="drop")
    found = {}
    for name, objective in (("sft", Imitation()), ("rrhf", Ranking(1.0))):
        loaded.model.zero_grad()
        objective(loaded.model, tokens, range(6)).losses.sum().backward()
        found[name] = torch.cat([p.grad.flatten() for p in loaded.model.parameters()])
    assert (found["sft"] - found["rrhf"]).norm() <= 1e-6 * found["sft"].norm()
    lengths = [len(tokens.group(row).completions[0]) for row in range(6)]
    terms = {"sft": Imitation(), "rrhf": Ranking(1.0)}
    num_terms = {name: sum(each.num_terms(tokens, row) for row in range(6)) for name, each in terms.items()}
    assert num_terms == {"sft": sum(lengths), "rrhf": len(lengths)}


def test_what_was_made_from_the_same_inputs_is_not_made_again(start: Path, data: Path, tmp_path: Path) -> None:
    first = run_job("sft", data, start, tmp_path / "sft")
    again = run_job("sft", data, start, tmp_path / "sft")
    assert (first.is_new, again.is_new) == (True, False)
    assert first.outcome == again.outcome
    assert run_job("sft", data, start, tmp_path / "sft", seed=1).is_new


def test_a_loss_that_is_not_finite_stops_and_leaves_the_older_checkpoint(
    start: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = count()

    def poisoned(logps: torch.Tensor) -> torch.Tensor:
        return -logps * (float("nan") if next(calls) == 2 else 1.0)

    monkeypatch.setattr("pipeline.train.sft.sft_loss", poisoned)
    keys = {"save_every": 1, "eval_every": 100}
    with pytest.raises(DivergedError, match=r"step 3: loss nan.*row") as caught:
        run_job("sft", data, start, tmp_path / "sft", keys=keys)
    assert caught.value.exit_code == 7
    kept = sorted((tmp_path / ".sft.training" / "checkpoints").iterdir())
    assert [path.name for path in kept] == ["step-00000001", "step-00000002"]
    assert all(tensor.isfinite().all() for tensor in load_file(kept[-1] / "weights.safetensors").values())


@pytest.mark.parametrize("harm", ["cut", "flipped", "deleted"])
def test_a_damaged_checkpoint_is_left_out_with_a_warning(harm: str, start: Path, data: Path, tmp_path: Path) -> None:
    keys = {"epochs": 2, "save_every": 1}
    run_job("sft", data, start, tmp_path / "whole", keys=keys)
    with pytest.raises(StoppedError):
        run_job("sft", data, start, tmp_path / "sft", keys=keys, should_stop=stop_after(4))
    path = tmp_path / ".sft.training" / "checkpoints" / "step-00000004" / "weights.safetensors"
    content = bytearray(path.read_bytes())
    if harm == "deleted":
        path.unlink()
    else:
        content[-1] ^= 1
        path.write_bytes(content if harm == "flipped" else content[:-10])
    said: list[str] = []
    run_job("sft", data, start, tmp_path / "sft", keys=keys, say=said.append)
    assert any("step-00000004" in message for message in said)
    assert metrics(tmp_path / "sft") == metrics(tmp_path / "whole")


def test_patience_ends_a_training_that_gets_no_better(start: Path, data: Path, tmp_path: Path) -> None:
    keys = {"epochs": 50, "learning_rate": 1e-2, "eval_every": 3, "patience": 2, "schedule": "constant"}
    report = run_job("sft", data, start, tmp_path / "sft", keys=keys)
    lines = metrics(tmp_path / "sft")
    assert len(lines) < 150
    assert report.outcome.step == lines[-1]["step"] - 6


def test_memory_that_is_not_there_is_told_with_rows_and_tokens(
    start: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.train.sft.sft_loss", lambda logps: torch.empty(1 << 50) + logps[0])
    with pytest.raises(
        ResourceError, match=r"step 1: out of memory with \d+ tokens \(rows row\d+, .*microbatch_tokens"
    ):
        run_job("sft", data, start, tmp_path / "sft")


def test_the_longest_rows_are_tried_after_the_first_step(
    start: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In their place in the data's order memory would end in the third step."""

    def hungry(logps: torch.Tensor) -> torch.Tensor:
        return torch.empty(1 << 50 if len(logps) > 25 else 0).sum() - logps

    lines = data.read_text().splitlines()
    order = batch_at(2, num_rows=24, batch_size=8, seed=0)
    long = json.loads(lines[order[0]])
    lines[order[0]] = json.dumps(long | {"completion": "please help me " * 20})
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(lines))
    monkeypatch.setattr("pipeline.train.sft.sft_loss", hungry)
    with pytest.raises(ResourceError, match=rf"step 2: out of memory with \d+ tokens \(rows {long['id']}\)"):
        run_job("sft", path, start, tmp_path / "sft", keys={"microbatch_tokens": 60, "epochs": 20})


def test_a_row_longer_than_the_context_is_named_with_its_length(data: Path, tmp_path: Path) -> None:
    save_tiny(tmp_path / "start", context=48)
    said: list[str] = []
    run_job("sft", data, tmp_path / "start", tmp_path / "sft", say=said.append)
    found = re.search(
        r"train: (\d+) rows longer than 48 tokens left out, the longest (row\d+) with (\d+)", "\n".join(said)
    )
    assert found, said
    chat = Chat(AutoTokenizer.from_pretrained(tmp_path / "start"))
    lengths = {
        row.id: len(chat.prompt(row.prompt, reasoning=False).token_ids)
        + len(chat.completion(row.completions[0]).token_ids)
        for row in read([Source(str(data))], kind="sft", split="train")
    }
    assert (int(found[3]), found[2]) == max((length, id) for id, length in lengths.items())
    assert int(found[1]) == sum(length > 48 for length in lengths.values())


@pytest.mark.parametrize(
    ("keys", "cure"),
    [
        ({}, "take a model with more context, or set too_long: cut"),
        ({"max_length": 40}, "set max_length higher, or set too_long: cut"),
        ({"max_length": 40, "too_long": "cut"}, "set max_length higher, or shorten them"),
        ({"too_long": "cut"}, "take a model with more context, or shorten them"),
    ],
)
def test_the_advice_about_rows_that_are_too_long_is_one_that_helps(
    keys: dict[str, Any], cure: str, data: Path, tmp_path: Path
) -> None:
    """A cut takes the beginning of a prompt, never an answer."""
    save_tiny(tmp_path / "start", context=48)
    line = {"prompt": "Hi", "completion": "please help me " * 30, "split": "train"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(line) + "\n")
    with pytest.raises(UsageError, match=f"{cure}$"):
        run_job("sft", tmp_path / "rows.jsonl", tmp_path / "start", tmp_path / "sft", keys=keys)


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(data: Path, tmp_path: Path) -> None:
    save_tiny(tmp_path / "start", vocab_size=300)
    with pytest.raises(UsageError, match="300 embeddings"):
        run_job("sft", data, tmp_path / "start", tmp_path / "sft")


def test_a_model_without_a_chat_template_is_refused(start: Path, data: Path, tmp_path: Path) -> None:
    save_tiny(tmp_path / "start")
    tiny_tokenizer(template=None).save_pretrained(tmp_path / "start")
    (tmp_path / "start" / "chat_template.jinja").unlink()
    with pytest.raises(UsageError, match="no chat template"):
        run_job("sft", data, tmp_path / "start", tmp_path / "sft")


def test_a_dataset_without_a_row_that_fits_is_refused(start: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="longer than 5 tokens"):
        run_job("sft", data, start, tmp_path / "sft", keys={"max_length": 5})


def test_a_folder_with_something_else_in_it_is_not_replaced(start: Path, data: Path, tmp_path: Path) -> None:
    (tmp_path / "sft").mkdir()
    (tmp_path / "sft" / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match="not empty"):
        run_job("sft", data, start, tmp_path / "sft")


def test_the_card_names_data_start_and_settings(start: Path, data: Path, tmp_path: Path) -> None:
    made_from = {"constitution": "c0ffee"}
    run_job("dpo", data, start, tmp_path / "dpo", keys={"beta": 0.25}, made_from=made_from)
    card = (tmp_path / "dpo" / "README.md").read_text()
    description: dict[str, Any] = json.loads((tmp_path / "dpo" / "training.json").read_text())
    assert description["data"]["train"]["sha256"][:16] in card
    assert description["start"]["weights"][:16] in card
    assert "| beta | 0.25 |" in card
    assert "constitution: c0ffee" in card
