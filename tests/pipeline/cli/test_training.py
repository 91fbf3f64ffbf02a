"""The training commands, as installed."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from pipeline import nano
from tests.pipeline.lm.tiny import save_tiny
from tests.pipeline.train.tiny_jobs import metrics, write_rows
from tests.support import Command, wait_for


def options(folder: Path, *, num: int = 24) -> list[str]:
    rows = write_rows(folder / "rows.jsonl", num)
    return ["--model", "nano", "--data", str(rows), "--set", "train_sft.batch_size=8"]


def test_a_model_is_trained_on_a_file(cai: Command, tmp_path: Path) -> None:
    done = cai("train-sft", *options(tmp_path), "--out", "models/sft", "--json", "--set", "train_sft.epochs=1")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["counts"]["train-sft"]["train"]["rows"] == 24
    assert (report["run"], report["outputs"]["model"]) == (None, "models/sft")
    AutoModelForCausalLM.from_pretrained(tmp_path / "models" / "sft")
    assert len(metrics(tmp_path / "models" / "sft")) == 3


@pytest.mark.parametrize("trainer", ["sft", "ppo"])
def test_a_stopped_training_goes_on_where_it_was(trainer: str, cai: Command, tmp_path: Path) -> None:
    call = ["train-sft", *options(tmp_path), "--out", "sft"] if trainer == "sft" else ppo_options(tmp_path)
    call += ["--set", f"train_{trainer}.epochs=300", "--set", f"train_{trainer}.eval_every=1000"]
    work, steps = tmp_path / f".{trainer}.training", list[int]()
    log = work / "metrics.jsonl"
    for _ in range(2):
        process, seen = cai.start(*call), len(steps)
        wait_for(lambda seen=seen: log.exists() and log.read_bytes().count(b"\n") > seen + 1)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 75, err
        assert "the same command goes on" in err
        steps = [json.loads(line)["step"] for line in log.read_text().splitlines()]
        assert (work / "checkpoints" / f"step-{steps[-1]:08d}").is_dir()
    assert steps == list(range(steps[0], steps[0] + len(steps)))


def test_kills_in_the_middle_of_a_checkpoint_change_nothing(cai: Command, tmp_path: Path) -> None:
    call = ["train-sft", *options(tmp_path), "--set", "train_sft.epochs=1", "--set", "train_sft.save_every=1"]
    assert cai(*call, "--out", "whole").returncode == 0
    log = tmp_path / ".sft.training" / "metrics.jsonl"
    for point in ("before:1:fsync .step-2/weights", "torn:1:write .step-2/.state", "before:1:replace .step-2/.state"):
        where = f"{log.parent}/checkpoints/.step-00000002.tmp"
        killed = cai(*call, "--out", "sft", fault=point.replace(".step-2", where))
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        assert [line["step"] for line in metrics(log.parent)] == [1, 2]
    done = cai(*call, "--out", "sft")
    assert done.returncode == 0, done.stderr
    assert metrics(tmp_path / "sft") == metrics(tmp_path / "whole")
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("sft", "whole")]
    assert weights[0] == weights[1]


def test_a_dry_run_prints_steps_and_memory_and_writes_nothing(cai: Command, tmp_path: Path) -> None:
    done = cai("train-sft", *options(tmp_path), "--out", "sft", "--dry-run", "--json")
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout)["counts"]
    weights = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(nano.path()).parameters())
    assert counts["steps"] == 9
    assert counts["memory"]["weights"] == 4 * weights
    assert counts["memory"]["total"] > 16 * weights
    assert not list(tmp_path.glob("*sft*"))


def test_bad_input_is_told_in_one_line(cai: Command, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"question": "Why?"}\n')
    missing = cai("train-sft", "--model", "nano", "--data", "rows.jsonl", "--out", "sft")
    assert missing.returncode == 2
    assert "rows.jsonl:1" in missing.stderr
    save_tiny(tmp_path / "small", vocab_size=300)
    write_rows(tmp_path / "good.jsonl")
    small = cai("train-rm", "--model", "small", "--data", "good.jsonl", "--out", "rm", "--dry-run")
    assert (small.returncode, "388 tokens, but 300 embeddings" in small.stderr) == (2, True)
    no_data = cai("train-sft", "--model", "nano", "--out", "sft")
    assert (no_data.returncode, "--data" in no_data.stderr) == (2, True)
    named = cai("train-sft", "--model", "nano", "--data", "good.jsonl", "--out", "sft", "--name", "mine")
    assert (named.returncode, "--name beside --out" in named.stderr) == (2, True)
    no_run = cai("train-dpo", "--model", "nano")
    assert (no_run.returncode, "no run here" in no_run.stderr) == (2, True)


def test_a_dry_run_refuses_a_training_that_lacks_its_reward_model(cai: Command, tmp_path: Path) -> None:
    call = [*options(tmp_path), "--out", "rrhf", "--dry-run"]
    lacking = cai("train-rrhf", *call, "--resample-every", "2")
    assert (lacking.returncode, "or give --reward-model\n" in lacking.stderr) == (2, True), lacking.stderr
    nowhere = cai("train-rrhf", *call, "--reward-model", "./nowhere")
    assert (nowhere.returncode, "no such folder; check its name" in nowhere.stderr) == (2, True), nowhere.stderr


def ppo_options(folder: Path) -> list[str]:
    (folder / "short.py").write_text("def score(conversations, texts):\n    return [-float(len(t)) for t in texts]\n")
    rows = write_rows(folder / "rows.jsonl", 24)
    keys = {"reward": "short.py:score", "max_tokens": 4, "batch_size": 8, "minibatch_size": 8}
    keys |= {"value_start": "zero", "save_every": 1}
    settings = [part for key, value in keys.items() for part in ("--set", f"train_ppo.{key}={value}")]
    return ["train-ppo", "--model", "nano", "--data", str(rows), "--out", "ppo", *settings]


def test_ppo_learns_from_a_function_and_its_dry_run_writes_nothing(cai: Command, tmp_path: Path) -> None:
    planned = cai(*ppo_options(tmp_path), "--dry-run", "--json")
    counts = json.loads(planned.stdout)["counts"]
    assert counts["steps"] == 3, planned.stderr
    assert not (tmp_path / "ppo").exists()
    done = cai(*ppo_options(tmp_path), "--json")
    assert done.returncode == 0, done.stderr
    read = json.loads(done.stdout)["counts"]["train-ppo"]
    assert read["train"]["rows"] == 24
    assert counts["answers"] == 24 + 2 * read["test"]["rows"]  # evaluated at the start and at the end
    AutoModelForCausalLM.from_pretrained(tmp_path / "ppo")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--reward-model", "nano"], "--reward-model: train_ppo.reward short.py:score gives the scores"),
        (["--set", "train_ppo.reward=graded"], "train_ppo.reward: graded: no model judges; set judge.model"),
        (["--set", "train_ppo.ptx_coef=1", "--set", "train_ppo.ptx_data=no.jsonl"], "no.jsonl"),
    ],
)
def test_ppo_refuses_in_a_dry_run_what_it_would_refuse(
    more: list[str], message: str, cai: Command, tmp_path: Path
) -> None:
    failed = cai(*ppo_options(tmp_path), *more, "--dry-run")
    assert (failed.returncode, failed.stdout) == (2, "")
    assert message in failed.stderr.splitlines()[-1]


def test_ppo_without_a_reward_is_told_how_to_get_one(cai: Command, tmp_path: Path) -> None:
    failed = cai(*ppo_options(tmp_path), "--set", "train_ppo.reward=model")
    assert failed.returncode == 2
    assert "use --reward-model MODEL" in failed.stderr
