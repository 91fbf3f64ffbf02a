"""The README's commands, run as they stand there, one after the other, in an empty folder."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parents[1]


def commands() -> list[str]:
    """The block of commands under "Your model, your principles", without the comments behind them."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    block = text.split("## Your model, your principles")[1].split("##")[0]
    return [line.split("  #")[0].strip() for line in re.findall(r"^    (cai .*)$", block, re.M)]


def test_the_five_commands_work_in_order_in_an_empty_folder(cai):
    asked = commands()
    assert [line.split()[1] for line in asked] == ["init", "try", "run", "run", "show"]
    for line in asked:
        ended = cai(*shlex.split(line)[1:], timeout=240)
        assert ended.returncode == 0, f"{line}: {ended.stderr}"
    assert (cai.folder / "runs" / "first" / "datasets" / "preference" / "README.md").exists()


def listed() -> set[Path]:
    """What the table under "What is where" names; further names of a row lie beside its first."""
    text = (ROOT / "README.md").read_text(encoding="utf-8").split("## What is where")[1].split("##")[0]
    rows = [re.findall(r"`([^`]+)`", line.split("|")[1]) for line in text.splitlines() if line.startswith("| `")]
    return {ROOT / Path(row[0]).parent / Path(name).name for row in rows for name in row}


def test_every_file_that_the_readme_names_is_there():
    assert [str(path) for path in listed() if not path.exists()] == []
    for link in re.findall(r"\]\((?!https:)([^)]+)\)", (ROOT / "README.md").read_text(encoding="utf-8")):
        assert (ROOT / link).exists(), link


def test_every_room_and_module_is_named_in_the_readme():
    modules = [path for path in (ROOT / "pipeline").glob("*.py") if path.name != "__init__.py"]
    rooms = [path.parent for path in (ROOT / "pipeline").glob("*/__init__.py")]
    assert {*modules, *rooms} <= listed()
