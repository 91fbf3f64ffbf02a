"""The arms through a server: one vLLM API server, the pipeline, a bare replay of its requests, and the peers."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import aiohttp
from chains import Kept, run_chains
from measured import Measured, Timeline

from pipeline.config.settings import EngineSettings
from pipeline.engines import open_engine

NAME = "wordy"
PEERS = Path(__file__).parent / "peers"
COUNTERS = ("generation_tokens", "prefix_cache_queries", "prefix_cache_hits")


class Sent(NamedTuple):
    """A request as it went to the server."""

    path: str
    body: dict[str, Any]


class Server:
    """A running API server. counters: of tokens, since it was started."""

    def __init__(self, port: int) -> None:
        self.root = f"http://127.0.0.1:{port}"
        self.url = self.root + "/v1"

    def is_up(self) -> bool:
        try:
            with urllib.request.urlopen(self.root + "/health", timeout=1):
                return True
        except OSError:
            return False

    def forget(self) -> None:
        """Empties the prefix cache."""
        urllib.request.urlopen(urllib.request.Request(self.root + "/reset_prefix_cache", method="POST")).close()

    def counters(self) -> dict[str, int]:
        with urllib.request.urlopen(self.root + "/metrics") as answer:
            text = answer.read().decode()
        found = {name: re.search(rf"^vllm:{name}_total{{.*}} (\S+)$", text, re.M) for name in COUNTERS}
        return {name: round(float(match[1])) if match else 0 for name, match in found.items()}


@contextmanager
def serve(model: Path, settings: dict[str, Any], port: int, log: Path) -> Iterator[Server]:
    """A vLLM server for as long as the block runs. settings: vLLM's engine arguments."""
    options = [option for name, value in settings.items() for option in _option(name, value)]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--port", str(port)]
    command += ["--host", "127.0.0.1", "--served-model-name", NAME, "--disable-uvicorn-access-log", *options]
    environment = {**os.environ, "VLLM_SERVER_DEV_MODE": "1"}
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
    try:
        server = Server(port)
        while not server.is_up():
            if process.poll() is not None:
                raise RuntimeError(f"{log}: the server ended with {process.returncode}")
            time.sleep(0.5)
        yield server
    finally:
        process.terminate()
        process.wait()


def _option(name: str, value: Any) -> list[str]:
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{flag}" if value else f"--no-{flag}"]
    return [f"--{flag}", str(value)]


async def run_pipeline(
    server: Server, folder: Path, prompts: Path, *, style: str, max_tokens: int, concurrency: int
) -> tuple[Timeline, list[Sent]]:
    """The pipeline through the server, and what it sent in that order."""
    import openai

    sent: list[Sent] = []
    post = openai.AsyncOpenAI.post

    def noting(client: Any, path: str, *, body: Any = None, **rest: Any) -> Any:
        sent.append(Sent(path, dict(body)))
        return post(client, path, body=body, **rest)

    settings = EngineSettings(
        backend="server", model=NAME, base_urls=(server.url,), api_key_env="", concurrency=concurrency, timeout_s=3600
    )
    engine = open_engine(settings)
    try:
        with patch.object(openai.AsyncOpenAI, "post", noting):
            timeline = await run_chains(folder, prompts, Kept(engine), style=style, max_tokens=max_tokens)
    finally:
        await engine.close()
    return timeline, [request for request in sent if request.path.endswith("completions")]


async def replay(server: Server, requests: list[Sent]) -> Timeline:
    """All requests at once, by nothing but an HTTP client."""
    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:
        timeline = Timeline()

        async def one(request: Sent) -> None:
            async with session.post(server.url + request.path, json=request.body) as answer:
                answer.raise_for_status()
                usage = (await answer.json())["usage"]
            timeline.add(usage["prompt_tokens"], usage["completion_tokens"], 0)

        await asyncio.gather(*(one(request) for request in requests))
        timeline.end()
    return timeline


def run_peer(
    name: str, python: str, server: Server, prompts: Path, *, style: str, max_tokens: int, options: list[str]
) -> dict[str, float]:
    """What a peer's script reports. RuntimeError if a row of it is no answer."""
    command = [python, str(PEERS / f"{name}.py"), "--base-url", server.url, "--model", NAME, "--prompts", str(prompts)]
    command += ["--style", style, "--max-tokens", str(max_tokens), *options]
    environment = {**os.environ, "PYTHONPATH": str(PEERS.parents[1]), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    if found["answers"] != found["rows"]:
        raise RuntimeError(f"{name}: only {found['answers']} of {found['rows']} rows are answers")
    return found


def add_counters(run: Measured, before: dict[str, int], after: dict[str, int]) -> Measured:
    """The run with the server's own count of tokens. RuntimeError if it made others than the arm was to ask for."""
    made = {name: after[name] - before[name] for name in COUNTERS}
    if made["generation_tokens"] != run.output_tokens:
        raise RuntimeError(f"{run.arm}: {run.output_tokens} tokens wanted, {made['generation_tokens']} made")
    return run._replace(prompt_tokens=made["prefix_cache_queries"], cached_tokens=made["prefix_cache_hits"])
