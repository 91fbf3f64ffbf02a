"""How much of the machine's matrix rate our backbone pass reaches: fp32, forward and backward, packed rows.

    python benchmarks/backbone.py JOB.json

The machine's rate is that of the model's own matrix products alone, three for each linear layer, on as many tokens.
Both are taken in turns, in one process; medians. Only the linear layers' operations are counted, on both sides.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import training_jobs
from transformers import AutoModelForCausalLM

from pipeline.lm.forward import Group, completion_ends, prepare

ROUNDS, PAIRS = 7, 8


def groups() -> list[Group]:
    def tokens(ids: list[int]) -> torch.Tensor:
        return torch.tensor(ids, dtype=torch.int32)

    return [
        Group(tokens(pair["prompt"]), (tokens(pair["chosen"]), tokens(pair["rejected"])))
        for pair in training_jobs.synthetic("1:1", PAIRS)
    ]


def linears(model: Any) -> list[torch.Tensor]:
    return [module.weight for module in model.modules() if isinstance(module, torch.nn.Linear)]


def products(weights: list[torch.Tensor], num_tokens: int) -> Callable[[], None]:
    """What the linear layers multiply: forward, and backward for input and weight."""
    rows = {size: torch.randn(num_tokens, size) for weight in weights for size in weight.shape}

    @torch.no_grad()
    def multiply() -> None:
        for weight in weights:
            into, out = rows[weight.shape[1]], rows[weight.shape[0]]
            into @ weight.T
            out @ weight
            out.T @ into

    return multiply


def seconds(action: Callable[[], None]) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def rates(folder: str) -> dict[str, float]:
    """GFLOP/s."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prepare(model)
    packed = groups()
    num_tokens = sum(len(piece) for group in packed for piece in (group.prompt, *group.completions))
    left_out = {id(weight) for weight in linears(model.base_model.layers[-1].mlp)}  # all but the ends of completions
    weights = [weight for weight in linears(model.base_model) if id(weight) not in left_out]
    multiply = products(weights, num_tokens)

    def backbone() -> None:
        completion_ends(model, packed).sum().backward()
        model.zero_grad(set_to_none=True)

    multiply(), backbone()
    times = [(seconds(multiply), seconds(backbone)) for _ in range(ROUNDS)]
    operations = 6 * num_tokens * sum(weight.numel() for weight in weights)
    machine, ours = (operations / statistics.median(each) / 1e9 for each in zip(*times, strict=True))
    return {"machine": machine, "backbone": ours}


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    print(json.dumps({Path(folder).name: rates(folder) for folder in job["models"]}))


if __name__ == "__main__":
    main()
