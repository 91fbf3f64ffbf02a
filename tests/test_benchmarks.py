"""Benchmarks use the project from outside and run rarely: they must at least find what they use."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_every_benchmark_finds_what_it_imports() -> None:
    names = sorted(path.stem for path in (ROOT / "benchmarks").glob("*.py"))
    search = f"import sys; sys.path[:0] = [{str(ROOT / 'benchmarks')!r}, {str(ROOT)!r}]; "
    done = subprocess.run([sys.executable, "-c", f"{search}import {', '.join(names)}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "ppo" in names
