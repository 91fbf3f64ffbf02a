"""PPO trainings from prompts to a model folder: what comes out, what is kept, what stops them, and exact resume."""

from __future__ import annotations

import json
import math
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from pipeline.config.settings import Settings
from pipeline.errors import DivergedError, IncompleteError, StoppedError, UsageError
from pipeline.lm.load import load
from pipeline.train.rollouts import roll_out
from tests.pipeline.lm.tiny import tiny_tokenizer
from tests.pipeline.train.ppo_jobs import open_scores, opened, run_ppo, save_pair, save_reward_model
from tests.pipeline.train.row_files import jsonl
from tests.pipeline.train.test_stages import stop_after

LORA = {"r": 4, "alpha": 8}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return save_pair(tmp_path_factory.mktemp("models"))


def lines(folder: Path, name: str = "metrics") -> list[dict[str, Any]]:
    """Without times."""
    found = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if not key.startswith("seconds")} for line in found]


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    "keys",
    [
        {"kl_target": 0.1, "kl_horizon": 20, "ema_decay": 0.9, "ptx_coef": 0.1},
        {"value": "joint", "num_samples": 2, "max_approxkl": 0.01, "patience": 50},
        {"lora": LORA, "learning_rate": 1e-2, "ema_decay": 0.9},
    ],
    ids=["separate", "joint", "adapters"],
)
def test_training_stopped_at_each_of_6_steps_gives_the_same_bytes(
    keys: dict[str, Any], models: tuple[Path, Path], data: Path, tmp_path: Path
) -> None:
    keys = {**keys, "epochs": 2, "eval_every": 2}
    run_ppo(data, *models, tmp_path / "whole", keys=keys)
    out = tmp_path / "stopped"
    for _ in range(5):
        with pytest.raises(StoppedError) as caught:
            run_ppo(data, *models, out, keys=keys, should_stop=stop_after(1))
        assert caught.value.exit_code == 75
        assert not out.exists()
    assert run_ppo(data, *models, out, keys=keys, should_stop=stop_after(1)).is_new
    assert weights(out) == weights(tmp_path / "whole")
    for name in ("metrics", "samples"):
        assert lines(out, name) == lines(tmp_path / "whole", name)
    assert [line["step"] for line in lines(out)] == list(range(7))


def test_the_first_step_has_no_kl_and_the_folder_loads(models: tuple[Path, Path], data: Path, tmp_path: Path) -> None:
    keys = {"num_inner_epochs": 1, "minibatch_size": 8, "num_logged": 3}
    report = run_ppo(data, *models, tmp_path / "ppo", keys=keys)
    first = lines(tmp_path / "ppo")[1]
    assert abs(first["objective/kl"]) <= 1e-5
    assert first["policy/ratio"] == pytest.approx(1.0, abs=1e-5)
    assert first["policy/clipfrac"] == 0.0
    assert first["policy/approxkl"] <= 1e-9
    assert first["objective/rlhf_reward"] == pytest.approx(first["objective/scores"], abs=1e-5)
    assert AutoTokenizer.from_pretrained(tmp_path / "ppo").chat_template
    AutoModelForCausalLM.from_pretrained(tmp_path / "ppo")
    for name in ("README.md", "curves.png", "reward_kl.png", "training.json"):
        assert (tmp_path / "ppo" / name).stat().st_size > 100
    samples = lines(tmp_path / "ppo", "samples")
    assert samples[0]["prompt"][-1]["role"] == "user"
    assert [sample["step"] for sample in samples[:4]] == [1, 1, 1, 2]
    assert report.counts["train"]["rows"] == 24
    assert not run_ppo(data, *models, tmp_path / "ppo", keys=keys).is_new


LIKES_VOWELS = (
    "def score(conversations, completions):\n    return [sum(x in 'aeiou' for x in c) for c in completions]\n"
)


