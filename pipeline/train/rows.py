"""Training rows from run folders, files and data sets, in one order and one form.

A source's rows come in its order, sources one after the other. Weight and split are choices by hash, row for row: a
row is taken floor(weight) times, and once more if its hash lies in the rest, so that a larger weight keeps what a
smaller one took. Of kind comparisons all rows of a prompt in one source are one. docs/datasets.md says
what is read.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pipeline.config.settings import SplitSettings
from pipeline.conversations import read_text
from pipeline.dataset_folder import verify
from pipeline.errors import IncompleteError, UsageError
from pipeline.records import Message, digest, message_id
from pipeline.sources import hf_parts, hf_splits, is_hf, read_fields
from pipeline.splits import row_hash, split_of
from pipeline.store import RunFolder
from pipeline.train.layouts import DOCS, Comparison, Example, Kind, read_example

Split = Literal["train", "test"]
SPLITS: tuple[Split, ...] = ("train", "test")
Fields = Iterator[tuple[str, dict[str, Any]]]

DATASETS: dict[Kind, tuple[str, ...]] = {
    "sft": ("sft",),
    "language": ("sft",),
    "pairs": ("preference",),
    "comparisons": ("preference",),
    "ranked": ("ranked",),
    "prompts": ("prompts",),
    "any": ("ranked", "preference", "sft"),
}
"""Kind of rows -> the datasets of a run that may hold them; the first that is there is read."""


class Source(NamedTuple):
    """path: a run folder, a file, a folder of files or `hf:…`. weight: how often an epoch takes a row, on average."""

    path: str
    weight: float = 1.0


class Row(NamedTuple):
    """One thing to learn, as layouts.Example says it.

    id: the input's own, or made from prompt and completions; the same for a row that is repeated, and not always
    another one in another source.
    label_source: `ai`, `given` or what the input says; `mixed` where a prompt's comparisons differ in it.
    tags: the input's own.
    """

    id: str
    prompt: list[Message]
    completions: tuple[str, ...]
    probability: float
    scores: tuple[float, ...]
    label_source: str
    tags: tuple[str, ...] = ()
    comparisons: tuple[Comparison, ...] = ()


@dataclass
class Tally:
    """What was read of one source. rows: in all. used: of these, given out at least once. other_split: not asked for.

    label_sources: of the used ones, each once. left_out: why there was nothing to learn -> rows.
    first: why -> where the first of these rows stands.
    """

    path: str
    split: Split
    rows: int = 0
    used: int = 0
    other_split: int = 0
    label_sources: Counter[str] = field(default_factory=Counter)
    left_out: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        parts = [f"{reason} {count} (first {self.first[reason]})" for reason, count in sorted(self.left_out.items())]
        left_out = f"; left out: {', '.join(parts)}" if parts else ""
        used = f"{self.used} of {self.rows} rows used, {self.other_split} in the other split"
        return f"{self.path}, {self.split}: {used}{left_out}"


def parse_source(text: str) -> Source:
    """`PATH`, or `PATH@WEIGHT`; a path that exists as it stands has weight 1. Raises UsageError."""
    path, at, after = text.rpartition("@")
    try:
        weight = float(after)
    except ValueError:
        if at and not Path(text).exists() and Path(path).exists():
            message = f"{text}: {after!r} is no number; write {path}@WEIGHT, such as {path}@0.5"
            raise UsageError(message) from None
        return Source(text)
    if not at or Path(text).exists():
        return Source(text)
    if not 0 < weight < math.inf:
        raise UsageError(f"{text}: the weight {after} is not above 0; leave the source out, or give it another weight")
    return Source(path, weight)


def read(
    sources: Iterable[Source],
    *,
    kind: Kind,
    split: Split,
    shares: SplitSettings | None = None,
    tallies: list[Tally] | None = None,
) -> Iterator[Row]:
    """The rows of one split, each as often as its source's weight says; in `test` no more than once.

    shares: of `export.split`; what has no split of its own is divided by the hash that export uses. tallies: takes one
    for each source. Raises UsageError (2) for what cannot be read, IncompleteError (3) if a source has no training row
    (of kind any it need not have one).
    """
    for source in sources:
        tally = Tally(source.path, split)
        if tallies is not None:
            tallies.append(tally)
        yield from _read_source(source, kind, split, shares or SplitSettings(), tally)
        if split == "train" and kind != "any" and not tally.used:
            weight = f", weight {source.weight:g}" if source.weight < 1 else ""
            raise IncompleteError(f"{tally}{weight}; nothing to train on, {DOCS}")


def _read_source(source: Source, kind: Kind, split: Split, shares: SplitSettings, tally: Tally) -> Iterator[Row]:
    found = _rows_of_split(source, kind, split, shares, tally)
    counted = _by_prompt(found) if kind == "comparisons" else ((row, Counter([row.label_source])) for row in found)
    for row, label_sources in counted:
        copies = _copies(source.weight, row.id)
        if copies:
            tally.used += label_sources.total()
            tally.label_sources += label_sources
        yield from [row] * (copies if split == "train" else min(copies, 1))


def _rows_of_split(source: Source, kind: Kind, split: Split, shares: SplitSettings, tally: Tally) -> Iterator[Row]:
    """Each once. Raises UsageError where plain texts and conversations are in one source."""
    found, is_split = _open(source.path, kind, split)
    forms: set[str] = set()
    for where, fields in found:
        tally.rows += 1
        example = read_example(fields, where, kind)
        if not is_split and _split(fields, example, shares) != split:
            tally.other_split += 1
        elif isinstance(example, str):
            tally.left_out[example] += 1
            tally.first.setdefault(example, where)
        else:
            form = "a conversation" if example.prompt else "a plain text"
            forms.add(form)
            if len(forms) > 1:
                raise UsageError(f"{where}: {form}, unlike the rows before; take one of the two kinds out, {DOCS}")
            yield _row(fields, example, where)


def _row(fields: dict[str, Any], example: Example, where: str) -> Row:
    id, label_source, tags = (fields.get(name) for name in ("id", "label_source", "tags"))
    return Row(
        digest([example.prompt, example.completions])[:32] if id is None else read_text(str(id), where, "id"),
        *example[:4],
        "given" if label_source is None else read_text(label_source, where, "label_source"),
        tuple(read_text(tag, where, "tags") for tag in tags) if isinstance(tags, list) else (),
        example.comparisons,
    )


def _copies(weight: float, id: str) -> int:
    whole = math.floor(weight)
    return whole + (row_hash("weight", id) / 2**64 < weight - whole)


def _split(fields: dict[str, Any], example: Example | str, shares: SplitSettings) -> Split:
    """What the row's own `split` column says, else the choice by hash.

    What teaches nothing, and a plain text, counts as training then.
    """
    own = fields.get("split")
    if own == "train":
        return "train"
    if own in ("test", "validation"):
        return "test"
    if isinstance(example, str) or not example.prompt:
        return "train"
    return "test" if split_of(example.prompt, shares) == "test" else "train"


# All rows of a prompt in one


class _Prompt:
    """What rows say of one prompt: its different completions, and how they compare."""

    def __init__(self, first: Row) -> None:
        self.first = first
        self.label_sources: Counter[str] = Counter()
        self._places: dict[str, int] = {}
        self._comparisons: list[Comparison] = []
        self._tags: dict[str, None] = {}

    def add(self, row: Row) -> None:
        self.label_sources[row.label_source] += 1
        self._tags |= dict.fromkeys(row.tags)
        places = [self._places.setdefault(text, len(self._places)) for text in row.completions]
        for first, second, probability in row.comparisons:
            self._comparisons.append(Comparison(places[first], places[second], probability))

    def row(self) -> Row:
        """With the id of the first one."""
        return self.first._replace(
            completions=tuple(self._places),
            probability=1.0,
            scores=(),
            label_source="mixed" if len(self.label_sources) > 1 else self.first.label_source,
            tags=tuple(self._tags),
            comparisons=tuple(self._comparisons),
        )


def _by_prompt(rows: Iterable[Row]) -> Iterator[tuple[Row, Counter[str]]]:
    """One row for each prompt, in the order of their first ones, and the label sources of those it is made of.

    Holds all of them.
    """
    prompts: dict[str, _Prompt] = {}
    for row in rows:
        prompts.setdefault(message_id(row.prompt), _Prompt(row)).add(row)
    yield from ((prompt.row(), prompt.label_sources) for prompt in prompts.values())


# Where rows lie


def _open(path: str, kind: Kind, split: Split) -> tuple[Fields, bool]:
    """The rows of a source, and whether they are all of this split."""
    folder = Path(path)
    if is_hf(path):
        return _open_hf(path, split)
    if not folder.is_dir():
        return read_fields(path), False
    if (folder / "run.json").exists():
        folder = dataset_of(RunFolder(folder).path, kind)
        if not folder.is_dir():
            raise UsageError(f"{folder}: not there; `cai export --run {path}` makes it, if the run has such rows")
        return _open_export(folder, split), True
    if is_export(folder):
        return _open_export(folder, split), True
    return _open_hf(f"hf:{path}", split)


def dataset_of(run: Path, kind: Kind) -> Path:
    """Where a run's rows of this kind lie, or would lie."""
    folders = [run / "datasets" / name for name in DATASETS[kind]]
    return next((folder for folder in folders if folder.is_dir()), folders[0])


def is_export(folder: Path) -> bool:
    """Whether it is a dataset of a run, or one that `cai score` made."""
    card = folder / "README.md"
    return card.is_file() and b"\ncai:\n" in card.read_bytes()


def _open_export(folder: Path, split: Split) -> Fields:
    file = verify(folder).get(split)
    return read_fields(str(file)) if file else iter(())


def _open_hf(path: str, split: Split) -> tuple[Fields, bool]:
    """A data set's own splits if it has both; the only one, or the one named in the path, is divided."""
    options = hf_parts(path)[1]
    if "column" in options:
        raise UsageError(f"{path}: column= is for prompts; leave it out, training rows are read by column name, {DOCS}")
    names = [] if "split" in options else hf_splits(path)
    if names in ([], ["train"]):
        return read_fields(path), False
    own = {"train": "train", "test": "test" if "test" in names else "validation"}
    if not set(own.values()) <= set(names):
        raise UsageError(f"{path}: its splits are {', '.join(names)}; name one to be divided: split=, {DOCS}")
    return read_fields(f"{path}{'&' if '?' in path else '?'}split={own[split]}"), True
