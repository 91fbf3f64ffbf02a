"""Engines answer requests. `open_engine` makes the one that a section of the settings describes.

`check_engine` refuses what cannot work before anything is written or loaded.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from pipeline.config.settings import EngineSettings
from pipeline.engines.base import Engine
from pipeline.errors import EngineRefused
from pipeline.lm.folder import check_name

CONCURRENCY = 64
"""Of every backend but vllm, where `engine.concurrency` is not set."""


def open_engine(settings: EngineSettings, *, name: str | None = None) -> Engine:
    """Loads the model or reaches for the server. EngineRefused if that cannot work, with what to do.

    name: what records call a model that is loaded from a folder; the folder's name if not given.
    """
    backend = check_engine(settings)
    if backend == "scripted":
        from pipeline.engines.scripted import ScriptedEngine

        named = settings.model or "scripted"
        return ScriptedEngine(settings.script, concurrency=settings.concurrency or CONCURRENCY, name=named)
    if backend == "server":
        from pipeline.engines.server import ServerEngine

        return ServerEngine(
            str(settings.model),
            settings.base_urls,
            api_key_env=settings.api_key_env,
            revision=settings.revision or "",
            concurrency=settings.concurrency or CONCURRENCY,
            timeout_s=settings.timeout_s,
            context=settings.context,
        )
    if backend == "vllm":
        return _open_vllm(settings, name=name)
    from pipeline.engines.transformers import TransformersEngine

    return TransformersEngine(
        str(settings.model),
        revision=settings.revision,
        dtype=settings.dtype,
        device=settings.device,
        context=settings.context,
        concurrency=settings.concurrency or CONCURRENCY,
        deterministic=settings.deterministic,
        name=name,
    )


def check_engine(settings: EngineSettings) -> str:
    """What can be told without loading or asking anything. Returns the backend; raises EngineRefused."""
    backend = resolve_backend(settings)
    if backend != "vllm" and (settings.adapter or settings.quantization):
        key = "adapter" if settings.adapter else "quantization"
        raise EngineRefused(f"engine.{key}: the {backend} backend has none; set engine.backend: vllm, or leave it out")
    if backend == "scripted":
        return backend
    if not settings.model:
        cure = "the name under which the server has it" if settings.base_urls else "`--model nano` is built in"
        raise EngineRefused(f"engine.model: no model given; use --model MODEL ({cure}), or set it in cai.yaml")
    if backend != "server":
        check_name(settings.model)
    elif not settings.base_urls:
        raise EngineRefused("engine.base_urls: no endpoint given; use --endpoint URL or set OPENAI_BASE_URL")
    return backend


def _open_vllm(settings: EngineSettings, *, name: str | None) -> Engine:
    from pipeline.engines.vllm import VllmEngine

    if settings.deterministic:
        raise EngineRefused("engine.deterministic: vllm cannot promise it; use engine.backend: transformers")
    if settings.device != "auto":
        raise EngineRefused("engine.device: vllm takes the visible GPUs; choose with CUDA_VISIBLE_DEVICES instead")
    return VllmEngine(
        str(settings.model),
        revision=settings.revision,
        dtype=settings.dtype,
        context=settings.context,
        concurrency=settings.concurrency,
        name=name,
        adapter=settings.adapter,
        quantization=settings.quantization,
        tensor_parallel=settings.tensor_parallel,
        data_parallel=settings.data_parallel,
        gpu_memory_utilization=settings.gpu_memory_utilization,
    )


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
