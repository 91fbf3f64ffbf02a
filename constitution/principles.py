"""Principles and the constitution that holds them: load, validate, draw, digest.

    principles:
      - {id, about, critique_request, revision_request, comparison, weight}
    wording: …           optional, see wording.yaml

A draw is a weighted rendezvous (DESIGN section 3): every principle gets the key -ln(u) / weight, where u in (0, 1)
comes from a sha256 over the run's seed, the record, the sample, the round and the principle's id; the smallest key
wins. So P(principle) = weight / sum of weights, no text moves a draw, and a new principle moves only the draws that it
wins.
"""

from __future__ import annotations

import hashlib
import heapq
import itertools
import json
import math
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from constitution import yamlfile
from constitution.wording import Wording, default_wording
from constitution.yamlfile import ConstitutionError, Node

__all__ = ["Constitution", "ConstitutionError", "Draw", "Principle"]

Draw = Literal["weighted", "uniform", "cover"]

_FIELDS = ("id", "about", "critique_request", "revision_request", "comparison", "weight")
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")


@dataclass(frozen=True)
class Principle:
    """One thing that a good answer does, worded for a critique, a revision and a comparison.

    about: its group. weight: above 0, relative to the other principles.
    """

    id: str
    about: str
    critique_request: str
    revision_request: str
    comparison: str
    weight: float = 1.0


@dataclass(frozen=True)
class Constitution:
    """Principles in file order, and the wording around them; `constitution["harm-people"]` is one principle."""

    principles: tuple[Principle, ...]
    wording: Wording

    @staticmethod
    def load(path: str | Path) -> Constitution:
        """Reads and validates a file. Raises ConstitutionError, whose message names file, line and cure."""
        return _constitution(yamlfile.read(path))

    @staticmethod
    def parse(text: str, name: str = "constitution.yaml") -> Constitution:
        """`load` on a file's text; `name` is the file's name in messages."""
        return _constitution(yamlfile.parse(text, name))

    @staticmethod
    def default() -> Constitution:
        """The project's own principles."""
        return Constitution.load(default_path())

    @cached_property
    def digest(self) -> str:
        """sha256 in hex over every principle and the wording; comments and layout of the file do not count."""
        content = {"principles": [asdict(p) for p in self.principles], "wording": self.wording.plain()}
        return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=False).encode()).hexdigest()

    @cached_property
    def abouts(self) -> tuple[str, ...]:
        """The groups, in file order."""
        return tuple(dict.fromkeys(p.about for p in self.principles))

    @cached_property
    def _by_id(self) -> dict[str, Principle]:
        return {p.id: p for p in self.principles}

    def __getitem__(self, id: str) -> Principle:
        return self._by_id[id]

    def __iter__(self) -> Iterator[Principle]:
        return iter(self.principles)

    def __len__(self) -> int:
        return len(self.principles)

    def in_group(self, about: str) -> tuple[Principle, ...]:
        """The group's principles in file order; () for a group that is not there."""
        return tuple(p for p in self.principles if p.about == about)

    def draw(self, seed: int, record_id: str, sample: int, round: int, method: Draw = "weighted") -> Principle:
        """The principle of one round of one sample.

        weighted: with replacement, by weight; `uniform`: all weights 1. cover: the rounds of a sample go through the
        groups without replacement, in an order drawn for every two samples; the second of them goes through it
        backwards, so that together they cover twice as many groups. By weight inside the group.
        """
        place = ("principle", seed, record_id, sample, round)
        if method == "weighted":
            return _smallest(self.principles, 1, *place)[0]
        if method == "uniform":
            return min(self.principles, key=lambda p: (_key(_hash(*place), p.id, 1.0), p.id))
        if method == "cover":
            base = _hash("about", seed, record_id, sample // 2)
            groups = sorted(self.abouts, key=lambda about: (_key(base, about, 1.0), about), reverse=sample % 2 == 1)
            return _smallest(self.in_group(groups[round % len(groups)]), 1, *place)[0]
        raise ValueError(f"draw {method!r}: use weighted, uniform or cover")

    def draw_many(self, seed: int, record_id: str, count: int) -> tuple[Principle, ...]:
        """`count` different principles for a record, by weight; all of them, in drawn order, if there are fewer.

        Every group gives one before any gives a second, so that a few principles judge from several sides.
        """
        if count < 1:
            raise ValueError(f"count is {count}: draw at least one principle")
        drawn = _smallest(self.principles, len(self), "principles", seed, record_id)
        turns = {about: itertools.count() for about in self.abouts}
        return tuple(sorted(drawn, key=lambda p: next(turns[p.about]))[:count])


def default_path() -> Path:
    """The default constitution's file: beside this file in a wheel, at the top of a source checkout."""
    here = Path(__file__).resolve().parent
    packaged = here / "principles.yaml"
    return packaged if packaged.exists() else here.parent / "principles.yaml"


def _hash(*place: str | int) -> hashlib._Hash:
    return hashlib.sha256(json.dumps(place).encode())


def _key(base: hashlib._Hash, name: str, weight: float) -> float:
    """-ln(u) / weight, u in (0, 1) from 53 bits of sha256(base, name): exponentially distributed, rate `weight`."""
    digest = base.copy()
    digest.update(name.encode())
    u = ((int.from_bytes(digest.digest()[:8], "big") >> 11) + 0.5) / (1 << 53)
    return -math.log(u) / weight


def _smallest(principles: tuple[Principle, ...], count: int, *place: str | int) -> list[Principle]:
    base = _hash(*place)
    return heapq.nsmallest(count, principles, key=lambda p: (_key(base, p.id, p.weight), p.id))


def _constitution(root: Node) -> Constitution:
    top = root.mapping("the file", ("principles", "wording"), ("principles",))
    principles: list[Principle] = []
    lines: dict[str, int] = {}
    for node in top["principles"].items("principles"):
        principle = _principle(node)
        if principle.id in lines:
            node.fail(f"duplicate id {principle.id!r}, first on line {lines[principle.id]}", "rename or delete one")
        lines[principle.id] = node.line
        principles.append(principle)
    wording = default_wording()
    if "wording" in top:
        wording = wording.overridden(top["wording"])
    return Constitution(tuple(principles), wording)


def _principle(node: Node) -> Principle:
    given = node.mapping("a principle", _FIELDS, _FIELDS[:-1])
    for name in ("id", "about"):
        word = given[name].text(name)
        if not _NAME.fullmatch(word):
            given[name].fail(f"{name} {word[:80]!r}", "use lower-case letters, digits, - and _, at most 64")
    return Principle(
        **{name: given[name].text(name) for name in _FIELDS[:-1]},
        weight=given["weight"].number("weight") if "weight" in given else 1.0,
    )
