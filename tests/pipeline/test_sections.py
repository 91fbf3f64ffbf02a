"""What the sections of engines have from `engine`, what they state in vain, and whether their models fit together."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline import nano
from pipeline.chain import DATA_STAGES
from pipeline.config.settings import Settings
from pipeline.engines.backends import only_read
from pipeline.errors import EngineRefused
from pipeline.voices import check_models

OF_A_MODEL = {"revision": "abc", "adapter": "tuned", "quantization": "fp8"}
SERVER = {"backend": "server", "base_urls": ["http://127.0.0.1:9/v1"]}


def settings(**sections: Any) -> Settings:
    return Settings.model_validate(sections)


@pytest.fixture
def vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty package by that name, and one GPU: whether they are there is decided without using them."""
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").touch()
    monkeypatch.delitem(sys.modules, "vllm", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)


@pytest.mark.parametrize(
    ("judge", "expected"),
    [
        ({"model": "other"}, {}),
        ({"model": "other", "adapter": "own"}, {"adapter": "own"}),
        ({"model": "base"}, OF_A_MODEL),
        ({"context": 512}, OF_A_MODEL),
    ],
)
def test_a_revision_an_adapter_and_a_quantization_stay_with_their_model(
    judge: dict[str, Any], expected: dict[str, str]
) -> None:
    found = settings(engine={"backend": "vllm", "model": "base", **OF_A_MODEL}).engine_for(judge)
    assert {key: value for key in OF_A_MODEL if (value := getattr(found, key))} == expected
    assert found.backend == "vllm"


@pytest.mark.usefixtures("vllm")
@pytest.mark.parametrize("judge", [SERVER, {**SERVER, "model": "api"}, {"backend": "transformers"}])
def test_what_another_backend_does_not_read_of_engine_has_no_effect_on_a_section(
    judge: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "adapter_config.json").touch()
    engine = {"adapter": str(tmp_path), "quantization": "fp8", "tensor_parallel": 1, "gpu_memory_utilization": 0.5}
    mine = settings(engine={"backend": "vllm", "model": str(nano.path()), **engine}, judge=judge)
    check_models(mine, DATA_STAGES)
    found = only_read(mine.engine_for(mine.judge))
    assert (found.adapter, found.quantization, found.gpu_memory_utilization) == (None, None, 0.9)


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"judge": {"adapter": "lora"}}, "judge.adapter: the transformers backend does not read it; set judge.backend"),
        ({"judge": {"tensor_parallel": 2}}, "judge.tensor_parallel: "),
        ({"judge": {**SERVER, "deterministic": True}}, "judge.deterministic: the server backend does not read it"),
        ({"critic": [{}, {"quantization": "fp8"}]}, "critic[1].quantization: "),
        ({"generate": {"models": [{}, {"script": "s.yaml"}]}}, "generate.models[1].script: "),
        ({"engine": {"model": "nano", "adapter": "lora"}, "judge": SERVER}, "engine.adapter: "),
        ({"judge": {"backend": "server"}}, "engine.base_urls: no endpoint given"),
        ({"judge": {"backend": "vllm"}}, "judge.backend: vllm is not installed"),
        ({"judge": {"model": "./gone"}}, "model ./gone: no such folder; check judge.model"),
        ({"judge": {"device": "warp"}}, "judge.device: warp is not available here"),
    ],
)
def test_a_refusal_names_the_section_that_states_it(
    sections: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(EngineRefused) as caught:
        check_models(settings(**{"engine": {"model": "nano"}, **sections}), DATA_STAGES)
    assert str(caught.value).startswith(said)


@pytest.mark.parametrize("backend", ["server", "transformers"])
def test_what_trainings_read_of_engine_is_right_whoever_answers(backend: str) -> None:
    engine = {"model": "nano", "base_urls": SERVER["base_urls"], "device": "cpu", "gpu_memory_utilization": 0.4}
    check_models(settings(engine={"backend": backend, **engine}), DATA_STAGES)


@pytest.mark.usefixtures("vllm")
@pytest.mark.parametrize(
    ("engine", "sections", "said"),
    [
        ({}, {"judge": {"model": "other"}}, "judge.gpu_memory_utilization: vllm loads 2 models, and their shares of"),
        ({}, {"judge": {"context": 512}}, "(engine 0.9, judge 0.9) add up to 1.8; lower them, such as engine."),
        ({"gpu_memory_utilization": 0.45}, {"judge": {"model": "other"}}, None),
        ({"gpu_memory_utilization": 0.5}, {"critic": [{"model": "a"}], "judge": {"model": "b"}}, "add up to 1.5"),
        ({}, {"judge": {"model": "other", "gpu_memory_utilization": 0.1}}, None),
        ({}, {"judge": {"style": "few-shot"}, "critic": [{}, {"price_in": 1.0}]}, None),
        ({}, {"judge": {"model": "other", **SERVER}}, None),
    ],
)
def test_different_models_in_vllm_share_one_gpu(
    engine: dict[str, Any], sections: dict[str, Any], said: str | None
) -> None:
    mine = settings(engine={"backend": "vllm", "model": "base", **engine}, **sections)
    if said is None:
        check_models(mine, DATA_STAGES)
        return
    with pytest.raises(EngineRefused) as caught:
        check_models(mine, DATA_STAGES)
    assert said in str(caught.value)


@pytest.mark.usefixtures("vllm")
def test_a_folder_without_an_adapter_is_refused_at_its_section(tmp_path: Path) -> None:
    mine = settings(engine={"backend": "vllm", "model": "nano"}, judge={"adapter": str(tmp_path)})
    with pytest.raises(EngineRefused, match=r"judge\.adapter: .* holds no adapter_config\.json; give a LoRA folder"):
        check_models(mine, DATA_STAGES)
