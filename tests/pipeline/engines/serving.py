"""A server engine on a scripted server in this process, for tests."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from pipeline.engines.base import Reply, Request
from pipeline.engines.scripted_answers import Fault, Rule, Script
from pipeline.engines.scripted_server import running
from pipeline.engines.server import ServerEngine


def chat(text: str, **options: Any) -> Request:
    options = {"max_tokens": 96, "temperature": 1.0, "seed": 7, **options}
    return Request([{"role": "user", "content": text}], "draft", **options)


def faulty(last: str, **fault: Any) -> Script:
    return Script(rules=(Rule(last=last, faults=(Fault(**fault),)),))


def play(
    script: Script,
    act: Callable[[ServerEngine], Awaitable[Any]],
    *,
    ledger: Path | None = None,
    model: str = "scripted",
    **options: Any,
) -> Any:
    """Runs `act` with an engine on a scripted server."""

    async def with_both() -> Any:
        async with running(script, ledger=ledger) as url:
            engine = ServerEngine(model, [url], **options)
            try:
                return await act(engine)
            finally:
                await engine.close()

    return asyncio.run(with_both())


def ask(script: Script, *requests: Request, **options: Any) -> list[Reply | BaseException]:
    async def all_of_them(engine: ServerEngine) -> list[Reply | BaseException]:
        return await asyncio.gather(*(engine.ask(request) for request in requests), return_exceptions=True)

    outcomes: list[Reply | BaseException] = play(script, all_of_them, **options)
    return outcomes


def received(ledger: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in ledger.read_text().splitlines()]
    return [line for line in lines if line["event"] == "received"]
