"""vLLM's step loop with its core in this process, behind what the pipeline asks of `AsyncLLM`."""

from __future__ import annotations

import asyncio
import os
import queue
import threading
from collections.abc import AsyncIterator
from typing import Any
from unittest.mock import patch


class SteppedLLM:
    """A thread steps while there are requests, and takes new ones between two steps."""

    output_handler = None

    def __init__(self, arguments: dict[str, Any]) -> None:
        from vllm.engine.arg_utils import EngineArgs
        from vllm.v1.engine.llm_engine import LLMEngine

        with patch.dict(os.environ, VLLM_ENABLE_V1_MULTIPROCESSING="0"):
            self._engine = LLMEngine.from_engine_args(EngineArgs(**arguments))
        self._inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._outboxes: dict[str, asyncio.Queue[Any]] = {}
        threading.Thread(target=self._work, daemon=True).start()

    async def add_request(self, number: str, prompt: Any, params: Any, lora_request: Any = None) -> asyncio.Queue[Any]:
        self._loop = asyncio.get_running_loop()
        outbox = self._outboxes[number] = asyncio.Queue()
        self._inbox.put((number, prompt, params, lora_request))
        return outbox

    async def generate(self, prompt: Any, params: Any, number: str) -> AsyncIterator[Any]:
        outbox, finished = await self.add_request(number, prompt, params), False
        while not finished:
            output = await outbox.get()
            finished = output.finished
            yield output

    async def reset_prefix_cache(self) -> None:
        """When nothing is asked."""
        self._engine.reset_prefix_cache()

    def shutdown(self, timeout: float | None = None) -> None:
        self._engine.engine_core.shutdown()

    def _work(self) -> None:
        while True:
            while not self._inbox.empty() or not self._engine.has_unfinished_requests():
                number, prompt, params, lora_request = self._inbox.get()
                self._engine.add_request(number, prompt, params, lora_request=lora_request)
            if outputs := self._engine.step():
                self._loop.call_soon_threadsafe(self._deliver, outputs)

    def _deliver(self, outputs: list[Any]) -> None:
        for output in outputs:
            self._outboxes[output.request_id].put_nowait(output)
            if output.finished:
                del self._outboxes[output.request_id]
