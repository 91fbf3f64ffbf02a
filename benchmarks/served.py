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


class Bench:
    """The arms on one server. folder: of the pipeline's run; concurrency: its requests in flight."""

    def __init__(
        self,
        server: Server,
        prompts: Path,
        *,
        folder: Path,
        max_tokens: int,
        concurrency: int,
        distilabel_python: str | None,
    ) -> None:
        self._server = server
        self._prompts = prompts
        self._folder = folder
        self._max_tokens = max_tokens
        self._concurrency = concurrency
        self._pythons = {"gather-all": sys.executable, "distilabel": distilabel_python}
        self._sent: list[Sent] = []
        """By the last run of the pipeline."""

    async def measure(self, arm: str, style: str, round_: int) -> Measured:
        """One run from an empty cache, with the server's own counts of tokens.

        arm: pipeline, replay (of what that sent), or a peer's name and number. RuntimeError if the server made another
        number of tokens than was to be asked for.
        """
        self._server.forget()
        before = self._server.counters()
        if arm == "pipeline":
            run = (await self._pipeline(style)).measured("server", style, round_, arm)
        elif arm == "replay":
            run = (await self._replay()).measured("server", style, round_, arm)
        else:
            run = await asyncio.to_thread(self._peer, arm, style, round_)
        after = self._server.counters()
        made = {name: after[name] - before[name] for name in COUNTERS}
        if made["generation_tokens"] != run.output_tokens:
            raise RuntimeError(f"{arm}: {run.output_tokens} tokens wanted, {made['generation_tokens']} made")
        return run._replace(prompt_tokens=made["prefix_cache_queries"], cached_tokens=made["prefix_cache_hits"])

    async def _pipeline(self, style: str) -> Timeline:
        import openai

        post, self._sent = openai.AsyncOpenAI.post, []
        tokenize = self._server.root + "/tokenize"

        def noting(client: Any, path: str, *, body: Any = None, **rest: Any) -> Any:
            if path != tokenize:
                self._sent.append(Sent(path, dict(body)))
            return post(client, path, body=body, **rest)

        url, limit = self._server.url, self._concurrency
        settings = EngineSettings(
            backend="server", model=NAME, base_urls=(url,), api_key_env="", concurrency=limit, timeout_s=3600
        )
        engine = open_engine(settings)
        try:
            with patch.object(openai.AsyncOpenAI, "post", noting):
                return await run_chains(
                    self._folder, self._prompts, Kept(engine), style=style, max_tokens=self._max_tokens
                )
        finally:
            await engine.close()

    async def _replay(self) -> Timeline:
        """All requests at once, by nothing but an HTTP client."""
        timeout = aiohttp.ClientTimeout(total=None)
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:
            timeline = Timeline()

            async def one(request: Sent) -> None:
                async with session.post(self._server.url + request.path, json=request.body) as answer:
                    answer.raise_for_status()
                    usage = (await answer.json())["usage"]
                timeline.add(usage["prompt_tokens"], usage["completion_tokens"], 0)

            await asyncio.gather(*(one(request) for request in self._sent))
            timeline.end()
        return timeline

    def _peer(self, arm: str, style: str, round_: int) -> Measured:
        """RuntimeError if a row is no answer."""
        name, number = arm.split()
        script = PEERS / ("gather_all.py" if name == "gather-all" else "distilabel_chain.py")
        option = "--limit" if name == "gather-all" else "--batch-size"
        command = [
            str(self._pythons[name]),
            "-W",
            "ignore",
            str(script),
            "--base-url",
            self._server.url,
            "--model",
            NAME,
        ]
        command += ["--prompts", str(self._prompts), "--style", style, "--max-tokens", str(self._max_tokens)]
        environment = {**os.environ, "PYTHONPATH": str(PEERS.parents[1]), "HF_HUB_OFFLINE": "1"}
        done = subprocess.run([*command, option, number], env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{arm}: {done.stderr[-2000:]}")
        found = json.loads(done.stdout.splitlines()[-1])
        if found["answers"] != found["rows"]:
            raise RuntimeError(f"{arm}: only {found['answers']} of {found['rows']} rows are answers")
        tokens, seconds = found["rows"] * (3 * self._max_tokens + 2), found["seconds"]
        return Measured("server", style, round_, arm, 5 * found["rows"], tokens, seconds, tokens / seconds, 0.0, 0, 0)
