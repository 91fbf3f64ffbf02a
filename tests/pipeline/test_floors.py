"""Imports go down only (DESIGN section 2), and what is slow is imported where it is used."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "pipeline").rglob("*.py"))
FLOORS = {
    **dict.fromkeys(("errors", "records", "config", "store", "sources", "conversations"), 0),
    **dict.fromkeys(("splits", "dataset_folder", "dataset_writer", "intervals", "worddiff", "calllog"), 0),
    **dict.fromkeys(("rates", "arguments", "hub"), 0),
    **dict.fromkeys(("engines.base", "journal", "lm", "lock"), 1),
    **dict.fromkeys(("engines", "driver"), 2),
    **dict.fromkeys(("stages", "train", "evaluate", "nano", "estimate", "reading"), 3),
    **dict.fromkeys(("recipe", "chain", "voices", "live_judge", "jobs", "report", "trial", "standing", "starter"), 4),
    **dict.fromkeys(("doctor", "checks", "calibrate", "vllm_rollouts"), 4),
    "cli": 5,
}
SLOW = ("torch", "transformers", "vllm", "openai", "datasets", "pyarrow", "safetensors", "tokenizers", "httpx")


def room_of(module: str) -> str:
    """The entry of FLOORS that a module `pipeline.x.y` belongs to; '' for the package itself."""
    inner = module.removeprefix("pipeline").lstrip(".")
    return inner if inner in FLOORS else inner.partition(".")[0]


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path, *, top_only: bool) -> Iterator[tuple[int, str]]:
    """Line and module of every import; top_only: of those that run when the file is imported."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        for child in ast.iter_child_nodes(node):
            inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or getattr(node, "lazy", False)
            typing_only = isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"
            child.lazy = inside or typing_only  # type: ignore[attr-defined]
    for node in ast.walk(tree):
        if top_only and getattr(node, "lazy", False):
            continue
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            known = [f"{node.module}.{alias.name}" for alias in node.names]
            modules = {module_of(file) for file in FILES}
            yield from ((node.lineno, name if name in modules else str(node.module)) for name in known)


def test_every_room_stands_on_a_floor() -> None:
    rooms = {room_of(module_of(path)) for path in FILES} - {""}
    assert rooms <= FLOORS.keys()


@pytest.mark.parametrize("path", FILES, ids=[module_of(path) for path in FILES])
def test_a_file_imports_lower_floors_and_its_own_room(path: Path) -> None:
    here = room_of(module_of(path))
    for line, module in imports(path, top_only=False):
        if not module.startswith("pipeline") or not room_of(module) or not here:
            continue
        there = room_of(module)
        allowed = FLOORS[there] < FLOORS[here] or there == here or (there, here) == ("engines", "engines.base")
        # Files of floors 0, 1 and 4 may use a neighbour; rooms of floor 3 do not import one another.
        neighbours = FLOORS[there] == FLOORS[here] and FLOORS[here] in (0, 1, 4)
        world = here in ("evaluate", "train") and module == "pipeline.nano.world"
        assert allowed or neighbours or world, f"{path}:{line}: {here} (floor {FLOORS[here]}) imports {module}"


def test_the_constitution_knows_nothing_of_the_pipeline_and_of_torch() -> None:
    for path in sorted((ROOT / "constitution").glob("*.py")):
        for line, module in imports(path, top_only=False):
            assert module.partition(".")[0] not in ("pipeline", *SLOW), f"{path}:{line}: {module}"


@pytest.mark.parametrize("room", ["errors", "records", "config", "store", "journal", "driver", "recipe", "cli", "lock"])
def test_what_every_command_imports_imports_nothing_slow(room: str) -> None:
    for path in FILES:
        if room_of(module_of(path)) == room:
            for line, module in imports(path, top_only=True):
                assert module.partition(".")[0] not in SLOW, f"{path}:{line}: {module}"


def test_help_and_the_scripted_engine_load_nothing_slow() -> None:
    code = (
        "import sys; sys.argv = ['cai', '--help']\n"
        "from pipeline.cli import cli\n"
        "cli.main(standalone_mode=False)\n"
        "import pipeline.recipe, pipeline.engines.scripted\n"
        f"print([name for name in {SLOW!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.splitlines()[-1] == "[]"
