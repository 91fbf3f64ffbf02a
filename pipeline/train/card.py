"""The card of a trained model: what it was made from, with which settings, and how it measured."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from pipeline.store import write_atomic

TITLES = {
    "sft": "Supervised fine-tuning",
    "rm": "Reward model (Bradley-Terry)",
    "dpo": "Direct preference optimisation",
    "rrhf": "RRHF (rank responses)",
    "ppo": "PPO (proximal policy optimisation)",
}


def in_words(counts: Mapping[str, Any]) -> str:
    """Of a part of the data: `rows 290, cut 0, …`."""
    return ", ".join(f"{name} {count}" for name, count in counts.items() if name != "sha256")


def write_card(path: Path, description: dict[str, Any]) -> None:
    start, data = description["start"], description["data"]
    front = {"base_model": start["name"], "tags": ["constitutional-ai", description["trainer"]]}
    lines = [
        "---",
        yaml.safe_dump(front, sort_keys=False).strip(),
        "---",
        f"# {TITLES[description['trainer']]}",
        "",
        f"Trained by `cai train-{description['trainer']}` from {start['name']} (weights {start['weights'][:16]}).",
        f"The weights are those after step {description['step']}.",
        "",
        "| data | of it | sha256 of its tokens |",
        "|---|---|---|",
        *(f"| {name} | {in_words(each)} | {each['sha256'][:16]} |" for name, each in data.items()),
        "",
        *(f"- {source}" for source in description["sources"]),
        *(f"- {name}: {value}" for name, value in description["made_from"].items()),
        "",
        "| metric | value |",
        "|---|---|",
        *(f"| {name} | {value:.6g} |" for name, value in description["metrics"].items()),
        "",
        "| setting | value |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in {**description["settings"], "seed": description["seed"]}.items()),
        "",
        "`metrics.jsonl` has every step, `training.json` all of this for programs.",
    ]
    write_atomic(path, ("\n".join(lines) + "\n").encode())
