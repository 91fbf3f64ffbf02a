"""constitution check, show and import."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from pipeline.cli.common import Console, command, printable
from pipeline.errors import UsageError

if TYPE_CHECKING:
    from constitution.principles import Constitution, Principle

REQUESTS = ("critique", "revision", "check", "comparison", "grade")
_TEXTS = ("critique_request", "revision_request", "comparison")


@click.group("constitution")
def constitution_command() -> None:
    """Check, show or import a constitution: the principles that answers are criticised, revised and judged by."""


@command("constitution check", short_help="Say whether a file is a valid constitution.")
@click.argument("file")
def check_command(console: Console, *, file: str) -> None:
    """Say whether FILE is a valid constitution; if not, where it is wrong and what to do, with exit code 2."""
    from constitution.principles import Constitution

    constitution = Constitution.load(file)
    groups = Counter(principle.about for principle in constitution)
    console.report["counts"] = {"principles": len(constitution), "groups": dict(groups)}
    console.report["outputs"]["digest"] = constitution.digest
    counted = ", ".join(f"{about} {number}" for about, number in groups.items())
    console.show(f"{file}: valid, {len(constitution)} principles ({counted})")
    console.show(f"digest {constitution.digest}")


@command("constitution show", short_help="Print principles, or a request as a model gets it.")
@click.option("--request", type=click.Choice(REQUESTS), help="Print this request, rendered for a small conversation.")
@click.option(
    "--style", type=click.Choice(["chat", "few-shot"]), default="chat", show_default=True, help="Of a request."
)
@click.argument("words", nargs=-1, metavar="[FILE] [ID]")
def show_command(
    console: Console, *, words: tuple[str, ...], request: str | None, style: Literal["chat", "few-shot"]
) -> None:
    """Print the principles of FILE, or of the built-in constitution; with ID only that one.

    With --request: the exact request that a model gets, for a small conversation, under the principle ID or else the
    first one.
    """
    from constitution.samples import sample_prompts

    constitution, chosen = _named(words)
    if request is None:
        console.report["outputs"]["principles"] = [vars(principle) for principle in chosen]
        for principle in chosen:
            _show_principle(console, principle)
        return
    group = constitution.in_group(chosen[0].about)
    prompt = sample_prompts(chosen[0], group, wording=constitution.wording, style=style)[request]
    console.report["outputs"]["request"] = prompt
    if isinstance(prompt, str):
        console.show(printable(prompt))
        return
    for message in prompt:
        console.show(f"[{message['role']}]\n{printable(message['content'])}\n")


@command("constitution import", short_help="Turn a constitution in another layout into YAML.")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, metavar="OUT.yaml", help="A new file.")
@click.argument("file")
def import_command(console: Console, *, file: str, output: Path) -> None:
    """Turn FILE into a constitution that this tool reads.

    FILE may be JSON: an object of name -> {"prompt": ["CritiqueRequest: ..."], "edit_request": "RevisionRequest: ..."};
    a list of comparison instructions that end in "Options:"; a list of sentences. Or a text file with one sentence per
    line. What a layout does not have is derived from what it has: read the result and edit it.
    """
    from constitution.importers import import_constitution
    from constitution.principles import Constitution
    from pipeline.store import write_atomic

    if output.exists():
        raise UsageError(f"{output}: exists; choose another -o, or delete it")
    text = import_constitution(file)
    write_atomic(output, text.encode())
    number = len(Constitution.load(output))
    console.report["counts"]["principles"] = number
    console.report["outputs"]["constitution"] = str(output)
    console.show(f"{output}: {number} principles")
    console.say(f"next: read and edit it, then `cai constitution check {output}`")


for _name, _command in (("check", check_command), ("show", show_command), ("import", import_command)):
    constitution_command.add_command(_command, _name)


def _named(words: tuple[str, ...]) -> tuple[Constitution, list[Principle]]:
    """The constitution and the principles that `[FILE] [ID]` name; a lone word that is no file is an id."""
    from constitution.principles import Constitution, default_path

    if len(words) > 2:
        raise UsageError(f"{' '.join(words)}: too many words; give a file, an id, or a file and an id")
    is_id = len(words) == 1 and re.fullmatch(r"[a-z0-9][a-z0-9_-]*", words[0]) and not Path(words[0]).is_file()
    file, id = (None, words[0]) if is_id else (*words, None, None)[:2]
    constitution = Constitution.load(file or default_path())
    if id is None:
        return constitution, list(constitution)
    ids = [principle.id for principle in constitution]
    if id not in ids:
        near = difflib.get_close_matches(id, ids, 1, 0.5)
        cure = f"did you mean {near[0]!r}?" if near else f"ids: {', '.join(ids)}"
        raise UsageError(f"{file or 'the built-in constitution'}: no principle {id!r}; {cure}")
    return constitution, [constitution[id]]


def _show_principle(console: Console, principle: Principle) -> None:
    values: dict[str, Any] = vars(principle)
    console.show(f"{principle.id}  (about {principle.about}, weight {principle.weight:g})")
    for name in _TEXTS:
        console.show(f"  {name + ':':<18}{printable(' '.join(values[name].split()))}")
