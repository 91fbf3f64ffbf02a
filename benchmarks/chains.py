"""The pipeline's own run of the chains, on an engine that outlives it: draft, critique, revision, both orders."""

from __future__ import annotations

import asyncio
import shutil
from contextvars import ContextVar
from pathlib import Path
from typing import Any
from unittest.mock import patch

from measured import Timeline

from pipeline import chain as chains
from pipeline import jobs, voices
from pipeline.engines.base import Engine, Reply, Request
from pipeline.store import RunFolder

KIND: ContextVar[str] = ContextVar("kind", default="")
"""Of the request that is being asked, for whoever records what is sent."""


class Kept:
    """An engine that is opened once for many runs; the timeline notes its replies."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.timeline = Timeline()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    async def ask(self, request: Request, priority: int = 0) -> Reply:
        KIND.set(request.kind)
        reply = await self.engine.ask(request, priority)
        # A label request counts as one token, whatever a server had to sample for it.
        self.timeline.add(reply.usage.prompt_tokens, reply.usage.completion_tokens or 1, reply.usage.cached_tokens)
        return reply

    async def close(self) -> None:
        """The benchmark closes what it opened."""


async def run_chains(folder: Path, prompts: Path, engine: Kept, *, style: str, max_tokens: int) -> Timeline:
    """One whole run, from the prompts' file to the ranked lines, journal on. RuntimeError if a record was lost."""
    shutil.rmtree(folder, ignore_errors=True)
    RunFolder(folder, create=True)
    engine.timeline = Timeline()
    wanted = {
        "engine.model": "benchmark",
        "engine.style": style,
        "generate.samples": 1,
        "generate.max_tokens": max_tokens,
        "critique_revise.rounds": 1,
        "critique_revise.max_tokens": max_tokens,
        "critique_revise.temperature": 1.0,
        "critique_revise.verify": "false",
    }
    assignments = [f"{key}={value}" for key, value in wanted.items()]
    settings = jobs.resolve(folder, None, assignments, {"prompts": {"sources": [{"path": str(prompts)}]}})
    job, _ = jobs.open_job(folder, settings)
    jobs.ingest_prompts(job, None)
    with patch.object(voices, "open_engine", lambda settings, name=None: engine):
        chain = chains.prepare(job, chains.DATA_STAGES)
    await chains.run_chain(chain, max_time=None, watch=lambda chain: asyncio.sleep(0))
    engine.timeline.end()
    for stage in chains.DATA_STAGES:
        counts = job.run.manifest(stage).counts  # type: ignore[union-attr]
        if counts["ok"] != counts["in"] or counts["lost_samples"] or counts["lost_comparisons"]:
            raise RuntimeError(f"{folder}: {stage} lost something: {dict(counts)}")
    return engine.timeline
