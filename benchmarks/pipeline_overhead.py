"""What the pipeline itself costs: driver, journal and store around an engine that answers after 5 ms in 256 slots.

    python benchmarks/pipeline_overhead.py [--records N] [--replies N] [--keep DIR]

Every record asks `--replies` times in turn, with prompts of 1 KB and replies of 192 characters; no tokenizer and
no model. Prints the process's CPU time per request, the memory at every tenth of the way, and how long a second start
of the finished run and of a run killed near its end takes.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import platform
import resource
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from pipeline.driver import Ask, Driver, Stage
from pipeline.engines.base import Reply, Request, Usage
from pipeline.journal import Journal
from pipeline.records import Outcome, Record
from pipeline.sources import Spec
from pipeline.stages.ingest import ingest
from pipeline.store import RunFolder, StageWriter

SLOTS = 256
LATENCY_S = 0.005


class TimedEngine:
    """Answers after LATENCY_S; as many at a time as the driver sends."""

    name = "timed"
    context = None
    fingerprint = {"backend": "timed"}  # noqa: RUF012 - an instance's constant
    concurrency = running = SLOTS

    async def ask(self, request: Request, priority: int = 0) -> Reply:
        await asyncio.sleep(LATENCY_S)
        text = hashlib.sha256(str(request.seed).encode()).hexdigest() * 3
        return Reply(text, "stop", usage=Usage(256, 50))

    async def close(self) -> None:
        pass


def prompts(path: Path, num: int) -> None:
    with path.open("w") as file:
        for number in range(num):
            file.write(json.dumps({"prompt": f"{number:08d} " + "lorem ipsum " * 84}) + "\n")


def stage(run: RunFolder, engine: TimedEngine, num_replies: int) -> Stage:
    async def chain(record: Record, ask: Ask) -> Outcome:
        texts = []
        for turn in range(num_replies):
            seed = int(record.id[:12], 16) + turn
            reply = await ask(engine, Request(record.messages, "draft", max_tokens=64, temperature=1.0, seed=seed))
            texts.append(reply.text)
        return Outcome({"id": record.id, "texts": texts})

    return Stage("generate", chain, StageWriter(run, "generate", "timed"))


def memory_mb() -> float:
    """Resident memory now, in MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


async def drive(run: RunFolder, num_replies: int, memory: list[tuple[int, float]]) -> tuple[float, float, int]:
    """Runs to the end. Returns CPU seconds, wall seconds and the number of new replies."""
    engine, journal = TimedEngine(), Journal(run.path / "journal")
    driver = Driver(run, [stage(run, engine, num_replies)], journal, window=SLOTS)
    cpu, wall = time.process_time(), time.perf_counter()

    async def watch() -> None:
        mark = 0
        while True:
            if driver.progress.done * 10 >= mark * driver.progress.total:
                memory.append((driver.progress.done, memory_mb()))
                mark += 1
            await asyncio.sleep(0.2)

    watcher = asyncio.create_task(watch())
    await driver.run()
    watcher.cancel()
    return time.process_time() - cpu, time.perf_counter() - wall, journal.asked


def lines(run: Path, num_records: int, num_replies: int) -> Iterator[str]:
    source = run.parent / "prompts.jsonl"
    prompts(source, num_records)
    began = time.perf_counter()
    ingest(RunFolder(run, create=True), [Spec(str(source))], shard_size=1000)
    yield f"ingest of {num_records:,} prompts: {time.perf_counter() - began:.1f} s, {memory_mb():.0f} MB"
    memory: list[tuple[int, float]] = []
    cpu, wall, asked = asyncio.run(drive(RunFolder(run), num_replies, memory))
    yield f"{asked:,} requests in {wall:.1f} s: {asked / wall:,.0f}/s, CPU per request {cpu / asked * 1e6:.0f} us"
    yield "memory: " + ", ".join(f"{done:,}: {size:.0f} MB" for done, size in memory)
    _, wall, asked = asyncio.run(drive(RunFolder(run), num_replies, []))
    yield f"second start, everything published: {wall:.2f} s, {asked} requests"
    forget_last_parts(RunFolder(run), 4)
    _, wall, asked = asyncio.run(drive(RunFolder(run), num_replies, []))
    yield f"second start, 4 shards unpublished: {wall:.2f} s, {asked} requests"


def forget_last_parts(run: RunFolder, num: int) -> None:
    """The state after a kill: the journal has the replies, the last parts are not published."""
    writer = StageWriter(run, "generate", "timed")
    del writer.parts[-num:]
    writer.write_manifest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", type=int, default=20_000)
    parser.add_argument("--replies", type=int, default=10)
    parser.add_argument("--keep", type=Path, help="a folder for the run; a temporary one if not given")
    options = parser.parse_args()
    folder = options.keep or Path(tempfile.mkdtemp(prefix="cai-overhead-"))
    folder.mkdir(exist_ok=True)
    print(f"python {platform.python_version()}, {platform.machine()}, {SLOTS} slots of {LATENCY_S * 1e3:.0f} ms")
    try:
        for line in lines(folder / "run", options.records, options.replies):
            print(line, flush=True)
    finally:
        if not options.keep:
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
