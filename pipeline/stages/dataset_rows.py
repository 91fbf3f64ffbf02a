"""One record's rows into the datasets, its losses into the report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.config.settings import ExportSettings
from pipeline.dataset_writer import DatasetWriter, Published
from pipeline.errors import IncompleteError
from pipeline.records import Failure, Line, Message
from pipeline.stages.cards import DATASETS
from pipeline.stages.filters import is_same, why_not
from pipeline.stages.rows import Pair, Target, Trace, candidate_targets, pairs, sft_targets


@dataclass
class ExportReport:
    """What came out. prompts: by split. dropped: dataset -> reason -> texts, pairs or records that made no row.

    expected: the training datasets that these stages can fill. labels: chosen of preference rows by origin.
    helpful: rows that the share asks for, and rows that were used. left_out: all of `dropped` one by one, if any.
    """

    prompts: Counter[str] = field(default_factory=Counter)
    datasets: dict[str, Published] = field(default_factory=dict)
    dropped: dict[str, Counter[str]] = field(default_factory=lambda: {name: Counter() for name in DATASETS})
    labels: Counter[str] = field(default_factory=Counter)
    helpful: Counter[str] = field(default_factory=Counter)
    expected: tuple[str, ...] = ()
    left_out: Path | None = None

    def check(self) -> None:
        """Raises IncompleteError (3) if a training dataset has nothing to train on, with the counts by reason."""
        empty = [name for name in self.expected if not self.datasets[name].rows["train"]]
        if empty:
            raise IncompleteError("; ".join(self._why_empty(name) for name in empty))

    def _why_empty(self, name: str) -> str:
        reasons = [f"{reason} {count}" for reason, count in sorted(self.dropped[name].items())]
        split = [f"{split} {count}" for split, count in sorted(self.prompts.items())]
        return (
            f"datasets/{name}: nothing left to train on; left out: {', '.join(reasons) or 'nothing'}; prompts: "
            f"{', '.join(split) or 'none'}; give more prompts, or change export.filters, margin or split"
        )


class Losses(NamedTuple):
    """Counts what made no row, and writes it down."""

    report: ExportReport
    write: Callable[[Line], object]

    def add(self, dataset: str, id: str, reason: str, *, row: str = "", target: Target | None = None) -> None:
        """id: the record's. row: the id of the row that there would have been. target: the text that was at fault."""
        self.report.dropped[dataset][reason] += 1
        where = (target.sample, target.round) if target else (-1, -1)
        self.write(Failure(*where, dataset, reason, row, 1).line(id, "export"))


