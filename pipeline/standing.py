"""How far a run is, from its manifests and cards alone: the same work for ten records and for a million."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

from pipeline.chain import DATA_STAGES
from pipeline.config.load import read_file
from pipeline.dataset_folder import read_card
from pipeline.lock import Holder, holder
from pipeline.stages.cards import DATASETS
from pipeline.stages.export import identity
from pipeline.store import Manifest, RunFolder


class StageStanding(NamedTuple):
    """What a stage has published. counts: in, ok, filtered, failed and the tallies.

    covered: prompts considered, up to the first part whose inputs have changed. stale: prompts from there on.
    """

    parts: int
    covered: int
    stale: int
    counts: Counter[str]


class DatasetStanding(NamedTuple):
    version: str
    rows: dict[str, int]


class Standing(NamedTuple):
    """prompts: in the run. to_do: what is left, a sentence for each step. next_command: what does it."""

    prompts: int
    stages: dict[str, StageStanding]
    datasets: dict[str, DatasetStanding]
    holder: Holder | None
    to_do: list[str]
    next_command: str


def standing(run: RunFolder) -> Standing:
    """Raises CorruptError for a manifest or card that does not hold what was written."""
    manifests = {name: found for name in ("prompts", *DATA_STAGES) if (found := run.manifest(name))}
    stages = {name: _stage(name, manifests) for name in manifests}
    cards = {name: read_card(run.path / "datasets" / name) for name in DATASETS}
    datasets = {name: _dataset(card) for name, card in cards.items() if card}
    prompts = stages["prompts"].covered if "prompts" in stages else 0
    to_do, words = _rest(prompts, stages, is_exported=_is_exported(run, prompts, datasets))
    return Standing(prompts, stages, datasets, holder(run.path), to_do, _command(run, words))


def _stage(name: str, manifests: dict[str, Manifest]) -> StageStanding:
    parts = manifests[name].parts
    before = list(manifests)[: list(manifests).index(name)]
    current = 0
    while current < len(parts) and parts[current]["inputs"] == _inputs(before, manifests, current):
        current += 1
    covered, stale = (sum(part["prompts"] for part in some) for some in (parts[:current], parts[current:]))
    return StageStanding(len(parts), covered, stale, manifests[name].counts)


def _inputs(before: Sequence[str], manifests: dict[str, Manifest], number: int) -> dict[str, str | None]:
    """What part `number` of a stage is made from, as it stands now: stage -> sha256."""
    parts = {name: manifests[name].parts for name in before}
    return {name: found[number]["sha256"] if number < len(found) else None for name, found in parts.items()}


def _is_exported(run: RunFolder, prompts: int, datasets: dict[str, DatasetStanding]) -> bool:
    """Whether the datasets are there and made from what the stages hold now, under the last settings."""
    path, config = run.path / "export.json", run.path / "config.yaml"
    exported = sum(datasets["chains"].rows.values()) if "chains" in datasets else 0
    if exported != prompts or not path.exists() or not config.exists():
        return False
    settings = read_file(config)
    return path.read_bytes() == identity(run, settings.export, tie_band=settings.rank.tie_band)


def _dataset(card: dict[str, Any]) -> DatasetStanding:
    rows = {name.removesuffix(".parquet"): entry["rows"] for name, entry in card["files"].items()}
    return DatasetStanding(card["version"], rows)


def _rest(prompts: int, stages: dict[str, StageStanding], *, is_exported: bool) -> tuple[list[str], Sequence[str]]:
    """What is left to do, and the words of the command that does it or, of a complete run, that reads it."""
    if not prompts:
        return ["no prompts yet"], ("run", "--prompts", "FILE", "--model", "MODEL")
    missing = {name: prompts - (stages[name].covered if name in stages else 0) for name in DATA_STAGES}
    # Who ranked without revising meant to; `cai run` would revise.
    is_skipped = "critique-revise" not in stages and "rank" in stages
    if is_skipped:
        del missing["critique-revise"]
        if "generate" not in stages:
            del missing["generate"]
    to_do = [f"{name}: {number} of {prompts} prompts" for name, number in missing.items() if number > 0]
    if to_do or not is_exported:
        to_do.append("export")
    if not to_do:
        return [], ("show",)
    return to_do, (to_do[0].partition(":")[0],) if is_skipped or to_do == ["export"] else ("run",)


def _command(run: RunFolder, words: Sequence[str]) -> str:
    return shlex.join(["cai", words[0], "--run", str(run.path), *words[1:]])
