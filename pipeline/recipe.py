"""The recipe: what `cai run` does, in order (Bai et al. 2022, arXiv 2212.08073).

Phase 1 is the paper's SL-CAI: a model revises its answers under the principles and is trained on the revisions. Phase 2
is its RL-CAI: answers sampled from that SFT model are ranked by the judge of phase 1, and preferences train a reward
model and, from the SFT model again, the policy: by PPO as in the paper, or directly. Every step is a command of its
own, too, and one that was done from the same inputs is not done again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, get_args

from pipeline.chain import DATA_STAGES
from pipeline.config.settings import RecipeSettings, Settings, Trainer
from pipeline.jobs import has_own_model

DEFAULT_TRAINERS: tuple[Trainer, ...] = ("sft", "rm", "dpo")


class Stages(NamedTuple):
    """Stages of a phase, run as one chain."""

    phase: int
    names: tuple[str, ...]


class Export(NamedTuple):
    """All datasets. before_samples: preferences are still to come, and may be empty now."""

    before_samples: bool


class Train(NamedTuple):
    trainer: Trainer


Step = Stages | Export | Train


def steps(recipe: RecipeSettings, trainers: Sequence[Trainer]) -> list[Step]:
    """The steps of a run that trains these; see `trainers`."""
    ordered: list[Trainer] = [trainer for trainer in get_args(Trainer) if trainer in trainers]
    policies = [Train(trainer) for trainer in ordered if trainer != "sft"] if recipe.phases == 2 else []
    samples = bool(policies) and recipe.pairs != "revisions"
    found: list[Step] = [Stages(1, DATA_STAGES), Export(before_samples=samples)]
    if "sft" in trainers:
        found += [Train("sft")]
    if samples:
        # One after the other, so that one GPU need never hold both the policy and the judge.
        found += [Stages(2, ("generate",)), Stages(2, ("rank",)), Export(before_samples=False)]
    return found + policies


def trainers(settings: Settings) -> tuple[tuple[Trainer, ...], str]:
    """Whom `cai run` trains; and if `auto` leaves that to nobody, why, for people to read."""
    asked = settings.recipe.trainers
    if asked != "auto":
        return asked, ""
    if not has_own_model(settings):
        return (), "the run has no model of its own to train, only an endpoint"
    if settings.engine.model == "nano" or _has_gpu():
        return DEFAULT_TRAINERS, ""
    return (), "there is no GPU here; `--set 'recipe.trainers=[sft, rm, dpo]'` trains all the same"


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()