@pytest.mark.parametrize("advantages", ["gae", "policy-gradient", "rloo", "group-relative"])
def test_every_kind_of_advantage_learns_what_a_function_rewards(
    advantages: str, models: tuple[Path, Path], data: Path, tmp_path: Path
) -> None:
    (tmp_path / "likes.py").write_text(LIKES_VOWELS)
    keys = {"reward": f"{tmp_path}/likes.py:score", "advantages": advantages, "num_samples": 4, "batch_size": 24}
    keys |= {"minibatch_size": 12, "learning_rate": 3e-3, "epochs": 6, "kl_coef": 0.0, "missing_eos_penalty": 0.0}
    run_ppo(data, models[0], None, tmp_path / "ppo", keys=keys)
    found = [line["objective/scores"] for line in lines(tmp_path / "ppo")[1:]]
    assert found[-1] > found[0] + 0.8


def test_a_larger_kl_coef_keeps_the_policy_nearer_to_its_start(
    models: tuple[Path, Path], data: Path, tmp_path: Path
) -> None:
    (tmp_path / "likes.py").write_text(LIKES_VOWELS)
    keys = {"reward": f"{tmp_path}/likes.py:score", "num_samples": 4, "batch_size": 24, "minibatch_size": 24}
    keys |= {"learning_rate": 1e-3, "epochs": 16}
    ends = []
    for kl_coef in (0.0, 2.0):
        run_ppo(data, models[0], None, tmp_path / str(kl_coef), keys={**keys, "kl_coef": kl_coef})
        ends.append(lines(tmp_path / str(kl_coef))[-1]["objective/kl"])
    assert ends[1] < 0.3 * ends[0]


def test_the_controller_raises_the_coefficient_while_the_kl_is_above_its_target(
    models: tuple[Path, Path], data: Path, tmp_path: Path
) -> None:
    keys = {"kl_target": 1e-4, "kl_horizon": 40, "kl_coef": 0.1, "learning_rate": 5e-3}
    run_ppo(data, *models, tmp_path / "ppo", keys=keys)
    found = [line["objective/kl_coef"] for line in lines(tmp_path / "ppo")[1:]]
    # Step 1 has no KL: the error is bounded at -0.2, 8 episodes of 40. Step 2 has far too much: +0.2.
    assert found == pytest.approx([0.1, 0.1 * (1 - 0.2 * 8 / 40), 0.1 * (1 - 0.04) * (1 + 0.04)])


def test_what_lies_beyond_the_kl_budget_is_not_kept(models: tuple[Path, Path], data: Path, tmp_path: Path) -> None:
    said: list[str] = []
    keys = {"kl_budget": 1e-9, "eval_every": 1, "learning_rate": 1e-2}
    report = run_ppo(data, *models, tmp_path / "ppo", keys=keys, say=said.append)
    assert report.outcome.step == 0
    assert any("kl_budget" in message for message in said)
    start, kept = (load_file(folder / "model.safetensors") for folder in (models[0], tmp_path / "ppo"))
    assert all(torch.equal(start[name], kept[name]) for name in start)


def test_the_best_scoring_is_kept(models: tuple[Path, Path], data: Path, tmp_path: Path) -> None:
    report = run_ppo(data, *models, tmp_path / "ppo", keys={"eval_every": 1, "epochs": 2})
    scored = lines(tmp_path / "ppo")[1:]
    best = max(scored, key=lambda line: line["eval/scores"])
    assert report.outcome.step == best["step"]
    assert report.outcome.metrics["eval/scores"] == best["eval/scores"]


def test_the_average_of_the_weights_is_what_is_kept(models: tuple[Path, Path], data: Path, tmp_path: Path) -> None:
    """One step with decay d leaves d of the way back to the start."""
    keys = {"batch_size": 24, "eval_every": 1}
    for name, more in (("plain", {}), ("average", {"ema_decay": 0.75})):
        run_ppo(data, *models, tmp_path / name, keys={**keys, **more})
    start, plain, average = (
        load_file(folder / "model.safetensors") for folder in (models[0], tmp_path / "plain", tmp_path / "average")
    )
    for name, value in start.items():
        assert torch.allclose(average[name], 0.75 * value + 0.25 * plain[name], atol=1e-6), name


