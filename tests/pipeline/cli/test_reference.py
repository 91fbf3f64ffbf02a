"""The reference and the help text."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.cli import COMMANDS
from pipeline.cli.reference import reference
from tests.support import Command

ROOT = Path(__file__).parents[3]
HEAVY = ("torch", "transformers", "openai", "datasets", "pyarrow", "vllm", "rich")


def test_the_reference_is_what_the_commands_say() -> None:
    page = ROOT / "docs" / "cli.md"
    assert page.read_text() == reference(), f"run: python -m pipeline.cli.reference > {page.relative_to(ROOT)}"


def test_help_takes_less_than_three_tenths_of_a_second_of_cpu(cai: Command) -> None:
    """CPU time, because other work on the machine lengthens the wait."""
    times = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert cai("--help").returncode == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert 0 < min(times) < 0.3


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_a_command_loads_nothing_heavy(name: str) -> None:
    code = f"""
import sys
from pipeline.cli import cli
cli.main([{name!r}, "--help"], standalone_mode=False)
print(*(module for module in {HEAVY!r} if module in sys.modules), file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr.strip()) == (0, "")
