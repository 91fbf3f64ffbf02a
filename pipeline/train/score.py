"""Scores any answers with a reward model or a policy, and groups them by quality, as data to train on.

Rows are scored as they are read, and wait on disk, sorted by prompt: all answers to one prompt, whatever source each
came from, are one row. Two readings of them follow: one for the numbers that bands and summary need, one that writes.
In memory are the scores alone. Left out: scores of single tokens.
"""

from __future__ import annotations

import itertools
import shutil
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pipeline.config.settings import SplitSettings
from pipeline.dataset_writer import DatasetWriter, Published, Sorter
from pipeline.errors import IncompleteError, UsageError
from pipeline.lock import working
from pipeline.records import message_id
from pipeline.train import rows
from pipeline.train.batches import Data, take
from pipeline.train.output import check_folder
from pipeline.train.quality import ALL, Answer, Grouping, Scored, borders, choose, parts, schema
from pipeline.train.scorers import Scorer, ScorerKind, open_scorer, outline

CHUNK = 1024
"""Rows that are sorted by length together."""
QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
NUM_BARS = 20


def _ignore(_: Any) -> None:
    """Nobody watches."""


@dataclass(frozen=True)
class ScoreJob:
    """What to score. model: a folder or hub name. out: the folder of the dataset. shares: of `export.split`.

    microbatch_tokens: what goes through the model at a time. watch: is told how many rows have their scores.
    """

    sources: Sequence[rows.Source]
    model: str
    kind: ScorerKind
    out: Path
    grouping: Grouping = ALL
    shares: SplitSettings = field(default_factory=SplitSettings)
    device: str = "auto"
    microbatch_tokens: int = 8192
    watch: Callable[[int], None] = _ignore


@dataclass
class Summary:
    """Of all different answers. by: label source or tag -> how many answers have it, and the sum of their scores.

    agreement: pairs of a row's answers that had an order before, and how many of them have the same one now.
    """

    scores: array[float] = field(default_factory=lambda: array("d"))
    prompts: Counter[str] = field(default_factory=Counter)
    by: dict[str, list[float]] = field(default_factory=lambda: defaultdict(lambda: [0, 0.0]))
    left_out: Counter[str] = field(default_factory=Counter)
    compared: Counter[str] = field(default_factory=Counter)
    agreed: Counter[str] = field(default_factory=Counter)

    def add(self, split: str, scored: Scored) -> None:
        self.prompts[split] += 1
        for answer in scored.answers:
            self.scores.append(answer.score)
            for name in (f"label_source {answer.label_source}", *(f"tag {tag}" for tag in scored.tags)):
                self.by[name][0] += 1
                self.by[name][1] += answer.score

    def numbers(self) -> dict[str, Any]:
        scores = np.array(self.scores)
        bars, edges = np.histogram(scores, bins=NUM_BARS)
        quantiles = np.quantile(scores, QUANTILES).tolist()
        return {
            "prompts": dict(self.prompts),
            "completions": len(scores),
            "left_out": dict(self.left_out),
            "mean": float(scores.mean()),
            "std": float(scores.std()),
            "quantiles": {f"{q:g}": value for q, value in zip(QUANTILES, quantiles, strict=True)},
            "histogram": {"from": float(edges[0]), "to": float(edges[-1]), "counts": bars.tolist()},
            "means": {name: {"completions": n, "mean": total / n} for name, (n, total) in sorted(self.by.items())},
            "agreement": {split: self.agreed[split] / n for split, n in sorted(self.compared.items())},
        }


class ScoreReport(NamedTuple):
    """parts: folder -> what was published there."""

    summary: dict[str, Any]
    parts: dict[Path, Published]
    tallies: list[rows.Tally]


def plan_score(job: ScoreJob) -> dict[str, dict[str, int]]:
    """Of each split the rows, completions and tokens that would be scored. Reads and tokenises, loads no weights."""
    _folders(job)
    chat, context, _ = outline(job.model, job.kind)
    counts, left_out = dict[str, dict[str, int]](), Counter[str]()
    for split in rows.SPLITS:
        total = Counter(rows=0, completions=0, tokens=0, too_long=0)
        for row in rows.read(job.sources, kind="any", split=split, shares=job.shares):
            one = Data()
            is_taken = take(one, row, chat, max_length=context, too_long="drop")
            tokens = one.num_tokens(0) if is_taken else 0
            total.update(rows=is_taken, completions=one.num_completions, tokens=tokens)
            total.update(one.left_out)
            left_out.update(one.left_out)
        counts[split] = dict(total)
    if not any(total["rows"] for total in counts.values()):
        raise _nothing(left_out, context, [])
    return counts


def _folders(job: ScoreJob) -> dict[str, Path]:
    """Of each part its folder; grades that an earlier call made and this one does not are parts without rows.

    Raises UsageError for a folder with something else in it.
    """
    folders = {part: job.out / part for part in parts(job.grouping)}
    for folder in (job.out, *folders.values()):
        check_folder(folder)
    for folder in folders.values():
        if folder.exists() and any(folder.iterdir()) and not rows.is_export(folder):
            raise UsageError(f"{folder}: not empty, and no dataset that was made here; choose another --out")
    before = job.out.glob("grade-*") if job.grouping.kind == "graded" else ()
    return folders | {path.name: path for path in sorted(before) if rows.is_export(path)}


