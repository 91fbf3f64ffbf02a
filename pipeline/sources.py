"""Files and data sets of other projects, read lazily; and the prompts in them, one `Row` per conversation.

What a row means is in conversations.py and docs/prompts.md. Duplicates are the ingest's business.
"""

from __future__ import annotations

import gzip
import hashlib
import heapq
import itertools
import json
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from io import BufferedReader
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qsl

import jsonlines

from pipeline import hub
from pipeline.conversations import DOCS, read_conversation, read_id, read_strings
from pipeline.errors import UsageError
from pipeline.records import Message, digest, message_id

JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
TEXT_SUFFIXES = (".txt", ".text")
PARQUET_SUFFIX = ".parquet"
_BATCH_ROWS = 256
HF_KEYS = ("config", "split", "column", "revision")


@dataclass(frozen=True)
class Spec:
    """One source of prompts.

    path: a file, or `hf:NAME?config=&split=&column=&revision=`, NAME a data set or a local folder of them.
    tags: given to every row, after the row's own. limit: at most so many rows, None for all.
    weight: above 0; its share of every beginning of the mix.
    """

    path: str
    tags: tuple[str, ...] = ()
    limit: int | None = None
    weight: float = 1.0


class Row(NamedTuple):
    """A prompt. given: answers to be ranked beside our own. answer: what the assistant said next, or ''."""

    id: str
    messages: list[Message]
    given: list[str]
    tags: list[str]
    source: str
    answer: str = ""


@dataclass
class Counts:
    """What reading did. rows: per source. merged_turns: joined to a turn of the same role before them.
    answers_cut: rows whose conversation went on after the last user turn."""

    rows: dict[str, int] = field(default_factory=dict)
    merged_turns: int = 0
    answers_cut: int = 0


def mix(specs: Iterable[Spec], counts: Counts | None = None) -> Iterator[Row]:
    """All rows of all sources; every beginning holds them in proportion to their weights, while they last."""
    waiting: list[tuple[float, int, int, Iterator[Row], float]] = []
    for place, spec in enumerate(specs):
        if not spec.weight > 0:
            raise UsageError(f"{spec.path}: weight {spec.weight} is not above 0; limit 0 leaves it out")
        heapq.heappush(waiting, (0.5 / spec.weight, place, 0, read(spec, counts), spec.weight))
    while waiting:
        _, place, taken, rows, weight = heapq.heappop(waiting)
        row = next(rows, None)
        if row is not None:
            yield row
            heapq.heappush(waiting, ((taken + 1.5) / weight, place, taken + 1, rows, weight))


def read(spec: Spec, counts: Counts | None = None) -> Iterator[Row]:
    """The rows of one source, in its order. Raises UsageError with the line and a cure."""
    counts = counts if counts is not None else Counts()
    source = source_name(spec.path)
    counts.rows.setdefault(source, 0)
    if spec.limit == 0:
        return
    column = hf_parts(spec.path)[1].get("column") if is_hf(spec.path) else None
    for taken, (where, fields) in enumerate(read_fields(spec.path), 1):
        row = _row(fields, where, source, spec.tags, column, counts)
        counts.rows[source] += 1
        yield row
        if taken == spec.limit:
            return


def source_name(path: str) -> str:
    """What rows say of where they come from: a file's base name, a data set's name; no folder and no host."""
    if not is_hf(path):
        return Path(path).name
    name = hf_parts(path)[0]
    return "hf:" + (Path(name).resolve().name if Path(name).exists() else name)


def source_digest(specs: Iterable[Spec]) -> str:
    """sha256 of what the sources hold and how they are mixed; the same wherever the files lie.

    A data set on the hub counts as its name and options; only a pinned `revision=` says what it holds.
    """
    parts = []
    for spec in specs:
        contents = _hf_digest(spec.path) if is_hf(spec.path) else _file_digest(spec.path)
        parts.append([source_name(spec.path), list(spec.tags), spec.limit, spec.weight, contents])
    return digest(parts)


# Files


