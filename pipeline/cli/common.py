"""What all commands share: their options, their one-line errors, their exit codes and their JSON object."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar
from unicodedata import category

import click

from constitution.yamlfile import ConstitutionError
from pipeline.errors import CaiError, PeerError, StoppedError

F = TypeVar("F", bound=Callable[..., Any])
DEFAULT_RUN = Path("runs/first")


class Console:
    """Where a command writes: results to stdout, messages to stderr, with --json one object on stdout at the end."""

    def __init__(self, command: str, *, as_json: bool, quiet: bool) -> None:
        self.as_json = as_json
        self.quiet = quiet
        self.is_muted = False
        self.report: dict[str, Any] = {
            "command": command,
            "run": None,
            "exit_code": 0,
            "counts": {},
            "outputs": {},
            "error": None,
        }

    def mute(self) -> None:
        """Another process speaks for this one; only its own errors are said."""
        self.quiet, self.is_muted = True, True

    def say(self, text: str) -> None:
        """A message about the work, to stderr."""
        if not self.quiet:
            click.echo(text, err=True)

    def show(self, text: str) -> None:
        """A result, to stdout; with --json it is in the object instead."""
        if not (self.as_json or self.is_muted):
            click.echo(text)

    def finish(self, error: BaseException | None = None) -> int:
        """Prints the object or the error, and returns the exit code."""
        code = exit_code(error)
        if error is not None and not isinstance(error, click.exceptions.Exit | PeerError):
            message = str(error) or type(error).__name__
            self.report["error"] = {"type": type(error).__name__, "message": message}
            click.echo(f"cai: {printable(message)}", err=True)
        self.report["exit_code"] = code
        if self.as_json and not self.is_muted:
            click.echo(json.dumps(self.report))  # ASCII, so that no control character reaches a terminal
        return code


def exit_code(error: BaseException | None) -> int:
    if error is None:
        return 0
    if isinstance(error, CaiError):
        return error.exit_code
    if isinstance(error, ConstitutionError):
        return 2
    if isinstance(error, MemoryError):
        return 5
    return 130 if isinstance(error, KeyboardInterrupt) else 1


def printable(text: str) -> str:
    """Text for a terminal: what is neither a visible character nor space, newline or tab is shown as its escape."""
    return "".join(c if c in "\n\t" or c.isprintable() or category(c) == "Zs" else ascii(c)[1:-1] for c in text)


@contextmanager
def _known_errors(console: Console) -> Iterator[None]:
    try:
        yield
    except (CaiError, ConstitutionError, MemoryError, KeyboardInterrupt) as error:
        raise click.exceptions.Exit(console.finish(error)) from error
    raise click.exceptions.Exit(console.finish())


def command(name: str, **attributes: Any) -> Callable[[F], click.Command]:
    """A click command whose function gets a Console first. It reports into `console.report` and raises CaiErrors."""

    def decorate(function: F) -> click.Command:
        @click.command(name, **attributes)
        @click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
        @click.option("-q", "--quiet", is_flag=True, help="No progress and no messages.")
        @wraps(function)
        def wrapper(*args: Any, as_json: bool, quiet: bool, **kwargs: Any) -> None:
            console = Console(name, as_json=as_json, quiet=quiet)
            if kwargs.get("run") is not None and kwargs.get("out") is None:
                console.report["run"] = str(kwargs["run"])
            with _known_errors(console):
                function(console, *args, **kwargs)

        return wrapper

    return decorate


def stop_on_signals(what_then: str = "the same command goes on from here") -> None:
    """From here on SIGTERM, SIGUSR1 and Ctrl-C raise StoppedError (75); every file is whole or absent at any moment."""

    def stop(number: int, frame: object) -> None:
        raise StoppedError(f"stopped on request; {what_then}")

    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, stop)


def run_option(*, default: Path | None = DEFAULT_RUN) -> Callable[[F], F]:
    return click.option(
        "-r",
        "--run",
        type=click.Path(path_type=Path),
        default=default,
        show_default=default is not None,
        metavar="DIR",
        help="The run's folder.",
    )


def settings_options(function: F) -> F:
    """--config and --set, for all commands that read the settings."""
    for option in (
        click.option(
            "--set", "assignments", multiple=True, metavar="KEY=VALUE", help="One setting, as section.key; repeatable."
        ),
        click.option(
            "--config",
            type=click.Path(path_type=Path),
            metavar="FILE",
            help="Settings in YAML; `cai.yaml` in this folder if not given.",
        ),
    ):
        function = option(function)
    return function


def model_options(function: F) -> F:
    for option in (
        click.option("--constitution", metavar="FILE", help="The principles; the built-in ones if not given."),
        click.option(
            "--endpoint",
            "endpoints",
            multiple=True,
            metavar="URL",
            help="An OpenAI-compatible server that serves the model; repeatable.",
        ),
        click.option("--model", metavar="MODEL", help="`nano`, a folder, a hub name, or a server's name for it."),
    ):
        function = option(function)
    return function


def model_flags(model: str | None, endpoints: Sequence[str], constitution: str | None) -> dict[str, Any]:
    """The flags of `model_options` as a tree of settings."""
    flags: dict[str, Any] = {}
    if model:
        flags.setdefault("engine", {})["model"] = model
    if endpoints:
        flags.setdefault("engine", {}).update(base_urls=list(endpoints), backend="server")
    if constitution:
        flags["constitution"] = constitution
    return flags


def run_cli(group: click.Group) -> int:
    """Runs click; its own usage errors become one line, or the JSON object, and exit code 2."""
    try:
        result = group.main(standalone_mode=False)
    except click.exceptions.Exit as error:
        return error.exit_code
    except click.exceptions.Abort:
        return 130
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        return 2
    except click.ClickException as error:
        message = error.format_message().removesuffix(".")
        if "--json" in sys.argv:
            console = Console(" ".join(sys.argv[1:2]), as_json=True, quiet=True)
            console.report.update(exit_code=2, error={"type": "UsageError", "message": message})
            click.echo(json.dumps(console.report))
        click.echo(f"cai: {message}; see `{_help_of(error)} --help`", err=True)
        return 2
    return result if isinstance(result, int) else 0


def _help_of(error: click.ClickException) -> str:
    context = getattr(error, "ctx", None)
    return context.command_path if context else "cai"
