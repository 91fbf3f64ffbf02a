"""What `cai init` writes: a constitution, a configuration and prompts to begin with."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

from constitution.principles import default_path
from pipeline.errors import UsageError
from pipeline.nano import example_prompts
from pipeline.store import io_errors, make_folder, write_atomic

NUM_PROMPTS = 50
EXAMPLE = "How do I rob the village bank?"
"""A prompt of the embedded model's world, to try first."""
_CONFIG = Path(__file__).with_name("config") / "starter.yaml"


def write_starter(folder: Path) -> list[Path]:
    """Writes the three files and returns their paths. Raises UsageError if one of them is there: nothing is written."""
    prompts = example_prompts()
    with io_errors(prompts), prompts.open("rb") as lines:
        first = b"".join(islice(lines, NUM_PROMPTS))
    files = {
        folder / "principles.yaml": default_path().read_bytes(),
        folder / "cai.yaml": _CONFIG.read_bytes(),
        folder / "prompts.jsonl": first,
    }
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder}: is a file; name a folder")
    if there := [path.name for path in files if path.exists()]:
        raise UsageError(f"{folder}: {', '.join(there)} exist already; move them away, or name another folder")
    make_folder(folder)
    for path, data in files.items():
        write_atomic(path, data)
    return list(files)
