"""Datasets from the published lines of a run: sft, preference, ranked, prompts, chains.

A pure function of the lines and the settings. Every choice depends on its own row (or, for the share of helpful data,
on the number of rows), so that ten runs that add prompts end with the bytes of one run over all. What made no row is
counted by its reason.
"""

from __future__ import annotations

import heapq
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.config.settings import ExportSettings, HelpfulSettings
from pipeline.dataset_writer import DatasetWriter
from pipeline.errors import CorruptError
from pipeline.records import Line, canonical, digest, line_bytes
from pipeline.sources import Spec, read
from pipeline.splits import row_hash, split_of
from pipeline.stages.cards import DATASETS, card_text, schemas
from pipeline.stages.dataset_rows import ExportReport, Losses, Rows, answer_value, prompt_value
from pipeline.stages.filters import why_not
from pipeline.stages.rows import Trace
from pipeline.store import RunFolder, io_errors, make_folder, sync_folder, write_atomic

STAGES = ("generate", "critique-revise", "rank")
OF_PHASE_1 = ("sft", "prompts")
"""Datasets that phase 2 adds nothing to."""


class Samples(NamedTuple):
    """What phase 2 has published: lines of all prompts, of the samples and of their ranking.

    alone: pairs and rankings come from these lines only, not from phase 1's too.
    """

    prompts: Iterable[Line]
    drafts: Iterable[Line]
    ranked: Iterable[Line]
    alone: bool


def export_run(
    run: RunFolder,
    settings: ExportSettings,
    *,
    tie_band: float,
    pairs_from: str = "samples",
    before_samples: bool = False,
) -> ExportReport:
    """Exports what a run has published. UsageError if a stage was made from lines that have changed since.

    pairs_from: as `recipe.pairs`; samples: phase 1's pairs for as long as there are no samples. before_samples: phase 2
    is about to run; what it has ranked before may be out of date, and what is made from it waits.
    `export.json` says what the datasets were made from. It is written last, and is away while they change.
    """
    waits = before_samples and bool(_phase_2(run, pairs_from))
    phase_2 = None if waits else _phase_2(run, pairs_from)
    for seen in filter(None, (run, phase_2)):
        for name in STAGES:
            seen.check_inputs(name)
    stages = {name: run.read(name) if run.manifest(name) else None for name in STAGES}
    path, made_from = run.path / "export.json", identity(run, settings, tie_band=tie_band, pairs_from=pairs_from)
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
        samples=_samples(phase_2, alone=pairs_from == "samples") if phase_2 else None,
        settings=settings,
        tie_band=tie_band,
        left_out=run.losses_path("filtered", "export"),
        names=OF_PHASE_1 if waits else tuple(DATASETS),
    )
    if before_samples:
        report.expected = tuple(name for name in report.expected if name in OF_PHASE_1)
    if not path.exists() and not waits:
        write_atomic(path, made_from)
    return report


def _phase_2(run: RunFolder, pairs_from: str) -> RunFolder | None:
    """The run as phase 2 sees it, if preferences are made from what it has ranked."""
    phase_2 = run.of_phase(2)
    return phase_2 if pairs_from != "revisions" and phase_2.manifest("rank") else None


def _samples(phase_2: RunFolder, *, alone: bool) -> Samples:
    return Samples(phase_2.read("prompts"), phase_2.read("generate"), phase_2.read("rank"), alone)


def identity(run: RunFolder, settings: ExportSettings, *, tie_band: float, pairs_from: str) -> bytes:
    """What an export depends on, as `export.json` holds it: a hash of each stage's parts, and one of the settings."""
    phases = filter(None, (run, _phase_2(run, pairs_from)))
    parts = {seen.name_of(name): seen.parts(name) for seen in phases for name in ("prompts", *STAGES)}
    content = {
        "inputs": {name: digest([part["sha256"] for part in found]) for name, found in parts.items() if found},
        "settings": digest([settings.model_dump(mode="json"), tie_band, pairs_from]),
    }
    return canonical(content) + b"\n"


def export(
    folder: Path,
    prompts: Iterable[Line],
    *,
    drafts: Iterable[Line] | None,
    chains: Iterable[Line] | None,
    ranked: Iterable[Line] | None,
    samples: Samples | None = None,
    settings: ExportSettings,
    tie_band: float,
    left_out: Path,
    names: Iterable[str] = tuple(DATASETS),
) -> ExportReport:
    """Writes the datasets under `folder`; stages that were not run are None. Their lines are in the prompts' order.

    tie_band: of the ranking; |p - 0.5| up to this makes no pair. left_out: the file that names what made no row, in the
    prompts' order; without such it is not there. names: of the datasets to write. Memory stays bounded for any number
    of records.
    """
    # Without a ranking nothing is best; the end of each chain is the nearest thing to it.
    settings = settings.model_copy(update={"sft": "last"}) if settings.sft == "best" and ranked is None else settings
    expected = _expected(settings, chains is not None, ranked is not None or samples is not None)
    report = ExportReport(expected=tuple(name for name in expected if name in names))
    schema = schemas(settings.format)
    writers = {name: DatasetWriter(folder / name, schema[name]) for name in names}
    with _losses(left_out) as drop:
        losses = Losses(report, drop)
        for trace in _joined(prompts, drafts, chains, ranked):
            split = split_of(trace.prompt["messages"], settings.split)
            report.prompts[split] += 1
            rows = Rows(trace, split, settings, report, losses, writers)
            rows.add_prompt()
            rows.add_chains()
            if split != "preference":
                rows.add_sft()
            if samples is None or not samples.alone:
                rows.add_pairs(tie_band)
                if ranked is not None:
                    rows.add_ranked()
        for trace in _joined(samples.prompts, samples.drafts, None, samples.ranked) if samples else ():
            split = split_of(trace.prompt["messages"], settings.split)
            if split != "sft":
                rows = Rows(trace, split, settings, report, losses, writers, phase=2)
                if trace.drafts:
                    rows.add_chains()
                rows.add_pairs(tie_band)
                rows.add_ranked()
        if settings.helpful:
            _add_helpful(settings.helpful, settings, report, losses, writers["sft"])
    report.left_out = left_out if left_out.exists() else None
    for name, writer in writers.items():
        report.datasets[name] = writer.publish(card_text(name, settings, pairs_from=_pairs_from(samples)))
    return report


def _pairs_from(samples: Samples | None) -> str:
    if samples is None:
        return "revisions"
    return "samples" if samples.alone else "both"


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


def _add_helpful(
    helpful: HelpfulSettings, settings: ExportSettings, report: ExportReport, losses: Losses, writer: DatasetWriter
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


def _helpful_rows(path: str, settings: ExportSettings, losses: Losses | None) -> Iterator[tuple[str, dict[str, Any]]]:
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
