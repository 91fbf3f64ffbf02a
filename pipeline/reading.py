"""The records of a run for reading: joined over the stages, selected, the ones to look at first.

One part of the prompts and the same parts of the stages are in memory at a time, and as many records as are asked for.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from itertools import islice
from typing import Any, NamedTuple

from pipeline.records import Line, Record
from pipeline.store import RunFolder

STAGES = ("generate", "critique-revise", "rank")
PHASE_2 = ("phase2/generate", "phase2/rank")
STATES = ("failed", "filtered")


class Case(NamedTuple):
    """A record with what its stages wrote of it. failed, filtered: its losses, in the order of the stages."""

    record: Record
    failed: list[Line]
    filtered: list[Line]

    @property
    def rounds(self) -> list[Line]:
        """The rounds of all its chains."""
        chains = self.record.lines.get("critique-revise", {}).get("chains", [])
        return [entry for chain in chains for entry in chain["rounds"]]

    @property
    def candidates(self) -> list[Line]:
        """What was ranked, best first; [] before `rank`."""
        return sorted(self.record.lines.get("rank", {}).get("candidates", []), key=lambda c: c["rank"])

    @property
    def samples(self) -> list[Line]:
        """What the policy of phase 2 answered; [] if it was not asked."""
        found: list[Line] = self.record.lines.get("phase2/generate", {}).get("completions", [])
        return found

    def plain(self) -> dict[str, Any]:
        """Everything, as JSON can hold it."""
        prompt = {"id": self.record.id, "messages": self.record.messages, "tags": self.record.tags}
        given = {"completions": self.record.given} if self.record.given else {}
        stages = {name: self.record.lines[name] for name in (*STAGES, *PHASE_2) if name in self.record.lines}
        return {**prompt, **given, **stages, "failed": self.failed, "filtered": self.filtered}


class Wanted(NamedTuple):
    """Which records. id_prefix: how the id begins. principle: drawn in a round or a comparison. verdict: of any round.

    with_losses: only those that lost a sample or failed.
    """

    id_prefix: str = ""
    principle: str | None = None
    verdict: str | None = None
    with_losses: bool = False

    def fits(self, case: Case) -> bool:
        if self.principle is not None and self.principle not in _principles(case):
            return False
        if self.verdict is not None and all(entry["verdict"] != self.verdict for entry in case.rounds):
            return False
        return not self.with_losses or bool(case.failed or case.filtered)


def cases(run: RunFolder, wanted: Wanted) -> Iterator[Case]:
    """The wanted records in the order of the prompts. A part without a wanted id costs no more than its prompts."""
    published = [_Stage(seen, name, seen.parts(name)) for seen in (run, run.of_phase(2)) for name in STAGES]
    ordinal = 0
    for number, part in enumerate(run.parts("prompts")):
        prompts = run.read_part("prompts", part)
        if any(prompt["id"].startswith(wanted.id_prefix) for prompt in prompts):
            read = _Part(published, number)
            for place, prompt in enumerate(prompts):
                if prompt["id"].startswith(wanted.id_prefix) and wanted.fits(
                    case := read.case(prompt, ordinal + place)
                ):
                    yield case
        ordinal += len(prompts)


def select(run: RunFolder, wanted: Wanted, *, limit: int, worst_first: bool = True) -> list[Case]:
    """At most `limit` wanted records: those to look at first, or the first of the run."""
    found = cases(run, wanted)
    return heapq.nsmallest(limit, found, key=badness) if worst_first else list(islice(found, limit))


def badness(case: Case) -> tuple[int, float, int]:
    """Smaller is worse: a revision judged worse, else all beaten by an unrevised text, else a loss, else all others.

    Within these groups: by the revision's p; by how far the best revision is behind in score; by p; then as they came.
    """
    ordinal = case.record.ordinal
    lowest = min((entry["p"] for entry in case.rounds if "p" in entry), default=1.0)
    if any(entry["verdict"] == "worse" for entry in case.rounds):
        return 0, lowest, ordinal
    ranked = case.candidates
    revised = [candidate for candidate in ranked if candidate["origin"] == "revision"]
    if revised and ranked[0]["origin"] != "revision":
        return 1, revised[0]["score"] - ranked[0]["score"], ordinal
    if case.failed or case.filtered:
        return 2, 0.0, ordinal
    return 3, lowest, ordinal


def _principles(case: Case) -> set[str]:
    ranked = case.record.lines.get("rank", {})
    asked = [*case.rounds, *ranked.get("comparisons", []), *ranked.get("grades", [])]
    return {entry["principle"] for entry in asked}


class _Stage(NamedTuple):
    """A stage and its parts. run: as its phase sees it."""

    run: RunFolder
    name: str
    parts: list[dict[str, Any]]


class _Part:
    """What the stages published of one part of the prompts."""

    def __init__(self, published: list[_Stage], number: int) -> None:
        done = [stage for stage in published if number < len(stage.parts)]
        self.lines = {
            stage.run.name_of(stage.name): _by_id(stage.run.read_part(stage.name, stage.parts[number]))
            for stage in done
        }
        self.losses: dict[str, dict[str, list[Line]]] = {state: {} for state in STATES}
        for state, found in self.losses.items():
            for stage in done:
                for line in stage.run.read_losses(state, stage.name, stage.parts, number):
                    found.setdefault(line["id"], []).append(line)

    def case(self, prompt: Line, ordinal: int) -> Case:
        id = prompt["id"]
        lines = {name: found[id] for name, found in self.lines.items() if id in found}
        record = Record(id, prompt["messages"], ordinal, prompt["tags"], prompt.get("completions", []), lines)
        return Case(record, *(self.losses[state].get(id, []) for state in STATES))


def _by_id(lines: list[Line]) -> dict[str, Line]:
    return {line["id"]: line for line in lines}
