"""Two processes train as one does: the same steps, the same files, the same end."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from pipeline.errors import StoppedError
from tests.pipeline.lm.tiny import save_tiny
from tests.pipeline.train.in_two import stopped_after, train_in_two
from tests.pipeline.train.tiny_jobs import TRAINERS, metrics, run_job, write_rows

PARALLEL = ("ddp", "fsdp")
KEYS = {"batch_size": 8, "epochs": 1, "microbatch_tokens": 60}  # 3 steps, of several microbatches each
LORA = {"r": 4, "alpha": 8}
THREADS = """
from pathlib import Path

import torch
from pipeline.train import ranks


def of_the_group():
    return [task.name for task in Path("/proc/self/task").iterdir()][1:]

with ranks.joined():
    assert ranks.gather(1) == [1]
    assert ranks.size() == 1 and len(of_the_group()) > 0
    weight = torch.ones(1, requires_grad=True)
    torch.optim.AdamW([weight]).step(lambda: weight.sum().backward())
print(len(of_the_group()))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every trainer in both ways, and the trainings that the tests below go on with."""
    folder = tmp_path_factory.mktemp("ranks")
    save_tiny(folder / "start")
    write_rows(folder / "rows.jsonl")

    def job(out: str, trainer: str = "sft", steps: int | None = None, **keys: Any) -> dict[str, Any]:
        paths = {"data": folder / "rows.jsonl", "start": folder / "start", "out": folder / out}
        return {**paths, "trainer": trainer, "steps": steps, "keys": {**KEYS, **keys}}

    jobs = [job(f"{parallel}/{t}", t, parallel=parallel) for parallel in PARALLEL for t in TRAINERS]
    for parallel in PARALLEL:
        keys = {"parallel": parallel, "epochs": 2}
        jobs += [
            job(f"{parallel}/first-step", steps=1, parallel=parallel),
            job(f"{parallel}/one-row", batch_size=1, parallel=parallel),
            job(f"{parallel}/checkpointed", gradient_checkpointing=True, parallel=parallel),
            job(f"{parallel}/adapters", "dpo", lora=LORA, parallel=parallel),
            job(f"{parallel}/whole", "dpo", **keys),
            *(job(f"{parallel}/stopped", "dpo", steps, **keys) for steps in (2, 2, None)),
            job(f"{parallel}/goes-on-alone", "dpo", 4, **keys),
        ]
    train_in_two(folder, jobs)
    return folder


def alone(folder: Path, out: Path, trainer: str = "sft", *, steps: int | None = None, **keys: Any) -> Path:
    """The same training in this process."""
    options = {"keys": {**KEYS, **keys}, "should_stop": stopped_after(steps)}
    run_job(trainer, folder / "rows.jsonl", folder / "start", out, **options)
    return out


def assert_alike(found: Path, expected: Path, *, relative: float) -> None:
    """Of every line of metrics; what is nearly 0 is compared in absolute terms."""
    lines = metrics(found), metrics(expected)
    assert len(lines[0]) == len(lines[1])
    for ours, theirs in zip(*lines, strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            assert math.isclose(ours[name], value, rel_tol=relative, abs_tol=1e-6), (name, ours[name], value)


def weights(folder: Path) -> torch.Tensor:
    return torch.cat([tensor.flatten() for _, tensor in sorted(load_file(folder / "model.safetensors").items())])


@pytest.mark.parametrize("trainer", TRAINERS)
def test_two_processes_take_the_steps_of_one(trainer: str, folder: Path, tmp_path: Path) -> None:
    expected = alone(folder, tmp_path / trainer, trainer)
    for parallel in PARALLEL:
        found = folder / parallel / trainer
        assert_alike(found, expected, relative=1e-5)
        assert (weights(found) - weights(expected)).abs().max() <= 1e-5


@pytest.mark.parametrize("parallel", PARALLEL)
def test_the_gradient_is_that_of_the_whole_batch(parallel: str, folder: Path, tmp_path: Path) -> None:
    """After one step AdamW's first moment is a tenth of it."""
    with pytest.raises(StoppedError):
        alone(folder, tmp_path / "sft", steps=1)
    places = tmp_path / ".sft.training", folder / parallel / ".first-step.training"
    files = [load_file(place / "checkpoints" / "step-00000001" / "optimizer.safetensors") for place in places]
    expected, found = (torch.cat([file[name].flatten() for name in sorted(file) if "avg." in name]) for file in files)
    assert expected.norm() > 0.01
    assert (found - expected).norm() <= 1e-6 * expected.norm()


