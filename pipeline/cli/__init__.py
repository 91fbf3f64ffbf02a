"""The `cai` command. A group's file is imported when one of its commands is called, so that `--help` stays fast."""

from __future__ import annotations

import difflib
import importlib
import os
import sys

import click

COMMANDS = {
    "init": ("pipeline.cli.start", "Write a constitution, a configuration and example prompts into this folder."),
    "try": ("pipeline.cli.start", "Send one prompt through one chain and print it."),
    "doctor": ("pipeline.cli.start", "Check the machine, the model and the endpoint."),
    "run": ("pipeline.cli.recipe", "Run the whole recipe: data, SFT, samples of the SFT model, reward model, DPO."),
    "generate": ("pipeline.cli.stages", "Draft answers to the prompts."),
    "critique-revise": ("pipeline.cli.stages", "Criticise and revise the drafts."),
    "rank": ("pipeline.cli.stages", "Compare the candidates and put them in order."),
    "export": ("pipeline.cli.stages", "Write the datasets."),
    "train-sft": ("pipeline.cli.training", "Train a model to imitate the chosen answers."),
    "train-rm": ("pipeline.cli.training", "Train a reward model on preferences."),
    "train-dpo": ("pipeline.cli.training", "Train a model on preferences directly (DPO, IPO)."),
    "train-rrhf": ("pipeline.cli.training", "Train a model on ranked answers (RRHF)."),
    "train-ppo": ("pipeline.cli.training", "Train a model by the scores of its answers (PPO), as InstructGPT was."),
    "score": ("pipeline.cli.scoring", "Score answers with a reward model or a policy, and group them by quality."),
    "status": ("pipeline.cli.look", "Show how far a run is."),
    "show": ("pipeline.cli.look", "Read the records of a run: drafts, critiques, word diffs, probabilities."),
    "constitution": ("pipeline.cli.constitution", "Check, show or import a constitution."),
}


class LazyGroup(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(COMMANDS[cmd_name][0])
        command: click.Command = getattr(module, f"{cmd_name.replace('-', '_')}_command")
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args[0] not in COMMANDS and (near := difflib.get_close_matches(args[0], COMMANDS, 1)):
            raise click.UsageError(f"No such command {args[0]!r} (did you mean {near[0]!r}?)", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="constitutional-pipeline", prog_name="cai")
def cli() -> None:
    """Constitutional AI, end to end: prompts in; critiqued, revised and ranked records and datasets out.

    A first run, with the built-in toy model:

      cai run --run runs/first --prompts FILE --model nano
    """


def main() -> None:
    """Entry point of the installed command."""
    from pipeline.cli.common import run_cli

    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # a hub out of reach is said once, by us
    sys.exit(run_cli(cli))
