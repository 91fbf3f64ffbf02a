"""Log-probabilities under the model that training starts from: one pass over all rows, kept by content."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from pipeline.config.settings import TrainSettings
from pipeline.lm.forward import Group, completion_logps
from pipeline.records import digest
from pipeline.store import make_folder
from pipeline.train.batches import Data, over_completions
from pipeline.train.checkpoints import save_tensors
from pipeline.train.loop import autocast


def reference_logps(
    model: Any, fingerprint: dict[str, str], data: Data, settings: TrainSettings, folder: Path
) -> Tensor:
    """(N,) summed log-probabilities of all completions of the data. model: not trained yet, `fingerprint` its identity.

    folder: where they are kept, under a hash of weights, tokens and precision.
    """
    path = folder / f"{digest([fingerprint, data.digest, settings.precision, model.device.type])[:32]}.safetensors"
    if path.exists():
        try:
            return load_file(path)["logps"]
        except (SafetensorError, KeyError):
            path.unlink()
    logps = compute_logps(model, data, settings)
    make_folder(folder)
    temporary = path.with_suffix(".tmp")
    save_tensors(temporary, {"logps": logps})
    temporary.replace(path)
    return logps


def compute_logps(model: Any, data: Data, settings: TrainSettings) -> Tensor:
    """(N,) in long batches of rows of similar length, on the CPU."""

    def sums(groups: list[Group]) -> Tensor:
        with autocast(model, settings):
            return completion_logps(model, groups).sums

    return over_completions(data, sums, max_tokens=settings.microbatch_tokens)