def read_fields(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Where a row of a file or of `hf:…` stands (for messages), and its columns. Raises UsageError."""
    if is_hf(path):
        yield from _hf_fields(path)
        return
    suffixes = [suffix.lower() for suffix in Path(path).suffixes]
    suffix = suffixes[-2] if suffixes[-1:] == [".gz"] and len(suffixes) > 1 else (suffixes or [""])[-1]
    if suffix not in (*JSON_SUFFIXES, *TEXT_SUFFIXES, PARQUET_SUFFIX):
        raise UsageError(f"{path}: unknown kind of file; name it .jsonl, .jsonl.gz, .parquet or .txt, {DOCS}")
    with _open(path) as file:
        if suffix == PARQUET_SUFFIX:
            yield from _parquet_fields(path, file)
            return
        lines = _Lines(path, gzip.GzipFile(fileobj=file) if suffixes[-1] == ".gz" else file)
        yield from _text_fields(lines) if suffix in TEXT_SUFFIXES else _json_fields(lines)


def _open(path: str) -> BufferedReader:
    if Path(path).is_dir():
        raise UsageError(f"{path}: a directory; name a file, or hf:{path} for a folder of Parquet or JSONL")
    try:
        return open(path, "rb")
    except FileNotFoundError as error:
        raise UsageError(f"{path}: no such file; check the path") from error
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror}); check its permissions") from error


class _Lines:
    """The decoded lines of a file, split at line feeds only, and where the reading stands."""

    def __init__(self, path: str, file: Iterable[bytes]) -> None:
        self.path = path
        self.number = 0
        self._file = iter(file)
        self._offset = 0

    @property
    def where(self) -> str:
        return f"{self.path}:{self.number}"

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        self.number += 1
        try:
            line = next(self._file)
        except (OSError, EOFError, zlib.error) as error:
            raise UsageError(f"{self.where}: unreadable from here ({error}); is it whole?") from error
        try:
            text = line.decode()
        except UnicodeDecodeError as error:
            offset = self._offset + error.start
            raise UsageError(f"{self.where}: not UTF-8 at byte offset {offset}; convert the file") from error
        if (nul := line.find(b"\0")) >= 0:
            raise UsageError(f"{self.where}: NUL at byte offset {self._offset + nul}; remove it")
        self._offset += len(line)
        return text.removeprefix("\ufeff") if self.number == 1 else text


def _text_fields(lines: _Lines) -> Iterator[tuple[str, dict[str, Any]]]:
    for line in lines:
        if line.strip():
            yield lines.where, {"messages": [{"role": "user", "content": line.rstrip("\r\n")}]}


def _json_fields(lines: _Lines) -> Iterator[tuple[str, dict[str, Any]]]:
    reader = jsonlines.Reader(lines, loads=partial(json.loads, parse_constant=_no_constant))
    try:
        for fields in reader.iter(type=dict, skip_empty=True):
            yield lines.where, fields
    except (jsonlines.InvalidLineError, RecursionError) as error:
        cause = error.__cause__
        what = f"{cause.msg}, column {cause.colno}" if isinstance(cause, json.JSONDecodeError) else error
        raise UsageError(f"{lines.where}: not a JSON object ({what}); every line is one, {DOCS}") from error


def _parquet_fields(path: str, file: BufferedReader) -> Iterator[tuple[str, dict[str, Any]]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        batches = pq.ParquetFile(file).iter_batches(_BATCH_ROWS)
        rows = itertools.chain.from_iterable(batch.to_pylist() for batch in batches)
        for number, fields in enumerate(rows, 1):
            yield f"{path}:{number}", fields
    except (pa.ArrowException, OSError) as error:
        raise UsageError(f"{path}: not readable as Parquet ({' '.join(str(error).split())}); is it whole?") from error


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON")


def _file_digest(path: str) -> str:
    with _open(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# Data sets read through `datasets`


def is_hf(path: str) -> bool:
    return path.startswith("hf:")


def hf_parts(path: str) -> tuple[str, dict[str, str]]:
    """The name and the options of `hf:NAME?…`."""
    name, _, query = path.removeprefix("hf:").partition("?")
    options = dict(parse_qsl(query))
    unknown = sorted(set(options) - set(HF_KEYS))
    if not name or unknown:
        what = f"unknown {', '.join(unknown)}" if unknown else "no name"
        raise UsageError(f"{path}: {what}; write hf:NAME?config=&split=&column=&revision=, {DOCS}")
    return name, options


def hf_splits(path: str) -> list[str]:
    """The names of all splits of `hf:…`."""
    from datasets import get_dataset_split_names

    name, options = hf_parts(path)
    with _hf_errors(path, "data"):
        return list(get_dataset_split_names(name, options.get("config"), revision=_hf_revision(name, options)))


def _hf_fields(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    from datasets import load_dataset

    name, options = hf_parts(path)
    split = options.get("split", "train")
    with _hf_errors(path, f"{split} split"):
        rows = load_dataset(
            name, options.get("config"), split=split, revision=_hf_revision(name, options), streaming=True
        )
        for number, fields in enumerate(rows, 1):
            yield f"{path}:{number}", fields


def _hf_revision(name: str, options: dict[str, str]) -> str | None:
    return None if Path(name).exists() else options.get("revision")


@contextmanager
def _hf_errors(path: str, wanted: str) -> Iterator[None]:
    from datasets.exceptions import DatasetsError

    name = hf_parts(path)[0]
    is_local = name.startswith((".", "/", "~")) or Path(name).exists()
    if not is_local and not hub.is_reachable():
        raise UsageError(f"{path}: the hub cannot be reached; check the network, or give a file or folder, {DOCS}")
    try:
        yield
    except (OSError, ValueError, DatasetsError) as error:
        cause = " ".join(str(error).split())
        raise UsageError(f"{path}: no {wanted} to read ({cause}); check the name, {DOCS}") from error


def _hf_digest(path: str) -> str:
    name, options = hf_parts(path)
    folder = Path(name)
    if not folder.exists():
        return digest([name, options])
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    contents = [[file.relative_to(folder).as_posix(), _file_digest(str(file))] for file in files]
    return digest([options, contents])


def _row(
    fields: dict[str, Any], where: str, source: str, tags: tuple[str, ...], column: str | None, counts: Counts
) -> Row:
    messages, answer, merged_turns = read_conversation(fields, where, column)
    counts.merged_turns += merged_turns
    counts.answers_cut += bool(answer)
    record_id = read_id(fields.get("id"), where) or message_id(messages)
    given = read_strings(fields, "completions", where)
    own_tags = [tag for tag in read_strings(fields, "tags", where) if tag not in tags]
    return Row(record_id, messages, given, [*own_tags, *tags], source, answer)
