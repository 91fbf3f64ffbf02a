"""PPO's rollouts through vLLM: drawn from the weights of the moment, with the log-probabilities that they have."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline import nano
from pipeline.config.settings import Settings
from pipeline.errors import EngineDown
from pipeline.lm.load import load
from pipeline.lm.templates import Chat
from pipeline.train import rows
from pipeline.train.networks import Networks, open_networks
from pipeline.train.prompts import Prompts, tokenise_prompts
from pipeline.train.rollouts import Rollouts, roll_out
from pipeline.train.samplers import DrawOutside
from pipeline.vllm_rollouts import vllm_sampler
from tests.pipeline.lm.tiny import save_tiny
from tests.pipeline.train.ppo_jobs import KEYS
from tests.pipeline.train.tiny_jobs import write_rows
from tests.support import Command
from tests.vllm.conftest import descendants

CLOSE = 1e-3
"""Nats between vLLM's log-probability of a token and training's, both in fp32."""
KEYS_HERE: dict[str, Any] = {**KEYS, "advantages": "rloo", "num_samples": 2, "max_tokens": 16, "temperature": 0.7}


def settings_of(**keys: Any) -> Settings:
    return Settings.model_validate({"train_ppo": {**KEYS_HERE, "sampler": "vllm", **keys}})


def opened(start: Path, settings: Settings) -> tuple[Networks, Chat, Prompts]:
    """Prompts that begin alike, longer than two blocks of vLLM's cache on a CPU."""
    loaded = load(str(start), dtype="float32", device="cpu")
    chat = Chat(loaded.tokenizer)
    texts = ("please help me to write a letter about the old bicycle " * 30 + end for end in ("", "said the user", "a"))
    turns = ([{"role": "user", "content": text}] for text in texts)
    prompts = [rows.Row(str(n), turn, (), 1.0, (), "") for n, turn in enumerate(turns)]
    networks = open_networks(loaded.model, str(start), None, settings.train_ppo, device="cpu")
    found = tokenise_prompts(prompts, chat, max_length=900, too_long="drop")
    assert found.data.group(0).prompt.numel() > 256
    return networks, chat, found


def check(rollouts: Rollouts, *, moved: bool) -> None:
    """vLLM's log-probabilities are the policy's; those of the starting model are others, if it has moved."""
    mask = rollouts.completion_mask
    assert (rollouts.logps - rollouts.sampler_logps).abs().max() <= CLOSE
    distance = (rollouts.ref_logps - rollouts.sampler_logps)[mask].abs().mean()
    assert distance > 100 * CLOSE if moved else distance <= CLOSE


def move(networks: Networks, seed: int) -> None:
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in networks.parameters["policy"].values():
            parameter.add_(0.02 * torch.randn_like(parameter))


@pytest.mark.parametrize(
    ("ties", "keys"),
    [(True, {}), (False, {}), (True, {"lora": {"r": 4}})],
    ids=["tied", "untied", "adapter"],
)
def test_vllm_draws_by_the_weights_of_the_moment_and_the_seed(ties: bool, keys: dict[str, Any], tmp_path: Path) -> None:
    # Heads of 64, which vLLM has on a CPU.
    start = nano.path() if ties else save_tiny(tmp_path / "start", hidden=256, context=1024)
    settings = settings_of(**keys)
    networks, chat, prompts = opened(start, settings)
    with vllm_sampler(settings) as sampler:
        draw = DrawOutside(sampler, tmp_path / "sampler")

        def drawn(seed: int) -> Rollouts:
            return roll_out(networks, chat, prompts, range(3), seed=[seed], num_samples=2, draw=draw)

        first = drawn(0)
        check(first, moved=False)
        assert drawn(0).texts == first.texts
        assert drawn(1).texts != first.texts
        for step in range(2):
            move(networks, step)
            check(drawn(0), moved=True)


def test_a_whole_training_draws_with_vllm_and_leaves_no_process(cai: Command, tmp_path: Path) -> None:
    (tmp_path / "likes.py").write_text(
        "def score(conversations, completions):\n    return [sum(x in 'aeiou' for x in c) for c in completions]\n"
    )
    keys = {**KEYS_HERE, "sampler": "vllm", "reward": f"{tmp_path}/likes.py:score", "eval_every": 1, "ema_decay": 0.5}
    data = write_rows(tmp_path / "rows.jsonl")
    said = [part for key, value in keys.items() for part in ("--set", f"train_ppo.{key}={value}")]
    done = cai("train-ppo", "--data", data, "--model", "nano", "--out", tmp_path / "ppo", *said, timeout=300)
    assert done.returncode == 0, done.stderr
    start, *steps = [json.loads(line) for line in (tmp_path / "ppo" / "metrics.jsonl").read_text().splitlines()]
    assert len(steps) == 3
    assert abs(start["eval/kl"]) <= 1e-4
    assert abs(steps[0]["objective/kl"]) <= 1e-4
    assert max(line["rollout/mismatch"] for line in steps) <= CLOSE
    assert steps[-1]["objective/kl"] > 100 * CLOSE
    assert not (tmp_path / ".ppo.training").exists()


def test_an_engine_that_dies_stops_training_resumable(tmp_path: Path) -> None:
    settings = settings_of()
    networks, chat, prompts = opened(nano.path(), settings)
    others = set(descendants(os.getpid()))  # engines that other tests go on using
    with vllm_sampler(settings) as sampler:
        draw = DrawOutside(sampler, tmp_path / "sampler")
        roll_out(networks, chat, prompts, [0], seed=[0], num_samples=1, draw=draw)
        for pid in set(descendants(os.getpid())) - others:
            os.kill(pid, signal.SIGKILL)
        with pytest.raises(EngineDown, match="process has ended"):
            roll_out(networks, chat, prompts, [0], seed=[0], num_samples=1, draw=draw)
