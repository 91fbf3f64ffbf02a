"""The reference of all commands, from their own help: `python -m pipeline.cli.reference > docs/cli.md`."""

from __future__ import annotations

from collections.abc import Iterator

import click

from pipeline.cli import cli

_WIDTH = 100
_HEAD = """# Commands

Made from `--help` by `python -m pipeline.cli.reference > docs/cli.md`.

Results go to stdout, messages and progress to stderr. With `--json` stdout is one object: `command`, `run`,
`exit_code`, `counts`, `outputs`, `error` (null, or `type` and `message`). An error is one line: where, what, what to
do.

| exit code | means |
|---|---|
| 0 | done |
| 1 | a bug |
| 2 | usage, settings or input |
| 3 | done, but more failed than `run.max_failed_share` allows, or a training dataset is empty |
| 4 | a file does not hold what was written |
| 5 | out of disk or memory |
| 6 | another process works on the run |
| 7 | a training diverged: a loss or gradient is no finite number |
| 75 | stopped early; the same command goes on |
| 130 | a second Ctrl-C |
"""


def reference() -> str:
    """Markdown: a section for every command, in the order of `cai --help`."""
    return _HEAD + "".join(f"\n## {name}\n\n```text\n{text}\n```\n" for name, text in _helps(cli, None, "cai"))


def _helps(command: click.Command, parent: click.Context | None, name: str) -> Iterator[tuple[str, str]]:
    """(full name, help text) of a command, and of all below it."""
    width = {"terminal_width": _WIDTH, "max_content_width": _WIDTH}
    context = command.make_context(name, [], parent, resilient_parsing=True, **width)
    text = command.get_help(context)
    yield context.command_path, "\n".join(line.rstrip() for line in text.splitlines())
    if isinstance(command, click.Group):
        for inner in command.list_commands(context):
            found = command.get_command(context, inner)
            if found is not None:
                yield from _helps(found, context, inner)


if __name__ == "__main__":
    print(reference(), end="")
