"""Supervised fine-tuning: phase 1's last step in Bai et al. 2022 (arXiv 2212.08073), and RRHF with one completion.

The loss is the mean negative log-likelihood over all completion tokens of the optimiser's batch. Left out: prompts as
targets, and a choice of checkpoint by anything but the loss on the test split.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pipeline.config.settings import TrainSftSettings
from pipeline.lm.forward import completion_logps
from pipeline.train.batches import Data
from pipeline.train.loop import Terms
from pipeline.train.losses import sft_loss
from pipeline.train.stage import Job, Report, train


class Imitation:
    """One term for each completion token."""

    def num_terms(self, data: Data, row: int) -> int:
        return data.num_completion_tokens(row)

    def __call__(self, model: Any, data: Data, rows: Sequence[int]) -> Terms:
        logps = completion_logps(model, [data.group(row) for row in rows])
        return Terms(sft_loss(logps.tokens), {"logps/completion": logps.sums})


def train_sft(job: Job, settings: TrainSftSettings) -> Report:
    return train(job, settings, trainer="sft", kind="sft", make_objective=lambda opened: Imitation())
