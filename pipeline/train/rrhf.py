"""RRHF: Yuan et al. 2023 (arXiv 2304.05302).

Completions come from anywhere, scores from the judge or from a reward model; with `resample_every` the policy's own
samples join them as it learns (the paper's online sampling). Left out: sampling with diverse beams.

With one completion the loss of a prompt is its negative log-likelihood, summed over tokens as in the paper. SFT's terms
add up to the same, but its step divides by the tokens of the batch, and this one by its prompts.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any

import torch

from pipeline.config.settings import TrainRrhfSettings
from pipeline.errors import UsageError
from pipeline.lm.forward import completion_logps
from pipeline.train.batches import Data
from pipeline.train.loop import Terms
from pipeline.train.losses import rrhf_loss
from pipeline.train.resample import Resampler
from pipeline.train.sampling import Generate, make_sampler
from pipeline.train.scorers import Score, check_same_tokenizer
from pipeline.train.stage import Extras, Job, Opened, Report, train

METRICS = ("ranking/best_first", "ranking/candidates", "scores/best")
"""Of its terms, by name."""


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
        losses, is_right, best = [], [], []
        for row, means, sums in zip(rows, logps.means.split(counts), logps.sums.split(counts), strict=True):
            scores = torch.tensor(data.row_scores(row), device=means.device)
            losses.append(rrhf_loss(means, sums, scores, rrhf_weight=self.rrhf_weight))
            is_right.append(means.argmax() == scores.argmax())
            best.append(scores.max())
        metrics = {
            "ranking/best_first": torch.stack(is_right).float(),
            "ranking/candidates": torch.tensor(counts, device=logps.tokens.device),
            "scores/best": torch.stack(best),
        }
        return Terms(torch.stack(losses), metrics)


def train_rrhf(
    job: Job, settings: TrainRrhfSettings, *, score: Score | None = None, generate: Generate | None = None
) -> Report:
    """score: takes the place of the scores in the data; needed for resampling. generate: the policy itself by default.

    Raises UsageError if `score` is missing, or has another tokenizer than the policy.
    """
    if settings.resample_every and score is None:
        raise UsageError("resample_every: new completions need scores; give a reward model")

    def make_extras(opened: Opened) -> Extras:
        if score is None:
            return Extras()
        check_same_tokenizer(score.fingerprint, opened.fingerprint)
        for data in (opened.train, opened.test):
            data.scores = array("d", score(data, max_tokens=settings.microbatch_tokens).tolist())
        if not settings.resample_every:
            return Extras()
        draw = generate or make_sampler(
            opened.model, opened.chat.eos, opened.train, settings, temperature=settings.temperature
        )
        every, seed = settings.resample_every, job.seed
        return Extras(refresh=Resampler(opened.train, settings, every=every, seed=seed, generate=draw, score=score))

    return train(
        job,
        settings,
        trainer="rrhf",
        kind="ranked",
        make_objective=lambda opened: Ranking(settings.rrhf_weight),
        make_extras=make_extras,
        other_models={"reward model": score.fingerprint} if score else {},
    )
