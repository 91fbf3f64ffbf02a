"""docs/config.md against the settings as they are."""

from __future__ import annotations

import re
from pathlib import Path

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from pipeline.config import settings

PAGE = Path(__file__).parents[3] / "docs" / "config.md"
SECTIONS: dict[str, tuple[type[BaseModel], set[str]]] = {
    "engine": (settings.EngineSettings, set()),
    "prompts": (settings.PromptsSettings, set()),
    "prompts.sources": (settings.Source, set()),
    "generate": (settings.GenerateSettings, set()),
    "critique_revise": (settings.CritiqueReviseSettings, set()),
    "rank": (settings.RankSettings, set()),
    "export": (settings.ExportSettings, {"split"}),
    "export.helpful": (settings.HelpfulSettings, set()),
    "export.split": (settings.SplitSettings, set()),
    "recipe": (settings.RecipeSettings, set()),
    "train_sft": (settings.TrainSftSettings, set()),
    "train_sft.lora": (settings.LoraSettings, set()),
    "train_rm": (settings.TrainRmSettings, set()),
    "train_dpo": (settings.TrainDpoSettings, set()),
    "train_rrhf": (settings.TrainRrhfSettings, set()),
    "train_ppo": (settings.TrainPpoSettings, set()),
    "run": (settings.RunSettings, set()),
}


def documented() -> dict[str, dict[str, str]]:
    """Section -> key -> default, as the page has them."""
    sections: dict[str, dict[str, str]] = {}
    for line in PAGE.read_text().splitlines():
        if line.startswith("## "):
            sections[line.removeprefix("## ")] = {}
        elif row := re.match(r"\| `(\w+)` \| ([^|]*) \|", line):
            sections[list(sections)[-1]][row[1]] = row[2]
    return sections


def shown(value: object) -> str:
    if value is PydanticUndefined:
        return "required"
    if isinstance(value, tuple):
        return f"[{', '.join(map(str, value))}]"
    if value is None or isinstance(value, bool):
        return {None: "–", True: "true", False: "false"}[value]
    return str(value)


def test_every_key_stands_on_the_page_with_its_default() -> None:
    sections = documented()
    for name, (model, elsewhere) in SECTIONS.items():
        defaults = {key: shown(field.default) for key, field in model.model_fields.items() if key not in elsewhere}
        assert sections[name] == defaults, name


def test_every_section_stands_on_the_page() -> None:
    named = {name.partition(".")[0] for name in documented()} - {"Top level"} | {"constitution"}
    assert named == set(settings.Settings.model_fields)
