"""The pages and the examples: their links, their commands, and that the examples load."""

from __future__ import annotations

import re
import shlex
import textwrap
from pathlib import Path

import click
import pytest
from torch.distributed.run import get_args_parser

from constitution.principles import Constitution
from pipeline.cli import cli
from pipeline.config.load import Layers, read_file
from pipeline.config.settings import Settings

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "examples").glob("*.md")])
COMMANDS = [
    (page.name, line.split("  #")[0].strip())
    for page in PAGES
    if page.name != "cli.md"
    for line in re.findall(r"^    ((?:torchrun .* )?cai .*)$", page.read_text(encoding="utf-8"), re.M)
]
SETTINGS = [
    (page.name, block)
    for page in PAGES
    for block in re.findall(
        rf"(?m)^ {{4}}(?:{'|'.join(Settings.model_fields)}):\n(?: {{4,}}.*\n)+", page.read_text("utf-8")
    )
]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if link.startswith("http"):
            continue
        name, _, heading = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        if not heading:
            continue
        headings = [
            re.sub(r"[^\w -]", "", text.lower()).replace(" ", "-")
            for text in re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.M)
        ]
        assert heading in headings, link


def test_every_page_is_reached_from_the_readme():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert {page.name for page in (ROOT / "docs").glob("*.md")} == set(re.findall(r"\(docs/([\w-]+\.md)\)", readme))


@pytest.mark.parametrize(("page", "line"), COMMANDS, ids=[f"{page}:{line}" for page, line in COMMANDS])
def test_a_command_on_a_page_names_options_that_there_are(page, line):
    command: click.Command = cli
    words = shlex.split(line)
    if words[0] == "torchrun":
        launch = get_args_parser().parse_args(words[1:])
        words = [launch.training_script, *launch.training_script_args]
    assert words.pop(0) == "cai"
    context = click.Context(command, **command.context_settings)
    while isinstance(command, click.Group):
        _, command, words = command.resolve_command(context, words)
        context = click.Context(command, parent=context, **command.context_settings)
    options, _, _ = command.make_parser(context).parse_args(words)
    layers = Layers()
    layers.add_assignments(options.get("assignments", ()))
    layers.settings()


@pytest.mark.parametrize(("page", "block"), SETTINGS, ids=[f"{page}:{block[:20]!r}" for page, block in SETTINGS])
def test_settings_on_a_page_are_valid(page, block, tmp_path):
    (tmp_path / "cai.yaml").write_text(textwrap.dedent(block), encoding="utf-8")
    read_file(tmp_path / "cai.yaml")


@pytest.mark.parametrize("path", [*(ROOT / "examples").glob("*.yaml")], ids=lambda path: path.name)
def test_an_example_loads(path):
    if "principles:" in path.read_text(encoding="utf-8").splitlines():
        assert len(Constitution.load(path)) > 0
    else:
        assert read_file(path).engine.model