@dataclass
class Rows:
    """Adds one record's rows to the datasets that are written, and its losses to the report.

    phase: whose texts the record holds. Rows of phase 2 have an id of their own.
    """

    trace: Trace
    split: str
    settings: ExportSettings
    report: ExportReport
    losses: Losses
    writers: Mapping[str, DatasetWriter]
    phase: int = 1

    def add_prompt(self) -> None:
        self._add("prompts", "", {"principles": [], "label_source": "none"})

    def add_chains(self) -> None:
        drafts, chains, ranked = self.trace[1:]
        asked = [entry["principle"] for chain in (chains or {}).get("chains", ()) for entry in chain["rounds"]]
        asked += [entry["principle"] for name in ("comparisons", "grades") for entry in (ranked or {}).get(name, ())]
        self._add(
            "chains",
            "",
            {
                "source": self.trace.prompt["source"],
                "completions": (drafts or {}).get("completions", []),
                "chains": (chains or {}).get("chains", []),
                **{name: (ranked or {}).get(name, []) for name in ("candidates", "comparisons", "grades")},
                "principles": sorted({principle for principle in asked if principle}),
                "label_source": "ai",
            },
        )

    def add_sft(self) -> None:
        for target in sft_targets(self.trace, self.settings.sft):
            if isinstance(target, str):
                self.losses.add("sft", self.id, target)
            elif reason := self._why_not(target):
                self.losses.add("sft", self.id, reason, row=f"{self.id}/{target.name}", target=target)
            else:
                row = {"completion": self._answer(target.text), "label_source": target.label_source}
                self._add("sft", f"/{target.name}", {**row, "principles": sorted(target.principles)})

    def add_pairs(self, tie_band: float) -> None:
        """None of a prompt whose answers are imitated: preferences are about other prompts."""
        if self.split == "sft" or "preference" not in self.writers:
            return
        which = self.settings.pairs
        if self.phase == 2 and which == "revision-draft":
            which = "best-worst"
        for pair in pairs(self.trace, which, tie_band=tie_band, margin=self.settings.margin):
            if isinstance(pair, str):
                self.losses.add("preference", self.id, pair)
                continue
            name = f"/{pair.chosen.name}:{pair.rejected.name}"
            if fault := self._why_no_pair(pair):
                self.losses.add("preference", self.id, fault[0], row=self.row_id + name, target=fault[1])
            else:
                self.report.labels["sample" if self.phase == 2 else pair.chosen.name.partition("-")[0]] += 1
                self._add("preference", name, self._pair_row(pair))

    def add_ranked(self) -> None:
        if "ranked" not in self.writers:
            return
        targets = candidate_targets(self.trace)
        kept: list[tuple[Line, Target]] = []
        candidates = self.trace.ranked["candidates"] if self.trace.ranked else []
        for candidate, target in sorted(zip(candidates, targets, strict=True), key=lambda found: found[0]["rank"]):
            if reason := self._why_not(target):
                self.losses.add("ranked", self.id, reason, row=self.row_id, target=target)
            else:
                kept.append((candidate, target))
        if len(kept) < 2:
            why = "single_candidate" if self.trace.ranked else "not_ranked"
            self.losses.add("ranked", self.id, why, row=self.row_id)
            return
        asked = {entry["principle"] for entry in (self.trace.ranked or {})["comparisons"]}
        principles = asked.union(*(target.principles for _, target in kept))
        row = {
            "completions": [self._answer(target.text) for _, target in kept],
            "scores": [candidate["score"] for candidate, _ in kept],
        }
        self._add("ranked", "", {**row, "principles": sorted(principles), "label_source": "ai"})

    @property
    def id(self) -> str:
        found: str = self.trace.prompt["id"]
        return found

    @property
    def row_id(self) -> str:
        """How the ids of its rows begin."""
        return self.id if self.phase == 1 else f"{self.id}/phase{self.phase}"

    def _why_not(self, target: Target) -> str | None:
        return why_not(
            target.text,
            finish_reason=target.finish_reason,
            revised=target.revised,
            filters=self.settings.filters,
        )

    def _why_no_pair(self, pair: Pair) -> tuple[str, Target] | None:
        """The fault, and the text that shows it."""
        if "same_text" in self.settings.filters and is_same(pair.chosen.text, pair.rejected.text):
            return "same_text", pair.rejected
        faults = [(self._why_not(target), target) for target in (pair.chosen, pair.rejected)]
        return next(((reason, target) for reason, target in faults if reason), None)

    def _pair_row(self, pair: Pair) -> dict[str, Any]:
        return {
            "chosen": self._answer(pair.chosen.text),
            "rejected": self._answer(pair.rejected.text),
            "chosen_probability": pair.p,
            "score_chosen": pair.score_chosen,
            "score_rejected": pair.score_rejected,
            "principles": sorted(pair.principles),
            "label_source": "ai",
        }

    def _answer(self, text: str) -> Any:
        return answer_value(text, self.settings.format)

    def _add(self, dataset: str, suffix: str, row: dict[str, Any]) -> None:
        if dataset not in self.writers:
            return
        prompt = self.trace.prompt
        start = {"id": self.row_id + suffix, "prompt": prompt_value(prompt["messages"], self.settings.format)}
        split = "test" if self.split == "test" else "train"
        self.writers[dataset].add(split, {**start, "tags": prompt["tags"], **row})


def prompt_value(messages: list[Message], format: str) -> Any:
    """messages, or text: "\\n\\nHuman: …\\n\\nAssistant:", with a system text before it."""
    if format == "messages":
        return messages
    speakers = {"system": "", "user": "\n\nHuman: ", "assistant": "\n\nAssistant: "}
    return "".join(speakers[message["role"]] + message["content"] for message in messages) + "\n\nAssistant:"


def answer_value(text: str, format: str) -> Any:
    """One assistant message, or text that goes on after `prompt_value`."""
    return [{"role": "assistant", "content": text}] if format == "messages" else " " + text
