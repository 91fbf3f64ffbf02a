"""Constitutions in other layouts, turned into this project's YAML.

    {"name": {"prompt": ["CritiqueRequest: …"], "edit_request": "RevisionRequest: …"}, …}      JSON, published with CAI
    ["Choose the response that … Options:", …]                                                 JSON, its comparisons
    ["Answers should …", …], or a text file with one sentence per line                         plain principles

What a layout does not have is derived by `FROM_CRITIQUE`, `FROM_COMPARISON` and `FROM_SENTENCE`; edit the result.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml

from constitution.principles import Constitution
from constitution.wording import fill
from constitution.yamlfile import MAX_BYTES, ConstitutionError, read_text

FROM_CRITIQUE = {
    "revision_request": 'Rewrite the answer so that this request would find nothing in it: "{text}"',
    "comparison": 'In which answer would this request find less: "{text}"',
}
FROM_REVISION = {
    "critique_request": 'Point out what in the answer above calls for this request: "{text}"',
    "comparison": 'Which answer has less need of this request: "{text}"',
}
FROM_COMPARISON = {
    "critique_request": 'Point out where the answer above would lose by this standard: "{text}"',
    "revision_request": 'Rewrite the answer so that it does better by this standard: "{text}"',
    "comparison": "{text}",
}
FROM_SENTENCE = {
    "critique_request": 'Point out where the answer above goes against this principle: "{text}"',
    "revision_request": 'Rewrite the answer so that it follows this principle: "{text}"',
    "comparison": 'Which answer follows this principle better: "{text}"',
}

MAX_PRINCIPLES = 1_000

_HEAD = re.compile(r"^\s*(critique ?request|revision ?request)\s*:\s*", re.IGNORECASE)
_TAIL = re.compile(r"\s*\b(critique|revision)\s*:\s*$", re.IGNORECASE)
_OPTIONS = re.compile(r"\s*\boptions\s*:\s*$", re.IGNORECASE)
_YAML = re.compile(r"^(principles|wording):", re.MULTILINE)
_BULLET = re.compile(r"^\s*(?:[-*•]|\d{1,3}[.)])\s+")

_Entry = dict[str, Any]


def import_constitution(path: str | Path) -> str:
    """The YAML text of a constitution in one of the layouts above; it loads with `Constitution.load`.

    Raises ConstitutionError: `FILE:LINE: what; cure`.
    """
    file = str(path)
    text = read_text(path)
    if text.lstrip()[:1] in ("{", "["):
        source = _json(text, file)
        entries = _from_object(source, text, file) if isinstance(source, dict) else _from_list(source, file)
    else:
        entries = _from_lines(text, file)
    if not entries:
        raise ConstitutionError(f"{file}:1: no principle found; see `cai constitution import --help` for the layouts")
    body = yaml.safe_dump({"principles": entries}, sort_keys=False, allow_unicode=True, width=110)
    imported = f"# Imported; texts that the source did not have were derived from those it had. Edit freely.\n\n{body}"
    if len(imported.encode()) > MAX_BYTES:
        raise ConstitutionError(f"{file}:1: makes more than {MAX_BYTES:,} bytes of YAML; shorten it")
    Constitution.parse(imported, f"{file} as YAML")
    return imported


def _json(text: str, file: str) -> dict[str, Any] | list[Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in pairs:
            if name in found:
                raise _error(text, file, name, f"duplicate key {name!r}", "rename or delete one")
            found[name] = value
        return found

    try:
        source: dict[str, Any] | list[Any] = json.loads(text, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        raise ConstitutionError(f"{file}:{error.lineno}: not JSON ({error.msg}); correct it") from error
    except RecursionError as error:
        raise ConstitutionError(f"{file}:1: nested too deep; flatten it") from error
    return source


def _from_object(source: dict[str, Any], text: str, file: str) -> list[_Entry]:
    entries: list[_Entry] = []
    _refuse_many(len(source), file)
    for name, value in source.items():
        if not isinstance(value, dict):
            raise _error(text, file, name, f"{name!r} is not an object", 'give it "prompt" and "edit_request"')
        critique = _joined(value.get("prompt"), text, file, name)
        revision = _joined(value.get("edit_request"), text, file, name)
        if not critique and not revision:
            raise _error(text, file, name, f'{name!r} has no "prompt" and no "edit_request"', "add one")
        derived = _filled(FROM_CRITIQUE, critique) if critique else _filled(FROM_REVISION, revision)
        given = {"critique_request": critique, "revision_request": revision}
        fields = derived | {field: words for field, words in given.items() if words}
        entries.append(_entry(name, re.sub(r"[\d_ -]+$", "", name), fields, entries))
    return entries


def _from_list(source: list[Any], file: str) -> list[_Entry]:
    entries: list[_Entry] = []
    _refuse_many(len(source), file)
    for number, item in enumerate(source, start=1):
        if not isinstance(item, str) or not item.strip():
            raise ConstitutionError(f"{file}:1: entry {number} of the list is not a sentence; write one text")
        words = " ".join(item.split())
        comparison = _OPTIONS.sub("", words)
        fields = _filled(FROM_SENTENCE if comparison == words else FROM_COMPARISON, comparison)
        entries.append(_entry(f"principle-{number:02}", "imported", fields, entries))
    return entries


def _from_lines(text: str, file: str) -> list[_Entry]:
    """One principle per line; empty lines and headings (#) are passed over, bullets and numbers taken off."""
    if found := _YAML.search(text):
        line = text.count("\n", 0, found.start()) + 1
        raise ConstitutionError(f"{file}:{line}: is YAML of this project already; use `cai constitution check` on it")
    lines = (_BULLET.sub("", line).strip() for line in text.splitlines() if not line.lstrip().startswith("#"))
    return _from_list([line for line in lines if line], file)


def _refuse_many(num: int, file: str) -> None:
    if num > MAX_PRINCIPLES:
        raise ConstitutionError(f"{file}:1: {num:,} principles; keep at most {MAX_PRINCIPLES:,}")


def _joined(value: Any, text: str, file: str, name: str) -> str:
    """A string or a list of strings as one line, without "CritiqueRequest:" before and "Critique:" after it."""
    parts = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(part, str) for part in parts):
        raise _error(text, file, name, f"{name!r} holds a value that is not a text", "write a text or a list of texts")
    line = " ".join(" ".join(parts).split())
    return _TAIL.sub("", _HEAD.sub("", line)).strip()


def _filled(templates: dict[str, str], words: str) -> dict[str, str]:
    return {field: fill(template, text=words) for field, template in templates.items()}


def _entry(name: str, about: str, fields: dict[str, str], others: list[_Entry]) -> _Entry:
    """A principle with an id and a group that the loader accepts; an id that is taken gets a number."""
    taken = {entry["id"] for entry in others}
    base = _slug(name) or "principle"
    id = next(id for id in (base, *(f"{base}-{n}" for n in range(2, len(taken) + 3))) if id not in taken)
    order = ("critique_request", "revision_request", "comparison")
    texts = {field: fields[field] for field in order}
    return {"id": id, "about": _slug(about) or "imported", **texts, "weight": 1.0}


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:56]


def _error(text: str, file: str, name: str, what: str, cure: str) -> ConstitutionError:
    at = max(text.find(json.dumps(name)), text.find(json.dumps(name, ensure_ascii=False)), 0)
    return ConstitutionError(f"{file}:{text.count(chr(10), 0, at) + 1}: {what}; {cure}")
