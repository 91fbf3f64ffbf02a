"""Our trainers beside TRL's, tuned: pairs a second of one epoch, the reference pass counted, and peak memory.

    OMP_NUM_THREADS=2 python benchmarks/train.py --trl-python .venv-trl/bin/python --out benchmarks/results/train

Every run has a process of its own; rows, their order, batch and optimiser are the same. Rounds are interleaved: every
arm once, then every arm again; ratios are of one round. README.md beside this file says what the arms are.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import training_jobs
from measured import write

from pipeline.train.batches import batch_at

BATCH_SIZE, SEED = 8, 0
ARMS = {
    "sft": ("ours", "unpacked", "packed"),
    "rm": ("ours", "padded"),
    "dpo": ("ours", "inline", "precomputed"),
}
"""Ours, and TRL's ways; DPO's two are where the reference's log-probabilities come from."""
SHOWN = "packed"
"""An arm without a bar: it makes other batches."""
DATA = ("1:1", "4:1", "1:4", "hh-rlhf")
BARS = {"sft": dict.fromkeys(DATA, 1.3), "rm": dict.fromkeys(DATA, 1.5)} | {
    "dpo": {"1:1": 2.0, "4:1": 2.5, "1:4": 1.5, "hh-rlhf": 3.0}
}
"""Ours / TRL's in pairs a second."""
HERE = Path(__file__).parent
PACKAGES = ("trl", "transformers", "torch")


class Cell(NamedTuple):
    model: str
    data: str
    trainer: str
    precision: str


class Measured(NamedTuple):
    """One run. rate: pairs a second. cpu: seconds of all cores together, which other work hardly changes.

    peak: resident memory at most, in MiB. first_loss: of its first step.
    """

    model: str
    data: str
    trainer: str
    precision: str
    round: int
    arm: str
    pairs: int
    seconds: float
    rate: float
    cpu: float
    peak: float
    first_loss: float

    @property
    def cell(self) -> Cell:
        return Cell(*self[:4])


