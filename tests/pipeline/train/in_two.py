"""Trainings in two processes, called by torchrun: a file of jobs in, their folders out; see `train_in_two`."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import nullcontext
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import CaiError
from pipeline.train import ranks
from tests.pipeline.train.ppo_jobs import run_ppo
from tests.pipeline.train.tiny_jobs import run_job
from tests.support import environment

ROOT = Path(__file__).parents[3]


def train_in_two(folder: Path, jobs: list[dict[str, Any]]) -> None:
    """Runs the jobs one after the other. Each: arguments of `run_job` or, with a `reward_model`, of `run_ppo`, and
    `steps`, after which it is stopped.
    """
    file = folder / "jobs.json"
    file.write_text(json.dumps(jobs, default=str))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*torchrun, "-m", "tests.pipeline.train.in_two", str(file)],
        cwd=ROOT,
        env=environment(PYTHONPATH=str(ROOT)),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr


def stopped_after(steps: int | None) -> Any:
    asked = count(1)
    return lambda: steps is not None and next(asked) >= steps


def main() -> None:
    with ranks.joined():
        for job in json.loads(Path(sys.argv[1]).read_text()):
            paths = {name: Path(job.pop(name)) for name in ("data", "start", "reward_model", "out") if name in job}
            run = run_ppo if "reward_model" in paths else run_job
            steps = job.pop("steps", None)
            stops = pytest.raises(CaiError) if steps else nullcontext()
            with stops as stopped:
                run(**paths, **job, device="cpu", should_stop=stopped_after(steps))
            assert not stopped or stopped.value.exit_code == 75


if __name__ == "__main__":
    main()
