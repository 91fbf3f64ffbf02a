"""What each backend reads of an engine's settings, and what is refused before anything is written or loaded."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Mapping
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
    "server": {"revision", "context", "concurrency"},
    "scripted": {"concurrency", "script"},
}
"""Backend -> the keys that it reads, besides _ALWAYS."""
_ALWAYS = {"backend", "model", "style", "price_in", "price_out", "base_urls", "api_key_env", "timeout_s"}
"""Refused nowhere: an environment names an endpoint for all programs, also for those that load a model."""
_OF_TRAININGS = {"device", "gpu_memory_utilization"}
"""Keys of `engine` that trainings read too."""


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
    """The settings without what their backend does not read: a section may have that from `engine`."""
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
    _check_read(settings, backend, section)
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


def _check_read(settings: EngineSettings, backend: str, section: str) -> None:
    """EngineRefused for a key that the section states in vain."""
    for key in _unread(settings, backend):
        if section == "engine":
            is_right = key in _OF_TRAININGS and (backend, key) != ("vllm", "device")
        else:
            is_right = key not in settings.model_fields_set
        if is_right:
            continue
        able = " or ".join(name for name, keys in READS.items() if key in keys)
        default = EngineSettings.model_fields[key].default
        shown = default if isinstance(default, str) else json.dumps(default)
        raise EngineRefused(
            f"{section}.{key}: the {backend} backend does not read it; set {section}.backend to {able}, or {key} to "
            f"{shown}"
        )


def _check_script(settings: EngineSettings) -> None:
    if settings.script:
        from pipeline.engines.scripted_answers import load_script

        load_script(settings.script)


def _check_vllm(settings: EngineSettings, at: At) -> None:
    import torch

    from pipeline.engines.vllm_model import require_vllm

    require_vllm(at("backend"), instead="transformers")
    if settings.adapter and not (Path(settings.adapter) / "adapter_config.json").exists():
        folder = settings.adapter
        raise EngineRefused(f"{at('adapter')}: {folder} holds no adapter_config.json; give a LoRA folder")
    gpus, of_one = torch.cuda.device_count(), settings.tensor_parallel
    copies = 1 if settings.data_parallel == "auto" else settings.data_parallel
    if gpus and gpus < of_one:
        raise EngineRefused(f"{at('tensor_parallel')}: {of_one}, but {gpus} GPUs are visible; lower it")
    if gpus and gpus < of_one * copies:
        asked = f"{copies} copies of {of_one} GPUs each"
        raise EngineRefused(f"{at('data_parallel')}: {asked}, but {gpus} GPUs are visible; lower it, or set it to auto")


def check_gpu(engines: Mapping[str, EngineSettings]) -> None:
    """EngineRefused if the different models that vLLM is to load for these sections do not fit on one GPU together.

    All of them begin with the first one that is visible.
    """
    models: dict[str, tuple[str, float]] = {}
    for section, settings in engines.items():
        if resolve_backend(settings) == "vllm":
            loaded = settings.model_dump_json(include=READS["vllm"] - {"adapter"} | {"model"})
            models.setdefault(loaded, (section, settings.gpu_memory_utilization))
    sections, shares = [section for section, _ in models.values()], [share for _, share in models.values()]
    if sum(shares) <= 1 + 1e-9:
        return
    import torch

    if torch.cuda.is_available():
        taken = ", ".join(f"{section} {share:g}" for section, share in models.values())
        raise EngineRefused(
            f"{sections[-1]}.gpu_memory_utilization: vllm loads {len(shares)} models, and their shares of the GPU "
            f"({taken}) add up to {sum(shares):g}; lower them, such as engine.gpu_memory_utilization to "
            f"{int(95 / len(shares)) / 100:g}"
        )