def test_ptx_keeps_the_loss_on_its_data_down(models: tuple[Path, Path], data: Path, tmp_path: Path) -> None:
    losses = []
    for coef in (1e-9, 10.0):
        keys = {"ptx_coef": coef, "ptx_per_prompt": 6, "epochs": 4, "learning_rate": 3e-3, "max_grad_norm": 100.0}
        run_ppo(data, *models, tmp_path / str(coef), keys=keys)
        losses.append(lines(tmp_path / str(coef))[-1]["loss/ptx"])
    assert losses[1] < losses[0] - 0.2


def test_ptx_learns_from_plain_texts(models: tuple[Path, Path], data: Path, tmp_path: Path) -> None:
    """One that fits, one too long, one of a single token, an empty one."""
    text = "The quick brown fox jumps over the lazy dog"
    path = jsonl(tmp_path / "pages.jsonl", {"text": text}, {"text": f"{text}. " * 300}, {"text": "a"}, {"text": ""})
    keys = {"ptx_coef": 10.0, "ptx_data": str(path), "learning_rate": 3e-3, "max_grad_norm": 100.0, "epochs": 2}
    said: list[str] = []
    run_ppo(data, *models, tmp_path / "ppo", keys=keys, say=said.append)
    losses = [line["loss/ptx"] for line in lines(tmp_path / "ppo")[1:]]
    assert losses[-1] < losses[0] - 0.5
    (told,) = [message for message in said if message.startswith(f"{path}, train")]
    assert told == f"{path}, train: 3 of 4 rows used, 0 in the other split; left out: empty 1 (first {path}:4)"
    assert "ptx: empty 1 left out, texts of one token" in said
    (told,) = [message for message in said if "longer than 512 tokens" in message]
    assert told.startswith("ptx: 1 rows left out, longer than 512 tokens, the longest ")
    made = json.loads((tmp_path / "ppo" / "training.json").read_text())
    assert made["data"]["ptx"]["rows"] == 1


@pytest.mark.parametrize(
    ("rows", "error", "complaint"),
    [
        ([{"text": "A page."}, {"prompt": "Hi", "completion": "Hello."}], UsageError, ":2: a conversation, unlike the"),
        ([{"body": "A page."}], UsageError, ":1: no \"completion\"; columns found: 'body'"),
        ([{"text": "A page. " * 600}], UsageError, "train_ppo.ptx_data: all rows are longer than 512 tokens"),
        ([{"text": "a"}], IncompleteError, "train_ppo.ptx_data: texts of one token alone"),
        ([{"text": " "}], IncompleteError, "left out: empty 1 .* nothing to train on"),
    ],
)
def test_ptx_data_that_is_mixed_or_teaches_nothing_is_refused(
    rows: list[dict[str, str]], error: type[Exception], complaint: str, data: Path, tmp_path: Path, models: Any
) -> None:
    path = jsonl(tmp_path / "pages.jsonl", *rows)
    with pytest.raises(error, match=complaint) as caught:
        run_ppo(data, *models, tmp_path / "ppo", keys={"ptx_coef": 1.0, "ptx_data": str(path)})
    assert "\n" not in str(caught.value)


