"""The curves of a training as a picture: loss, and every other metric, over steps."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from io import BytesIO
from pathlib import Path
from typing import Any

from pipeline.store import write_atomic

_NOT_DRAWN = re.compile("step|epoch|seconds(/.*)?")


def draw_curves(metrics: Path, picture: Path) -> None:
    """Reads metrics.jsonl; training and evaluation of one metric share a panel."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    curves: dict[str, dict[str, list[tuple[int, float]]]] = defaultdict(lambda: defaultdict(list))
    for line in metrics.read_text(encoding="utf-8").splitlines():
        fields = json.loads(line)
        for name, value in fields.items():
            if not _NOT_DRAWN.fullmatch(name):
                split = "eval" if name.startswith("eval/") else "train"
                curves[name.removeprefix("eval/")][split].append((fields["step"], value))
    columns = min(3, len(curves))
    rows = -(-len(curves) // columns)
    figure = Figure(figsize=(4.5 * columns, 3 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    for panel, (name, lines) in zip(figure.subplots(rows, columns, squeeze=False).flat, curves.items(), strict=False):
        for split, points in lines.items():
            panel.plot(*zip(*points, strict=True), label=split, marker="o" if split == "eval" else "", linewidth=1)
        panel.set_title(name, fontsize=9)
        panel.set_xlabel("step", fontsize=8)
        if len(lines) > 1:
            panel.legend(fontsize=8)
    _write(figure, picture)


def draw_reward_kl(metrics: Path, picture: Path, *, kl_budget: float | None) -> bool:
    """Mean score over KL from the start, a point for each evaluation. False if there was none."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    points = [(line["eval/kl"], line["eval/scores"], line["step"]) for line in lines if "eval/kl" in line]
    if not points:
        return False
    figure = Figure(figsize=(6, 4), layout="constrained")
    FigureCanvasAgg(figure)
    panel = figure.subplots()
    panel.plot([kl for kl, _, _ in points], [score for _, score, _ in points], marker="o", linewidth=1)
    for kl, score, step in points:
        panel.annotate(str(step), (kl, score), fontsize=7)
    if kl_budget is not None:
        panel.axvline(kl_budget, linestyle="--", linewidth=1, color="grey")
    panel.set_xlabel("KL from the start, nats a completion")
    panel.set_ylabel("mean score")
    _write(figure, picture)
    return True


def _write(figure: Any, picture: Path) -> None:
    """By way of memory: the libraries that draw do not tell of a full disk what it was."""
    drawn = BytesIO()
    figure.savefig(drawn, format="png", dpi=110, metadata={"Software": None})
    write_atomic(picture, drawn.getvalue())