def prepare(options: argparse.Namespace) -> dict[str, Any]:
    """Writes models and rows. Returns what they are."""
    texts = itertools.chain.from_iterable(training_jobs.real_texts(options.hh_rlhf))
    tokenizer = training_jobs.train_tokenizer(texts)
    options.work.mkdir(parents=True, exist_ok=True)
    ask = f"import importlib.metadata as m, json; print(json.dumps({{n: m.version(n) for n in {PACKAGES}}}))"
    about: dict[str, Any] = {
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}",
        "threads": torch.get_num_threads(),
        "versions": json.loads(subprocess.check_output([options.trl_python, "-c", ask], text=True)),
        "parameters": {},
        "mean_tokens": {},
    }
    for model in options.models:
        about["parameters"][model] = training_jobs.build(options.work / model, model, tokenizer)
        pairs = options.pairs[model]
        for data in options.data:
            if data == "hh-rlhf":
                rows = training_jobs.real(options.hh_rlhf, tokenizer, pairs)
            else:
                rows = training_jobs.synthetic(data, pairs)
            about["mean_tokens"][data] = training_jobs.write(rows_path(options, model, data, "ours"), rows)
            steps = range(-(-pairs // BATCH_SIZE))
            order = [n for step in steps for n in batch_at(step, num_rows=pairs, batch_size=BATCH_SIZE, seed=SEED)]
            training_jobs.write(rows_path(options, model, data, "TRL"), [rows[n] for n in order])
    return about


def rows_path(options: argparse.Namespace, model: str, data: str, arm: str) -> Path:
    """TRL takes its rows in the file's order, so that stands in the order in which ours draws them."""
    order = "" if arm == "ours" else "-in-order"
    return Path(options.work) / f"{data}-{options.pairs[model]}{order}.jsonl"


def measure(options: argparse.Namespace, cell: Cell, round_: int, arm: str) -> Measured:
    """Runs one arm in its own process."""
    job = {
        "trainer": cell.trainer,
        "arm": arm,
        "model": str(options.work / cell.model),
        "rows": str(rows_path(options, cell.model, cell.data, arm)),
        "precision": cell.precision,
        "batch_size": BATCH_SIZE,
        "learning_rate": 1e-5,
        "seed": SEED,
    }
    command = [sys.executable, HERE / "train_ours.py"]
    if arm != "ours":
        command = [options.trl_python, HERE / "peers/trl_trainer.py"]
    found = training_jobs.run(options.work, command, job)
    pairs, seconds = options.pairs[cell.model], found["seconds"]
    peak, first_loss = found["peak"] / 1024, found["losses"][0]
    made = Measured(*cell, round_, arm, pairs, seconds, pairs / seconds, found["cpu"], peak, first_loss)
    print(*(f"{each:.4g}" if isinstance(each, float) else each for each in made), flush=True)
    return made


def table(runs: Sequence[Measured]) -> str:
    """Markdown: medians, and ours / TRL's of the same rounds; of DPO's two ways the one with the better median."""
    lines = [
        "| model | pairs | trainer | arithmetic | pairs/s | TRL | pairs/s | ours ÷ TRL | bar | CPU time | MiB | TRL |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for cell in dict.fromkeys(each.cell for each in runs):
        arms: dict[str, list[Measured]] = {}
        for each in runs:
            if each.cell == cell:
                arms.setdefault(each.arm, []).append(each)
        ours = arms.pop("ours")
        best = max((arm for arm in arms if arm != SHOWN), key=lambda arm: median(arms[arm], "rate"))
        lines.append(row(cell, best, ours, arms[best], f"≥ {BARS[cell.trainer][cell.data]}"))
        lines += [row(cell, SHOWN, ours, arms[SHOWN], "")] if SHOWN in arms else []
    return "\n".join(lines)


def row(cell: Cell, arm: str, ours: Sequence[Measured], theirs: Sequence[Measured], bar: str) -> str:
    ratios, by_cpu = compare(ours, theirs)
    rates = [f"{median(each, 'rate'):.2f}" for each in (ours, theirs)]
    peaks = [f"{median(each, 'peak'):.0f}" for each in (ours, theirs)]
    ratio = f"{statistics.median(ratios):.2f} ({', '.join(f'{each:.2f}' for each in ratios)})"
    return "| " + " | ".join([*cell, rates[0], arm, rates[1], ratio, bar, f"{by_cpu:.2f}", *peaks]) + " |"


def compare(ours: Sequence[Measured], theirs: Sequence[Measured]) -> tuple[list[float], float]:
    """Ours / theirs: pairs a second in each round, and pairs a CPU second as a median."""
    pairs = list(zip(ours, theirs, strict=True))
    return [own.rate / their.rate for own, their in pairs], statistics.median(b.cpu / a.cpu for a, b in pairs)


def median(runs: Sequence[Measured], what: str) -> float:
    return statistics.median(getattr(each, what) for each in runs)


def backbone_table(found: dict[str, Any]) -> str:
    lines = ["| model | matrix products, GFLOP/s | at their widest | backbone | share |", "|---|---|---|---|---|"]
    for model, rates in found.items():
        machine, backbone = rates["machine"], rates["backbone"]
        share = f"{backbone / machine:.0%}, {backbone / rates['widest']:.0%}"
        lines.append(f"| {model} | {machine:.0f} | {rates['widest']:.0f} | {backbone:.0f} | {share} |")
    return "\n".join(lines)


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl-python", required=True, help="of TRL's environment, made from peers/trl.txt")
    parser.add_argument("--hh-rlhf", type=Path, default=Path("harmless-base-test.jsonl.gz"), help="its pairs")
    parser.add_argument("--models", nargs="+", choices=training_jobs.SHAPES, default=list(training_jobs.SHAPES))
    parser.add_argument("--data", nargs="+", choices=DATA, default=list(DATA))
    parser.add_argument("--trainers", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--precisions", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pairs", type=int, nargs=2, default=[64, 16], help="of a run of the 5M and of the 30M model")
    parser.add_argument("--work", type=Path, default=Path("runs/train"), help="models and rows")
    parser.add_argument(
        "--out",
        type=Path,
        help="a file's name without its ending, for CSV and JSON; several calls add up",
    )
    options = parser.parse_args()
    options.pairs = dict(zip(training_jobs.SHAPES, options.pairs, strict=True))
    return options


def kept(path: Path | None) -> tuple[list[Measured], dict[str, Any]]:
    """Runs and the backbone's rates that were measured into this file before."""
    file = path and path.with_suffix(".json")
    if not file or not file.exists():
        return [], {}
    found = json.loads(file.read_text())
    return [Measured(**each) for each in found["runs"]], found["backbone"]


def main() -> None:
    options = read_options()
    about, (runs, backbone) = prepare(options), kept(options.out)
    job = {"models": [str(options.work / model) for model in options.models]}
    backbone |= training_jobs.run(options.work, [sys.executable, HERE / "backbone.py"], job)
    for cell in itertools.product(options.models, options.data, options.trainers, options.precisions):
        made = [
            measure(options, Cell(*cell), round_, arm)
            for round_, arm in itertools.product(range(1, options.rounds + 1), ARMS[cell[2]])
        ]
        runs = [each for each in runs if each.cell != cell] + made
        if options.out:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            write(options.out, runs, {**about, "backbone": backbone})
    print(table(runs), backbone_table(backbone), sep="\n\n")


if __name__ == "__main__":
    main()
