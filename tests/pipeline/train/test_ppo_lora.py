"""PPO with adapters: policy and reference on one base, value and reward on another, and the folders that come out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from pipeline.errors import StoppedError
from pipeline.train.ppo_run import EVAL
from pipeline.train.rollouts import roll_out
from tests.pipeline.train.ppo_jobs import opened, run_ppo, save_pair
from tests.pipeline.train.test_ppo import lines
from tests.pipeline.train.test_stages import stop_after

LORA = {"r": 4, "alpha": 8}
KEYS = {"lora": LORA, "learning_rate": 1e-2, "epochs": 2}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return save_pair(tmp_path_factory.mktemp("models"))


def places(model: Any) -> set[int]:
    """Where the weights lie that are not trained."""
    return {parameter.data_ptr() for parameter in model.parameters() if not parameter.requires_grad}


def test_frozen_weights_are_held_once(models: tuple[Path, Path]) -> None:
    networks, _, _, source = opened(*models, lora=LORA)
    assert places(networks.policy) == places(networks.reference)
    assert places(networks.value_model) == places(source.model)
    for name, parameters in networks.parameters.items():
        assert all("lora_" in each or each.startswith("score.") for each in parameters), name


@pytest.mark.parametrize("value", ["separate", "joint"])
def test_adapters_start_without_effect_and_the_reference_keeps_it(value: str, models: tuple[Path, Path]) -> None:
    networks, chat, prompts, _ = opened(*models, lora=LORA, value=value)
    draw = {"seed": [0, EVAL], "num_samples": 1}
    first = roll_out(networks, chat, prompts, range(6), **draw)
    assert first.kl.abs().max() <= 1e-5
    with torch.no_grad():
        for name, parameter in networks.parameters["policy"].items():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    moved = roll_out(networks, chat, prompts, range(6), **draw)
    assert moved.kl.abs().max() > 0.01
    networks.restart()
    again = roll_out(networks, chat, prompts, range(6), **draw)
    assert again.texts == first.texts
    assert torch.equal(again.logps, first.logps)


def test_the_merged_folder_is_the_start_with_its_adapter(models: tuple[Path, Path], data: Path, tmp_path: Path) -> None:
    out = tmp_path / "ppo"
    run_ppo(data, *models, out, keys=KEYS)
    beside = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(models[0]), out / "adapter").eval()
    merged, tokens = AutoModelForCausalLM.from_pretrained(out).eval(), torch.arange(3, 60)[None]
    with torch.no_grad():
        found, expected = merged(tokens).logits, beside(tokens).logits
        with beside.disable_adapter():
            away = (expected - beside(tokens).logits).abs().max()
    assert (found - expected).abs().max() <= 1e-5
    assert away > 1e-3
    assert abs(lines(out)[1]["objective/kl"]) <= 1e-5
    assert lines(out)[-1]["objective/kl"] != 0


def test_a_checkpoint_has_adapters_alone(models: tuple[Path, Path], data: Path, tmp_path: Path) -> None:
    with pytest.raises(StoppedError):
        run_ppo(data, *models, tmp_path / "ppo", keys=KEYS, should_stop=stop_after(1))
    state = tmp_path / ".ppo.training" / "checkpoints" / "step-00000001"
    for network in ("policy", "value"):
        names = set(load_file(state / f"{network}.safetensors"))
        assert names
        assert all("lora_" in name or name.startswith("score.") for name in names)


def test_beyond_the_kl_budget_the_start_is_what_is_kept(models: tuple[Path, Path], data: Path, tmp_path: Path) -> None:
    report = run_ppo(data, *models, tmp_path / "ppo", keys={**KEYS, "kl_coef": 0.0, "kl_budget": 1e-9})
    assert report.outcome.step == 0
    start, found = (load_file(folder / "model.safetensors") for folder in (models[0], tmp_path / "ppo"))
    assert all(torch.equal(found[name], weight) for name, weight in start.items())
