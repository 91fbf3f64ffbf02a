"""Our PPO beside TRL 1.12's, the last version that has it: episodes a second, memory, and where a step's time goes.

    OMP_NUM_THREADS=2 python benchmarks/ppo.py --trl-python .venv-trl-ppo/bin/python --out benchmarks/results/ppo

A 5M Llama of random weights, 64 prompts of about 105 tokens a step, up to 64 new tokens, fp32, one minibatch. Every run
has a process of its own; its first step is not counted. Rounds are interleaved: every arm once, then every arm again;
ratios are of one round.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import training_jobs
from measured import write
from transformers import AutoModelForSequenceClassification, AutoTokenizer

BATCH_SIZE, MAX_TOKENS, SEED = 64, 64, 0
PROMPT_TOKENS = (85, 125)
"""Least and most, uniform."""
ODDS_OF_END = {"full": 1e-9, "half": 0.0248}
"""Of each token: none ends before the limit, or they end after half of it on average."""
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
"""Of the chat model that a trainer asks for; the prompts are tokens already."""
ARMS = ("separate", "joint", "TRL", "no-gc")
"""Ours with a value model or a value head; TRL as it is, and without its garbage collections."""


class Cell(NamedTuple):
    answers: str
    num_inner_epochs: int


BARS = {
    Cell("full", 1): {"separate": 1.5, "joint": 2.2},
    Cell("full", 4): {"separate": 1.25, "joint": 1.9},
    Cell("half", 1): {"separate": 2.5},
}
"""Ours / TRL's as it is, in episodes a second."""
LEAST_SHARE = 0.6
"""Of the machine's rate that the updates reach."""
CELLS = {f"{cell.answers}-{cell.num_inner_epochs}": cell for cell in BARS}
HERE = Path(__file__).parent
PACKAGES = ("trl", "transformers", "torch")


class Measured(NamedTuple):
    """One run. rate: episodes a second. cpu: seconds of all cores together. peak: resident memory, in MiB.

    Of ours alone: tokens of an answer, seconds of a step's parts, GFLOP/s of its update and of the bare products, as
    PyTorch makes them and as `pipeline.lm.products` does.
    """

    answers: str
    num_inner_epochs: int
    round: int
    arm: str
    rate: float
    cpu: float
    peak: float
    length: float = 0.0
    rollout: float = 0.0
    score: float = 0.0
    update: float = 0.0
    update_rate: float = 0.0
    machine_rate: float = 0.0
    widest_rate: float = 0.0

    @property
    def cell(self) -> Cell:
        return Cell(*self[:2])


def prepare(options: argparse.Namespace) -> dict[str, Any]:
    """Writes models, reward models and prompts. Returns what they are, and by what they are trained."""
    ask = f"import importlib.metadata as m, json; print(json.dumps({{n: m.version(n) for n in {PACKAGES}}}))"
    about: dict[str, Any] = {
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}",
        "threads": torch.get_num_threads(),
        "versions": json.loads(subprocess.check_output([options.trl_python, "-c", ask], text=True)),
    }
    options.work.mkdir(parents=True, exist_ok=True)
    tokenizer = training_jobs.train_tokenizer(iter([("a b c", "d", "e")] * 10))
    for name, odds in ODDS_OF_END.items():
        folder = options.work / name
        about["parameters"] = training_jobs.build(folder, "5M", tokenizer)
        training_jobs.set_odds_of_end(folder, odds)
        torch.manual_seed(1)
        AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1).save_pretrained(folder / "rm")
        chat = AutoTokenizer.from_pretrained(folder)
        chat.chat_template = TEMPLATE
        for each in (folder, folder / "rm"):
            chat.save_pretrained(each)
    draw = random.Random(SEED)
    prompts = [
        [draw.randrange(2, training_jobs.VOCABULARY) for _ in range(draw.randint(*PROMPT_TOKENS))]
        for _ in range(BATCH_SIZE * options.steps)
    ]
    (options.work / "prompts.jsonl").write_text("".join(f"{json.dumps(prompt)}\n" for prompt in prompts))
    return about | {"steps": options.steps, "mean_prompt": statistics.mean(map(len, prompts))}


