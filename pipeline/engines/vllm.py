"""The engine that runs a model with vLLM: on GPUs, or with vLLM's CPU build.

vLLM's asynchronous engine, whose core has a process of its own, as under `LLM.generate`: templates, text and the
journal take no time from the GPU, and it is the form that spreads over several. The backlog stays here, in a heap by
priority: vLLM is handed a little more than it can run, so that it never idles and no old record waits behind many
young ones.

Equal requests are equal tokens, whatever was asked before: a reply stands in the next turn's prompt as the tokenizer
spells its text. Where the model spelt it otherwise, the next turn computes the rest of that reply again.
"""

from __future__ import annotations

import asyncio
import hashlib
import heapq
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from pipeline.engines.base import Reply, Request, Usage
from pipeline.engines.rendered import Renderer
from pipeline.engines.vllm_model import NUM_SEQUENCES, sampling_params, shared_model, told
from pipeline.errors import EngineDown
from pipeline.lm.labels import FLOOR, Label, own_shares
from pipeline.lm.load import hash_weights, identify
from pipeline.lm.templates import Chat

BACKLOG = 1.25
"""Requests handed to vLLM for each sequence that it computes at a time."""


@dataclass(order=True, slots=True)
class _Job:
    """One request, or several that differ in consecutive seeds alone, and who waits for their replies."""

    priority: int
    arrival: int
    requests: list[Request] = field(compare=False)
    futures: list[asyncio.Future[Reply]] = field(compare=False)


class VllmEngine:
    """Implements engines.base.Engine.

    model, revision, dtype, context, name: as in TransformersEngine. concurrency: sequences that each copy of the model
    computes together. adapter: a folder with a LoRA adapter; engines that differ in it alone share one loaded model.
    quantization: vLLM's name of a method. tensor_parallel: GPUs for one copy. data_parallel: copies; auto: as many as
    the visible GPUs hold. gpu_memory_utilization: share of each GPU's memory.
    """

    def __init__(
        self,
        model: str,
        *,
        revision: str | None = None,
        dtype: str = "auto",
        context: int | None = None,
        concurrency: int | None = None,
        name: str | None = None,
        adapter: str | None = None,
        quantization: str | None = None,
        tensor_parallel: int = 1,
        data_parallel: int | Literal["auto"] = "auto",
        gpu_memory_utilization: float = 0.9,
    ) -> None:
        identity = identify(model, revision=revision, dtype=dtype)
        replicas = _replicas(tensor_parallel, data_parallel)
        num_sequences = concurrency or NUM_SEQUENCES
        self.name = _named(name or (Path(model).resolve().name if Path(model).is_dir() else model), adapter)
        self.concurrency = round(BACKLOG * num_sequences * replicas)
        self._num_sequences = num_sequences * replicas
        self.context = min((limit for limit in (identity.context, context) if limit), default=None)
        self.chat = Chat(identity.tokenizer, eos=identity.eos)
        self.fingerprint = {
            **identity.fingerprint,
            "template": self.chat.template_hash,
            "backend": "vllm",
            "quantization": quantization or "",
            "adapter": _hash_adapter(Path(adapter)) if adapter else "",
        }
        self._renderer = Renderer(self.chat, self.context)
        self._adapter = adapter
        self._model = shared_model(
            adapter,
            model=model,
            revision=revision,
            dtype=identity.fingerprint["dtype"],
            max_model_len=self.context,
            max_num_seqs=num_sequences,
            quantization=quantization,
            tensor_parallel_size=tensor_parallel,
            data_parallel_size=replicas,
            gpu_memory_utilization=gpu_memory_utilization,
        )
        self._lora: Any = None
        self._fresh: list[_Job] = []
        self._waiting: list[_Job] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._num_running = 0
        self._numbers = itertools.count()

    @property
    def running(self) -> int:
        return min(self._num_running, self._num_sequences)

    @property
    def neutralised(self) -> int:
        return self._renderer.neutralised

    async def start(self) -> None:
        """Loads the model. Raises EngineRefused with vLLM's reason."""
        await self._model.start()
        if self._adapter:
            from vllm.lora.request import LoRARequest

            number = self._model.adapters.index(self._adapter) + 1
            self._lora = LoRARequest(self._adapter, number, self._adapter)

    async def sleep(self) -> None:
        """Gives the GPUs' memory to somebody else. No request may be in flight."""
        await self._model.sleep()

    async def wake(self) -> None:
        """Takes the memory back."""
        await self._model.wake()

    async def close(self) -> None:
        """Ends the model's processes, unless another engine uses them."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._model.leave()

    async def ask(self, request: Request, priority: int = 0) -> Reply:
        """Answers; raises RequestFailed (`too_long`, `bad_roles`, `empty_prompt`), EngineDown, EngineRefused."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Reply] = loop.create_future()
        if not self._fresh:
            loop.call_soon(self._queue)  # runs when all have asked that are ready to
        self._fresh.append(_Job(priority, next(self._numbers), [request], [future]))
        return await future

    def _queue(self) -> None:
        fresh, self._fresh = self._fresh, []
        for job in _merged(fresh):
            heapq.heappush(self._waiting, job)
        self._refill()

    def _refill(self) -> None:
        while self._waiting and self._num_running < self.concurrency:
            job = heapq.heappop(self._waiting)
            if all(future.done() for future in job.futures):
                continue
            self._num_running += len(job.requests)
            task = asyncio.get_running_loop().create_task(self._run(job))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _run(self, job: _Job) -> None:
        try:
            await (self._score(job) if job.requests[0].labels else self._sample(job))
        except BaseException as error:  # noqa: BLE001 -- those who asked get it
            for future in job.futures:
                if not future.done():
                    future.set_exception(told(error))
        self._num_running -= len(job.requests)
        self._refill()

    async def _sample(self, job: _Job) -> None:
        """Texts, each handed over when it is finished."""
        request = job.requests[0]
        prompt = self._renderer.prompt(request)
        params = self._params(request, n=len(job.requests), max_tokens=self._renderer.max_tokens(request, prompt))
        completions: list[list[int]] = [[] for _ in job.requests]
        async for output in self._model.outputs(prompt, params, self._lora):
            usage = Usage(len(prompt), 0, output.num_cached_tokens or 0)
            for part in output.outputs:
                completion = completions[part.index]
                completion += part.token_ids
                if part.finish_reason not in (None, "stop", "length"):
                    raise EngineDown(f"vLLM gave a request up ({part.finish_reason}); run again")
                if part.finish_reason and not job.futures[part.index].done():
                    whole = usage._replace(completion_tokens=len(completion))
                    reply = self._renderer.reply(request, completion, part.finish_reason, whole)
                    job.futures[part.index].set_result(reply)

    async def _score(self, job: _Job) -> None:
        """Labels, read where they branch: one token asked for at every proper beginning of a label."""
        (request,), (future,) = job.requests, job.futures
        prompt = self._renderer.prompt(request)
        labels = self.chat.labels(request.prompt, request.labels)
        self._renderer.check_length(len(prompt), len(prompt) + max(map(len, labels)))
        branches: dict[Label, set[int]] = {}
        for label in labels:
            for length, token in enumerate(label):
                branches.setdefault(label[:length], set()).add(token)
        read = await asyncio.gather(*(self._read(prompt, node, tokens) for node, tokens in branches.items()))
        logps = dict(zip(branches, (found for found, _ in read), strict=True))
        whole = [
            max(FLOOR, sum(logps[label[:length]][token] for length, token in enumerate(label))) for label in labels
        ]
        shares = dict(zip(request.labels, own_shares(labels, whole), strict=True))
        if not future.done():
            usage = Usage(len(prompt), 0, read[0][1])
            future.set_result(Reply("", "labels", logprobs=shares, method="logprobs", usage=usage))

    async def _read(self, prompt: list[int], node: Label, tokens: Iterable[int]) -> tuple[dict[int, float], int]:
        """Log-probabilities of the tokens after prompt and node, and how many of the prompt's tokens were cached."""
        params = sampling_params(temperature=0.0, max_tokens=1, logprob_token_ids=sorted(tokens))
        async for output in self._model.outputs([*prompt, *node], params, self._lora):
            (found,) = output.outputs[0].logprobs
            return {token: found[token].logprob for token in tokens}, output.num_cached_tokens or 0
        raise EngineDown("vLLM gave no log-probabilities; run again")

    def _params(self, request: Request, *, n: int, max_tokens: int) -> Any:
        """n > 1: sample i draws with the seed + i, and comes as soon as it is finished, not with the others."""
        sampled = request.temperature > 0
        return sampling_params(
            n=n,
            temperature=request.temperature,
            top_p=request.top_p if sampled else 1.0,
            seed=(request.seed or 0) if sampled else None,
            stop=list(request.stop),
            stop_token_ids=sorted(self.chat.eos),
            max_tokens=max_tokens,
            parts=n > 1,
        )


