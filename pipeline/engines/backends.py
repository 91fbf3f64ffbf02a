"""What each backend reads of an engine's settings, and what is refused before anything is written or loaded."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

from pipeline.config.settings import EngineSettings
from pipeline.errors import EngineRefused
from pipeline.lm.folder import check_name

At = Callable[[str], str]
"""A key -> its place, such as `judge.adapter`."""

_LOADED = {"revision", "dtype", "context", "concurrency"}
READS: dict[str, set[str]] = {
    "transformers": _LOADED | {"device", "deterministic"},
    "vllm": _LOADED | {"adapter", "quantization", "tensor_parallel", "data_parallel", "gpu_memory_utilization"},
    "server": {"revision", "context", "concurrency", "base_urls", "api_key_env", "timeout_s"},
    "scripted": {"concurrency", "script"},
}
"""Backend -> the keys that it reads, besides those that every backend does."""
_ALWAYS = {"backend", "model", "style", "price_in", "price_out", "base_urls", "api_key_env", "timeout_s"}
"""Read by every backend, or of endpoints: an environment names one for all programs, whatever model this one loads."""


def resolve_backend(settings: EngineSettings) -> str:
    """What `auto` stands for: a folder is loaded, a name is asked for at the endpoint if there is one, else loaded.

    A model is loaded with vllm where that is installed and a GPU is visible, else with transformers.
    """
    if settings.backend != "auto":
        return settings.backend
    if settings.script and not settings.model:
        return "scripted"
    is_folder = bool(settings.model) and Path(str(settings.model)).is_dir()
    if settings.base_urls and not is_folder:
        return "server"
    return "vllm" if _suits_vllm(settings) else "transformers"


def _suits_vllm(settings: EngineSettings) -> bool:
    if settings.deterministic or settings.device != "auto" or importlib.util.find_spec("vllm") is None:
        return False
    import torch

    return torch.cuda.is_available()


def only_read(settings: EngineSettings) -> EngineSettings:
    """The settings without what their backend does not read: a section has it from another one."""
    unread = _unread(settings, resolve_backend(settings))
    return settings.model_copy(update={key: EngineSettings.model_fields[key].default for key in unread})


def _unread(settings: EngineSettings, backend: str) -> list[str]:
    """Keys with another value than their default that the backend does not read."""
    fields = EngineSettings.model_fields
    others = [key for key in fields if key not in READS[backend] | _ALWAYS]
    return [key for key in others if getattr(settings, key) != fields[key].default]


def check_engine(settings: EngineSettings, section: str = "engine") -> str:
    """What can be told without loading or asking anything. Returns the backend; raises EngineRefused.

    section: where the settings stand; what it does not state itself it has from `engine` (`Settings.engine_for`).
    """

    def at(key: str) -> str:
        return f"{section if section == 'engine' or key in settings.model_fields_set else 'engine'}.{key}"

    backend = resolve_backend(settings)
    _check_read(settings, backend, section, at)
    if backend == "scripted":
        _check_script(settings)
        return backend
    if not settings.model:
        cure = "the name under which the server has it" if settings.base_urls else "`--model nano` is built in"
        raise EngineRefused(f"{at('model')}: no model given; use --model MODEL ({cure}), or set it in cai.yaml")
    if backend == "server":
        if not settings.base_urls:
            raise EngineRefused(f"{at('base_urls')}: no endpoint given; use --endpoint URL or set OPENAI_BASE_URL")
        return backend
    check_name(settings.model, at("model"))
    if backend == "vllm":
        _check_vllm(settings, at)
    elif settings.device != "auto":
        from pipeline.lm.load import pick_device

        pick_device(settings.device, at("device"))
    return backend


def _check_read(settings: EngineSettings, backend: str, section: str, at: At) -> None:
    """EngineRefused for a key that the section states in vain. The device of `engine` is also that of trainings."""
    if backend == "vllm" and settings.device != "auto":
        raise EngineRefused(f"{at('device')}: vllm takes the visible GPUs; choose with CUDA_VISIBLE_DEVICES instead")
    for key in _unread(settings, backend):
        if (key == "device") if section == "engine" else (key not in settings.model_fields_set):
            continue
        able = " or ".join(name for name, keys in READS.items() if key in keys)
        default = EngineSettings.model_fields[key].default
        shown = default if isinstance(default, str) else json.dumps(default)
        raise EngineRefused(
            f"{at(key)}: the {backend} backend does not read it; set {section}.backend to {able}, or {key} to {shown}"
        )


def _check_script(settings: EngineSettings) -> None:
    if settings.script:
        from pipeline.engines.scripted_answers import load_script

        load_script(settings.script)


def _check_vllm(settings: EngineSettings, at: At) -> None:
    if importlib.util.find_spec("vllm") is None:
        install = "pip install 'constitutional-pipeline[vllm]'"
        raise EngineRefused(f"{at('backend')}: vllm is not installed; {install}, or set it to transformers")
    if settings.adapter and not (Path(settings.adapter) / "adapter_config.json").exists():
        folder = settings.adapter
        raise EngineRefused(f"{at('adapter')}: {folder} holds no adapter_config.json; give a LoRA folder")
