"""Ties vLLM's engine processes to the one that started them: when that is killed, nothing tells them (vLLM 0.32)."""

from __future__ import annotations

import os
import threading
import time
from typing import Any

PARENT = "_ENGINE_PARENT"
"""The environment variable with the process that the engine must not outlive."""
_LOOK_S = 1.0


def run_engine_core(*args: Any, **options: Any) -> None:
    """Runs in an engine's process, in the place of vLLM's own function, which it calls. Its workers follow it."""
    _tie()
    from vllm.v1.engine.core import EngineCoreProc

    EngineCoreProc.run_engine_core(*args, **options)


def run_coordinator(*args: Any, **options: Any) -> None:
    """The same in the process that stands between several engines."""
    _tie()
    from vllm.v1.engine.coordinator import DPCoordinatorProc

    DPCoordinatorProc.run_coordinator(*args, **options)


def _tie() -> None:
    threading.Thread(target=_watch, args=(int(os.environ[PARENT]),), name="tether", daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_LOOK_S)
    os._exit(1)
