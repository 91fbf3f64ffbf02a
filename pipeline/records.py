"""The words that pass between the rooms: messages, records, what a stage says of a record, canonical JSON."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

Message = dict[str, str]
"""`role` (system, user or assistant) and `content`."""

Prompt = list[Message] | str
"""A conversation for a chat template, or raw text for a base model."""

Line = dict[str, Any]
"""One JSON object of a stage's file, with its `id`."""

_encode = json.JSONEncoder(ensure_ascii=False, sort_keys=True, separators=(",", ":"), allow_nan=False).encode
_encode_ordered = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode


def canonical(value: Any) -> bytes:
    """Canonical JSON: sorted keys, no white space, UTF-8. Raises ValueError for NaN and lone surrogates."""
    return _encode(value).encode()


def digest(value: Any) -> str:
    """sha256 of the canonical JSON, in hex."""
    return hashlib.sha256(canonical(value)).hexdigest()


def line_bytes(line: Line) -> bytes:
    """One line of a stage's file: keys in the order written, UTF-8, newline."""
    return _encode_ordered(line).encode() + b"\n"


def message_id(messages: Iterable[Message]) -> str:
    """The id of a prompt that brought none: first 32 hex digits of sha256 of the messages' canonical JSON."""
    return digest(list(messages))[:32]


class Failure(NamedTuple):
    """Why a sample or a record did not get through; a line of `failed/` or `filtered/`.

    sample, turn: which completion and which round, -1 if the whole record is meant. kind: the request's kind, or the
    filter's name.
    """

    sample: int
    turn: int
    kind: str
    reason: str
    detail: str
    attempts: int

    def line(self, record_id: str, stage: str) -> Line:
        return {"id": record_id, "stage": stage, **self._asdict()}


@dataclass(slots=True)
class Record:
    """A prompt on its way through the stages.

    ordinal: its place in the run, from 0; older records go first. given: answers that came with the prompt.
    lines: stage -> the line that the stage wrote about this record.
    """

    id: str
    messages: list[Message]
    ordinal: int
    tags: list[str] = field(default_factory=list)
    given: list[str] = field(default_factory=list)
    lines: dict[str, Line] = field(default_factory=dict)


class Outcome(NamedTuple):
    """What a stage says of one record: its line if the record is ok, and every loss with its reason.

    line: None when the record failed (then `failures` says why) or was filtered (then `filtered` does).
    """

    line: Line | None
    failures: tuple[Failure, ...] = ()
    filtered: tuple[Failure, ...] = ()