def test_a_score_that_is_not_finite_stops_at_its_step(
    models: tuple[Path, Path], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = count()

    def poisoned(raw: torch.Tensor, *_: Any) -> torch.Tensor:
        return raw * (math.nan if next(calls) == 2 else 1.0)  # the first call is the evaluation before step 1

    monkeypatch.setattr("pipeline.train.ppo_run.shaped_scores", poisoned)
    monkeypatch.setattr("pipeline.train.ppo.shaped_scores", poisoned)
    with pytest.raises(DivergedError, match=r"step 2: score nan") as caught:
        run_ppo(data, *models, tmp_path / "ppo", keys={"save_every": 1})
    assert caught.value.exit_code == 7
    kept = sorted((tmp_path / ".ppo.training" / "checkpoints").iterdir())
    assert [path.name for path in kept] == ["step-00000001"]
    assert all(tensor.isfinite().all() for tensor in load_file(kept[-1] / "policy.safetensors").values())


def test_a_loss_that_is_not_finite_stops_before_the_weights_change(
    models: tuple[Path, Path], data: Path, tmp_path: Path
) -> None:
    with pytest.raises(DivergedError, match=r"step 1: loss"):
        run_ppo(data, *models, tmp_path / "ppo", keys={"vf_coef": 1e39})
    assert not (tmp_path / "ppo").exists()


@pytest.mark.parametrize(("eval_every", "where"), [(100, "step 2: loss nan"), (1, "after step 1: eval/kl nan")])
def test_a_policy_that_no_longer_computes_is_neither_drawn_from_nor_kept(
    models: tuple[Path, Path], data: Path, tmp_path: Path, eval_every: int, where: str
) -> None:
    keys = {
        "learning_rate": 1e30,
        "eval_every": eval_every,
        "num_inner_epochs": 1,
        "batch_size": 8,
        "minibatch_size": 8,
    }
    with pytest.raises(DivergedError, match=where):
        run_ppo(data, *models, tmp_path / "ppo", keys=keys)
    assert not (tmp_path / ".ppo.training" / "best").exists()


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        ("return [float('nan')] * len(completions)", "gave nan for a completion of prompt row"),
        ("raise KeyError('bicycle')", "raised KeyError: 'bicycle'"),
        ("raise SystemExit(0)", "raised SystemExit: 0"),
        ("return [1.0]", "gave 1 scores for"),
        ("return ['good'] * len(completions)", "raised ValueError"),
    ],
)
def test_a_reward_function_that_fails_is_named(
    body: str, complaint: str, models: tuple[Path, Path], data: Path, tmp_path: Path
) -> None:
    (tmp_path / "bad.py").write_text(f"def score(conversations, completions):\n    {body}\n")
    with pytest.raises(UsageError, match=f"bad.py:score: {complaint}"):
        run_ppo(data, models[0], None, tmp_path / "ppo", keys={"reward": f"{tmp_path}/bad.py:score"})


def test_a_reward_function_that_is_not_there_is_refused(models: tuple[Path, Path], data: Path, tmp_path: Path) -> None:
    (tmp_path / "ends.py").write_text("raise SystemExit(0)")
    for reward, complaint in (
        (f"{tmp_path}/no.py:score", "no such file"),
        (f"{__file__}:nothing", "cannot be had"),
        (f"{tmp_path}/ends.py:score", "cannot be had: SystemExit"),
    ):
        with pytest.raises(UsageError, match=complaint):
            run_ppo(data, models[0], None, tmp_path / "ppo", keys={"reward": reward})


def test_a_reward_function_finds_what_lies_beside_it(models: tuple[Path, Path], data: Path, tmp_path: Path) -> None:
    (tmp_path / "lies_beside.py").write_text(
        "def score(conversations, completions):\n    return [1.0] * len(completions)\n"
    )
    (tmp_path / "reward.py").write_text("from lies_beside import score\n")
    keys = {"epochs": 1, "missing_eos_penalty": 0.0}
    run_ppo(data, models[0], None, tmp_path / "ppo", keys={**keys, "reward": f"{tmp_path}/reward.py:score"})
    assert lines(tmp_path / "ppo")[-1]["objective/scores"] == pytest.approx(1.0)


def test_evaluations_beyond_the_kl_budget_use_up_the_patience(
    models: tuple[Path, Path], data: Path, tmp_path: Path
) -> None:
    keys = {"eval_every": 1, "kl_budget": 1e-9, "patience": 2, "epochs": 2, "learning_rate": 1e-2}
    run_ppo(data, *models, tmp_path / "ppo", keys=keys)
    assert [line["step"] for line in lines(tmp_path / "ppo")] == [0, 1, 2]


