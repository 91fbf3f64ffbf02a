"""How far a run is, from its manifests and cards alone: the same work for ten records and for a million."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.chain import DATA_STAGES
from pipeline.config.load import read_file
from pipeline.dataset_folder import read_card
from pipeline.jobs import is_current
from pipeline.lock import Holder, holder
from pipeline.recipe import Export, Stages, Step, steps, trainers
from pipeline.stages.cards import DATASETS
from pipeline.stages.export import identity
from pipeline.store import Manifest, RunFolder, read_json


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


class ModelStanding(NamedTuple):
    """A model that was trained here. is_current: made from the data and the start that the run has now."""

    step: int
    metrics: dict[str, float]
    is_current: bool


class Standing(NamedTuple):
    """prompts: in the run. to_do: what is left, a sentence for each step. next_command: what does it."""

    prompts: int
    stages: dict[str, StageStanding]
    datasets: dict[str, DatasetStanding]
    models: dict[str, ModelStanding]
    holder: Holder | None
    to_do: list[str]
    next_command: str


def standing(run: RunFolder) -> Standing:
    """Raises CorruptError for a manifest or card that does not hold what was written."""
    stages = {seen.name_of(name): found for seen in (run, run.of_phase(2)) for name, found in _stages(seen).items()}
    cards = {name: read_card(run.path / "datasets" / name) for name in DATASETS}
    datasets = {name: _dataset(card) for name, card in cards.items() if card}
    models = {path.parent.name: _model(run, path) for path in sorted(run.path.glob("models/*/training.json"))}
    prompts = stages["prompts"].covered if "prompts" in stages else 0
    to_do, words = _Rest(run, prompts, stages, models).found() if prompts else _NOTHING_YET
    return Standing(prompts, stages, datasets, models, holder(run.path), to_do, _command(run, words))


_NOTHING_YET = (["no prompts yet"], ("run", "--prompts", "FILE", "--model", "MODEL"))


def _stages(run: RunFolder) -> dict[str, StageStanding]:
    """The stages of the phase from which the run is seen."""
    manifests = {name: found for name in ("prompts", *DATA_STAGES) if (found := run.manifest(name))}
    stages = {name: _stage(name, manifests) for name in manifests}
    drafts = manifests.get("generate")
    if run.phase == 2 and drafts and not is_current(run, drafts.extra.get("made_from", {})):
        # The policy is another one by now.
        again = {name: made._replace(covered=0, stale=made.covered + made.stale) for name, made in stages.items()}
        return {**again, "prompts": stages["prompts"]}
    return stages


def _model(run: RunFolder, path: Path) -> ModelStanding:
    found = read_json(path)
    return ModelStanding(found["step"], found["metrics"], is_current(run, found["made_from"]))


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


def _is_exported(run: RunFolder) -> bool:
    """Whether the datasets are there and made from what the stages hold now, under the last settings."""
    path, config = run.path / "export.json", run.path / "config.yaml"
    if not path.exists() or not config.exists() or not (run.path / "datasets" / "chains").exists():
        return False
    settings = read_file(config)
    pairs_from = settings.recipe.pairs
    return path.read_bytes() == identity(run, settings.export, tie_band=settings.rank.tie_band, pairs_from=pairs_from)


def _dataset(card: dict[str, Any]) -> DatasetStanding:
    rows = {name.removesuffix(".parquet"): entry["rows"] for name, entry in card["files"].items()}
    return DatasetStanding(card["version"], rows)


class _Rest:
    """What of the recipe is left to do."""

    def __init__(
        self, run: RunFolder, prompts: int, stages: dict[str, StageStanding], models: dict[str, ModelStanding]
    ) -> None:
        self.run, self.prompts, self.stages, self.models = run, prompts, stages, models
        self.is_exported = _is_exported(run)
        # Who ranked without revising meant to; `cai run` would revise.
        self.is_skipped = "critique-revise" not in stages and "rank" in stages

    def found(self) -> tuple[list[str], Sequence[str]]:
        """A sentence for each step, and the words of the command that does it or, of a complete run, that reads it."""
        to_do: list[str] = []
        for step in self._steps():
            if isinstance(step, Stages):
                to_do += self._missing(step, is_pending=bool(to_do))
            elif isinstance(step, Export):
                waits = step.before_samples and "phase2/rank" in self.stages
                to_do += ["export"] if to_do or not (self.is_exported or waits) else []
            elif to_do or not self._has(step.trainer):
                to_do.append(f"train-{step.trainer}")
        if not to_do:
            return [], ("show",)
        return to_do, (to_do[0].partition(":")[0],) if self.is_skipped or to_do == ["export"] else ("run",)

    def _steps(self) -> list[Step]:
        config = self.run.path / "config.yaml"
        if self.is_skipped:
            drafts = ("generate",) if "generate" in self.stages else ()
            return [Stages(1, (*drafts, "rank")), Export(before_samples=False)]
        if not config.exists():
            return [Stages(1, DATA_STAGES), Export(before_samples=False)]
        settings = read_file(config)
        return steps(settings.recipe, trainers(settings)[0])

    def _missing(self, step: Stages, *, is_pending: bool) -> Iterator[str]:
        """is_pending: steps before are to do, so that phase 2 samples another model."""
        for name in step.names:
            name = self.run.of_phase(step.phase).name_of(name)
            covered = self.stages[name].covered if name in self.stages else 0
            number = self.prompts if step.phase == 2 and is_pending else self.prompts - covered
            if number > 0:
                yield f"{name}: {number} of {self.prompts} prompts"

    def _has(self, trainer: str) -> bool:
        return trainer in self.models and self.models[trainer].is_current


def _command(run: RunFolder, words: Sequence[str]) -> str:
    return shlex.join(["cai", words[0], "--run", str(run.path), *words[1:]])
