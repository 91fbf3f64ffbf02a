"""A few prompts through the whole recipe for real, so that an estimate can go by what they took.

The stages' files are gone afterwards. The replies stay in the run's journal: the run does not ask for them again.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from constitution.principles import Constitution
from pipeline.chain import DATA_STAGES, Chain, prepare, run_chain
from pipeline.config.settings import Settings
from pipeline.engines.base import Reply, Request
from pipeline.engines.votes import NUM_VOTES
from pipeline.errors import UsageError
from pipeline.estimate import Call, Measured
from pipeline.jobs import Job, constitution_file, ingest_prompts
from pipeline.store import RunFolder, StageWriter


def calibrate(path: Path, settings: Settings, num: int) -> Measured:
    """Runs the first `num` prompts of the sources, or else of the run at `path`, whose lock the caller holds."""
    run = RunFolder(path, create=True)
    replies: dict[str, list[Reply]] = defaultdict(list)
    asked: list[float] = []
    began = 0.0

    def keep(request: Request, reply: Reply, is_new: bool) -> None:
        replies[request.kind].append(reply)
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
    calls = tuple(_call(kind, found, records) for kind, found in replies.items())
    return Measured(records, calls, (asked[-1] - began) / len(asked) if asked else None)


def _call(kind: str, replies: Sequence[Reply], records: int) -> Call:
    num = len(replies)
    return Call(
        kind,
        num / records,
        tokens_in=sum(reply.usage.prompt_tokens for reply in replies) / num,
        tokens_out=sum(reply.usage.completion_tokens for reply in replies) / num,
        requests=sum(NUM_VOTES if reply.method == "votes" else 1 for reply in replies) / num,
    )


def _bring_prompts(run: RunFolder, job: Job, num: int) -> None:
    if job.settings.prompts.sources:
        ingest_prompts(job, num)
        return
    parts = run.parts("prompts")
    if not parts:
        raise UsageError(f"{run.path}: no prompts; use --prompts FILE, or set prompts.sources in cai.yaml")
    lines = list(run.read_part("prompts", parts[0]))[:num]
    StageWriter(job.run, "prompts", "prompts").publish(0, lines, prompts=len(lines), num_in=len(lines))
