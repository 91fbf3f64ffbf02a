"""Settings from their layers: flag, environment, file, default; the first that speaks wins."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from constitution import yamlfile
from pipeline.config.addresses import origins
from pipeline.config.settings import EngineSettings, Settings
from pipeline.errors import UsageError

Tree = dict[str, Any]
"""Settings as read: nested mappings of texts, not yet validated."""

_ENGINE_SECTIONS = ("judge", "critic")
_PLAINLY = {"tuple_type": "write a list, such as [ONE, TWO]", "model_type": "write a section, such as {KEY: VALUE}"}
"""What pydantic says in words of Python."""


class Layers:
    """Values from every layer, and where each came from, so that a mistake is reported at its place."""

    def __init__(self) -> None:
        self.tree: Tree = {}
        self.places: dict[tuple[str, ...], str] = {}

    def add(self, tree: Tree, place: str, places: Mapping[tuple[str, ...], str] | None = None) -> None:
        """Lays `tree` over what is there. A list replaces a list."""
        self._forget_key_of_another_origin(tree.get("engine"))
        for path, value in _leaves(tree):
            node = self.tree
            for key in path[:-1]:
                inner = node.setdefault(key, {})
                if not isinstance(inner, dict):
                    inner = node[key] = {}
                node = inner
            node[path[-1]] = value
            self.places = {where: found for where, found in self.places.items() if where[: len(path)] != path}
            # What is wrong with a section as a whole is laid to the layer that spoke of it last.
            self.places |= {path[:length]: place for length in range(1, len(path) + 1)}
        self.places |= {where: found for where, found in (places or {}).items() if where}

    def _forget_key_of_another_origin(self, engine: Any) -> None:
        """A layer that only moves the endpoint does not send the key that a lower layer named for another one."""
        below = self.tree.get("engine", {})
        if isinstance(engine, dict) and "base_urls" in engine and isinstance(below, dict):
            urls, urls_below = (list(section.get("base_urls") or ()) for section in (engine, below))
            if not set(origins(map(str, urls))) <= set(origins(map(str, urls_below))):
                below.pop("api_key_env", None)

    def add_file(self, path: Path) -> None:
        try:
            root = yamlfile.read(path)
        except yamlfile.ConstitutionError as error:
            raise UsageError(
                str(error).replace("write principles, or start from `cai init`", "see docs/config.md")
            ) from error
        places: dict[tuple[str, ...], str] = {}
        tree = _plain(root, (), places)
        if not isinstance(tree, dict):
            raise UsageError(f"{path}:1: not a mapping of sections; write lines such as `engine:`, see docs/config.md")
        self.add(tree, str(path), places)

    def add_environment(self, environment: Mapping[str, str]) -> None:
        """`CAI_SECTION_KEY`, such as CAI_RUN_SEED or CAI_CRITIQUE_REVISE_ROUNDS; OPENAI_BASE_URL names the endpoint."""
        if url := environment.get("OPENAI_BASE_URL"):
            self.add({"engine": {"base_urls": [url]}}, "OPENAI_BASE_URL")
        for name in sorted(environment):
            if name.startswith("CAI_"):
                section, key = _section_of(name)
                self.add({section: {key: environment[name]}}, name)

    def add_assignments(self, assignments: Iterable[str]) -> None:
        """`section.key=value` as given to --set; the value is YAML."""
        for assignment in assignments:
            path, equals, value = assignment.partition("=")
            keys = path.strip().split(".")
            if not equals or not all(keys):
                raise UsageError(
                    f"--set {assignment}: not section.key=value; write for example --set rank.order=single"
                )
            try:
                tree: Any = yaml.safe_load(value)
            except yaml.YAMLError as error:
                raise UsageError(f"--set {assignment}: the value is not YAML; put it in quotes") from error
            for key in reversed(keys):
                tree = {key: tree}
            self.add(tree, f"--set {path.strip()}")

    def settings(self) -> Settings:
        """Validates. UsageError names the place, the mistake and, for an unknown key, the nearest known one."""
        section: tuple[str, ...] = ()
        try:
            settings = Settings.model_validate(self.tree)
            overrides: dict[tuple[str, ...], dict[str, Any]] = {("judge",): settings.judge}
            overrides |= {("generate", "models", str(i)): model for i, model in enumerate(settings.generate.models)}
            if isinstance(settings.critic, dict):
                overrides["critic",] = settings.critic
            else:
                overrides |= {("critic", str(i)): critic for i, critic in enumerate(settings.critic)}
            for section, override in overrides.items():  # noqa: B007 - `section` names the place of the error
                settings.engine_for(override)
        except ValidationError as error:
            first = error.errors()[0]
            where = (*section, *_keys(first))
            place = self._place(where)
            is_named = place == f"--set {'.'.join(where)}"
            raise UsageError(f"{place}: {_explain(first, where, with_key=not is_named)}") from error
        return settings

    def _place(self, where: tuple[str, ...]) -> str:
        for length in range(len(where), 0, -1):
            if where[:length] in self.places:
                return self.places[where[:length]]
        return "settings"


def _leaves(tree: Tree, path: tuple[str, ...] = ()) -> Iterable[tuple[tuple[str, ...], Any]]:
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, (*path, str(key)))
        else:
            yield (*path, str(key)), value


def _plain(node: yamlfile.Node, path: tuple[str, ...], places: dict[tuple[str, ...], str]) -> Any:
    places[path] = f"{node.file}:{node.line}"
    if isinstance(node.value, dict):
        inner = {key: _plain(value, (*path, key), places) for key, value in node.value.items()}
        places.update({(*path, key): f"{node.file}:{node.keys[key]}" for key in node.value})
        return inner
    if isinstance(node.value, list):
        return [_plain(value, (*path, str(index)), places) for index, value in enumerate(node.value)]
    return None if node.value in ("", "null", "~") else node.value


def _section_of(name: str) -> tuple[str, str]:
    rest = name.removeprefix("CAI_").lower()
    for section in sorted(Settings.model_fields, key=len, reverse=True):
        if rest.startswith(section + "_"):
            return section, rest.removeprefix(section + "_")
    raise UsageError(f"{name}: no section of that name; sections are {', '.join(Settings.model_fields)}")


def _keys(error: Any) -> Iterable[str]:
    """The keys on the way to a mistake, without the alternatives of a type that pydantic puts between them."""
    parts = list(map(str, error["loc"]))
    if error["type"] == "extra_forbidden":
        return parts
    return [part for part in parts if part.isidentifier() or part.isdecimal()]


def _explain(error: Any, where: tuple[str, ...], *, with_key: bool) -> str:
    dotted = ".".join(where)
    if error["type"] == "extra_forbidden":
        known = _known_keys(where[:-1])
        near = difflib.get_close_matches(where[-1], known, 1, 0.5)
        cure = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
        return f"unknown key{f' {dotted!r}' if with_key else ''}; {cure}"
    key = f"{dotted or 'settings'}: " if with_key else ""
    if error["type"] in _PLAINLY:
        return f"{key}{_PLAINLY[error['type']]}"
    message = error["msg"].removeprefix("Value error, ")
    given = error.get("input")
    shown = f", not {given!r}" if isinstance(given, str | int | float) and "add up" not in message else ""
    return f"{key}{message[0].lower()}{message[1:]}{shown}"


def _known_keys(where: tuple[str, ...]) -> list[str]:
    """The keys of the section at `where`."""
    model: type[BaseModel] = Settings
    for key in where:
        if key in _ENGINE_SECTIONS or key == "models":
            return list(EngineSettings.model_fields)
        field = model.model_fields.get(key)
        for candidate in [field.annotation, *get_args(field.annotation)] if field else []:
            if isinstance(candidate, type) and issubclass(candidate, BaseModel):
                model = candidate
    return list(model.model_fields)


def dump(settings: Settings) -> bytes:
    """YAML of all settings, defaults included; reading it gives the same settings."""
    text = yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)
    header = "# Settings as resolved at the last call; later calls read them where there is no cai.yaml.\n"
    return (header + text).encode()


def differences(before: Settings, after: Settings) -> list[str]:
    """`section.key: old -> new` for every setting that differs."""
    old, new = ({k: v for k, v in _leaves(s.model_dump(mode="json")) if v != {}} for s in (before, after))
    changed = sorted(path for path in old.keys() | new.keys() if old.get(path) != new.get(path))
    return [f"{'.'.join(path)}: {old.get(path)} -> {new.get(path)}" for path in changed]


def read_file(path: Path) -> Settings:
    """The settings of one file alone."""
    layers = Layers()
    layers.add_file(path)
    return layers.settings()


def read_layers(run_config: Path | None, config: Path | None, assignments: Iterable[str], flags: Tree) -> Settings:
    """The settings of one call: flags, --set, the environment, and one file; the first that speaks wins.

    The file is --config, or `cai.yaml` if this folder has one, or else `run_config`: what the last call on the same run
    resolved.
    """
    layers = Layers()
    for file in (config, Path("cai.yaml"), run_config):
        if file is not None and (file == config or file.exists()):
            layers.add_file(file)
            break
    layers.add_environment(os.environ)
    layers.add_assignments(assignments)
    layers.add(flags, "command line")
    return layers.settings()
