"""Files of JSON lines that grow with a training; a resumed one cuts off what came after its checkpoint."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from pipeline.records import Line
from pipeline.store import io_errors
from pipeline.train import ranks


class LineFile:
    """Written by the first process; called by all."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, lines: Iterable[Line]) -> None:
        def write() -> None:
            with io_errors(self.path), self.path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(line) + "\n" for line in lines)

        ranks.first(write)

    def size(self) -> int:
        """Bytes, 0 if there is none."""
        return ranks.first(lambda: self.path.stat().st_size if self.path.exists() else 0)

    def last_evaluation(self) -> dict[str, float]:
        """Of the last line."""
        line: Line = ranks.first(lambda: json.loads(self.path.read_text(encoding="utf-8").splitlines()[-1]))
        return {name: value for name, value in line.items() if name.startswith("eval/")}

    def cut(self, size: int) -> None:
        def truncate() -> None:
            if self.path.exists():
                with io_errors(self.path), self.path.open("r+b") as file:
                    file.truncate(size)

        ranks.first(truncate)
