"""A dataset that export wrote, as its readers see it: a card that names the current version, files to verify."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import yaml

from pipeline.errors import CorruptError
from pipeline.store import io_errors


def read_card(folder: Path) -> dict[str, Any]:
    """The card's word on the current version: {"version", "files": {name: {"rows", "sha256"}}}; {} without a card."""
    path = folder / "README.md"
    if not path.exists():
        return {}
    with io_errors(path):
        content = path.read_bytes()
    try:
        card = yaml.safe_load(content.decode().split("---\n")[1])["cai"]
        return {"version": f"v{int(card['version'][1:]):04d}", "files": dict(card["files"])}
    except (IndexError, KeyError, TypeError, ValueError, yaml.YAMLError) as error:
        raise CorruptError(f"{path}: does not name a version; delete {folder} and run `cai export` again") from error


def verify(folder: Path) -> dict[str, Path]:
    """The current version's files by split, each whole. Raises CorruptError (4) with the file."""
    card = read_card(folder)
    found = {}
    for name, entry in card.get("files", {}).items():
        path = folder / card["version"] / name
        if not path.is_file() or file_sha256(path) != entry["sha256"]:
            raise CorruptError(f"{path}: is not what its card says; delete {folder} and run `cai export` again")
        found[path.stem] = path
    return found


def file_sha256(path: Path) -> str:
    with io_errors(path), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
