"""RRHF: Yuan et al. 2023 (arXiv 2304.05302). Left out: sampling anew between epochs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from pipeline.config.settings import TrainRrhfSettings
from pipeline.lm.forward import completion_logps
from pipeline.train.batches import Data
from pipeline.train.loop import Terms
from pipeline.train.losses import rrhf_loss
from pipeline.train.stage import Job, Report, train


class Ranking:
    """One term for each prompt."""

    def __init__(self, rrhf_weight: float) -> None:
        self.rrhf_weight = rrhf_weight

    def num_terms(self, data: Data, row: int) -> int:
        return 1

    def __call__(self, model: Any, data: Data, rows: Sequence[int]) -> Terms:
        groups = [data.group(row) for row in rows]
        logps = completion_logps(model, groups)
        counts = [len(group.completions) for group in groups]
        losses, is_right = [], []
        for row, means, sums in zip(rows, logps.means.split(counts), logps.sums.split(counts), strict=True):
            scores = torch.tensor(data.row_scores(row), device=means.device)
            losses.append(rrhf_loss(means, sums, scores, rrhf_weight=self.rrhf_weight))
            is_right.append(means.argmax() == scores.argmax())
        return Terms(torch.stack(losses), {"ranking/best_first": torch.stack(is_right).float()})


def train_rrhf(job: Job, settings: TrainRrhfSettings) -> Report:
    return train(
        job,
        settings,
        trainer="rrhf",
        kind="ranked",
        make_objective=lambda opened: Ranking(settings.rrhf_weight),
    )
