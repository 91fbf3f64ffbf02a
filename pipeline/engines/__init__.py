"""Engines answer requests. `open_engine` makes the one that a section of the settings describes."""

from __future__ import annotations

from pipeline.config.settings import EngineSettings
from pipeline.engines.backends import check_engine
from pipeline.engines.base import Engine

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


def _open_vllm(settings: EngineSettings, *, name: str | None) -> Engine:
    from pipeline.engines.vllm import VllmEngine

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
