"""Runs one step of TRL 1.12's PPO on tiny networks and keeps what it computed, as what our own is tested against.

    PYTHONPATH=. python benchmarks/agreement_ppo.py --trl-python .venv-trl-ppo/bin/python

Writes tests/pipeline/train/data/trl_ppo.safetensors, whose header names versions, command and TRL's metrics;
tests/pipeline/train/test_agreement_ppo.py reads it. Networks, prompts and settings are those of
tests/pipeline/train/agreed_ppo.py. Running it again gives the same file.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from agreement import DATA, PACKAGES, ROOT, run, write_tokenizer
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.pipeline.train.agreed_ppo import (
    ADAM_EPS,
    BATCH_SIZE,
    CASES,
    COMMON,
    MAX_TOKENS,
    MINIBATCH_SIZE,
    NUM_INNER_EPOCHS,
    make_networks,
    make_prompts,
)

COMMAND = "PYTHONPATH=. python benchmarks/agreement_ppo.py"


def run_trl(python: str, case: str, folder: Path) -> tuple[dict[str, float], dict[str, Tensor]]:
    """TRL's metrics, and what it computed on the way."""
    for name, model in make_networks().items():
        model.save_pretrained(folder / name)
    write_tokenizer(folder / "policy")
    rows, kept, job = folder / "rows.jsonl", folder / "kept.safetensors", folder / "job.json"
    rows.write_text("".join(f"{json.dumps(prompt)}\n" for prompt in make_prompts()))
    settings = {**COMMON, **CASES[case]}
    job.write_text(
        json.dumps(
            {
                "model": str(folder / "policy"),
                **{name: str(folder / name) for name in ("reference", "value_model", "reward_model")},
                "rows": str(rows),
                "batch_size": BATCH_SIZE,
                "num_inner_epochs": NUM_INNER_EPOCHS,
                "max_tokens": MAX_TOKENS,
                "learning_rate": settings.pop("learning_rate"),
                "options": {
                    **settings,
                    "num_mini_batches": BATCH_SIZE // MINIBATCH_SIZE,
                    "adam_epsilon": ADAM_EPS,
                    "disable_tqdm": True,
                },
                "seed": 0,
                "save": str(kept),
            }
        )
    )
    found: dict[str, float] = json.loads(run(python, str(ROOT / "benchmarks/peers/trl_ppo_kept.py"), str(job)))
    return found, load_file(kept)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl-python", required=True, help="of TRL 1.12's environment, made from peers/trl_ppo.txt")
    python = parser.parse_args().trl_python
    ask = f"import json, importlib.metadata as m; print(json.dumps({{n: m.version(n) for n in {PACKAGES}}}))"
    header: dict[str, Any] = {"command": COMMAND, "versions": json.loads(run(python, "-c", ask)), "metrics": {}}
    tensors = {}
    for case in CASES:
        with tempfile.TemporaryDirectory() as folder:
            header["metrics"][case], kept = run_trl(python, case, Path(folder))
        tensors |= {f"{case}/{name}": value for name, value in kept.items()}
        print(case, header["metrics"][case], file=sys.stderr)
    about = {name: json.dumps(value) for name, value in header.items()}
    save_file(tensors, DATA / "trl_ppo.safetensors", metadata=about)


if __name__ == "__main__":
    main()
