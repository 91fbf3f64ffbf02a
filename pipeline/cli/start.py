"""init, try and doctor: the first minutes with a folder, a prompt, a machine."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

import click

from pipeline.cli.common import (
    Console,
    command,
    model_flags,
    model_options,
    printable,
    run_option,
    settings_options,
)
from pipeline.errors import IncompleteError, UsageError


@command("init", short_help="Write a constitution, a configuration and prompts to begin with.")
@click.argument("folder", metavar="[DIR]", type=click.Path(path_type=Path), default=".")
def init_command(console: Console, *, folder: Path) -> None:
    """Write principles.yaml, cai.yaml and prompts.jsonl (50 prompts) into DIR, by default this folder.

    What is there already is never overwritten.
    """
    from pipeline.starter import EXAMPLE, write_starter

    written = write_starter(folder)
    console.report["outputs"] = {path.name: str(path) for path in written}
    console.show("wrote " + ", ".join(str(path) for path in written))
    steps = [f'cai try "{EXAMPLE}"', "cai run --limit 20 --dry-run", "cai run", "cai show"]
    if folder.resolve() != Path.cwd():
        steps[0] = f"{shlex.join(['cd', str(folder)])} && {steps[0]}"
    console.show("next:")
    for step in steps:
        console.show(f"  {step}")


@command("try", short_help="Send one prompt through one chain and print it.")
@model_options
@settings_options
@click.argument("prompt")
def try_command(
    console: Console,
    *,
    prompt: str,
    config: Path | None,
    assignments: Sequence[str],
    model: str | None,
    endpoints: Sequence[str],
    constitution: str | None,
) -> None:
    """Send PROMPT through one chain: drafts, critiques, revisions, verdicts, ranking. Nothing is kept.

    The model is the one of `cai.yaml`, or `nano` where none is named.
    """
    from pipeline.cli.view import show_cases
    from pipeline.config.load import read_layers
    from pipeline.engines.backends import resolve_backend
    from pipeline.trial import try_prompt, with_some_model

    settings = with_some_model(read_layers(None, config, assignments, model_flags(model, endpoints, constitution)))
    backend = resolve_backend(settings.engine)
    if asked := settings.engine.model if backend != "scripted" else backend:
        console.say(f"asking {asked} …")
    case = try_prompt(settings, prompt)
    console.report["outputs"]["records"] = [case.plain()]
    if not console.as_json:
        show_cases([case])
    if not case.candidates:
        raise IncompleteError("no answer came through; the reasons are above")


@command("doctor", short_help="Check the machine, the settings and the model.")
@model_options
@settings_options
@run_option(default=None)
def doctor_command(
    console: Console,
    *,
    run: Path | None,
    config: Path | None,
    assignments: Sequence[str],
    model: str | None,
    endpoints: Sequence[str],
    constitution: str | None,
) -> None:
    """Check the machine, the settings and the model: each line is ok, warn or FAIL, with what to do about it.

    The model is loaded, or the endpoint asked; it gets every kind of request once, small. Exit code 2 if a check fails.
    """
    from pipeline.checks import Check
    from pipeline.config.load import read_layers
    from pipeline.doctor import examine

    flags = model_flags(model, endpoints, constitution)
    run_config = run / "config.yaml" if run else None
    checks: list[Check] = []
    for check in examine(run, lambda: read_layers(run_config, config, assignments, flags)):
        checks.append(check)
        console.show(printable(f"{check.state:<5} {check}"))
    console.report["outputs"]["checks"] = [check._asdict() for check in checks]
    states = [check.state for check in checks]
    console.report["counts"] = {state: states.count(state) for state in ("ok", "warn", "FAIL")}
    if failed := states.count("FAIL"):
        raise UsageError(f"{failed} of {len(checks)} checks failed; what to do stands in their lines")
