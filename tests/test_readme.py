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


def test_every_file_that_the_readme_names_is_there():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    for row in rows:
        first, *others = re.findall(r"`([^`]+)`", row)
        folder = Path(first).parent
        for name in (first, *(str(folder / other) for other in others)):
            assert (ROOT / name).exists(), name
    for link in re.findall(r"\]\((?!https:)([^)]+)\)", text):
        assert (ROOT / link).exists(), link