@pytest.mark.parametrize("parallel", PARALLEL)
def test_a_process_may_have_no_row(parallel: str, folder: Path, tmp_path: Path) -> None:
    expected = alone(folder, tmp_path / "sft", batch_size=1)
    assert_alike(folder / parallel / "one-row", expected, relative=1e-5)
    assert len(metrics(expected)) == 24


@pytest.mark.parametrize("parallel", PARALLEL)
def test_gradient_checkpointing_changes_nothing(parallel: str, folder: Path) -> None:
    assert_alike(folder / parallel / "checkpointed", folder / parallel / "sft", relative=1e-5)


@pytest.mark.parametrize("parallel", PARALLEL)
def test_stopped_twice_two_processes_give_the_same_bytes(parallel: str, folder: Path) -> None:
    found, expected = folder / parallel / "stopped", folder / parallel / "whole"
    assert metrics(found) == metrics(expected)
    assert len(metrics(found)) == 6
    assert torch.equal(weights(found), weights(expected))


@pytest.mark.parametrize("parallel", PARALLEL)
def test_what_two_processes_began_one_finishes(parallel: str, folder: Path) -> None:
    found = folder / parallel / "goes-on-alone"
    said: list[str] = []
    keys = {**KEYS, "epochs": 2}
    run_job("dpo", folder / "rows.jsonl", folder / "start", found, keys=keys, say=said.append)
    assert not [message for message in said if "afresh" in message]
    expected = folder / parallel / "whole"
    assert_alike(found, expected, relative=1e-5)
    assert (weights(found) - weights(expected)).abs().max() <= 1e-6


@pytest.mark.parametrize("parallel", PARALLEL)
def test_adapters_are_trained_and_merged_by_two_as_by_one(parallel: str, folder: Path, tmp_path: Path) -> None:
    expected, found = alone(folder, tmp_path / "dpo", "dpo", lora=LORA), folder / parallel / "adapters"
    assert_alike(found, expected, relative=1e-5)
    assert (weights(found) - weights(expected)).abs().max() <= 1e-5
    ours, theirs = (load_file(path / "adapter" / "adapter_model.safetensors") for path in (found, expected))
    assert ours.keys() == theirs.keys()
    assert all((ours[name] - theirs[name]).abs().max() <= 1e-5 for name in theirs)


def test_a_model_that_was_divided_loads_as_any_other(folder: Path) -> None:
    model, info = AutoModelForCausalLM.from_pretrained(folder / "fsdp" / "sft", output_loading_info=True)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert not info["missing_keys"]


def test_what_one_process_began_two_finish(folder: Path, tmp_path: Path) -> None:
    out = folder / "begun-alone"
    with pytest.raises(StoppedError):
        alone(folder, out, "dpo", steps=4, epochs=2)
    keys = {**KEYS, "epochs": 2, "parallel": "fsdp"}
    job = {"trainer": "dpo", "data": folder / "rows.jsonl", "start": folder / "start", "out": out, "keys": keys}
    train_in_two(tmp_path, [job])
    assert_alike(out, folder / "fsdp" / "whole", relative=1e-5)
    assert (weights(out) - weights(folder / "fsdp" / "whole")).abs().max() <= 1e-6


def test_the_threads_of_the_group_end_with_it(tmp_path: Path) -> None:
    """Those that are left when Python ends may abort the process; an optimiser's first step imports much of torch."""
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    environment = os.environ | place | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", THREADS], capture_output=True, text=True, env=environment)
    assert done.stdout == "0\n", done.stderr
