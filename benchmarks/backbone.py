"""How much of the machine's matrix rate our backbone pass reaches: fp32, forward and backward, packed rows.

    python benchmarks/backbone.py JOB.json

The machine's rate is that of the model's own matrix products alone, three for each linear layer, on as many tokens: as
PyTorch makes them (`machine`), and as `pipeline.lm.products` does (`widest`). All are taken in turns, in one process;
medians. Only the linear layers' operations are counted, on both sides.
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
from torch.nn import functional

from pipeline.lm.forward import Group, completion_ends, prepare
from pipeline.lm.load import load
from pipeline.lm.products import linear

Linear = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
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


def products(weights: list[torch.Tensor], num_tokens: int, *, multiply: Linear) -> Callable[[], None]:
    """What the linear layers multiply: forward, and backward for input and weight."""
    rows = {size: torch.randn(num_tokens, size) for weight in weights for size in weight.shape}
    for each in rows.values():
        each.requires_grad_()

    def multiply_all() -> None:
        for weight in weights:
            into = rows[weight.shape[1]]
            torch.autograd.grad(multiply(into, weight), (into, weight), rows[weight.shape[0]])

    return multiply_all


def seconds(action: Callable[[], None]) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def rates(folder: str) -> dict[str, float]:
    """GFLOP/s."""
    model = load(folder, dtype="float32", device="cpu").model
    prepare(model)
    packed = groups()
    num_tokens = sum(len(piece) for group in packed for piece in (group.prompt, *group.completions))
    left_out = {id(weight) for weight in linears(model.base_model.layers[-1].mlp)}  # all but the ends of completions
    weights = [weight for weight in linears(model.base_model) if id(weight) not in left_out]
    ways = {"machine": functional.linear, "widest": linear}
    actions = {way: products(weights, num_tokens, multiply=multiply) for way, multiply in ways.items()}

    def backbone() -> None:
        completion_ends(model, packed).sum().backward()
        model.zero_grad(set_to_none=True)

    actions["backbone"] = backbone
    times: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(ROUNDS + 1):
        for name, action in actions.items():
            times[name].append(seconds(action))
    operations = 6 * num_tokens * sum(weight.numel() for weight in weights)
    return {name: operations / statistics.median(each[1:]) / 1e9 for name, each in times.items()}


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    print(json.dumps({Path(folder).name: rates(folder) for folder in job["models"]}))


if __name__ == "__main__":
    main()
