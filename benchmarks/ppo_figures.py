"""What PPO does on the embedded world: the KL penalty, ptx, where the value function begins, and plain policy gradient.

    python benchmarks/ppo_figures.py collapse|ptx|value|episodes [--run RUN]

RUN has models/sft and models/rm, as `nano_study.py` and `make demo` leave them. Each part trains with PPO from the
run's models (a finished training is kept in --work and not run again), writes its numbers to results/ppo-figures-PART
and its plot to docs/images, and prints its table.

collapse  the same training with the KL penalty and without: scores rise in both, answers stay whole in one
ptx       the loss on pretraining text, with and without a share of it mixed into PPO
value     explained variance of a value function that begins as the reward model, and of one that begins at zero
episodes  until a target: PPO against plain policy gradient, three learning rates, three seeds, from the base model
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from measured import write
from ppo_curves import Arm, Curve, curve, episodes_to
from ppo_plots import plot_collapse, plot_episodes, plot_ptx, plot_value

from pipeline.evaluate.behaviour import FAULTS
from pipeline.intervals import Rate

ROOT = Path(__file__).parents[1]
SEEDS = (0, 1, 2)
DRIFT = {"learning_rate": 2e-4, "num_inner_epochs": 2, "epochs": 5, "num_samples": 1, "kl_coef": 1.0}
"""Twice the demo's rate and updates, of a quarter of the samples: whatever the score leaves open drifts."""
EVERY = 10
ARMS: dict[str, dict[str, Any]] = {
    "kl": {},
    "no-kl": {"kl_coef": 0.0},
    "ptx": {"kl_coef": 0.0, "ptx_coef": 1.0},
    "zero": {"value_start": "zero"},
}
"""Trainings that differ in this from the one with the KL penalty; parts share them."""
COLLAPSE = {"with the KL penalty": "kl", "without": "no-kl"}
PTX = {"plain PPO": "no-kl", "PPO-ptx": "ptx"}
VALUE = {"the reward model": "kl", "zero": "zero"}
FROM_BASE = {"kl_coef": 0.05, "epochs": 4, "num_samples": 1}
EPISODES: dict[str, dict[str, Any]] = {
    "PPO": {"num_inner_epochs": 4},
    "policy gradient": {"advantages": "policy-gradient"},
}
RATES = (1e-4, 3e-4, 1e-3)
TARGET = 0.8


class Measured(NamedTuple):
    """One measurement of one training. Shares in [0, 1]. loss: nats a token of the texts, ratio to the start's."""

    arm: str
    seed: int
    step: int
    scores: float
    kl: float
    entropy: float
    harmful: float
    evasive: float
    rude: float
    garbled: float
    loss: float
    loss_ratio: float
    loss_error: float


class Explained(NamedTuple):
    """One step of one training: what the value function knew of its returns before it learned from them."""

    arm: str
    seed: int
    step: int
    explained_variance: float
    scores: float


class Reached(NamedTuple):
    """One training to the target. episodes: None if it was not reached. last: mean score of the last batch."""

    arm: str
    learning_rate: float
    seed: int
    episodes: int | None
    steps: int
    last: float


Curves = dict[str, list[Curve]]


class Place(NamedTuple):
    """Where the models are, where trainings are kept, and the seeds."""

    run: Path
    work: Path
    seeds: Sequence[int]

    def curves(self, arms: dict[str, str]) -> Curves:
        """Label -> the curve of each seed; arms: label -> one of ARMS."""
        return {
            label: [self.curve(Arm(name, seed, DRIFT | ARMS[name], every=EVERY)) for seed in self.seeds]
            for label, name in arms.items()
        }

    def curve(self, arm: Arm) -> Curve:
        return curve(self.run, self.work, arm)


def measurements(curves: Curves, seeds: Sequence[int]) -> list[Measured]:
    return [
        Measured(name, seed, **{key: own["share"] if key in FAULTS else own for key, own in line.items()})
        for name, each in curves.items()
        for seed, found in zip(seeds, each, strict=True)
        for line in found.measured
    ]


def table(head: Sequence[str], lines: Sequence[Sequence[Any]]) -> str:
    """Markdown."""
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in rows)


def at_the_end(curves: Curves, seeds: Sequence[int]) -> str:
    """The start, and every training after its last step."""
    lines = [["SFT", "", *cells(next(iter(curves.values()))[0].measured[0])]]
    for name, each in curves.items():
        lines += [[name, seed, *cells(found.measured[-1])] for seed, found in zip(seeds, each, strict=True)]
    return table(["", "seed", "step", "score", "KL, nats", *FAULTS, "loss ÷ SFT's"], lines)


