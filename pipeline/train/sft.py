"""Supervised fine-tuning: phase 1's last step in Bai et al. 2022 (arXiv 2212.08073).

The loss is the mean negative log-likelihood over all completion tokens of the optimiser's batch. Where a reward model
is given, it chooses the checkpoint: by its score of the model's own answers to test prompts (Ouyang et al. 2022,
arXiv 2203.02155, appendix C.1). Left out: prompts as targets.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from pipeline.config.settings import TrainSettings, TrainSftSettings
from pipeline.lm.forward import completion_logps
from pipeline.train import ranks
from pipeline.train.batches import Data
from pipeline.train.loop import Terms
from pipeline.train.losses import sft_loss
from pipeline.train.sampling import make_sampler
from pipeline.train.scorers import Score, check_same_tokenizer
from pipeline.train.stage import Extras, Job, Opened, Report, train

REWARD = "eval/reward"
METRICS = ("logps/completion",)
"""Of its terms, by name."""


class Imitation:
    """One term for each completion token."""

    def num_terms(self, data: Data, row: int) -> int:
        return data.num_completion_tokens(row)

    def __call__(self, model: Any, data: Data, rows: Sequence[int]) -> Terms:
        logps = completion_logps(model, [data.group(row) for row in rows])
        return Terms(sft_loss(logps.tokens), {"logps/completion": logps.sums})


def train_sft(job: Job, settings: TrainSftSettings, *, score: Score | None = None) -> Report:
    """score: adds the metric eval/reward, which chooses the weights unless `select` names another than the loss.

    Raises UsageError if it has another tokenizer than the model.
    """
    if score and settings.select == "min eval/loss":
        settings = settings.model_copy(update={"select": f"max {REWARD}"})

    def make_extras(opened: Opened) -> Extras:
        if score is None or not len(opened.test):
            return Extras()
        check_same_tokenizer(score.fingerprint, opened.fingerprint)
        return Extras({REWARD: make_reward(opened, settings, score, num_prompts=settings.num_reward_prompts)})

    return train(
        job,
        settings,
        trainer="sft",
        kind="sft",
        make_objective=lambda opened: Imitation(),
        make_extras=make_extras,
        other_models={"reward model": score.fingerprint} if score else {},
    )


def make_reward(opened: Opened, settings: TrainSettings, score: Score, *, num_prompts: int) -> Callable[[Any], float]:
    """The mean score of a model's greedy answers to the first test prompts, over all processes."""
    answer = make_sampler(opened.model, opened.chat.eos, opened.train, settings, temperature=0.0)
    rows = range(min(num_prompts, len(opened.test)))[ranks.rank() :: ranks.size()]
    prompts = [opened.test.group(row).prompt.tolist() for row in rows]

    def own_scores(model: Any) -> list[float]:
        answered = Data()
        for prompt, sample in zip(prompts, answer(model, prompts, [0] * len(prompts)), strict=True):
            answered.add_tokens("", prompt, [sample.tokens])
        found: list[float] = score(answered, max_tokens=settings.microbatch_tokens).tolist()
        return found

    def reward(model: Any) -> float:
        scores = [value for part in ranks.gather(ranks.together(lambda: own_scores(model))) for value in part]
        return sum(scores) / len(scores)

    return reward
