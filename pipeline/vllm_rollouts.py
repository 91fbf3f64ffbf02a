"""Rollouts of PPO through vLLM, in processes of its own beside training.

vLLM reads the policy's weights anew before every draw, and forgets the prefixes that it computed with other ones. On a
GPU training and drawing take turns: vLLM sleeps while training computes. Left out: copies on several GPUs, and drawing
ahead with older weights.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch

from pipeline.config.settings import Settings
from pipeline.engines.vllm_model import (
    NUM_SEQUENCES,
    VllmModel,
    lora_arguments,
    require_vllm,
    sampling_params,
    told,
)
from pipeline.engines.vllm_worker import ReadsAgain
from pipeline.errors import EngineDown, EngineRefused, UsageError
from pipeline.lm.decode import Row
from pipeline.lm.load import context_of, load_config, pick_device, release_memory
from pipeline.train.loop import compute_dtype

_SEEDS = 1 << 63
"""Fewer than training has."""
_LOOK_S = 1.0
"""Between two looks at whether vLLM's core is alive."""
T = TypeVar("T")


class VllmSampler:
    """Implements train.samplers.Sampler. options: vLLM's engine arguments, without the model. max_length: in tokens."""

    def __init__(self, options: dict[str, Any], max_length: int | None) -> None:
        self._options = options
        self._max_length = max_length
        self._model: VllmModel | None = None
        self._runner = asyncio.Runner()
        self._num_adapters = 0

    def __call__(self, rows: Sequence[Row], weights: Path, adapter: Path | None) -> None:
        release_memory()
        self._runner.run(self._draw(rows, weights, adapter))

    def close(self) -> None:
        if self._model is not None:
            self._runner.run(self._model.leave())
        self._runner.close()

    async def _draw(self, rows: Sequence[Row], weights: Path, adapter: Path | None) -> None:
        try:
            model = await self._ready(weights, reads=adapter is None)
            lora = await self._load(model, adapter) if adapter else None
            await asyncio.gather(*(_continue(model, row, lora) for row in rows))
            if torch.cuda.is_available():  # a CPU's has no sleep but to end
                await model.sleep()
        except Exception as error:
            if (found := told(error)) is error:
                raise
            raise found from error

    async def _ready(self, weights: Path, *, reads: bool) -> VllmModel:
        """Awake, with the weights as they are now, unless they are those that it has. reads: they may be others."""
        if self._model is None:
            context = context_of(load_config(str(weights)))
            length = self._max_length if (self._max_length or context) < context else None
            self._model = VllmModel({"model": str(weights), "max_model_len": length, **self._options})
            self._model.join(None)
            await self._model.start()
            return self._model
        await self._model.wake()
        if reads:
            llm = self._model.llm
            await _answer(llm, llm.collective_rpc(ReadsAgain.read_weights_again.__name__))
            if not await _answer(llm, llm.reset_prefix_cache()):
                raise EngineDown("vLLM kept prefixes of older weights; run again")
        return self._model

    async def _load(self, model: VllmModel, adapter: Path) -> Any:
        """A number and a name of its own keep its prefixes apart from those of earlier ones."""
        from vllm.lora.request import LoRARequest

        self._num_adapters += 1
        lora = LoRARequest(str(self._num_adapters), self._num_adapters, str(adapter))
        await _answer(model.llm, model.llm.add_lora(lora))
        return lora


async def _answer(llm: Any, call: Coroutine[Any, Any, T]) -> T:
    """What vLLM's core says to a call. One that was sent just before the core died gets no answer, ever."""
    task = asyncio.ensure_future(call)
    while not task.done():
        await asyncio.wait([task], timeout=_LOOK_S)
        if llm.errored and not task.done():
            task.cancel()
            raise llm.dead_error
    return task.result()


async def _continue(model: VllmModel, row: Row, lora: Any) -> None:
    params = sampling_params(
        temperature=row.temperature,
        top_p=row.top_p,
        seed=row.seed % _SEEDS,
        stop_token_ids=sorted(row.eos),
        max_tokens=row.max_tokens,
        logprobs=0,
    )
    async for output in model.outputs(row.prompt, params, lora):
        (part,) = output.outputs
        for token, found in zip(part.token_ids, part.logprobs, strict=True):
            row.extend(token, found[token].logprob)
    if not row.finish_reason:
        raise EngineDown(f"vLLM gave a completion up ({part.finish_reason}); run again")


def check_sampler(settings: Settings) -> None:
    """Raises EngineRefused or UsageError for what `vllm_sampler` cannot do."""
    require_vllm("train_ppo.sampler", instead="decode")
    if settings.engine.device != "auto":
        raise EngineRefused("engine.device: vllm takes the visible GPUs; choose with CUDA_VISIBLE_DEVICES instead")
    if settings.train_ppo.lora and settings.train_ppo.lora.quantize:
        raise UsageError("train_ppo.sampler: vllm cannot draw with lora.quantize; set it to decode")


@contextmanager
def vllm_sampler(settings: Settings) -> Iterator[VllmSampler]:
    """What the settings of training and of the engine say, until the end of the block. Loads when it first draws."""
    check_sampler(settings)
    engine, ppo = settings.engine, settings.train_ppo
    sampler = VllmSampler(
        {
            "skip_tokenizer_init": True,
            "dtype": str(compute_dtype(ppo, pick_device(engine.device).type)).removeprefix("torch."),
            "max_num_seqs": engine.concurrency or NUM_SEQUENCES,
            "gpu_memory_utilization": engine.gpu_memory_utilization,
            # Of the distribution that is drawn from: after the temperature.
            "logprobs_mode": "processed_logprobs",
            "worker_extension_cls": f"{ReadsAgain.__module__}.{ReadsAgain.__qualname__}",
            **(lora_arguments(1, ppo.lora.r) if ppo.lora else {}),
        },
        ppo.max_length,
    )
    try:
        yield sampler
    finally:
        sampler.close()
