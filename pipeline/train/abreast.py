"""Work that has nothing to do with one another, side by side on a CPU's cores.

An operation of a small model is too short for all cores: they wait for one another at its end. Two passes with half of
the cores each do not.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import torch


def abreast(*actions: Callable[[], Any]) -> list[Any]:
    """What the actions give: each in a thread of its own with its share of this one's cores, if there is one for each.

    The first error is raised once all have ended. No two of them may change the same thing.
    """
    num_threads = torch.get_num_threads()
    if num_threads < len(actions):
        return [action() for action in actions]
    share, with_grad = num_threads // len(actions), torch.is_grad_enabled()

    def act(action: Callable[[], Any]) -> Any:
        torch.set_num_threads(share)
        with torch.set_grad_enabled(with_grad):
            return action()

    futures = [_pool().submit(act, action) for action in actions]
    errors = [future.exception() for future in futures]
    torch.set_num_threads(num_threads)  # of this thread, and of those that begin later
    for error in filter(None, errors):
        raise error
    return [future.result() for future in futures]


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(thread_name_prefix="abreast")
