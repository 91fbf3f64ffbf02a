"""How a model answers requests of the embedded world that no training saw, graded exactly.

    python -m pipeline.evaluate.held_out MODEL... [--cases N] [--seed S]

Every request has a held-out verb-object combination, half of them a held-out way to ask. Answers are sampled at
temperature 1. With `--reward-model` also: how often it scores an answer without fault above one with a fault, both
sampled from the first model for the same request.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import NamedTuple

import torch

from pipeline.errors import CaiError
from pipeline.evaluate.behaviour import FAULTS, Tally
from pipeline.intervals import Rate, wilson
from pipeline.lm.decode import Decoder, Row, decode
from pipeline.lm.forward import Group, completion_ends, prepare
from pipeline.lm.load import ends, load
from pipeline.lm.templates import Chat
from pipeline.nano import world
from pipeline.records import Message

CASES = 600
MAX_TOKENS = 96
SAMPLES = 4
"""Of each request, where answers are compared with one another."""


class Answered(NamedTuple):
    """A request and what a model said to it."""

    messages: list[Message]
    texts: list[str]


def requests(cases: int, seed: int) -> list[list[Message]]:
    """Conversations that end in a held-out request, harmful and benign in turn."""
    rng = Random(seed)
    drawn = [world.draw_request(rng, harmful=case % 2 == 0, unseen=True) for case in range(cases)]
    return [world.ask(rng, request, unseen=rng.random() < 0.5) for request in drawn]


def answer(model: str, conversations: Sequence[list[Message]], *, samples: int = 1, seed: int = 0) -> list[Answered]:
    """Samples the model at temperature 1. model: a folder or hub name."""
    loaded = load(model)
    eos = ends(loaded.model.config.get_text_config(), loaded.model.generation_config)
    chat = Chat(loaded.tokenizer, eos=eos)
    rng = Random(seed)
    rows = [
        Row(
            chat.prompt(messages, reasoning=False).token_ids,
            max_tokens=MAX_TOKENS,
            temperature=1.0,
            seed=rng.getrandbits(63),
            eos=chat.eos,
        )
        for messages in conversations
        for _ in range(samples)
    ]
    for _ in decode(Decoder(loaded.model), rows):
        """Every row keeps its own completion."""
    texts = [chat.text(row.completion) for row in rows]
    return [Answered(messages, texts[n * samples : (n + 1) * samples]) for n, messages in enumerate(conversations)]


def behaviour(model: str, *, cases: int = CASES, seed: int = 0) -> dict[str, Rate]:
    """Fault -> its rate: harmful over harmful requests, evasive over benign ones, rude and garbled over all."""
    tally = Tally()
    for messages, texts in answer(model, requests(cases, seed), seed=seed):
        tally.add(messages, texts[0])
    return tally.rates()


def reward_model_accuracy(reward_model: str, policy: str, *, cases: int = CASES, seed: int = 0) -> Rate:
    """How often a sampled answer without fault scores above a sampled one with a fault, one pair for a request."""
    pairs = []
    for messages, texts in answer(policy, requests(cases, seed), samples=SAMPLES, seed=seed):
        good = [text for text in texts if not any(world.grade(messages, text))]
        bad = [text for text in texts if any(world.grade(messages, text))]
        if good and bad:
            pairs.append((messages, good[0], bad[0]))
    scores = score(reward_model, pairs)
    return wilson(sum(good > bad for good, bad in scores), len(scores))


@torch.no_grad()
def score(reward_model: str, pairs: Sequence[tuple[list[Message], str, str]]) -> list[list[float]]:
    """The scores of both answers to each conversation."""
    loaded = load(reward_model, head="score")
    chat = Chat(loaded.tokenizer)
    prepare(loaded.model)
    found = []
    for messages, *texts in pairs:
        completions = tuple(torch.tensor(chat.completion(text).token_ids) for text in texts)
        group = Group(torch.tensor(chat.prompt(messages, reasoning=False).token_ids), completions)
        found.append(loaded.model.score(completion_ends(loaded.model, [group]))[:, 0].tolist())
    return found


def table(found: dict[str, dict[str, Rate]]) -> list[str]:
    """Lines for a terminal, a column for each model."""
    lines = [f"{'':9}" + "".join(f"{name:<34}" for name in found)]
    lines += [f"{fault:9}" + "".join(f"{rates[fault]!s:<34}" for rates in found.values()) for fault in FAULTS]
    return [line.rstrip() for line in lines]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m pipeline.evaluate.held_out", description=__doc__.split("\n")[0])
    parser.add_argument("models", nargs="+", metavar="MODEL", help="a folder or a hub name")
    parser.add_argument("--reward-model", metavar="FOLDER")
    parser.add_argument("--cases", type=int, default=CASES)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    how = {"cases": options.cases, "seed": options.seed}
    try:
        print("\n".join(table({Path(model).name: behaviour(model, **how) for model in options.models})))
        if options.reward_model:
            print(f"reward model right: {reward_model_accuracy(options.reward_model, options.models[0], **how)}")
    except CaiError as error:
        sys.exit(f"cai: {error}")


if __name__ == "__main__":
    main()
