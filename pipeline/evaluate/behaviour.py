"""What a run did to the behaviour of the embedded model: drafts against final answers, graded exactly by its world.

    python -m pipeline.evaluate.behaviour RUN

A final answer is a record's rank-1 candidate. Harmful counts over harmful requests, evasive over benign ones, rude and
garbled over all. Only prompts of the world are graded; elsewhere nothing is known for sure.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from constitution.verdicts import same_position
from pipeline.arguments import Arguments, one_line
from pipeline.errors import UsageError
from pipeline.intervals import Rate, wilson
from pipeline.nano import world
from pipeline.records import Line, Message
from pipeline.store import RunFolder

FAULTS = ("harmful", "evasive", "rude", "garbled")


class Behaviour(NamedTuple):
    """drafts, finals: fault -> rate. verdicts: principle -> verdict -> rounds.

    same_position: comparisons whose two orders named the same position. decided: those of them that were no tie.
    """

    drafts: dict[str, Rate]
    finals: dict[str, Rate]
    verdicts: dict[str, Counter[str]]
    same_position: Rate
    decided: Rate


class Tally:
    """Faults of completions, each counted over the requests where it can occur."""

    def __init__(self) -> None:
        self.hits: Counter[str] = Counter()
        self.cases: Counter[str] = Counter()

    def add(self, messages: list[Message], text: str) -> None:
        request = world.find_request(messages)
        if request is None:
            return
        grade = world.grade(messages, text)._asdict()
        relevant = {"harmful": request.harmful, "evasive": not request.harmful, "rude": True, "garbled": True}
        for fault in FAULTS:
            self.cases[fault] += relevant[fault]
            self.hits[fault] += relevant[fault] and grade[fault]

    def rates(self) -> dict[str, Rate]:
        return {fault: wilson(self.hits[fault], self.cases[fault]) for fault in FAULTS}


def behaviour(run: RunFolder) -> Behaviour:
    """Reads the published prompts, drafts, chains and ranks of a run."""
    drafts, finals = Tally(), Tally()
    stages = {name: _by_id(run, name) for name in ("generate", "rank")}
    for prompt in run.read("prompts"):
        drafted, ranked = (stages[name].get(prompt["id"]) for name in ("generate", "rank"))
        for completion in drafted["completions"] if drafted else ():
            drafts.add(prompt["messages"], completion["text"])
        if ranked:
            best = next(candidate for candidate in ranked["candidates"] if candidate["rank"] == 1)
            finals.add(prompt["messages"], best["text"])
    judged = [c for line in stages["rank"].values() for c in line["comparisons"] if "p_ab" in c and "p_ba" in c]
    decided = [c for c in judged if c["status"] == "ok"]
    return Behaviour(drafts.rates(), finals.rates(), _verdicts(run), _same_position(judged), _same_position(decided))


def _same_position(comparisons: list[Line]) -> Rate:
    return wilson(sum(same_position(c["p_ab"], c["p_ba"]) for c in comparisons), len(comparisons))


def _by_id(run: RunFolder, stage: str) -> dict[str, Line]:
    return {line["id"]: line for line in run.read(stage)}


def _verdicts(run: RunFolder) -> dict[str, Counter[str]]:
    found: dict[str, Counter[str]] = {}
    for line in run.read("critique-revise"):
        for chain in line["chains"]:
            for entry in chain["rounds"]:
                if not entry["stopped"]:
                    found.setdefault(entry["principle"], Counter())[entry["verdict"]] += 1
    return dict(sorted(found.items()))


def table(found: Behaviour) -> Iterator[str]:
    """Lines for a terminal."""
    yield f"{'':9}{'drafts':<34}final answers"
    for fault in FAULTS:
        yield f"{fault:9}{found.drafts[fault]!s:<34}{found.finals[fault]}"
    yield ""
    yield f"{'revisions by principle':24}improved  same  worse  abstain"
    for principle, verdicts in found.verdicts.items():
        cells = "".join(f"{verdicts[v]:>{w}}" for v, w in (("improved", 8), ("same", 6), ("worse", 7), ("abstain", 9)))
        yield f"{principle:24}{cells}"
    yield ""
    yield f"same position named in both orders:     {found.same_position}"
    yield f"where one answer was better (no tie):   {found.decided}"


def main() -> None:
    parser = Arguments("pipeline.evaluate.behaviour", __doc__)
    parser.add_argument("run", type=Path, help="the run's folder")
    run = parser.parse_args().run
    with one_line():
        found = behaviour(RunFolder(run))
        if not any(rate.cases for rate in found.drafts.values()):
            raise UsageError(f"{run}: no draft for a prompt of the toy's world; `make demo` has some")
        print("\n".join(table(found)))


if __name__ == "__main__":
    main()
