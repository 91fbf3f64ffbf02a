"""A model that vLLM has loaded, in processes that end with this one; engines with different adapters share it."""

from __future__ import annotations

import asyncio
import importlib.util
import itertools
import json
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import torch

from pipeline.engines import tether
from pipeline.errors import EngineDown, EngineRefused
from pipeline.records import canonical

NUM_SEQUENCES = 256
"""That a model computes at a time, where nothing else is said."""
_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Of LoRA adapters, those that vLLM makes room for."""
_GIB = 1 << 30
_WORKER_S, _CLOSE_S = 2, 10
"""A worker (those on a CPU hang at their end) is told to end after the first, the engine above it killed after both."""
_loaded: dict[bytes, VllmModel] = {}


class VllmModel:
    """options: vLLM's engine arguments. llm: its `AsyncLLM`, None before `start`, after `leave` and asleep on a CPU."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.llm: Any = None
        self.adapters: list[str] = []
        self._options = options
        self._users = 0
        self._numbers = itertools.count()

    def join(self, adapter: str | None) -> None:
        """One more engine uses the model, with this adapter."""
        self._users += 1
        if adapter and adapter not in self.adapters:
            self.adapters.append(adapter)

    async def leave(self) -> None:
        """The last engine ends the processes."""
        self._users -= 1
        if not self._users:
            for key in [key for key, model in _loaded.items() if model is self]:
                del _loaded[key]
            await self._stop()

    async def start(self) -> None:
        """Loads the model if no other engine has. Raises EngineRefused with vLLM's reason."""
        if self.llm is None:
            await asyncio.to_thread(self._load)

    async def sleep(self) -> None:
        """Gives the memory of the GPUs back: weights to main memory, the cache away. On a CPU all of it goes."""
        if not torch.cuda.is_available():
            await self._stop()
        elif self.llm is not None:
            await self.llm.sleep(level=1)

    async def wake(self) -> None:
        if self.llm is None:
            await self.start()
        elif torch.cuda.is_available():
            await self.llm.wake_up()

    async def outputs(self, prompt: list[int], params: Any, lora: Any = None) -> AsyncIterator[Any]:
        """vLLM's outputs to one request, as they come. lora: a `LoRARequest`."""
        from vllm.inputs.engine import tokens_input

        number = str(next(self._numbers))
        collector = await self.llm.add_request(number, tokens_input(prompt), params, lora_request=lora)
        finished = False
        while not finished:
            output = await collector.get()
            finished = output.finished
            yield output

    async def _stop(self) -> None:
        if self.llm is not None:
            llm, self.llm = self.llm, None
            if llm.output_handler is not None:  # else it reports that the engine is dead
                llm.output_handler.cancel()
                await asyncio.gather(llm.output_handler, return_exceptions=True)
            await asyncio.to_thread(llm.shutdown, timeout=_CLOSE_S)

    def _load(self) -> None:
        """Returns nothing: frames that vLLM's exceptions keep would hold the model until the interpreter ends."""
        _set_environment()
        # Ctrl-C goes to all processes of a terminal; ours decides when the engine ends. Children inherit the mask.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGUSR1})
        try:
            self.llm = _launch(self._arguments())
        except (RuntimeError, ValueError, OSError, TypeError, ImportError) as error:
            reason = _reason(error)
            cure = "set VLLM_LOGGING_LEVEL=INFO to see vLLM's own messages"
            raise EngineRefused(f"{self._options['model']}: vLLM cannot load it ({reason}); {cure}") from error
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def _arguments(self) -> dict[str, Any]:
        """The model's own generation config is left out: every sampling parameter is said with each request."""
        arguments = {
            **self._options,
            "generation_config": "vllm",
            "enable_prefix_caching": True,
            "disable_log_stats": True,
            "use_tqdm_on_load": False,
            "trust_remote_code": False,
        }
        if torch.cuda.is_available():
            arguments["enable_sleep_mode"] = True
        else:
            total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
            arguments |= {"enforce_eager": True, "kv_cache_memory_bytes": min(total // 8, 4 * _GIB)}
            # A request with a seed whose prompt is computed in several steps ends vLLM's CPU build (0.32).
            arguments["enable_chunked_prefill"] = False
        if self.adapters:
            arguments |= lora_arguments(len(self.adapters), max(map(_rank, self.adapters)))
        return arguments


def shared_model(adapter: str | None, **options: Any) -> VllmModel:
    """The model with these options, for one more engine; one that runs already takes no further adapter."""
    key = canonical(options)
    found = _loaded.get(key)
    if found is None or (found.llm is not None and adapter and adapter not in found.adapters):
        found = _loaded[key] = VllmModel(options)
    found.join(adapter)
    return found


def lora_arguments(num_adapters: int, rank: int) -> dict[str, Any]:
    """Room for so many adapters at a time. Raises EngineRefused for a rank that vLLM has no room for."""
    room = next((most for most in _RANKS if rank <= most), None)
    if room is None:
        raise EngineRefused(f"vllm: no room for an adapter of rank {rank}; take one up to {_RANKS[-1]}")
    # vLLM 0.32 on a CPU adds the last place's adapter to rows that have none; that place stays empty.
    places = num_adapters + (0 if torch.cuda.is_available() else 1)
    return {"enable_lora": True, "max_loras": places, "max_cpu_loras": places, "max_lora_rank": room}


def require_vllm(setting: str, *, instead: str) -> None:
    """Raises EngineRefused if it is not installed. setting: that asks for it; instead: another value of that."""
    if importlib.util.find_spec("vllm") is None:
        install = "pip install 'constitutional-pipeline[vllm]'"
        raise EngineRefused(f"{setting}: vllm is not installed; {install}, or set it to {instead}")


def told(error: BaseException) -> BaseException:
    """The error as whoever asked vLLM gets it."""
    from vllm.v1.engine.exceptions import EngineDeadError

    if isinstance(error, EngineDeadError | asyncio.CancelledError):
        return EngineDown("vLLM's process has ended; set VLLM_LOGGING_LEVEL=INFO to see why, and run again")
    return error


def sampling_params(*, parts: bool = False, **said: Any) -> Any:
    """Every parameter that changes a reply is said, so that no default of model or library does."""
    from vllm.sampling_params import RequestOutputKind, SamplingParams

    return SamplingParams(
        top_k=0,
        min_p=0.0,
        presence_penalty=0.0,
        frequency_penalty=0.0,
        repetition_penalty=1.0,
        min_tokens=0,
        ignore_eos=False,
        watermarking=False,
        detokenize=bool(said.get("stop")),
        # The first token of a part comes alone, the others when it is finished.
        output_kind=RequestOutputKind.DELTA if parts else RequestOutputKind.FINAL_ONLY,
        stream_interval=said["max_tokens"] if parts else None,
        skip_clone=True,
        **said,
    )


def _set_environment() -> None:
    """What vLLM reads when it is imported: quiet, off stdout, no statistics sent, no fork of a threaded parent."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_WORKER_SHUTDOWN_TIMEOUT_SECONDS", str(_WORKER_S))
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"
    os.environ[tether.PARENT] = str(os.getpid())


def _reason(error: Exception) -> str:
    """vLLM's own words in one line; the first line of a pydantic error only counts the others."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    said = lines[1:] if "validation error" in lines[0] else lines
    return (said or lines)[0].removeprefix("Value error, ").partition(" [type=")[0][:300]


def _launch(arguments: dict[str, Any]) -> Any:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.coordinator import DPCoordinatorProc
    from vllm.v1.engine.core import EngineCoreProc

    untied = EngineCoreProc.run_engine_core, DPCoordinatorProc.run_coordinator
    EngineCoreProc.run_engine_core = staticmethod(tether.run_engine_core)
    DPCoordinatorProc.run_coordinator = staticmethod(tether.run_coordinator)
    try:
        return AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))
    finally:
        EngineCoreProc.run_engine_core, DPCoordinatorProc.run_coordinator = map(staticmethod, untied)


def _rank(adapter: str) -> int:
    """Raises EngineRefused where there is no adapter."""
    path = Path(adapter) / "adapter_config.json"
    try:
        return int(json.loads(path.read_text())["r"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EngineRefused(f"engine.adapter: {path} names no rank; give a LoRA folder") from error
