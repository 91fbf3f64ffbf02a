"""One PPO training by this project, on prompts that are tokens already: see ppo.py and peers/trl_ppo.py.

python benchmarks/ppo_ours.py JOB.json
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from backbone import Linear, linears, products, seconds
from peers.peak import peak_kib
from torch.nn import functional

from pipeline.config.settings import Settings, TrainPpoSettings
from pipeline.lm.load import load
from pipeline.lm.products import linear
from pipeline.lm.templates import Chat
from pipeline.train.batches import Data
from pipeline.train.loop import Progress
from pipeline.train.networks import open_networks
from pipeline.train.ppo import optimise
from pipeline.train.ppo_run import Task
from pipeline.train.prompts import Prompts
from pipeline.train.rewards import open_reward_model

PARTS = ("rollout", "score", "update")


def settings_of(job: dict[str, Any]) -> TrainPpoSettings:
    keys = {name: job[name] for name in ("batch_size", "max_tokens", "learning_rate", "num_inner_epochs", "value")}
    more = {
        "minibatch_size": job["batch_size"],
        "precision": "float32",
        "missing_eos_penalty": 0.0,
        "warmup": 0.0,
        "microbatch_tokens": 1 << 14,
    }
    return Settings.model_validate({"train_ppo": {**keys, **more}}).train_ppo


def read_prompts(path: str) -> Prompts:
    prompts = Prompts(Data(), [])
    for number, line in enumerate(Path(path).read_text().splitlines()):
        prompts.data.add_tokens(str(number), json.loads(line), [])
        prompts.conversations.append([])
    return prompts


def machine_rate(weights: list[Any], num_tokens: int, multiply: Linear) -> float:
    """GFLOP/s of the matrix products that forward and backward pass make, alone."""
    action = products(weights, num_tokens, multiply=multiply)
    action()
    taken = statistics.median(seconds(action) for _ in range(7))
    return 6 * num_tokens * sum(weight.numel() for weight in weights) / taken / 1e9


def update_rate(lines: list[dict[str, Any]], task: Task) -> float:
    """GFLOP/s of a step's updates, the linear layers' operations alone, and of these what is really computed.

    The head and the last layer's MLP see the tokens of completions only; the first forward pass is the rollouts'.
    """
    networks, settings = task.networks, task.settings
    prompt = statistics.mean(task.prompts.data.num_tokens(row) for row in range(len(task.prompts)))
    backbones = [networks.policy, *([networks.value_model] if networks.value_model is not None else [])]
    last = sum(weight.numel() for model in backbones for weight in linears(model.base_model.layers[-1].mlp))
    rest = sum(weight.numel() for model in backbones for weight in linears(model.base_model)) - last
    last += networks.policy.get_output_embeddings().weight.numel()
    passes = 3 * settings.num_inner_epochs - 1  # forward, and backward for input and weight
    rates = []
    for line in lines:
        completion = line["rollout/length"]
        multiplied = settings.batch_size * ((prompt + completion - 1) * rest + completion * last)
        rates.append(2 * passes * multiplied / line["seconds/update"] / 1e9)
    return statistics.median(rates)


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    settings = settings_of(job)
    loaded = load(job["model"], dtype="float32", device="cpu")
    chat = Chat(loaded.tokenizer)
    source = open_reward_model(
        job["reward_model"],
        "reward",
        tokenizer=loaded.fingerprint["tokenizer"],
        reencode=False,
        max_tokens=settings.microbatch_tokens,
        device="cpu",
    )
    networks = open_networks(loaded.model, job["model"], source.model, settings, device="cpu")
    ends: list[tuple[float, float]] = []

    def watch(progress: Progress) -> None:
        ends.append((time.perf_counter(), time.process_time()))

    with tempfile.TemporaryDirectory() as folder:
        prompts, nobody = read_prompts(job["rows"]), Prompts(Data(), [])
        task = Task(networks, chat, prompts, nobody, None, source.score, settings, Path(folder), job["seed"])
        optimise(task, watch=watch)
        lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()][2:]
    (began, cpu), (ended, cpu_end) = ends[0], ends[-1]
    num_tokens = sum(map(prompts.data.num_tokens, range(settings.batch_size)))
    print(json.dumps({
        "seconds": ended - began,  # of all steps but the first, which pays for what a process does once
        "cpu": cpu_end - cpu,
        "peak": peak_kib(),
        "length": statistics.mean(line["rollout/length"] for line in lines),
        "parts": {part: statistics.mean(line[f"seconds/{part}"] for line in lines) for part in PARTS},
        "update": update_rate(lines, task),
        "machine": machine_rate(linears(networks.policy.base_model), num_tokens, functional.linear),
        "widest": machine_rate(linears(networks.policy.base_model), num_tokens, linear),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
