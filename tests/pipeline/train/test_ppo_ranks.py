"""PPO in two processes: the steps of one, the same rollouts, and exact resume."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.pipeline.train.in_two import train_in_two
from tests.pipeline.train.ppo_jobs import run_ppo, save_pair
from tests.pipeline.train.test_ppo import lines
from tests.pipeline.train.tiny_jobs import write_rows

KEYS = {"epochs": 1, "microbatch_tokens": 150, "eval_every": 2, "ptx_coef": 0.1}  # 3 steps of 4 updates
PARALLEL = ("ddp", "fsdp")
ARMS: dict[str, dict[str, Any]] = {
    "separate": {},
    "joint": {"value": "joint", "num_samples": 2, "ema_decay": 0.5},
    "adapters": {"lora": {"r": 4, "alpha": 8}, "learning_rate": 1e-2},
    "one-prompt": {"batch_size": 3, "minibatch_size": 1, "num_inner_epochs": 1},
}
TIED = {"batch_size": 9, "minibatch_size": 9, "num_inner_epochs": 1, "ptx_coef": 0.0}
TIED_ARMS = {"ddp/both-keep": 4096, "ddp/one-could-keep": 1900, "fsdp/both-keep": 4096}
"""Nine rows of 422 tokens are five for one process and four for the other: 2110, two passes on a CPU, and 1688."""
LIKES = "def score(conversations, completions):\n    return [len(set(text)) for text in completions]\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every arm by two processes, one that they stop twice, and one with a function for its reward."""
    folder = tmp_path_factory.mktemp("ranks")
    start, reward_model = save_pair(folder)
    data = write_rows(folder / "rows.jsonl")
    (folder / "likes.py").write_text(LIKES)
    tied = [{"prompt": letter + " help" * 400, "split": "train"} for letter in "abcdefghi"]
    (folder / "tied.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tied))

    def job(out: str, steps: int | None = None, **keys: Any) -> dict[str, Any]:
        paths = {"data": data, "start": start, "reward_model": reward_model, "out": folder / "two" / out}
        return {**paths, "steps": steps, "keys": {**KEYS, **keys}}

    jobs = []
    for parallel in PARALLEL:
        arms = list(ARMS)[parallel == "fsdp" :]  # one-prompt has a value model of its own, too
        jobs += [job(f"{parallel}/{arm}", parallel=parallel, **ARMS[arm]) for arm in arms]
        jobs += [job(f"{parallel}/stopped", steps, parallel=parallel, **ARMS["joint"]) for steps in (1, 1, None)]
    jobs += [job("fsdp/goes-on-alone", 2, parallel="fsdp", **ARMS["joint"])]
    for arm, tokens in TIED_ARMS.items():
        keys = {**TIED, "microbatch_tokens": tokens, "parallel": arm.partition("/")[0]}
        jobs += [{**job(arm, **keys), "data": folder / "tied.jsonl"}]
    jobs += [job("function", reward=f"{folder}/likes.py:score", missing_eos_penalty=0.0)]
    train_in_two(folder, jobs)
    return folder


def alone(folder: Path, out: Path, *, data: str = "rows", say: Any = print, **keys: Any) -> Path:
    run_ppo(folder / f"{data}.jsonl", folder / "start", folder / "rm", out, keys={**KEYS, **keys}, say=say)
    return out


def weights(folder: Path) -> torch.Tensor:
    return torch.cat([tensor.flatten() for _, tensor in sorted(load_file(folder / "model.safetensors").items())])


def assert_alike(found: Path, expected: Path) -> None:
    assert [line["completion"] for line in lines(found, "samples")] == [
        line["completion"] for line in lines(expected, "samples")
    ]
    assert (weights(found) - weights(expected)).abs().max() <= 1e-5
    for ours, theirs in zip(lines(found), lines(expected), strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            assert math.isclose(ours[name], value, rel_tol=1e-4, abs_tol=1e-5), (name, ours[name], value)


@pytest.mark.parametrize("arm", ARMS)
def test_two_processes_take_the_steps_of_one(arm: str, folder: Path, tmp_path: Path) -> None:
    expected = alone(folder, tmp_path / arm, **ARMS[arm])
    in_two = sorted((folder / "two").glob(f"*/{arm}"))
    assert in_two
    for found in in_two:
        assert_alike(found, expected)


def test_rollouts_whose_graph_is_kept_give_each_row_s_gradient_once(folder: Path, tmp_path: Path) -> None:
    """Shares that tie are dealt otherwise in the order of an update, so that what is kept here has to be kept there."""
    expected = alone(folder, tmp_path / "ppo", data="tied", **{**TIED, "microbatch_tokens": 4096})
    for arm in TIED_ARMS:
        assert_alike(folder / "two" / arm, expected)


def test_what_two_processes_began_one_finishes(folder: Path) -> None:
    found, expected = (folder / "two" / "fsdp" / name for name in ("goes-on-alone", "joint"))
    said: list[str] = []
    alone(folder, found, say=said.append, **ARMS["joint"])
    assert not [message for message in said if "afresh" in message]
    assert_alike(found, expected)


@pytest.mark.parametrize("parallel", PARALLEL)
def test_stopped_twice_two_processes_give_the_same_bytes(parallel: str, folder: Path) -> None:
    found, expected = (folder / "two" / parallel / name for name in ("stopped", "joint"))
    for name in ("metrics", "samples"):
        assert lines(found, name) == lines(expected, name)
    assert torch.equal(weights(found), weights(expected))


def test_a_function_scores_what_both_processes_drew(folder: Path) -> None:
    found = lines(folder / "two" / "function", "samples")
    assert [line["score"] for line in found] == [len(set(line["completion"])) for line in found]