def cells(line: dict[str, Any]) -> list[str]:
    shares = [f"{own.share:.1%} [{own.low:.1%}, {own.high:.1%}]" for own in (Rate(**line[fault]) for fault in FAULTS)]
    loss = f"{line['loss_ratio']:.4f} ± {line['loss_error']:.4f}"
    return [str(line["step"]), f"{line['scores']:.3f}", f"{line['kl']:.2f}", *shares, loss]


def collapse(place: Place, images: Path) -> tuple[list[Measured], str]:
    curves = place.curves(COLLAPSE)
    plot_collapse(curves, images / "ppo-collapse.png")
    return measurements(curves, place.seeds), at_the_end(curves, place.seeds)


def ptx(place: Place, images: Path) -> tuple[list[Measured], str]:
    curves = place.curves(PTX)
    plot_ptx(curves, images / "ppo-ptx.png")
    return measurements(curves, place.seeds), at_the_end(curves, place.seeds)


def value(place: Place, images: Path) -> tuple[list[Explained], str]:
    curves = place.curves(VALUE)
    plot_value(curves, images / "ppo-value.png")
    found = [
        Explained(name, seed, line["step"], line["val/explained_variance"], line["objective/scores"])
        for name, each in curves.items()
        for seed, own in zip(place.seeds, each, strict=True)
        for line in own.steps
    ]
    steps = sorted({own.step for own in found})
    shown = [step for step in steps if step in (1, 2, 4, 8) or step == steps[-1]]
    lines = []
    for name in VALUE:
        by_step = [[own.explained_variance for own in found if (own.arm, own.step) == (name, step)] for step in shown]
        lines.append([name, *(f"{statistics.median(own):.2f} ({listed(own, '.2f')})" for own in by_step)])
    return found, table(["value begins as", *(f"step {step}" for step in shown)], lines)


def episodes(place: Place, images: Path) -> tuple[list[Reached], str]:
    curves = {
        (name, rate): [place.curve(race(name, rate, seed)) for seed in place.seeds]
        for rate in RATES
        for name in EPISODES
    }
    plot_episodes(curves, images / "ppo-episodes.png", target=TARGET)
    found = [
        Reached(*arm, seed, episodes_to(own.steps, TARGET), len(own.steps), own.steps[-1]["objective/scores"])
        for arm, each in curves.items()
        for seed, own in zip(place.seeds, each, strict=True)
    ]
    lines = []
    for name in EPISODES:
        own = [[each.episodes for each in found if each[:2] == (name, rate)] for rate in RATES]
        lines.append([name, *map(median_and_all, own)])
    return found, table([f"episodes to a score of {TARGET:g}", *(f"rate {rate:g}" for rate in RATES)], lines)


def race(name: str, rate: float, seed: int) -> Arm:
    """A training that ends at the target."""
    keys = {**FROM_BASE, "learning_rate": rate, **EPISODES[name]}
    return Arm(f"{name.replace(' ', '-')}-{rate:g}", seed, keys, start="base", target=TARGET)


def median_and_all(found: Sequence[int | None]) -> str:
    """The median counts what was not reached as more than anything."""
    middle = sorted(found, key=lambda own: (own is None, own or 0))[len(found) // 2]
    every = ", ".join("not reached" if own is None else str(own) for own in found)
    return f"**{'not reached' if middle is None else middle}** ({every})"


def listed(values: Sequence[float], how: str) -> str:
    return ", ".join(f"{own:{how}}" for own in values)


PARTS = {"collapse": collapse, "ptx": ptx, "value": value, "episodes": episodes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=PARTS, metavar="|".join(PARTS))
    parser.add_argument("--run", type=Path, default=ROOT / "runs" / "study" / "seed-2")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "ppo-figures", help="finished trainings")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="CSV and JSON")
    parser.add_argument("--images", type=Path, default=ROOT / "docs" / "images")
    options = parser.parse_args()
    for folder in (options.work, options.out, options.images):
        folder.mkdir(parents=True, exist_ok=True)
    place = Place(options.run, options.work, options.seeds)
    machine = f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}"
    for part in options.parts:
        found, shown = PARTS[part](place, options.images)
        about = {"machine": machine, "threads": torch.get_num_threads(), "torch": torch.__version__}
        write(options.out / f"ppo-figures-{part}", found, about)
        print(shown)


if __name__ == "__main__":
    main()
