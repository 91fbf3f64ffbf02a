"""Our trainers beside TRL 1.16 on the same weights and batches. benchmarks/agreement.py made what is expected here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pipeline.config.settings import Settings
from pipeline.lm.forward import prepare
from pipeline.train import loop
from pipeline.train.batches import Data
from pipeline.train.loop import Task, fit
from tests.pipeline.train.agreed import BATCH_SIZE, CASES, LEARNING_RATE, STEPS, Case, make_model, make_rows
from tests.pipeline.train.tiny_jobs import metrics, objective, token_data

DATA = Path(__file__).parent / "data"


@pytest.fixture(scope="module")
def losses() -> dict[str, list[float]]:
    found: dict[str, list[float]] = json.loads((DATA / "trl.json").read_text())["losses"]
    return found


@pytest.fixture(scope="module")
def added() -> dict[str, torch.Tensor]:
    """What TRL has added to each weight."""
    return load_file(DATA / "trl.safetensors")


@pytest.mark.parametrize("name", CASES)
def test_losses_and_weights_of_20_steps_are_those_of_trl(
    name: str,
    losses: dict[str, list[float]],
    added: dict[str, torch.Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(loop, "batch_at", in_order)
    case = CASES[name]
    model = make_model("score" if case.trainer == "rm" else "language")
    start = {key: parameter.detach().clone() for key, parameter in model.named_parameters()}
    train(case, model, tmp_path)
    found = [line["loss"] for line in metrics(tmp_path)]
    assert len(found) == STEPS
    assert found == pytest.approx(losses[name], abs=1e-4, rel=0)
    ours = torch.cat([(p.detach() - start[key]).flatten() for key, p in model.named_parameters()])
    theirs = torch.cat([added[f"{name}/{key}"].flatten() for key in start])
    assert (ours - theirs).norm() <= 1e-3 * theirs.norm()


def in_order(step: int, *, num_rows: int, batch_size: int, seed: int) -> list[int]:
    """The rows stand in the order in which TRL took them."""
    return list(range(step * batch_size, (step + 1) * batch_size))


def train(case: Case, model: Any, folder: Path) -> None:
    common = {"batch_size": BATCH_SIZE, "learning_rate": LEARNING_RATE, "schedule": "constant", "warmup": 0.0}
    section = f"train_{case.trainer}"
    tree = {section: {**common, "epochs": 1, "microbatch_tokens": 200, **case.ours}}
    settings = getattr(Settings.model_validate(tree), section)
    data = token_data(make_rows(), case.trainer)
    prepare(model)
    fit(Task(model, objective(case.trainer, model, data, settings), data, Data(), settings, folder, seed=0))
