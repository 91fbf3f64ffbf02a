"""A dataset on disk: versions of Parquet files, and a card that names the current one.

Rows come in any order and leave sorted by id; what does not fit into memory waits in sorted files on disk. The same
rows give the same bytes, and no new version. A version becomes current when its card replaces the old one.
"""

from __future__ import annotations

import heapq
import itertools
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import yaml

from pipeline.dataset_folder import file_sha256, read_card, verify
from pipeline.records import digest, line_bytes
from pipeline.store import io_errors, make_folder, sync_folder, write_atomic

if TYPE_CHECKING:
    import pyarrow as pa

SPLITS = ("train", "test")
_NEW = ".new"
_EMPTY = "\nNo row was left for this dataset: there is nothing to load. The version before it had some.\n"
_SORT_BYTES = 16 << 20
_FAN_IN = 64
_GROUP_ROWS = 1000
_GROUP_BYTES = 8 << 20


class Published(NamedTuple):
    """version: the current one, '' if there never was a row. rows: per split. is_new: made by this call."""

    version: str
    rows: dict[str, int]
    is_new: bool


class DatasetWriter:
    """Takes the rows of one dataset, then publishes them as a version of it."""

    def __init__(self, folder: Path, schema: pa.Schema) -> None:
        self.folder = folder
        self.schema = schema
        self._new = folder / _NEW
        _clear(self._new)
        self._sorters = {split: Sorter(self._new, split) for split in SPLITS}

    def add(self, split: str, row: dict[str, Any]) -> None:
        """split: train or test. row: as the schema says, its `id` unique in the dataset."""
        self._sorters[split].add(row)

    def num_rows(self, split: str) -> int:
        return self._sorters[split].num_rows

    def publish(self, text: str) -> Published:
        """Makes the rows the current version. text: what the card says of them, in Markdown."""
        before = read_card(self.folder)
        _clear_after(self.folder, before.get("version", ""))
        files = {}
        for split, sorter in self._sorters.items():
            if sorter.num_rows:
                make_folder(self._new)
                files[f"{split}.parquet"] = _write_parquet(self._new / f"{split}.parquet", sorter.rows(), self.schema)
        rows = {split: sorter.num_rows for split, sorter in self._sorters.items()}
        if not files and not before:
            _clear(self._new)
            return Published("", rows, False)
        if is_new := files != before.get("files"):
            version = f"v{int(before.get('version', 'v0')[1:]) + 1:04d}"
            self._install(version, files)
        else:
            version = before["version"]
            verify(self.folder)
            _clear(self._new)
        card = _card(version, files, text if files else _EMPTY + text)
        if is_new or (self.folder / "README.md").read_bytes() != card:
            write_atomic(self.folder / "README.md", card)
        return Published(version, rows, is_new)

    def _install(self, version: str, files: dict[str, Any]) -> None:
        """Puts the new files in the version's place."""
        make_folder(self._new)
        target = self.folder / version
        with io_errors(target):
            for leftover in self._new.iterdir():
                if leftover.name not in files:
                    leftover.unlink()
            sync_folder(self._new)
            os.rename(self._new, target)
            sync_folder(self.folder)


def _card(version: str, files: dict[str, Any], text: str) -> bytes:
    data_files = [{"split": name.partition(".")[0], "path": f"{version}/{name}"} for name in files]
    # The cache of `datasets` tells folders of one name apart by their configs alone, not by path, time or content.
    described = {"description": f"rows {digest(files)}"} if files else {}
    front = {
        "configs": [{"config_name": "default", "data_files": data_files, **described}],
        "cai": {"version": version, "files": files},
    }
    return f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n{text}".encode()


def _clear(folder: Path) -> None:
    with io_errors(folder):
        if folder.exists():
            shutil.rmtree(folder)


def _clear_after(folder: Path, version: str) -> None:
    """Removes versions that a killed run made and did not get to name."""
    for path in folder.glob("v*"):
        if path.name > version:
            _clear(path)


class Sorter:
    """Rows in, rows sorted by id out; at most `_SORT_BYTES` in memory.

    A row is kept as its id, a NUL and its JSON, whose byte order is the order of the ids.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.num_rows = 0
        self._folder = folder
        self._name = name
        self._lines: list[bytes] = []
        self._num_bytes = 0
        self._files: list[Path] = []
        self._names = itertools.count()

    def add(self, row: dict[str, Any]) -> None:
        line = row["id"].encode() + b"\0" + line_bytes(row)
        self._lines.append(line)
        self._num_bytes += len(line)
        self.num_rows += 1
        if self._num_bytes >= _SORT_BYTES:
            self._files.append(self._spill(sorted(self._lines)))
            self._lines, self._num_bytes = [], 0

    def rows(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Size in bytes and row, sorted by id; as often as it is called, with no row added since."""
        while len(self._files) > _FAN_IN:
            merged = self._spill(self._merged(self._files[:_FAN_IN]))
            for file in self._files[:_FAN_IN]:
                file.unlink()
            self._files = [*self._files[_FAN_IN:], merged]
        self._lines.sort()
        last = b""
        for line in heapq.merge(self._merged(self._files), self._lines):
            key, _, row = line.partition(b"\0")
            if key == last:
                raise ValueError(f"{self._folder.parent}: two rows with the id {key.decode()}")
            last = key
            yield len(row), json.loads(row)

    def _spill(self, lines: Iterable[bytes]) -> Path:
        make_folder(self._folder)
        path = self._folder / f"{self._name}-{next(self._names)}.sorted"
        with io_errors(path), path.open("wb") as file:
            file.writelines(lines)
        return path

    def _merged(self, paths: Iterable[Path]) -> Iterator[bytes]:
        with ExitStack() as stack:
            yield from heapq.merge(*[stack.enter_context(path.open("rb")) for path in paths])


def _write_parquet(path: Path, rows: Iterable[tuple[int, dict[str, Any]]], schema: pa.Schema) -> dict[str, Any]:
    """Writes and fsyncs one file; its row groups end where the rows say, not where memory does."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    num_rows = 0
    with io_errors(path), path.open("wb") as file:
        with pq.ParquetWriter(file, schema, compression="zstd", version="2.6", write_statistics=False) as writer:
            for group in _groups(rows):
                writer.write_table(pa.Table.from_pylist(group, schema=schema), row_group_size=len(group))
                num_rows += len(group)
        file.flush()
        os.fsync(file.fileno())
    return {"rows": num_rows, "sha256": file_sha256(path)}


def _groups(rows: Iterable[tuple[int, dict[str, Any]]]) -> Iterator[list[dict[str, Any]]]:
    group: list[dict[str, Any]] = []
    num_bytes = 0
    for size, row in rows:
        group.append(row)
        num_bytes += size
        if len(group) == _GROUP_ROWS or num_bytes >= _GROUP_BYTES:
            yield group
            group, num_bytes = [], 0
    if group:
        yield group
