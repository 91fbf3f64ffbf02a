"""What the settings make of rollouts through vLLM, without vLLM."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.settings import Settings
from pipeline.errors import UsageError
from pipeline.vllm_rollouts import vllm_sampler
from tests.pipeline.engines.test_open_engine import install_vllm


def settings(engine: dict[str, Any] | None = None, **ppo: Any) -> Settings:
    return Settings.model_validate({"engine": engine or {}, "train_ppo": {"sampler": "vllm", **ppo}})


def refusal(**said: Any) -> str:
    with pytest.raises(UsageError) as caught, vllm_sampler(settings(**said)):
        pass
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_a_missing_vllm_is_refused_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    said = "train_ppo.sampler: vllm is not installed; pip install 'constitutional-pipeline[vllm]', or set it to decode"
    assert refusal() == said


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"engine": {"device": "cuda:1"}}, "engine.device: vllm takes the visible GPUs"),
        ({"lora": {"quantize": "4bit"}}, "train_ppo.sampler: vllm cannot draw with lora.quantize"),
        ({"lora": {"r": 1000}}, "vllm: no room for an adapter of rank 1000"),
    ],
)
def test_what_vllm_cannot_draw_with_is_refused(
    keys: dict[str, Any], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_vllm(tmp_path, monkeypatch)
    assert refusal(**keys).startswith(said)


def test_vllm_computes_as_training_does_and_loads_nothing_before_it_draws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_vllm(tmp_path, monkeypatch)
    with vllm_sampler(settings({"concurrency": 7}, precision="bfloat16", lora={"r": 12})) as sampler:
        found = sampler._options
        assert sampler._model is None
    expected = {"dtype": "bfloat16", "max_num_seqs": 7, "logprobs_mode": "processed_logprobs", "max_lora_rank": 16}
    assert {key: found[key] for key in expected} == expected
