"""The arms in one process: the pipeline on vLLM, a bare replay of its requests at once, and staged `LLM.generate`."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

from chains import Kept, run_chains
from measured import Timeline
from stepped import SteppedLLM

from pipeline.engines import vllm_model
from pipeline.engines.vllm import VllmEngine

STAGES = ("draft", "critique", "revision", "comparison")


class Sent(NamedTuple):
    """A request as it went to vLLM. kind: of the pipeline's request."""

    kind: str
    token_ids: list[int]
    params: Any


class Bench:
    """The pipeline's engine with these arguments of vLLM in place of its own, and one `LLM` with the same.

    is_stepped: vLLM's step loop in this process takes the place of its asynchronous engine.
    """

    def __init__(self, model: Path, settings: dict[str, Any], *, is_stepped: bool = False) -> None:
        self._model = str(model)
        self._settings = settings
        self._launch = SteppedLLM if is_stepped else vllm_model._launch
        self._numbers = itertools.count()
        self.engine = VllmEngine(
            self._model,
            dtype=settings["dtype"],
            context=settings["max_model_len"],
            concurrency=settings["max_num_seqs"],
        )

    async def start(self) -> None:
        with patch.object(vllm_model, "_launch", lambda arguments: self._launch({**arguments, **self._settings})):
            await self.engine.start()
        from vllm import LLM

        self._llm = LLM(self._model, disable_log_stats=True, **self._settings)

    async def close(self) -> None:
        self._llm.llm_engine.engine_core.shutdown()
        await self.engine.close()

    @property
    def _bare(self) -> Any:
        """The `AsyncLLM` that the pipeline's engine asks, or what stands for it."""
        return self.engine._model.llm

    async def pipeline(self, folder: Path, prompts: Path, **how: Any) -> tuple[Timeline, list[Sent]]:
        """The pipeline, and what it sent in that order."""
        await self._bare.reset_prefix_cache()
        with self._noting() as sent:
            return await run_chains(folder, prompts, Kept(self.engine), **how), sent

    @contextmanager
    def _noting(self) -> Iterator[list[Sent]]:
        """The list of what is sent to vLLM while the block runs."""
        sent: list[Sent] = []
        run, add_request = self.engine._run, self._bare.add_request
        kinds: dict[asyncio.Task[Any] | None, str] = {}

        async def noting_kind(job: Any) -> None:
            kinds[asyncio.current_task()] = job.requests[0].kind
            await run(job)

        async def noting(number: str, prompt: Any, params: Any, **rest: Any) -> Any:
            kind = kinds.get(asyncio.current_task(), STAGES[-1])
            sent.append(Sent(kind, prompt["prompt_token_ids"], params))
            return await add_request(number, prompt, params, **rest)

        with patch.object(self.engine, "_run", noting_kind), patch.object(self._bare, "add_request", noting):
            yield sent

    async def replay(self, sent: list[Sent]) -> Timeline:
        """All requests at once, by nothing but vLLM's engine."""
        from vllm.inputs.engine import tokens_input

        await self._bare.reset_prefix_cache()
        prompts = [tokens_input(request.token_ids) for request in sent]
        timeline = Timeline()

        async def one(prompt: Any, params: Any) -> None:
            async for output in self._bare.generate(prompt, params, f"replay-{next(self._numbers)}"):
                last = output
            timeline.add(len(last.prompt_token_ids), len(last.outputs[0].token_ids), last.num_cached_tokens or 0)

        await asyncio.gather(*(one(prompt, request.params) for prompt, request in zip(prompts, sent, strict=True)))
        timeline.end()
        return timeline

    def staged(self, sent: list[Sent]) -> Timeline:
        """One call of `LLM.generate` for each turn of all chains, and one for all judgements."""
        return self._generate([[request for request in sent if request.kind == kind] for kind in STAGES])

    def _generate(self, stages: list[list[Sent]]) -> Timeline:
        from vllm.inputs import TokensPrompt

        self._llm.reset_prefix_cache()
        calls = [
            ([TokensPrompt(prompt_token_ids=request.token_ids) for request in stage], [r.params for r in stage])
            for stage in stages
        ]
        timeline = Timeline(in_bulk=True)
        for prompts, params in calls:
            for output in self._llm.generate(prompts, params, use_tqdm=False):
                tokens = len(output.prompt_token_ids), len(output.outputs[0].token_ids), output.num_cached_tokens or 0
                timeline.add(*tokens)
        timeline.end()
        return timeline
