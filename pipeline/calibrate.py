"""A few prompts through the whole recipe for real, so that an estimate can go by what they took.

The stages' files are gone afterwards. The replies stay in the run's journal: the run does not ask for them again.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections import defaultdict
from pathlib import Path

from constitution.principles import Constitution
from pipeline.chain import DATA_STAGES, Chain, prepare, run_chain
from pipeline.config.settings import Settings
from pipeline.engines.base import Reply, Request, Usage
from pipeline.errors import UsageError
from pipeline.estimate import Call, Measured
from pipeline.jobs import Job, constitution_file, ingest_prompts
from pipeline.store import RunFolder, StageWriter


def calibrate(path: Path, settings: Settings, num: int) -> Measured:
    """Runs the first `num` prompts of the sources, or else of the run at `path`, whose lock the caller holds."""
    run = RunFolder(path, create=True)
    usages: dict[str, list[Usage]] = defaultdict(list)
    asked: list[float] = []
    began = 0.0

    def keep(request: Request, reply: Reply, is_new: bool) -> None:
        usages[request.kind].append(reply.usage)
        if is_new:
            asked.append(time.monotonic())

    async def note_begin(chain: Chain) -> None:
        nonlocal began
        began = time.monotonic()

    with tempfile.TemporaryDirectory(prefix="cai-calibrate-") as folder:
        job = Job(
            RunFolder(Path(folder) / "run", create=True), settings, Constitution.load(constitution_file(settings))
        )
        _bring_prompts(run, job, num)
        chain = prepare(job, DATA_STAGES, journal_folder=run.path / "journal", on_reply=keep)
        asyncio.run(run_chain(chain, max_time=settings.run.max_time, watch=note_begin))
        records = chain.driver.progress.total
    calls = (
        Call(
            kind,
            len(found) / records,
            sum(usage.prompt_tokens for usage in found) / len(found),
            sum(usage.completion_tokens for usage in found) / len(found),
        )
        for kind, found in usages.items()
    )
    return Measured(records, tuple(calls), (asked[-1] - began) / len(asked) if asked else None)


def _bring_prompts(run: RunFolder, job: Job, num: int) -> None:
    if job.settings.prompts.sources:
        ingest_prompts(job, num)
        return
    parts = run.parts("prompts")
    if not parts:
        raise UsageError(f"{run.path}: no prompts; use --prompts FILE, or set prompts.sources in cai.yaml")
    lines = list(run.read_part("prompts", parts[0]))[:num]
    StageWriter(job.run, "prompts", "prompts").publish(0, lines, prompts=len(lines), num_in=len(lines))
