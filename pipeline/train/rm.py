"""Reward model: Ouyang et al. 2022 (arXiv 2203.02155), section 3.5 and appendix C, with soft labels.

All comparisons of a prompt are one term of the loss, with one forward pass for each completion. The score is read at
the token that ends the turn, from a head that starts at zero, so that the first loss is ln 2. Left out: dividing scores
by their spread, and the bias that brings demonstrations to a mean score of 0 before PPO.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from pipeline.config.settings import TrainRmSettings
from pipeline.train.batches import Data
from pipeline.train.loop import Terms
from pipeline.train.losses import centering_loss, ranking_loss
from pipeline.train.scorers import reward_scores
from pipeline.train.stage import Job, Report, train

METRICS = ("scores/margin", "scores/accuracy", "scores/mean")
"""Of its terms, by name."""


class Comparisons:
    """One term for each prompt."""

    def __init__(self, center_coef: float) -> None:
        self.center_coef = center_coef

    def num_terms(self, data: Data, row: int) -> int:
        return 1

    def __call__(self, model: Any, data: Data, rows: Sequence[int]) -> Terms:
        groups = [data.group(row) for row in rows]
        scores = reward_scores(model, groups).split([len(group.completions) for group in groups])
        losses, gaps = [], []
        for row, own in zip(rows, scores, strict=True):
            first, second, probability = data.comparisons(row)
            loss = ranking_loss(own, first, second, probability.to(own.device))
            losses.append(loss + self.center_coef * centering_loss(own))
            gaps.append((own[first] - own[second]) * (2 * (probability > 0.5) - 1).to(own.device))
        gap = torch.cat(gaps).detach()
        metrics = {"scores/margin": gap, "scores/accuracy": (gap > 0).float(), "scores/mean": torch.cat(scores)}
        return Terms(torch.stack(losses), metrics)


def train_rm(job: Job, settings: TrainRmSettings) -> Report:
    return train(
        job,
        settings,
        trainer="rm",
        kind="comparisons",
        make_objective=lambda opened: Comparisons(settings.center_coef),
        head="score",
    )
