"""The plots of ppo_figures.py: a thin line for each seed, a thick one for their median."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from ppo_curves import SMOOTHED, Curve

from pipeline.records import Line

COLOURS = ("tab:blue", "tab:orange")


def panels(rows: int, columns: int) -> tuple[Figure, list[Any]]:
    figure = Figure(figsize=(4.2 * columns, 3.0 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def save(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=110, metadata={"Software": None})


def draw(panel: Any, lines: Sequence[Sequence[tuple[float, float]]], name: str, colour: str, marker: str = "") -> None:
    """lines: of each seed, points (x, y). The median is drawn as far as all seeds go."""
    for points in lines:
        panel.plot(*zip(*points, strict=True), color=colour, linewidth=0.7, alpha=0.5)
    together = list(zip(*lines, strict=False))
    middle = [statistics.median(y for _, y in points) for points in together]
    places = [points[0][0] for points in together]
    panel.plot(places, middle, color=colour, linewidth=2, marker=marker, markersize=4, label=name)


def percent(line: Line, fault: str) -> float:
    return 100 * float(line[fault]["share"])


def plot_collapse(curves: dict[str, list[Curve]], path: Path) -> None:
    figure, (score, kl, entropy, *faults) = panels(2, 3)
    wanted: list[tuple[Any, str, Any]] = [
        (score, "mean score of the reward model", lambda line: line["scores"]),
        (kl, "KL from SFT, nats an answer", lambda line: line["kl"]),
        (entropy, "entropy, nats an answer", lambda line: line["entropy"]),
        (faults[0], "garbled answers, %", lambda line: percent(line, "garbled")),
        (faults[1], "evasive, % of harmless requests", lambda line: percent(line, "evasive")),
        (faults[2], "harmful, % of harmful requests", lambda line: percent(line, "harmful")),
    ]
    for panel, label, of in wanted:
        for colour, (name, each) in zip(COLOURS, curves.items(), strict=True):
            lines = [[(line["step"], of(line)) for line in own.measured] for own in each]
            draw(panel, lines, name, colour, marker="o")
        panel.set_ylabel(label, fontsize=9)
        panel.set_xlabel("PPO step", fontsize=9)
        if panel not in (score, kl):
            panel.set_ylim(bottom=0)
    score.legend(fontsize=9)
    save(figure, path)


def plot_ptx(curves: dict[str, list[Curve]], path: Path) -> None:
    figure, (loss, score) = panels(1, 2)
    loss.axhspan(99, 101, color="0.85", label="within 1 %")
    for colour, (name, each) in zip(COLOURS, curves.items(), strict=True):
        of_loss = [[(line["step"], 100 * line["loss_ratio"]) for line in own.measured] for own in each]
        draw(loss, of_loss, name, colour, marker="o")
        draw(score, [[(line["step"], line["scores"]) for line in own.measured] for own in each], name, colour, "o")
    loss.set_ylabel("loss on pretraining text, % of SFT's", fontsize=9)
    score.set_ylabel("mean score of the reward model", fontsize=9)
    for panel in (loss, score):
        panel.set_xlabel("PPO step", fontsize=9)
    loss.legend(fontsize=9)
    save(figure, path)


def plot_value(curves: dict[str, list[Curve]], path: Path) -> None:
    figure, (panel,) = panels(1, 1)
    for colour, (name, each) in zip(COLOURS, curves.items(), strict=True):
        lines = [[(line["step"], line["val/explained_variance"]) for line in own.steps] for own in each]
        draw(panel, lines, f"value begins as {name}", colour)
    panel.axhline(0, color="grey", linewidth=0.8, linestyle="--")
    panel.set_xlabel("PPO step", fontsize=9)
    panel.set_ylabel("explained variance of the returns", fontsize=9)
    panel.legend(fontsize=9)
    save(figure, path)


def plot_episodes(curves: dict[tuple[str, float], list[Curve]], path: Path, *, target: float) -> None:
    """A panel for each learning rate; scores as the target reads them, the mean over the last batches."""
    rates = list(dict.fromkeys(rate for _, rate in curves))
    figure, each_panel = panels(1, len(rates))
    for panel, rate in zip(each_panel, rates, strict=True):
        arms = {name: own for (name, at), own in curves.items() if at == rate}
        for colour, (name, each) in zip(COLOURS, arms.items(), strict=True):
            draw(panel, [smoothed(own.steps) for own in each], name, colour)
        panel.axhline(target, color="grey", linewidth=0.8, linestyle="--", label="target")
        panel.set_title(f"learning rate {rate:g}", fontsize=9)
        panel.set_xlabel("episodes", fontsize=9)
        panel.sharey(each_panel[0])
    each_panel[0].set_ylabel("mean score of the reward model", fontsize=9)
    each_panel[-1].legend(fontsize=9)
    save(figure, path)


def smoothed(steps: Sequence[Line]) -> list[tuple[float, float]]:
    """(episodes, mean score of the last SMOOTHED batches), from the first step that has so many."""
    scores = [line["objective/scores"] for line in steps]
    return [
        (steps[number - 1]["episodes"], sum(scores[number - SMOOTHED : number]) / SMOOTHED)
        for number in range(SMOOTHED, len(steps) + 1)
    ]
