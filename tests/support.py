"""What tests of whole runs share: the installed `cai` command, the scripted server with its ledger, a run's files."""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pipeline import chain as chains
from pipeline import jobs
from pipeline.config.settings import Settings
from pipeline.engines.base import Reply, Request, Usage
from pipeline.journal import Journal
from pipeline.records import Outcome, Record
from pipeline.stages.export import export_run
from pipeline.store import RunFolder

CAI = Path(sys.executable).with_name("cai")
FAULTS = Path(__file__).parent / "faults"
PUBLISHED = ("prompts", "generate", "critique-revise", "rank", "phase2", "failed", "filtered", "datasets")


def environment(**changes: str) -> dict[str, str]:
    """This process's environment without what would reach into the settings."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("CAI_", "OPENAI_"))}
    return {**kept, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **changes}


class Command:
    """The installed command, in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def start(self, *args: str | Path, fault: str = "", log: Path | None = None, **options: Any) -> subprocess.Popen:
        """Starts it as the leader of its own process group. fault: see tests/faults/sitecustomize.py."""
        path = os.pathsep.join(filter(None, (str(FAULTS), os.environ.get("PYTHONPATH"))))
        changes = {"PYTHONPATH": path, "FAULT": fault, "FAULT_LOG": str(log)} if fault else {}
        return subprocess.Popen(
            [CAI, *map(str, args)],
            cwd=self.folder,
            env=environment(**changes),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            **options,
        )

    def __call__(
        self, *args: str | Path, fault: str = "", timeout: float = 60, **options: Any
    ) -> subprocess.CompletedProcess[str]:
        """Runs it to its end; a process that hangs is killed after `timeout` seconds."""
        process = self.start(*args, fault=fault, **options)
        try:
            out, err = process.communicate(timeout=timeout)
        finally:
            kill_group(process)
        return subprocess.CompletedProcess(args, process.returncode, out, err)


def kill_group(process: subprocess.Popen, number: int = signal.SIGKILL) -> None:
    if process.poll() is None:
        os.killpg(process.pid, number)
        if number == signal.SIGKILL:
            process.wait()


class Server:
    """`python -m pipeline.engines.scripted` with a ledger; what it received is what was really asked.

    url: an address of before, for one that returns; its ledger goes on.
    """

    def __init__(self, folder: Path, script: str = "", *, url: str = "") -> None:
        self.ledger = folder / "ledger.jsonl"
        options = ["--ledger", str(self.ledger)]
        if script:
            (folder / "script.yaml").write_text(script)
            options += ["--script", str(folder / "script.yaml")]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "pipeline.engines.scripted", "--port", str(urlsplit(url).port or 0), *options],
            env=environment(),
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout
        ready = self.process.stdout.readline().split()
        assert ready[:1] == ["ready"], ready
        self.url = ready[1]

    def options(self, *more: str) -> list[str]:
        """What `cai` needs to ask this server."""
        return ["--endpoint", self.url, "--model", "scripted", *more]

    def received(self, since: int = 0) -> list[dict[str, Any]]:
        """The requests that came, the first `since` left out: n, key, try, path, body."""
        lines = [json.loads(line) for line in self.ledger.read_text().splitlines() if line.endswith("}")]
        return [line for line in lines if line["event"] == "received"][since:]

    def num_received(self) -> int:
        return self.ledger.read_bytes().count(b'"event":"received"') if self.ledger.exists() else 0

    def repeated(self) -> int:
        """How many requests had been received before, word for word."""
        return sum(count - 1 for count in Counter(line["key"] for line in self.received()).values())

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(10)


def published(run: Path, folders: tuple[str, ...] = PUBLISHED) -> dict[str, str]:
    """File -> sha256 of all that a run has published."""
    files = [path for folder in folders for path in (run / folder).rglob("*") if path.is_file()]
    return {str(path.relative_to(run)): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(files)}


def wait_for(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


def write_prompts(path: Path, num: int, first: int = 0) -> Path:
    """Writes `num` different prompts, from number `first` on, as JSON lines."""
    lines = [{"prompt": f"Question {n}: what is to be done about case {7 * n}?"} for n in range(first, first + num)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def play(
    run: Path,
    tree: dict[str, Any],
    names: tuple[str, ...] = chains.DATA_STAGES,
    *,
    limit: int | None = None,
    export: bool = True,
    phase: int = 1,
) -> chains.Chain:
    """What `cai run` does with stages, in this process. tree: settings by section; the engine is the scripted one."""
    settings = Settings.model_validate({**tree, "engine": {"backend": "scripted", **tree.get("engine", {})}})
    RunFolder(run, create=True)
    job, _ = jobs.open_job(run, settings)
    if settings.prompts.sources:
        jobs.ingest_prompts(job, limit)
    chain = chains.prepare(job.of_phase(phase), names, limit=limit)
    asyncio.run(chains.run_chain(chain, max_time=None, watch=_silent))
    if export:
        pairs_from = settings.recipe.pairs
        export_run(job.run, settings.export, tie_band=settings.rank.tie_band, pairs_from=pairs_from)
    return chain


async def _silent(chain: chains.Chain) -> None:
    await asyncio.Event().wait()


def lines(run: Path, stage: str) -> list[dict[str, Any]]:
    """All published lines of a stage."""
    return list(RunFolder(run).read(stage))


class Told:
    """An engine that answers with what a function says of a request: a text, or a whole reply. Keeps the requests."""

    context = None
    neutralised = 0

    def __init__(self, say: Callable[[Request], str | Reply], *, name: str = "told", concurrency: int = 8) -> None:
        self.say = say
        self.name = name
        self.concurrency = self.running = concurrency
        self.fingerprint = {"backend": "told", "model": name}
        self.requests: list[Request] = []
        self.priorities: list[int] = []

    async def ask(self, request: Request, priority: int = 0) -> Reply:
        self.requests.append(request)
        self.priorities.append(priority)
        await asyncio.sleep(0)
        said = self.say(request)
        return said if isinstance(said, Reply) else Reply(said, "stop", usage=Usage(0, len(said.split())))

    async def close(self) -> None:
        """Nothing is held."""

    def kinds(self) -> Counter[str]:
        return Counter(request.kind for request in self.requests)


def label_reply(probabilities: dict[str, float], method: str = "logprobs") -> Reply:
    """A reply to a label request."""
    return Reply("", "labels", (), {label: math.log(p) for label, p in probabilities.items() if p > 0}, method)


def a_or_b(p_first: float, mass: float = 1.0) -> Reply:
    """What a judge says who finds the answer shown first better with `p_first`."""
    return label_reply({"A": mass * p_first, "B": mass * (1 - p_first)})


_SHOWN = re.compile(r"(?s) answer A\n(.*?)\n~:~ \w+ answer B\n(.*?)\n~:~ ")


def shown(request: Request) -> tuple[str, str]:
    """The two answers in a comparison request, in the order shown."""
    found = _SHOWN.search(request.prompt if isinstance(request.prompt, str) else request.prompt[0]["content"])
    assert found, request
    return found[1], found[2]


def run_stage(folder: Path, stage: Callable[..., Awaitable[Outcome]], record: Record, **options: Any) -> Outcome:
    """One record through one stage, over a journal in `folder`."""

    async def whole() -> Outcome:
        journal = Journal(folder)
        await journal.start()
        segment = journal.open(0)
        try:
            return await stage(record, lambda engine, request: journal.ask(engine, request, segment, 0), **options)
        finally:
            await journal.release(segment)
            await journal.close()

    return asyncio.run(whole())
