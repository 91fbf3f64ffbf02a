"""vLLM's asynchronous engine beside its step loop: which of the two `pipeline/engines/vllm.py` should be.

    python benchmarks/step_loop.py

The same requests, all handed over at once, by `AsyncLLM`, by `LLMEngine.step` with vLLM's core in a process of its own,
and by `LLMEngine.step` with the core in this process. One model, throughput.py's settings for a CPU; every arm once a
round, on an empty prefix cache. What a stage would do between two steps is left out, which favours the step loop.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import wordy_model
from throughput import CONTEXT, CPU

from pipeline.engines.vllm_model import sampling_params
from pipeline.lm.load import identify
from pipeline.lm.templates import Chat
from pipeline.sources import Spec, read

Arm = Callable[[list[Any], Any], Awaitable[int]]
"""Prompts and sampling parameters -> tokens that came out."""


def asynchronous(settings: dict[str, Any]) -> Arm:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**settings))

    async def run(prompts: list[Any], params: Any) -> int:
        async def one(number: int, prompt: Any) -> int:
            collector = await engine.add_request(f"{time.monotonic()}-{number}", prompt, params)
            return len((await collector.get()).outputs[0].token_ids)

        await engine.reset_prefix_cache()
        return sum(await asyncio.gather(*(one(number, prompt) for number, prompt in enumerate(prompts))))

    return run


def step_loop(settings: dict[str, Any], *, own_process: bool) -> Arm:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine

    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = str(int(own_process))
    engine = LLMEngine.from_engine_args(EngineArgs(**settings))

    async def run(prompts: list[Any], params: Any) -> int:
        engine.reset_prefix_cache()
        for number, prompt in enumerate(prompts):
            engine.add_request(f"{time.monotonic()}-{number}", prompt, params)
        tokens = 0
        while engine.has_unfinished_requests():
            tokens += sum(len(output.outputs[0].token_ids) for output in engine.step())
        return tokens

    return run


async def measure(arms: dict[str, Arm], prompts: list[Any], params: Any, rounds: int) -> dict[str, list[float]]:
    """Output tokens per second of each arm in each round; a short run of each comes before, uncounted."""
    for arm in arms.values():
        await arm(prompts[:64], params)
    rates: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(rounds):
        for name, arm in arms.items():
            began = time.perf_counter()
            tokens = await arm(prompts, params)
            assert tokens == len(prompts) * params.max_tokens
            rates[name].append(tokens / (time.perf_counter() - began))
            print(f"{name:28} {rates[name][-1]:6.0f} tokens/s", flush=True)
    return rates


async def compare(settings: dict[str, Any], prompts: list[Any], params: Any, rounds: int) -> None:
    arms = {
        "AsyncLLM": asynchronous(settings),
        "step loop, core apart": step_loop(settings, own_process=True),
        "step loop, core in process": step_loop(settings, own_process=False),
    }
    rates = await measure(arms, prompts, params, rounds)
    first = rates["AsyncLLM"]
    for name, found in rates.items():
        ratio = statistics.median(mine / other for mine, other in zip(first, found, strict=True))
        print(f"{name:28} median {statistics.median(found):6.0f} tokens/s, AsyncLLM ÷ it {ratio:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=640)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--work", type=Path, default=Path("runs/step-loop"), help="model and prompts")
    options = parser.parse_args()
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    options.work.mkdir(parents=True, exist_ok=True)
    model, texts = options.work / "model", options.work / "prompts.jsonl"
    wordy_model.build(model, shape="30M", context=CONTEXT)
    wordy_model.write_prompts(texts, count=options.requests, length=24)

    from vllm.inputs.engine import tokens_input

    chat = Chat(identify(str(model)).tokenizer)
    prompts = [tokens_input(chat.prompt(row.messages).token_ids) for row in read(Spec(str(texts)))]
    params = sampling_params(temperature=1.0, top_p=1.0, seed=1, max_tokens=24)
    settings = {**CPU, "model": str(model), "disable_log_stats": True}
    asyncio.run(compare(settings, prompts, params, options.rounds))


if __name__ == "__main__":
    main()
