"""The embedded model three times: in vLLM here, in vLLM behind a server, and in transformers, which they must equal."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Coroutine, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pytest

from pipeline import nano
from pipeline.engines.base import Engine, Reply, Request
from pipeline.engines.server import ServerEngine
from pipeline.engines.transformers import TransformersEngine
from pipeline.engines.vllm import VllmEngine
from tests.support import environment, kill_group, wait_for

# Two engines at a time on few cores: vLLM would tie the threads of both to the same one.
os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
T = TypeVar("T")


class Asked:
    """An engine in the event loop of the session."""

    def __init__(self, runner: asyncio.Runner, engine: Engine) -> None:
        self._runner = runner
        self.engine = engine

    def __call__(self, *requests: Request) -> list[Reply]:
        """Replies to requests that are in flight together."""
        return self.run(self._all(requests))

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self._runner.run(asyncio.wait_for(work, 120))

    async def _all(self, requests: Sequence[Request]) -> list[Reply]:
        return await asyncio.gather(*(self.engine.ask(request, n) for n, request in enumerate(requests)))


@pytest.fixture(scope="session")
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="session")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """Of a vLLM server; it comes up while others use the model in this process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = {"served-model-name": "nano", "dtype": "float32", "generation-config": "vllm", "max-num-seqs": "32"}
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(nano.path())]
    command += ["--host=127.0.0.1", f"--port={port}", "--enforce-eager", *(f"--{k}={v}" for k, v in options.items())]
    process = subprocess.Popen(
        command,
        env=environment(VLLM_NO_USAGE_STATS="1"),
        stdout=(tmp_path_factory.mktemp("server") / "log").open("w"),
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    yield port
    kill_group(process)


@pytest.fixture(scope="session")
def local(runner: asyncio.Runner, port: int) -> Iterator[Asked]:
    engine = VllmEngine(str(nano.path()), concurrency=32)
    runner.run(engine.start())
    yield Asked(runner, engine)
    runner.run(engine.close())


@pytest.fixture(scope="session")
def served(runner: asyncio.Runner, port: int) -> Iterator[Asked]:
    wait_for(lambda: _answers(port), seconds=300)
    engine = ServerEngine("nano", [f"http://127.0.0.1:{port}/v1"], concurrency=32)
    runner.run(engine.start())
    yield Asked(runner, engine)
    runner.run(engine.close())


@pytest.fixture(scope="session")
def reference(runner: asyncio.Runner) -> Iterator[Asked]:
    engine = TransformersEngine(str(nano.path()), dtype="float32", device="cpu")
    yield Asked(runner, engine)
    runner.run(engine.close())


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """Six prompts of the embedded model's world."""
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(nano.example_prompts().read_text().splitlines(keepends=True)[:6]))
    return path


def _answers(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
            return True
    except (urllib.error.URLError, OSError):
        return False


def descendants(pid: int) -> Iterator[int]:
    """Processes below this one."""
    for child in [other for other in alive() if parent(other) == pid]:
        yield child
        yield from descendants(child)


def alive() -> list[int]:
    return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit() and parent(int(path.name))]


def parent(pid: int) -> int:
    """0 for a process that is gone, or dead and not yet buried."""
    try:
        state, ppid = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:2]
    except OSError:
        return 0
    return 0 if state == "Z" else int(ppid)
