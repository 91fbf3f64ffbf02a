"""Online RRHF: new completions from the policy as it is, scored by a reward model, beside those that a prompt has.

Before every N-th step the prompts of the next N batches get their samples; those of before are forgotten. A sample that
was cut, is empty or is there already is not used. All scores of a prompt come from the one reward model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pipeline.config.settings import TrainRrhfSettings
from pipeline.splits import row_hash
from pipeline.train import ranks
from pipeline.train.batches import Data, Fresh, batch_at
from pipeline.train.sampling import Generate
from pipeline.train.scorers import Score


class Resampler:
    """Implements loop.Refresher for the rows of `data`, which have scores by `score` already."""

    def __init__(
        self, data: Data, settings: TrainRrhfSettings, *, every: int, seed: int, generate: Generate, score: Score
    ) -> None:
        self.data, self.settings, self.every, self.seed = data, settings, every, seed
        self.generate, self.score = generate, score

    def __call__(self, model: Any, step: int) -> None:
        if step % self.every:
            return
        size = {"num_rows": len(self.data), "batch_size": self.settings.batch_size, "seed": self.seed}
        rows = sorted({row for coming in range(step, step + self.every) for row in batch_at(coming, **size)})
        own = rows[ranks.rank() :: ranks.size()]
        self.data.fresh = {}
        parts = ranks.gather(ranks.together(lambda: self._draw(model, step, own)))
        self.data.fresh = {row: fresh for part in parts for row, fresh in part.items()}

    def _draw(self, model: Any, step: int, rows: Sequence[int]) -> dict[int, Fresh]:
        wanted = [(row, number) for row in rows for number in range(self.settings.num_samples)]
        prompts = [self.data.group(row).prompt.tolist() for row, _ in wanted]
        seeds = [row_hash("resample", f"{self.seed} {step} {row} {number}") for row, number in wanted]
        samples = self.generate(model, prompts, seeds)
        kept: dict[int, dict[tuple[int, ...], None]] = {}
        for (row, _), sample in zip(wanted, samples, strict=True):
            known = {tuple(completion.tolist()) for completion in self.data.group(row).completions}
            if sample.is_whole and len(sample.tokens) > 1 and tuple(sample.tokens) not in known:
                kept.setdefault(row, {})[tuple(sample.tokens)] = None
        return self._scored({row: list(found) for row, found in kept.items()})

    def _scored(self, kept: dict[int, list[tuple[int, ...]]]) -> dict[int, Fresh]:
        asked = Data()
        for row, completions in kept.items():
            asked.add_tokens(self.data.ids[row], self.data.group(row).prompt.tolist(), completions)
        scores = self.score(asked, max_tokens=self.settings.microbatch_tokens).tolist()
        return {
            row: Fresh(
                tuple(torch.tensor(tokens, dtype=torch.int32) for tokens in completions),
                tuple(scores[n] for n in asked.completions(place)),
            )
            for place, (row, completions) in enumerate(kept.items())
        }

    def tensors(self) -> dict[str, Tensor]:
        found = [(row, *one) for row, fresh in self.data.fresh.items() for one in zip(*fresh, strict=True)]
        return {
            "rows": torch.tensor([row for row, _, _ in found], dtype=torch.int64),
            "lengths": torch.tensor([len(tokens) for _, tokens, _ in found], dtype=torch.int64),
            "tokens": torch.cat([torch.zeros(0, dtype=torch.int32), *(tokens for _, tokens, _ in found)]),
            "scores": torch.tensor([score for _, _, score in found], dtype=torch.float64),
        }

    def load(self, tensors: dict[str, Tensor]) -> None:
        completions = tensors["tokens"].split(tensors["lengths"].tolist())
        self.data.fresh = {}
        for row, tokens, score in zip(tensors["rows"].tolist(), completions, tensors["scores"].tolist(), strict=True):
            before = self.data.fresh.get(row, Fresh((), ()))
            self.data.fresh[row] = Fresh((*before.completions, tokens), (*before.scores, score))
