"""Which engine the settings open, and what is refused in one line. Each engine has a file beside this one."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline import nano
from pipeline.config.settings import EngineSettings
from pipeline.engines import open_engine
from pipeline.engines.backends import _ALWAYS, READS, only_read, resolve_backend
from pipeline.engines.vllm import VllmEngine
from pipeline.errors import EngineRefused


def refusal(**settings: Any) -> str:
    with pytest.raises(EngineRefused) as caught:
        open_engine(EngineSettings(**settings))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def install_vllm(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty package by that name: whether vLLM is there is decided without an import of it."""
    (folder / "vllm").mkdir()
    (folder / "vllm" / "__init__.py").touch()
    monkeypatch.delitem(sys.modules, "vllm", raising=False)
    monkeypatch.syspath_prepend(folder)


def test_a_missing_vllm_is_refused_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    said = refusal(backend="vllm", model=str(nano.path()))
    assert "vllm is not installed; pip install 'constitutional-pipeline[vllm]'" in said


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"backend": "vllm", "deterministic": True},
            "engine.deterministic: the vllm backend does not read it; set engine.backend to transformers, or "
            "deterministic to false",
        ),
        ({"backend": "vllm", "device": "cuda:1"}, "engine.device: the vllm backend does not read it"),
        ({"backend": "transformers", "adapter": "lora"}, "engine.adapter: the transformers backend does not read it"),
        (
            {"backend": "transformers", "quantization": "fp8"},
            "engine.quantization: the transformers backend does not read it; set engine.backend to vllm, or "
            "quantization to null",
        ),
        ({"backend": "transformers", "tensor_parallel": 8}, "engine.tensor_parallel: the transformers backend does"),
        ({"backend": "transformers", "script": "s.yaml"}, "engine.script: the transformers backend does not read it"),
        ({"backend": "server", "adapter": "lora"}, "engine.adapter: the server backend does not read it"),
        ({"backend": "server", "dtype": "float16"}, "engine.dtype: the server backend does not read it"),
        ({"backend": "server", "data_parallel": 4}, "engine.data_parallel: the server backend does not read it"),
        ({"backend": "scripted", "context": 99}, "engine.context: the scripted backend does not read it"),
    ],
)
def test_what_a_backend_cannot_do_is_refused_with_the_way_out(settings: dict[str, Any], said: str) -> None:
    assert refusal(model=str(nano.path()), **settings).startswith(said)


@pytest.mark.parametrize("backend", READS)
def test_every_key_is_read_by_some_backend_and_no_default_is_refused(backend: str) -> None:
    assert set().union(*READS.values()) | _ALWAYS == set(EngineSettings.model_fields)
    defaults = EngineSettings(backend=backend, model="nano", base_urls=("http://127.0.0.1:9/v1",))  # type: ignore[arg-type]
    assert only_read(defaults) == defaults


def test_a_folder_without_an_adapter_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_vllm(tmp_path, monkeypatch)
    said = refusal(backend="vllm", model=str(nano.path()), adapter=str(tmp_path))
    assert f"{tmp_path} holds no adapter_config.json; give a LoRA folder" in said


def vllm_arguments(settings: dict[str, Any]) -> dict[str, Any]:
    """What vLLM would be started with."""
    engine = open_engine(EngineSettings(backend="vllm", model=str(nano.path()), **settings))
    assert isinstance(engine, VllmEngine)
    found = engine._model._arguments()
    asyncio.run(engine.close())
    return found


@pytest.mark.parametrize(
    ("gpus", "settings", "copies"),
    [(0, {}, 1), (1, {}, 1), (8, {}, 8), (8, {"tensor_parallel": 2}, 4), (8, {"data_parallel": 3}, 3)],
)
def test_vllm_gets_what_the_settings_say_and_as_many_copies_as_the_gpus_hold(
    gpus: int, settings: dict[str, Any], copies: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_vllm(tmp_path, monkeypatch)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    said = {"dtype": "bfloat16", "quantization": "fp8", "gpu_memory_utilization": 0.7, "context": 1024}
    found = vllm_arguments({**said, "concurrency": 100, **settings})
    expected = {"dtype": "bfloat16", "quantization": "fp8", "gpu_memory_utilization": 0.7, "max_model_len": 1024}
    expected |= {"max_num_seqs": 100, "tensor_parallel_size": settings.get("tensor_parallel", 1)}
    expected |= {"data_parallel_size": copies, "generation_config": "vllm", "trust_remote_code": False}
    assert {key: found[key] for key in expected} == expected


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"tensor_parallel": 4}, "engine.tensor_parallel: 4, but 2 GPUs are visible; lower it"),
        ({"data_parallel": 3}, "engine.data_parallel: 3 copies of 1 GPUs each, but 2 GPUs are visible; lower it"),
    ],
)
def test_more_gpus_than_are_visible_are_refused(
    settings: dict[str, Any], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_vllm(tmp_path, monkeypatch)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert refusal(backend="vllm", model=str(nano.path()), **settings).startswith(said)


@pytest.mark.parametrize(
    ("installed", "gpu", "settings", "backend"),
    [
        (True, True, {}, "vllm"),
        (False, True, {}, "transformers"),
        (True, False, {}, "transformers"),
        (True, True, {"deterministic": True}, "transformers"),
        (True, True, {"device": "cuda:1"}, "transformers"),
        (True, True, {"base_urls": ("http://127.0.0.1:9/v1",)}, "vllm"),
        (True, True, {"base_urls": ("http://127.0.0.1:9/v1",), "model": "a/name"}, "server"),
        (True, True, {"model": "a/name"}, "vllm"),
        (True, True, {"model": None, "script": "replies.yaml"}, "scripted"),
        (True, True, {"backend": "transformers"}, "transformers"),
    ],
)
def test_auto_takes_vllm_for_a_model_to_be_loaded_where_it_is_and_a_gpu(
    installed: bool,
    gpu: bool,
    settings: dict[str, Any],
    backend: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if installed:
        install_vllm(tmp_path, monkeypatch)
    else:
        monkeypatch.setitem(sys.modules, "vllm", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    assert resolve_backend(EngineSettings(**{"model": str(nano.path()), **settings})) == backend
