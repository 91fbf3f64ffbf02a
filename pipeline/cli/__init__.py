"""The `cai` command. A group's file is imported when one of its commands is called, so that `--help` stays fast."""

from __future__ import annotations

import importlib
import sys

import click

COMMANDS = {
    "init": ("pipeline.cli.start", "Write a constitution, a configuration and example prompts into this folder."),
    "try": ("pipeline.cli.start", "Send one prompt through one chain and print it."),
    "doctor": ("pipeline.cli.start", "Check the machine, the model and the endpoint."),
    "run": ("pipeline.cli.stages", "Run the whole recipe: generate, critique-revise, rank, export."),
    "generate": ("pipeline.cli.stages", "Draft answers to the prompts."),
    "critique-revise": ("pipeline.cli.stages", "Criticise and revise the drafts."),
    "rank": ("pipeline.cli.stages", "Compare the candidates and put them in order."),
    "export": ("pipeline.cli.stages", "Write the datasets."),
    "train-sft": ("pipeline.cli.training", "Train a model to imitate the chosen answers."),
    "train-rm": ("pipeline.cli.training", "Train a reward model on preferences."),
    "train-dpo": ("pipeline.cli.training", "Train a model on preferences directly (DPO, IPO)."),
    "train-rrhf": ("pipeline.cli.training", "Train a model on ranked answers (RRHF)."),
    "train-ppo": ("pipeline.cli.training", "Train a model by the scores of its answers (PPO), as InstructGPT was."),
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

    sys.exit(run_cli(cli))
