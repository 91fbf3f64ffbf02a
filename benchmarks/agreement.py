"""Trains a tiny model with TRL and keeps its losses and changed weights as what our own trainers are tested against.

    PYTHONPATH=. python benchmarks/agreement.py --trl-python .venv-trl/bin/python

Writes tests/pipeline/train/data/trl.json and trl.safetensors; tests/pipeline/train/test_agreement.py reads them. The
model, the rows and the trainings are those of tests/pipeline/train/agreed.py.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from tests.pipeline.train.agreed import (
    BATCH_SIZE,
    CASES,
    END,
    LEARNING_RATE,
    PAD,
    VOCABULARY,
    Case,
    make_model,
    make_rows,
)

ROOT = Path(__file__).parents[1]
DATA = ROOT / "tests/pipeline/train/data"
PACKAGES = ("trl", "transformers", "torch", "accelerate")


def run_trl(python: str, case: Case, folder: Path) -> tuple[list[float], dict[str, Tensor]]:
    """Losses of each step, and what was added to each weight."""
    make_model("score" if case.trainer == "rm" else "language").save_pretrained(folder)
    write_tokenizer(folder)
    rows, added, job = folder / "rows.jsonl", folder / "added.safetensors", folder / "job.json"
    rows.write_text("".join(json.dumps(row) + "\n" for row in make_rows()))
    options = {**case.theirs, "gradient_accumulation_steps": BATCH_SIZE // case.theirs_at_a_time}
    job.write_text(
        json.dumps(
            {
                "trainer": case.trainer,
                "arm": "inline",
                "model": str(folder),
                "rows": str(rows),
                "precision": "float32",
                "batch_size": case.theirs_at_a_time,
                "learning_rate": LEARNING_RATE,
                "options": options,
                "save": str(added),
            }
        )
    )
    found = json.loads(run(python, str(ROOT / "benchmarks/peers/trl_trainer.py"), str(job)))
    return found["losses"], load_file(added)


def write_tokenizer(folder: Path) -> None:
    """TRL wants one, though the rows are tokens."""
    vocabulary = {"<pad>": PAD, "<end>": END} | {f"t{n}": n for n in range(2, VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>").save_pretrained(folder)


def run(*command: str) -> str:
    """The last line of its output."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr}")
    return done.stdout.splitlines()[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl-python", required=True, help="of TRL's environment, made from peers/trl.txt")
    python = parser.parse_args().trl_python
    ask = f"import json, importlib.metadata as m; print(json.dumps({{n: m.version(n) for n in {PACKAGES}}}))"
    kept: dict[str, Any] = {"versions": json.loads(run(python, "-c", ask)), "losses": {}}
    weights = {}
    for name, case in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            kept["losses"][name], added = run_trl(python, case, Path(folder))
        weights |= {f"{name}/{parameter}": value for parameter, value in added.items()}
        print(name, kept["losses"][name], file=sys.stderr)
    DATA.mkdir(exist_ok=True)
    (DATA / "trl.json").write_text(json.dumps(kept, indent=1) + "\n")
    save_file(weights, DATA / "trl.safetensors")


if __name__ == "__main__":
    main()
