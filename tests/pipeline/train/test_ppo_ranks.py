"""PPO in two processes: the steps of one, the same rollouts, and exact resume."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pipeline.errors import UsageError
from pipeline.train.ppo import plan_ppo
from pipeline.train.rows import Source
from pipeline.train.stage import Job
from tests.pipeline.train.in_two import train_in_two
from tests.pipeline.train.ppo_jobs import ppo_settings, run_ppo, save_pair
from tests.pipeline.train.test_ppo import lines
from tests.pipeline.train.tiny_jobs import write_rows

KEYS = {"epochs": 1, "microbatch_tokens": 150, "eval_every": 2, "ptx_coef": 0.1}  # 3 steps of 4 updates
ARMS: dict[str, dict[str, Any]] = {
    "separate": {},
    "joint": {"value": "joint", "num_samples": 2},
    "adapters": {"lora": {"r": 4, "alpha": 8}, "learning_rate": 1e-2},
    "one-prompt": {"batch_size": 3, "minibatch_size": 1},
}
LIKES = "def score(conversations, completions):\n    return [len(set(text)) for text in completions]\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every arm by two processes, one that they stop twice, and one with a function for its reward."""
    folder = tmp_path_factory.mktemp("ranks")
    start, reward_model = save_pair(folder)
    data = write_rows(folder / "rows.jsonl")
    (folder / "likes.py").write_text(LIKES)

    def job(out: str, steps: int | None = None, **keys: Any) -> dict[str, Any]:
        paths = {"data": data, "start": start, "reward_model": reward_model, "out": folder / "two" / out}
        return {**paths, "steps": steps, "keys": {**KEYS, **keys}}

    jobs = [job(arm, **keys) for arm, keys in ARMS.items()]
    jobs += [job("stopped", steps) for steps in (1, 1, None)]
    jobs += [job("function", reward=f"{folder}/likes.py:score", missing_eos_penalty=0.0)]
    train_in_two(folder, jobs)
    return folder


def alone(folder: Path, out: Path, **keys: Any) -> Path:
    run_ppo(folder / "rows.jsonl", folder / "start", folder / "rm", out, keys={**KEYS, **keys})
    return out


def weights(folder: Path) -> torch.Tensor:
    return torch.cat([tensor.flatten() for _, tensor in sorted(load_file(folder / "model.safetensors").items())])


@pytest.mark.parametrize("arm", ARMS)
def test_two_processes_take_the_steps_of_one(arm: str, folder: Path, tmp_path: Path) -> None:
    expected, found = alone(folder, tmp_path / arm, **ARMS[arm]), folder / "two" / arm
    assert [line["completion"] for line in lines(found, "samples")] == [
        line["completion"] for line in lines(expected, "samples")
    ]
    assert (weights(found) - weights(expected)).abs().max() <= 1e-5
    for ours, theirs in zip(lines(found), lines(expected), strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            assert math.isclose(ours[name], value, rel_tol=1e-4, abs_tol=1e-5), (name, ours[name], value)


def test_stopped_twice_two_processes_give_the_same_bytes(folder: Path) -> None:
    found, expected = folder / "two" / "stopped", folder / "two" / "separate"
    for name in ("metrics", "samples"):
        assert lines(found, name) == lines(expected, name)
    assert torch.equal(weights(found), weights(expected))


def test_a_function_scores_what_both_processes_drew(folder: Path) -> None:
    found = lines(folder / "two" / "function", "samples")
    assert [line["score"] for line in found] == [len(set(line["completion"])) for line in found]


def test_a_divided_policy_is_refused(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.train.ranks.size", lambda: 2)
    job = Job(sources=[Source(str(folder / "rows.jsonl"))], start=str(folder / "start"), out=tmp_path / "ppo")
    with pytest.raises(UsageError, match=r"^parallel: fsdp: .*; use parallel: ddp$"):
        plan_ppo(job, ppo_settings(parallel="fsdp"), reward_model=str(folder / "rm"))