def test_a_kl_budget_needs_test_prompts(models: tuple[Path, Path], tmp_path: Path) -> None:
    rows = [{"prompt": f"Say {word}.", "split": "train"} for word in ("one", "two", "three")]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    for key, value in (("kl_budget", 1.0), ("patience", 1)):
        with pytest.raises(UsageError, match=rf"^train_ppo.{key}: no test prompt"):
            run_ppo(data, *models, tmp_path / "ppo", keys={key: value})


def test_a_reward_model_with_another_tokenizer_is_refused_or_reads_the_text_again(
    models: tuple[Path, Path], data: Path, tmp_path: Path
) -> None:
    other = save_reward_model(tmp_path / "rm", models[0])
    tiny_tokenizer(vocab_size=330).save_pretrained(other)
    with pytest.raises(UsageError, match="its tokenizer or chat template is not the policy's"):
        run_ppo(data, models[0], other, tmp_path / "ppo")
    networks, chat, prompts, _ = opened(*models)
    rollouts = roll_out(networks, chat, prompts, range(6), seed=[0, 0], num_samples=1)
    source = open_scores(other, "reward", "another", reencode=True)
    tokenizer = AutoTokenizer.from_pretrained(other)
    reader = AutoModelForSequenceClassification.from_pretrained(other).eval()
    for n, score in enumerate(source.score(rollouts).tolist()):
        turns = [*rollouts.conversations[n], {"role": "assistant", "content": rollouts.texts[n]}]
        text = tokenizer.apply_chat_template(turns, tokenize=False).rstrip("\n")
        whole = reader(**tokenizer(text, return_tensors="pt")).logits.item()
        assert score == pytest.approx(whole, abs=1e-4)


def test_a_language_model_is_no_reward_model(models: tuple[Path, Path], data: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no reward model"):
        run_ppo(data, models[0], models[0], tmp_path / "ppo")


def test_a_policy_scores_by_its_log_probability_per_token(models: tuple[Path, Path]) -> None:
    networks, chat, prompts, _ = opened(*models)
    rollouts = roll_out(networks, chat, prompts, range(6), seed=[0, 0], num_samples=2)
    tokenizer = load(str(models[0]), dtype="float32").fingerprint["tokenizer"]
    source = open_scores(models[0], "policy", tokenizer)
    lengths = rollouts.completion_mask.sum(dim=1)
    assert torch.allclose(source.score(rollouts), rollouts.ref_logps.sum(dim=1) / lengths, atol=1e-5)


def test_prompts_longer_than_the_context_are_left_out_or_cut(
    models: tuple[Path, Path], data: Path, tmp_path: Path
) -> None:
    long = tmp_path / "long.jsonl"
    rows = [{"prompt": "please help " * 300, "split": "train"}, {"prompt": "please help", "split": "train"}] * 2
    long.write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = run_ppo(long, *models, tmp_path / "dropped")
    assert (report.counts["train"]["rows"], report.counts["train"]["too_long"]) == (2, 2)
    report = run_ppo(long, *models, tmp_path / "cut", keys={"too_long": "cut"})
    assert (report.counts["train"]["rows"], report.counts["train"]["cut"]) == (4, 2)
    with pytest.raises(UsageError, match="longer than 2 tokens"):
        run_ppo(long, *models, tmp_path / "none", keys={"max_length": 10})
    with pytest.raises(UsageError, match="8 leave no prompt of the 8 tokens"):
        run_ppo(long, *models, tmp_path / "none", keys={"max_length": 8})


@pytest.mark.parametrize(
    ("keys", "complaint"),
    [
        ({"advantages": "rloo"}, "num_samples: 2 or more"),
        ({"kl_coef": 0.0, "kl_target": 1.0}, "set kl_coef to more than 0"),
        ({"ptx_data": "text.jsonl"}, "no effect while ptx_coef is 0"),
        ({"cliprange": math.inf}, "cliprange"),
    ],
)
def test_settings_without_effect_or_bounds_are_refused(keys: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        Settings.model_validate({"train_ppo": keys})
