"""Datasets from the published lines of a run: sft, preference, ranked, prompts, chains.

A pure function of the lines and the settings. Every choice depends on its own row (or, for the share of helpful data,
on the number of rows), so that ten runs that add prompts end with the bytes of one run over all. What made no row is
counted by its reason.
"""

from __future__ import annotations

import heapq
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.config.settings import ExportSettings, HelpfulSettings
from pipeline.dataset_writer import DatasetWriter, Published
from pipeline.errors import CorruptError, IncompleteError
from pipeline.records import Failure, Line, Message, canonical, digest, line_bytes
from pipeline.sources import Spec, read
from pipeline.splits import row_hash, split_of
from pipeline.stages.cards import DATASETS, card_text, schemas
from pipeline.stages.filters import is_same, why_not
from pipeline.stages.rows import Pair, Target, Trace, candidate_targets, pairs, sft_targets
from pipeline.store import RunFolder, io_errors, make_folder, sync_folder, write_atomic

STAGES = ("generate", "critique-revise", "rank")


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


def export_run(run: RunFolder, settings: ExportSettings, *, tie_band: float) -> ExportReport:
    """Exports what a run has published. UsageError if a stage was made from lines that have changed since.

    `export.json` says what the datasets were made from. It is written last, and is away while they change.
    """
    for name in STAGES:
        run.check_inputs(name)
    stages = {name: run.read(name) if run.manifest(name) else None for name in STAGES}
    path, made_from = run.path / "export.json", identity(run, settings, tie_band=tie_band)
    if path.exists() and path.read_bytes() != made_from:
        with io_errors(path):
            path.unlink()
            sync_folder(run.path)
    report = export(
        run.path / "datasets",
        run.read("prompts"),
        drafts=stages["generate"],
        chains=stages["critique-revise"],
        ranked=stages["rank"],
        settings=settings,
        tie_band=tie_band,
        left_out=run.losses_path("filtered", "export"),
    )
    if not path.exists():
        write_atomic(path, made_from)
    return report


def identity(run: RunFolder, settings: ExportSettings, *, tie_band: float) -> bytes:
    """What an export depends on, as `export.json` holds it: a hash of each stage's parts, and one of the settings."""
    parts = {name: [part["sha256"] for part in run.parts(name)] for name in ("prompts", *STAGES)}
    content = {
        "inputs": {name: digest(found) for name, found in parts.items() if found},
        "settings": digest([settings.model_dump(mode="json"), tie_band]),
    }
    return canonical(content) + b"\n"


def export(
    folder: Path,
    prompts: Iterable[Line],
    *,
    drafts: Iterable[Line] | None,
    chains: Iterable[Line] | None,
    ranked: Iterable[Line] | None,
    settings: ExportSettings,
    tie_band: float,
    left_out: Path,
) -> ExportReport:
    """Writes the datasets under `folder`; stages that were not run are None. Their lines are in the prompts' order.

    tie_band: of the ranking; |p - 0.5| up to this makes no pair. left_out: the file that names what made no row, in the
    prompts' order; without such it is not there. Memory stays bounded for any number of records.
    """
    # Without a ranking nothing is best; the end of each chain is the nearest thing to it.
    settings = settings.model_copy(update={"sft": "last"}) if settings.sft == "best" and ranked is None else settings
    report = ExportReport(expected=_expected(settings, chains is not None, ranked is not None))
    writers = {name: DatasetWriter(folder / name, schema) for name, schema in schemas(settings.format).items()}
    with _losses(left_out) as drop:
        losses = _Losses(report, drop)
        for trace in _joined(prompts, drafts, chains, ranked):
            split = split_of(trace.prompt["messages"], settings.split)
            report.prompts[split] += 1
            rows = _Rows(trace, split, settings, report, losses, writers)
            rows.add_prompt()
            rows.add_chains()
            if split != "sft":
                rows.add_pairs(tie_band)
            if split != "preference":
                rows.add_sft()
            if ranked is not None:
                rows.add_ranked()
        if settings.helpful:
            _add_helpful(settings.helpful, settings, report, losses, writers["sft"])
    report.left_out = left_out if left_out.exists() else None
    for name, writer in writers.items():
        report.datasets[name] = writer.publish(card_text(name, settings))
    return report


def _expected(settings: ExportSettings, has_chains: bool, has_ranked: bool) -> tuple[str, ...]:
    has_pairs = has_chains if settings.pairs == "revision-draft" else has_ranked
    shares = settings.split
    return (
        *(("sft",) if shares.sft else ()),
        *(("preference",) if has_pairs and shares.preference else ()),
        *(("ranked",) if has_ranked else ()),
    )