def measure(options: argparse.Namespace, cell: Cell, round_: int, arm: str) -> Measured:
    """Runs one arm in its own process."""
    model = options.work / cell.answers
    job = {
        "model": str(model),
        "reward_model": str(model / "rm"),
        "rows": str(options.work / "prompts.jsonl"),
        "arm": arm,
        "value": arm,
        "batch_size": BATCH_SIZE,
        "max_tokens": MAX_TOKENS,
        "num_inner_epochs": cell.num_inner_epochs,
        "learning_rate": 1e-6,
        "seed": SEED,
    }
    is_ours = arm in ("separate", "joint")
    command = [sys.executable, HERE / "ppo_ours.py"] if is_ours else [options.trl_python, HERE / "peers/trl_ppo.py"]
    found = training_jobs.run(options.work, command, job)
    shutil.rmtree(model / "output", ignore_errors=True)
    own = (
        [found["length"], *found["parts"].values(), found["update"], found["machine"], found["widest"]]
        if is_ours
        else []
    )
    rate = BATCH_SIZE * (options.steps - 1) / found["seconds"]
    made = Measured(*cell, round_, arm, rate, found["cpu"], found["peak"] / 1024, *own)
    print(*(f"{each:.4g}" if isinstance(each, float) else each for each in made), flush=True)
    return made


def table(runs: Sequence[Measured]) -> str:
    """Markdown: medians of each arm, and its ratio to both of TRL's in the same rounds."""
    lines = [
        "| answers | inner epochs | arm | episodes/s | ÷ TRL | bar | ÷ TRL without gc | MiB |"
        f" rollout, score, update, s | update ÷ products, bar {LEAST_SHARE:.0%} | ÷ the widest |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for cell in dict.fromkeys(each.cell for each in runs):
        arms = {arm: [each for each in runs if each.cell == cell and each.arm == arm] for arm in ARMS}
        for arm, own in arms.items():
            cells = [*map(str, cell), arm, f"{median(own, 'rate'):.2f}"]
            if arm in ("separate", "joint"):
                bar = BARS[cell].get(arm)
                cells += [ratio(own, arms["TRL"]), f"≥ {bar}" if bar else "", ratio(own, arms["no-gc"])]
                parts = ", ".join(f"{median(own, part):.2f}" for part in ("rollout", "score", "update"))
                update = median(own, "update_rate")
                shares = [f"{update / median(own, machine):.0%}" for machine in ("machine_rate", "widest_rate")]
                cells += [f"{median(own, 'peak'):.0f}", parts, *shares]
            else:
                cells += ["", "", "", f"{median(own, 'peak'):.0f}", "", "", ""]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def ratio(own: Sequence[Measured], other: Sequence[Measured]) -> str:
    ratios = [a.rate / b.rate for a, b in zip(own, other, strict=True)]
    return f"{statistics.median(ratios):.2f} ({', '.join(f'{each:.2f}' for each in ratios)})"


def median(runs: Sequence[Measured], what: str) -> float:
    return statistics.median(getattr(each, what) for each in runs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl-python", required=True, help="of TRL 1.12's environment, made from peers/trl_ppo.txt")
    parser.add_argument("--cells", nargs="+", choices=CELLS, default=list(CELLS), help="answers, and inner epochs")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4, help="of each run, the first uncounted")
    parser.add_argument("--work", type=Path, default=Path("runs/ppo"), help="models and prompts")
    parser.add_argument("--out", type=Path, help="a file's name without its ending, for CSV and JSON")
    options = parser.parse_args()
    about, runs = prepare(options), list[Measured]()
    for cell, round_, arm in itertools.product(options.cells, range(1, options.rounds + 1), ARMS):
        runs.append(measure(options, CELLS[cell], round_, arm))
        if options.out:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            write(options.out, runs, about)
    print(table(runs))


if __name__ == "__main__":
    main()