def _nothing(left_out: Counter[str], context: int, tallies: Sequence[rows.Tally]) -> IncompleteError:
    words = {
        "too_long": f"longer than the model's context of {context} tokens; use a model with more",
        "bad_roles": "with turns that the model's chat template refuses; use a model whose template takes them",
    }
    lost = [f"{count} {words.get(reason, reason)}" for reason, count in sorted(left_out.items())]
    return IncompleteError(f"no row to score: {'; '.join([*map(str, tallies), *lost])}")


def run_score(job: ScoreJob) -> ScoreReport:
    """Reads, scores and publishes. Raises IncompleteError (3) if no row can be scored."""
    folders = _folders(job)
    with working(job.out.with_name(f".{job.out.name}.scoring")) as held:
        return _run(job, folders, held / "rows")


def _run(job: ScoreJob, folders: dict[str, Path], work: Path) -> ScoreReport:
    """work: a folder for what waits; it is gone at the end."""
    scorer = open_scorer(job.model, job.kind, device=job.device)
    shutil.rmtree(work, ignore_errors=True)
    summary, tallies = Summary(), list[rows.Tally]()
    try:
        waiting = {split: Sorter(work, split) for split in rows.SPLITS}
        for split, sorter in waiting.items():
            for line in _scored_lines(job, scorer, split, summary, tallies):
                sorter.add(line)
        for split, sorter in waiting.items():
            for scored in _by_prompt(sorter):
                summary.add(split, scored)
        if not summary.scores:
            raise _nothing(summary.left_out, scorer.context, tallies)
        published = _write(job, scorer, waiting, folders, summary)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return ScoreReport(summary.numbers(), published, tallies)


def _scored_lines(
    job: ScoreJob, scorer: Scorer, split: rows.Split, summary: Summary, tallies: list[rows.Tally]
) -> Iterator[dict[str, Any]]:
    """Every row with its scores; ids are unique, and sort by prompt, then by place in the sources."""
    found = rows.read(job.sources, kind="any", split=split, shares=job.shares, tallies=tallies)
    number = 0
    while chunk := list(itertools.islice(found, CHUNK)):
        kept, scores, left_out = scorer.score_rows(chunk, max_tokens=job.microbatch_tokens)
        summary.left_out.update(left_out)
        for row, own in zip(kept, scores, strict=True):
            number += 1
            _count_agreement(summary, split, row.scores, own)
            yield {
                "id": f"{message_id(row.prompt)}/{number:012d}",
                "prompt": row.prompt,
                "answers": [[text, score, row.label_source] for text, score in zip(row.completions, own, strict=True)],
                "tags": row.tags,
            }
        job.watch(number)


def _count_agreement(summary: Summary, split: str, before: Sequence[float], now: Sequence[float]) -> None:
    for i, j in itertools.combinations(range(len(before)), 2):
        if before[i] != before[j]:
            summary.compared[split] += 1
            summary.agreed[split] += (before[i] - before[j]) * (now[i] - now[j]) > 0


def _by_prompt(sorter: Sorter) -> Iterator[Scored]:
    """All answers to each prompt, the best first; a text that came twice counts once, as it came first."""
    lines = (line for _, line in sorter.rows())
    for id, group in itertools.groupby(lines, key=lambda line: line["id"].partition("/")[0]):
        answers: dict[str, Answer] = {}
        tags: set[str] = set()
        for line in group:
            prompt = line["prompt"]
            tags.update(line["tags"])
            for text, score, label_source in line["answers"]:
                answers.setdefault(text, Answer(text, score, label_source))
        yield Scored(id, prompt, sorted(answers.values(), key=lambda answer: -answer.score), sorted(tags))


def _write(
    job: ScoreJob, scorer: Scorer, waiting: dict[rows.Split, Sorter], folders: dict[str, Path], summary: Summary
) -> dict[Path, Published]:
    edges = borders(summary.scores, job.grouping)
    writers = {part: DatasetWriter(folder, schema(job.grouping)) for part, folder in folders.items()}
    for split, sorter in waiting.items():
        for scored in _by_prompt(sorter):
            for part, row in choose(scored, job.grouping, edges):
                writers[part].add(split, row)
    card = _card(job.grouping, edges, scorer)
    return {folders[part]: writer.publish(card) for part, writer in writers.items()}


_SAID = {
    "all": "Every prompt with all its different answers, the best first: `prompt`, `completions`, `scores`.",
    "best-of-n": "The best answer to every prompt: `prompt`, `completion`, with its `score`.",
    "top-quantile": "The answers whose score is in the top share of all: `prompt`, `completion`, with its `score`.",
    "graded": "Answers by grade, 1 the worst, in a folder for each: `prompt`, `completion`, `score`, `grade`.",
}


def _card(grouping: Grouping, edges: Sequence[float], scorer: Scorer) -> str:
    """Markdown without a time, a host or a folder."""
    how = {
        "reward": "a reward model, read at the token that ends the answer's turn",
        "policy": "a policy: the log-probability of the answer, divided by its tokens",
    }[scorer.kind]
    lines = [
        "# Scored answers",
        _SAID[grouping.kind],
        f"Scores come from {how}; its weights: {scorer.fingerprint['weights'][:16]}. A higher score is better.",
        "A row's id begins with the hash of its prompt. `label_source` is that of the row that the answer came from "
        "(`mixed` where they differ), `tags` those of all rows with this prompt.",
        f"Made with: group {grouping}" + (f", borders {', '.join(f'{edge:.6g}' for edge in edges)}." if edges else "."),
        "Only the version named in this file's head is current; older ones beside it can be deleted.",
    ]
    return "\n" + "\n\n".join(lines) + "\n"
