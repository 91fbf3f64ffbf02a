"""A YAML file read with suspicion: every value keeps its line, and whatever could surprise a reader is refused.

Refused before anything is built: more than `MAX_BYTES`, bytes that are not UTF-8, anchors and aliases (an alias bomb),
explicit tags (`!!python/...`), deep nesting, duplicate keys. Scalars stay text; who wants a number asks for one.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import yaml

MAX_BYTES = 1 << 20
MAX_EVENTS = 50_000
MAX_DEPTH = 12

# libyaml reads a megabyte in well under a second, the pure Python reader does not; both build plain values only.
_Loader: type = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


class ConstitutionError(ValueError):
    """A constitution that cannot be used. The message is one line: `FILE:LINE: what; cure`."""


@dataclass(frozen=True)
class Node:
    """A value and its place; `keys` holds the lines of a mapping's keys. A scalar is its text, an empty one ""."""

    value: str | list[Node] | dict[str, Node]
    file: str
    line: int
    keys: dict[str, int]

    def fail(self, what: str, cure: str, *, key: str | None = None) -> NoReturn:
        raise ConstitutionError(f"{self.file}:{self.keys.get(key or '', self.line)}: {what}; {cure}")

    def text(self, name: str) -> str:
        """The value as text that is not empty, stripped."""
        if not isinstance(self.value, str):
            self.fail(f"{name} is not a text", "write one text, in quotes if it holds a colon")
        text = self.value.strip()
        if not text:
            self.fail(f"{name} is empty", "write it, or delete its entry")
        bad = _CONTROL.search(text)
        if bad:
            self.fail(f"{name} holds the control character U+{ord(bad[0]):04X}", "delete it")
        return text

    def items(self, name: str) -> list[Node]:
        """The value as a list that is not empty."""
        if not isinstance(self.value, list):
            self.fail(f"{name} is not a list", 'begin each entry with "- "')
        if not self.value:
            self.fail(f"{name} is empty", "write at least one entry")
        return self.value

    def mapping(self, name: str, known: Iterable[str], required: Iterable[str] = ()) -> dict[str, Node]:
        """The value as a mapping that has no key outside `known` and every key of `required`."""
        known = list(known)
        if not isinstance(self.value, dict):
            self.fail(f"{name} is not a mapping", f"write lines such as {known[0]}: …")
        for key in self.value:
            if key not in known:
                near = difflib.get_close_matches(key[:80], known, 1, 0.5)
                cure = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
                self.fail(f"unknown key {key[:80]!r} in {name}", cure, key=key)
        for key in required:
            if key not in self.value:
                self.fail(f"{name} has no {key!r}", f"add a line {key}: …")
        return self.value

    def number(self, name: str) -> float:
        """The value as a finite number above 0."""
        try:
            number = float(self.value) if isinstance(self.value, str) else math.nan
        except ValueError:
            number = math.nan
        if not (math.isfinite(number) and number > 0):
            self.fail(f"{name} is not a number above 0", "write one such as 1.0")
        return number


def read(path: str | Path) -> Node:
    """The file's one document. Raises ConstitutionError."""
    return parse(read_text(path), str(path))


def read_text(path: str | Path) -> str:
    """A file's text. Refuses what cannot be read, more than MAX_BYTES, and bytes that are not UTF-8."""
    try:
        with open(path, "rb") as stream:
            data = stream.read(MAX_BYTES + 1)
    except OSError as error:
        raise ConstitutionError(f"{path}:1: cannot be read ({error.strerror}); check the path") from error
    if len(data) > MAX_BYTES:
        raise ConstitutionError(f"{path}:1: longer than {MAX_BYTES:,} bytes; shorten it")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConstitutionError(f"{path}:{line}: byte {error.start} is not UTF-8; save the file as UTF-8") from error


def parse(text: str, file: str) -> Node:
    """`read` on the text of a file; `file` is its name in messages."""
    try:
        _refuse_surprises(text, file)
        root = yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = getattr(mark, "line", 0) + 1
        raise ConstitutionError(
            f"{file}:{line}: not YAML ({error.problem or error.context}); check indentation and quotes"
        ) from error
    except (yaml.YAMLError, UnicodeEncodeError) as error:
        position = getattr(error, "position", getattr(error, "start", 0))
        line = text.count("\n", 0, position) + 1
        raise ConstitutionError(f"{file}:{line}: a character that YAML does not allow; delete it") from error
    if root is None:
        raise ConstitutionError(f"{file}:1: empty; fill it, or start from `cai init`")
    return _node(root, file)


def _refuse_surprises(text: str, file: str) -> None:
    depth = documents = 0
    for number, event in enumerate(yaml.parse(text, Loader=_Loader)):
        where = f"{file}:{getattr(event.start_mark, 'line', 0) + 1}"
        documents += isinstance(event, yaml.DocumentStartEvent)
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise ConstitutionError(f"{where}: anchors and aliases are not allowed; write the text out")
        tag = getattr(event, "tag", None)
        if tag:
            raise ConstitutionError(f"{where}: the tag {tag!r} is not allowed; delete it")
        if documents > 1:
            raise ConstitutionError(f"{where}: a second document; delete the line ---")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH or number > MAX_EVENTS:
            raise ConstitutionError(f"{where}: nested too deep or too many values; flatten or shorten it")


def _node(node: yaml.Node, file: str) -> Node:
    line = node.start_mark.line + 1
    if isinstance(node, yaml.SequenceNode):
        return Node([_node(item, file) for item in node.value], file, line, {})
    if not isinstance(node, yaml.MappingNode):
        empty = node.tag == "tag:yaml.org,2002:null"
        return Node("" if empty else node.value, file, line, {})
    values: dict[str, Node] = {}
    keys: dict[str, int] = {}
    for key, value in node.value:
        at = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode):
            raise ConstitutionError(f"{file}:{at}: a key that is not a text; write a plain word")
        if key.value in values:
            raise ConstitutionError(
                f"{file}:{at}: duplicate key {key.value[:80]!r}, first on line {keys[key.value]}; delete one"
            )
        values[key.value], keys[key.value] = _node(value, file), at
    return Node(values, file, line, keys)
