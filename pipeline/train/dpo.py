"""Direct preference optimisation: Rafailov et al. 2023 (arXiv 2305.18290), with soft labels, and IPO.

The reference is the starting model. Its log-probabilities are computed once, before the first step, and kept by the
content of model and data, so that epochs, sweeps and resumed trainings share them. Left out: a moving reference.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.config.settings import TrainDpoSettings
from pipeline.lm.forward import completion_logps
from pipeline.train.batches import Data
from pipeline.train.loop import Terms
from pipeline.train.losses import dpo_loss, ipo_loss
from pipeline.train.reference import reference_logps
from pipeline.train.stage import Job, Opened, Report, train

METRICS = ("rewards/chosen", "rewards/rejected", "rewards/margin", "rewards/accuracy", "logps/chosen", "logps/rejected")
"""Of its terms, by name."""


class Preference:
    """One term for each pair. references: by id of the data they belong to, (N,) summed log-probabilities."""

    def __init__(self, settings: TrainDpoSettings, references: dict[int, Tensor]) -> None:
        self.settings = settings
        self.references = references

    def num_terms(self, data: Data, row: int) -> int:
        return 1

    def __call__(self, model: Any, data: Data, rows: Sequence[int]) -> Terms:
        logps = completion_logps(model, [data.group(row) for row in rows])
        completions = [number for row in rows for number in data.completions(row)]
        ref_logps = self.references[id(data)][completions].to(model.device)
        policy_logps = logps.sums
        if self.settings.length_normalised:
            policy_logps, ref_logps = policy_logps / logps.lengths, ref_logps / logps.lengths
        policy_logps, ref_logps = policy_logps.view(-1, 2), ref_logps.view(-1, 2)
        probability = torch.tensor([data.probability[row] for row in rows], device=model.device).float()
        metrics = self._metrics(policy_logps, ref_logps, probability)
        return Terms(self._loss(policy_logps, ref_logps, probability), metrics)

    def _loss(self, policy_logps: Tensor, ref_logps: Tensor, probability: Tensor) -> Tensor:
        beta = self.settings.beta
        if self.settings.loss == "ipo":
            return ipo_loss(policy_logps, ref_logps, probability, beta=beta)
        smoothing = self.settings.label_smoothing
        return dpo_loss(policy_logps, ref_logps, probability, beta=beta, label_smoothing=smoothing)

    def _metrics(self, policy_logps: Tensor, ref_logps: Tensor, probability: Tensor) -> dict[str, Tensor]:
        """A pair is right if the answer that its label holds for the better one has the larger reward."""
        rewards = self.settings.beta * (policy_logps - ref_logps).detach()
        margins = rewards[:, 0] - rewards[:, 1]
        return {
            "rewards/chosen": rewards[:, 0],
            "rewards/rejected": rewards[:, 1],
            "rewards/margin": margins,
            "rewards/accuracy": (margins * (2 * (probability > 0.5) - 1) > 0).float(),
            "logps/chosen": policy_logps[:, 0],
            "logps/rejected": policy_logps[:, 1],
        }


def train_dpo(job: Job, settings: TrainDpoSettings) -> Report:
    def make_objective(opened: Opened) -> Preference:
        folder = job.out.parent / ".reference"
        return Preference(settings, references(opened, settings, folder, should_stop=job.should_stop))

    return train(job, settings, trainer="dpo", kind="pairs", make_objective=make_objective)


def references(
    opened: Opened, settings: TrainDpoSettings, folder: Path, *, should_stop: Callable[[], bool]
) -> dict[int, Tensor]:
    """The starting model's summed log-probabilities for both splits, by the data's id."""
    return {
        id(data): reference_logps(opened.model, opened.fingerprint, data, settings, folder, should_stop=should_stop)
        for data in (opened.train, opened.test)
    }
