"""Prompts into the run folder: unique ids, in parts, counted.

Prompts that the run already has keep their place; new ones go into new parts behind them. The same id with the same
content is a duplicate and is counted; the same id with other content is refused. The ids seen so far are kept in a
temporary database on disk, so that memory stays flat.
"""

from __future__ import annotations

import itertools
import sqlite3
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from pipeline.errors import CorruptError, ResourceError, UsageError
from pipeline.records import Line, digest
from pipeline.sources import Counts, Row, Spec, mix, source_digest
from pipeline.store import RunFolder, StageWriter


class Ingested(NamedTuple):
    """One reading of the sources: lines = known + new + duplicates. known: ids that the run had before it began.

    merged_turns, answers_cut: what was done to the conversations, of all lines (docs/prompts.md).
    """

    lines: int
    known: int
    new: int
    duplicates: int
    merged_turns: int
    answers_cut: int = 0


def ingest(run: RunFolder, specs: Iterable[Spec], *, shard_size: int, limit: int | None = None) -> Ingested:
    """Adds the first `limit` different prompts of the sources to the run, as far as it has not got them yet.

    Sources that were read to the same end before are not read again. The manifest says after which part a reading
    began, so that one that was killed half way ends with the same counts as an undisturbed one.
    """
    specs = list(specs)
    writer = StageWriter(run, "prompts", "prompts")
    reading = f"{source_digest(specs)}:{limit}"
    for earlier in writer.extra.get("readings", []):
        if earlier["sources"] == reading:
            return Ingested(**{name: earlier[name] for name in Ingested._fields})
    if writer.extra.get("begun", {}).get("sources") != reading:
        writer.extra["begun"] = {"sources": reading, "parts": len(writer.parts)}
    counts = Counts()
    with _room_for_ids(), _Ids() as ids:
        for number, part in enumerate(writer.parts):
            state = "known" if number < writer.extra["begun"]["parts"] else "published"
            for line in run.read_part("prompts", part):
                ids.add(line["id"], digest([line["messages"], line.get("completions", [])]), state)
        _publish(writer, (_line(row) for row in ids.new_rows(mix(specs, counts), limit)), shard_size)
        result = Ingested(ids.lines, ids.known, ids.new, ids.duplicates, counts.merged_turns, counts.answers_cut)
    if result.lines != result.known + result.new + result.duplicates:
        raise CorruptError(f"{writer.folder}: prompts do not balance: {result}; please report it")
    del writer.extra["begun"]
    writer.extra.setdefault("readings", []).append({"sources": reading, **result._asdict()})
    writer.write_manifest()
    return result


@contextmanager
def _room_for_ids() -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        raise ResourceError(f"{tempfile.gettempdir()}: {error}; free some room there, or set TMPDIR") from error


def _line(row: Row) -> Line:
    line: Line = {"id": row.id, "messages": row.messages, "tags": row.tags, "source": row.source}
    return {**line, "completions": row.given} if row.given else line


def _publish(writer: StageWriter, lines: Iterator[Line], shard_size: int) -> None:
    while batch := list(itertools.islice(lines, shard_size)):
        writer.publish(len(writer.parts), batch, prompts=len(batch), num_in=len(batch))


class _Ids:
    """Ids seen, with a digest of their content, in a database of its own that nobody else sees."""

    def __init__(self) -> None:
        self.lines = self.known = self.new = self.duplicates = 0
        self._database = sqlite3.connect("", isolation_level=None)
        self._database.execute("PRAGMA journal_mode=OFF")
        self._database.execute("CREATE TABLE seen (id TEXT PRIMARY KEY, content TEXT, state TEXT) WITHOUT ROWID")
        self._database.execute("BEGIN")

    def __enter__(self) -> _Ids:
        return self

    def __exit__(self, *_: object) -> None:
        self._database.close()

    def add(self, id: str, content: str, state: str) -> tuple[str, str] | None:
        """Notes the id with its state: known, published (by this reading, before it was killed) or seen (now).

        Returns the content and state that it had before, if any.
        """
        done = self._database.execute("INSERT OR IGNORE INTO seen VALUES (?, ?, ?)", (id, content, state))
        if done.rowcount:
            return None
        before: tuple[str, str] = self._database.execute(
            "SELECT content, state FROM seen WHERE id = ?", (id,)
        ).fetchone()
        return before

    def new_rows(self, rows: Iterator[Row], limit: int | None) -> Iterator[Row]:
        """The rows still to be published, of the first `limit` different ones."""
        while self.known + self.new != limit and (row := next(rows, None)):
            self.lines += 1
            content = digest([row.messages, row.given])
            before = self.add(row.id, content, "seen")
            if before is None:
                self.new += 1
                yield row
                continue
            if before[0] != content:
                raise UsageError(
                    f"{row.source}: the id {row.id!r} stands for two different prompts; give each prompt its own id"
                )
            self._database.execute("UPDATE seen SET state = 'seen' WHERE id = ?", (row.id,))
            self.known += before[1] == "known"
            self.new += before[1] == "published"
            self.duplicates += before[1] == "seen"
