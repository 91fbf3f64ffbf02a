"""Log-probabilities under the model that training starts from: one pass over all rows, kept by content."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from pipeline.config.settings import TrainSettings
from pipeline.errors import StoppedError
from pipeline.lm.forward import completion_logps
from pipeline.records import digest
from pipeline.store import make_folder
from pipeline.train import ranks
from pipeline.train.batches import Data, dealt_microbatches
from pipeline.train.checkpoints import save_tensors
from pipeline.train.loop import autocast
from pipeline.train.lora import adapters_off
from pipeline.train.shards import compute


def reference_logps(
    model: Any,
    fingerprint: dict[str, str],
    data: Data,
    settings: TrainSettings,
    folder: Path,
    *,
    should_stop: Callable[[], bool],
) -> Tensor:
    """(N,) summed log-probabilities of all completions of the data.

    model: not trained yet but for its adapters, which are switched off; `fingerprint`: its identity.

    folder: where they are kept, under a hash of weights, tokens and precision.
    """
    path = folder / f"{digest([fingerprint, data.digest, settings.precision, model.device.type])[:32]}.safetensors"
    kept = ranks.first(lambda: _kept(path))
    if kept is None:
        kept = compute_logps(model, data, settings, should_stop=should_stop)
        ranks.first(lambda: _keep(path, kept))
    return kept


def _kept(path: Path) -> Tensor | None:
    try:
        return load_file(path)["logps"]
    except FileNotFoundError:
        return None
    except (SafetensorError, KeyError):
        path.unlink()
        return None


def _keep(path: Path, logps: Tensor) -> None:
    make_folder(path.parent)
    temporary = path.with_suffix(".tmp")
    save_tensors(temporary, {"logps": logps})
    temporary.replace(path)


@torch.no_grad()
def compute_logps(
    model: Any, data: Data, settings: TrainSettings, *, should_stop: Callable[[], bool] = lambda: False
) -> Tensor:
    """(N,) in long batches of rows of similar length, dealt among the processes, on the CPU. May raise StoppedError."""
    logps = torch.zeros(sum(len(data.completions(row)) for row in range(len(data))))
    share = {"rank": ranks.rank(), "size": ranks.size(), "max_tokens": settings.microbatch_tokens}
    for rows in dealt_microbatches(data, range(len(data)), **share):
        if any(ranks.gather(should_stop())):
            said = "stopped while the starting model's log-probabilities were computed; the same command begins again"
            raise ranks.shared(StoppedError(said))
        groups = [data.group(row) for row in rows or [0]]
        with adapters_off(model), autocast(model, settings):
            found = compute(model, partial(completion_logps, model, groups)).sums
        if rows:
            logps[[number for row in rows for number in data.completions(row)]] = found.float().cpu()
    ranks.add_up([logps])
    return logps
