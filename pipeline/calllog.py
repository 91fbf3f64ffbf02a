"""What was called on a run, when, and how it ended: `log.jsonl`, a line a call, and `summary.json`, the last one."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pipeline.errors import CaiError
from pipeline.records import Line, line_bytes
from pipeline.store import io_errors, write_all, write_atomic


@contextmanager
def logged(folder: Path, report: dict[str, Any]) -> Iterator[None]:
    """Writes both when the block ends, also when it raises. report: filled by the block. The caller holds the lock."""
    began, ended = time.monotonic(), ""
    entry: Line = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "argv": sys.argv[1:],
        "version": version("constitutional-pipeline"),
    }
    try:
        yield
    except BaseException as error:
        ended = f"{type(error).__name__}: {error}" if isinstance(error, CaiError) else type(error).__name__
        raise
    finally:
        entry |= {"seconds": round(time.monotonic() - began, 3), "error": ended, "counts": report["counts"]}
        # A full disk has its own error already; the log must not hide it.
        if not ended.startswith("ResourceError"):
            _append(folder / "log.jsonl", entry)
            write_atomic(folder / "summary.json", json.dumps(entry, indent=1).encode() + b"\n")


def last_call(folder: Path) -> Line | None:
    """The newest line of the log that is whole."""
    path = folder / "log.jsonl"
    if not path.exists():
        return None
    with io_errors(path):
        lines = path.read_bytes().split(b"\n")
    for line in reversed(lines[:-1]):
        try:
            found: Line = json.loads(line)
        except ValueError:
            continue
        return found
    return None


def _append(path: Path, entry: Line) -> None:
    with io_errors(path):
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            size = os.fstat(fd).st_size
            torn = size > 0 and os.pread(fd, 1, size - 1) != b"\n"
            write_all(fd, b"\n" * torn + line_bytes(entry))
        finally:
            os.close(fd)