def _merged(jobs: list[_Job]) -> Iterator[_Job]:
    """Joins jobs that differ in consecutive seeds alone."""
    groups: dict[Any, list[_Job]] = {}
    for job in jobs:
        groups.setdefault(_without_seed(job), []).append(job)
    for group in groups.values():
        last: _Job | None = None
        for job in sorted(group, key=lambda job: job.requests[0].seed or 0):
            request = job.requests[0]
            if last and request.temperature > 0 and request.seed == (last.requests[-1].seed or 0) + 1:
                last.requests.append(request)
                last.futures += job.futures
            else:
                if last:
                    yield last
                last = job
        if last:
            yield last


def _without_seed(job: _Job) -> Any:
    request, prompt = job.requests[0], job.requests[0].prompt
    text = prompt if isinstance(prompt, str) else tuple((turn["role"], turn["content"]) for turn in prompt)
    settings = (request.max_tokens, request.temperature, request.top_p, request.stop, request.labels)
    return (job.priority, text, settings)


def _replicas(tensor_parallel: int, data_parallel: int | Literal["auto"]) -> int:
    """Copies of the model; auto: as many as the visible GPUs hold, 1 on a CPU."""
    return max(1, torch.cuda.device_count() // tensor_parallel) if data_parallel == "auto" else data_parallel


def _hash_adapter(folder: Path) -> str:
    """Identity of a LoRA adapter by content."""
    return hashlib.sha256((folder / "adapter_config.json").read_bytes() + hash_weights(folder).encode()).hexdigest()


def _named(model: str, adapter: str | None) -> str:
    """The model, and its adapter by folder: that of the trained model where trainers put one, in `MODEL/adapter`."""
    if not adapter:
        return model
    folder = Path(adapter).resolve()
    return f"{model}+{(folder.parent if folder.name == 'adapter' else folder).name}"
