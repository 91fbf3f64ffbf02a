"""The processes that train together, as torchrun starts them; a process of its own is rank 0 of 1.

Every function here but `rank` and `size` is called by all processes at the same place. An error that one of them meets
inside `together` or `first` is raised in all, so that none waits for another that has ended.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.nn
from torch import Tensor

from pipeline.errors import CaiError, PeerError, StoppedError, UsageError

T = TypeVar("T")
_PATIENCE = timedelta(hours=6)  # for another process that writes or reads alone; torchrun ends those whose peer died
_BUCKET = 1 << 24
"""Numbers that are summed over the processes at a time: 64 MiB in fp32."""


@contextmanager
def joined() -> Iterator[None]:
    """Joins the processes that torchrun started, each on the GPU of its local rank, or on the CPU."""
    local = int(os.environ["LOCAL_RANK"])
    if has_gpus := torch.cuda.is_available():
        if local >= torch.cuda.device_count():
            raise UsageError(f"{torch.cuda.device_count()} GPUs here, but more processes; lower --nproc-per-node")
        torch.cuda.set_device(local)
    dist.init_process_group("cpu:gloo,cuda:nccl" if has_gpus else "gloo", timeout=_PATIENCE)
    try:
        yield
    except CaiError:
        # torchrun sends it to the others once one has ended; they are about to, with the same code.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        dist.destroy_process_group()
        raise
    dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def gather(value: T) -> list[T]:
    """The values of all processes, by rank."""
    if size() == 1:
        return [value]
    values: list[Any] = [None] * size()
    with lost_peers():
        dist.all_gather_object(values, value)
    return values


def any_of(*asked: bool) -> list[bool]:
    """Of each question, whether any process says yes."""
    return [any(answers) for answers in zip(*gather(asked), strict=True)]


def together(action: Callable[[], T]) -> T:
    """What every process does by itself; if one of them fails, all do."""
    result, error = _attempt(action)
    _raise_first(gather(_code(error)), error)
    return result  # type: ignore[return-value]


def first(action: Callable[[], T]) -> T:
    """What the first process does alone; its result in all of them."""
    result, error = _attempt(action) if rank() == 0 else (None, None)
    told: list[Any] = [_code(error), result]
    if size() > 1:
        with lost_peers():
            dist.broadcast_object_list(told, 0)
    _raise_first(told[:1], error)
    return told[1]


def shared(error: CaiError) -> CaiError:
    """An error that all processes have, to be raised by them: the first one says it."""
    return error if rank() == 0 else PeerError(error.exit_code)


def add_up(tensors: Sequence[Tensor]) -> None:
    """Replaces the tensors by their sums over all processes. All of one dtype."""
    if size() == 1:
        return
    for bucket in _buckets(tensors):
        flat = torch.cat([tensor.flatten() for tensor in bucket])
        with lost_peers():
            dist.all_reduce(flat)
        for tensor, part in zip(bucket, flat.split([tensor.numel() for tensor in bucket]), strict=True):
            tensor.copy_(part.view_as(tensor))


def copy_from_first(tensors: Sequence[Tensor]) -> None:
    """Gives all processes the first one's values."""
    if size() > 1:
        for tensor in tensors:
            dist.broadcast(tensor, 0)


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    held: list[Tensor] = []
    for tensor in tensors:
        if held and sum(map(torch.numel, held)) + tensor.numel() > _BUCKET:
            yield held
            held = []
        held.append(tensor)
    if held:
        yield held


def _attempt(action: Callable[[], T]) -> tuple[T | None, CaiError | None]:
    try:
        return action(), None
    except CaiError as error:
        return None, error


def _code(error: CaiError | None) -> int | None:
    return error.exit_code if error else None


def _raise_first(codes: Sequence[int | None], own: CaiError | None) -> None:
    """Raises if any rank has an exit code: the first of them its own error, the others one that says nothing."""
    failed = [(number, code) for number, code in enumerate(codes) if code is not None]
    if failed:
        number, code = failed[0]
        raise own if own and number == rank() else PeerError(code)


@contextmanager
def lost_peers() -> Iterator[None]:
    """The connection to a process that ended is closed; what ended it is said there, if it could."""
    try:
        yield
    except RuntimeError as error:
        if "peer" not in str(error):
            raise
        raise StoppedError("lost another process of this training; the same command goes on here") from error