def _joined(
    prompts: Iterable[Line], drafts: Iterable[Line] | None, chains: Iterable[Line] | None, ranked: Iterable[Line] | None
) -> Iterator[Trace]:
    """The lines of each prompt together. A stage's lines are a part of the prompts, in their order."""
    stages = [iter(lines or ()) for lines in (drafts, chains, ranked)]
    heads = [next(lines, None) for lines in stages]
    for prompt in prompts:
        found: list[Line | None] = [None, None, None]
        for place, head in enumerate(heads):
            if head is not None and head["id"] == prompt["id"]:
                found[place] = head
                heads[place] = next(stages[place], None)
        yield Trace(prompt, *found)
    for name, head in zip(("generate", "critique-revise", "rank"), heads, strict=True):
        if head is not None:
            raise CorruptError(
                f"{name}: the id {head['id']!r} is not among the prompts in their order; run {name} again"
            )


@contextmanager
def _losses(path: Path) -> Iterator[Callable[[Line], object]]:
    """Takes lines; the file holds them all at the end, or is not there if there were none."""
    make_folder(path.parent)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with io_errors(path):
            with temporary.open("wb") as file:
                yield lambda line: file.write(line_bytes(line))
                file.flush()
                os.fsync(file.fileno())
                is_empty = file.tell() == 0
            if is_empty:
                path.unlink(missing_ok=True)
            else:
                os.replace(temporary, path)
            sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


class _Losses(NamedTuple):
    """Counts what made no row, and writes it down."""

    report: ExportReport
    write: Callable[[Line], object]

    def add(self, dataset: str, id: str, reason: str, *, row: str = "", target: Target | None = None) -> None:
        """id: the record's. row: the id of the row that there would have been. target: the text that was at fault."""
        self.report.dropped[dataset][reason] += 1
        where = (target.sample, target.round) if target else (-1, -1)
        self.write(Failure(*where, dataset, reason, row, 1).line(id, "export"))


@dataclass
class _Rows:
    """Adds one record's rows to the datasets, and its losses to the report."""

    trace: Trace
    split: str
    settings: ExportSettings
    report: ExportReport
    losses: _Losses
    writers: Mapping[str, DatasetWriter]

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
        for pair in pairs(self.trace, self.settings.pairs, tie_band=tie_band, margin=self.settings.margin):
            if isinstance(pair, str):
                self.losses.add("preference", self.id, pair)
                continue
            name = f"/{pair.chosen.name}:{pair.rejected.name}"
            if fault := self._why_no_pair(pair):
                self.losses.add("preference", self.id, fault[0], row=self.id + name, target=fault[1])
            else:
                self.report.labels[pair.chosen.name.partition("-")[0]] += 1
                self._add("preference", name, self._pair_row(pair))

    def add_ranked(self) -> None:
        targets = candidate_targets(self.trace)
        kept: list[tuple[Line, Target]] = []
        candidates = self.trace.ranked["candidates"] if self.trace.ranked else []
        for candidate, target in sorted(zip(candidates, targets, strict=True), key=lambda found: found[0]["rank"]):
            if reason := self._why_not(target):
                self.losses.add("ranked", self.id, reason, row=self.id, target=target)
            else:
                kept.append((candidate, target))
        if len(kept) < 2:
            self.losses.add("ranked", self.id, "single_candidate" if self.trace.ranked else "not_ranked", row=self.id)
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
        prompt = self.trace.prompt
        start = {"id": prompt["id"] + suffix, "prompt": prompt_value(prompt["messages"], self.settings.format)}
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


def _add_helpful(
    helpful: HelpfulSettings, settings: ExportSettings, report: ExportReport, losses: _Losses, writer: DatasetWriter
) -> None:
    """Adds as many helpful rows as make up their share of each split: those with the smallest hashes.

    The file is read twice, so that memory holds hashes only.
    """
    own = {split: writer.num_rows(split) for split in ("train", "test")}
    wanted = {split: round(num * helpful.share / (1 - helpful.share)) for split, num in own.items()}
    hashes: dict[str, set[int]] = {"train": set(), "test": set()}
    for split, row in _helpful_rows(helpful.path, settings, losses):
        hashes[split].add(row_hash("helpful", row["id"]))
    chosen = {split: set(heapq.nsmallest(wanted[split], found)) for split, found in hashes.items()}
    for split, row in _helpful_rows(helpful.path, settings, None):
        if row_hash("helpful", row["id"]) in chosen[split]:
            chosen[split].remove(row_hash("helpful", row["id"]))
            writer.add(split, row)
            report.helpful["used"] += 1
    report.helpful["wanted"] = sum(wanted.values())


def _helpful_rows(path: str, settings: ExportSettings, losses: _Losses | None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Split and row of every helpful answer that shows no fault; the others are counted if there is `losses`."""
    for source in read(Spec(path)):
        messages = source.messages
        id = f"helpful/{digest([messages, source.answer])[:32]}"
        if reason := why_not(source.answer, filters=settings.filters):
            if losses:
                losses.add("sft", source.id, f"helpful_{reason}", row=id)
            continue
        row = {
            "id": id,
            "prompt": prompt_value(messages, settings.format),
            "completion": answer_value(source.answer, settings.format),
            "tags": [*source.tags, "helpful"],
            "principles": [],
            "label_source": "given",
        }
        yield "test" if split_of(messages, settings.split) == "test" else "train", row
