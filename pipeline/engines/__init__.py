"""Engines answer requests. `open_engine` makes the one that a section of the settings describes."""

from __future__ import annotations

from pathlib import Path

from pipeline.config.settings import EngineSettings
from pipeline.engines.base import Engine
from pipeline.errors import EngineRefused


def open_engine(settings: EngineSettings, *, name: str | None = None) -> Engine:
    """Loads the model or reaches for the server. EngineRefused if that cannot work, with what to do.

    name: what records call a model that is loaded from a folder; the folder's name if not given.
    """
    backend = resolve_backend(settings)
    if backend == "scripted":
        from pipeline.engines.scripted import ScriptedEngine

        named = settings.model or "scripted"
        return ScriptedEngine(settings.script, concurrency=settings.concurrency, name=named)
    if not settings.model:
        raise EngineRefused(
            "engine.model: no model given; use --model MODEL (`--model nano` is built in), or set it in cai.yaml"
        )
    if backend == "server":
        from pipeline.engines.server import ServerEngine

        if not settings.base_urls:
            raise EngineRefused("engine.base_urls: no endpoint given; use --endpoint URL or set OPENAI_BASE_URL")
        return ServerEngine(
            settings.model,
            settings.base_urls,
            api_key_env=settings.api_key_env,
            revision=settings.revision or "",
            concurrency=settings.concurrency,
            timeout_s=settings.timeout_s,
            context=settings.context,
        )
    if backend == "vllm":
        raise EngineRefused("engine.backend: vllm in process is not there yet; serve it and use --endpoint URL")
    from pipeline.engines.transformers import TransformersEngine

    return TransformersEngine(
        settings.model,
        revision=settings.revision,
        dtype=settings.dtype,
        device=settings.device,
        context=settings.context,
        concurrency=settings.concurrency,
        deterministic=settings.deterministic,
        name=name,
    )


def resolve_backend(settings: EngineSettings) -> str:
    """What `auto` stands for: a folder is loaded, a name is asked for at the endpoint if there is one, else loaded."""
    if settings.backend != "auto":
        return settings.backend
    if settings.script and not settings.model:
        return "scripted"
    is_folder = bool(settings.model) and Path(str(settings.model)).is_dir()
    return "server" if settings.base_urls and not is_folder else "transformers"
