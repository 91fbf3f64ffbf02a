"""How a model answers requests of the embedded world that no training saw, graded exactly.

    python -m pipeline.evaluate.held_out RUN [--cases N] [--seed S]

Every request has a held-out verb-object combination, half of them a held-out way to ask. Answers are sampled at
temperature 1. The models are those that the run trained, and the one that it started from. Of the reward model: how
often it scores an answer without fault above one with a fault, both sampled for the same request, from the model that
the run started from and from its SFT model.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import NamedTuple

import torch

from pipeline.arguments import Arguments, count, one_line
from pipeline.errors import UsageError
from pipeline.evaluate.behaviour import FAULTS, Tally
from pipeline.intervals import Rate, wilson
from pipeline.lm.decode import Decoder, Row, decode
from pipeline.lm.forward import Group, completion_ends, prepare
from pipeline.lm.load import ends, load
from pipeline.lm.templates import Chat
from pipeline.nano import world
from pipeline.records import Message
from pipeline.store import read_json

CASES = 600
POLICIES = ("sft", "dpo", "rrhf", "ppo")
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


def reward_model_accuracy(reward_model: str, policies: Sequence[str], *, cases: int = CASES, seed: int = 0) -> Rate:
    """How often a sampled answer without fault scores above a sampled one with a fault, one pair for a request."""
    rng, pairs = Random(seed), []
    answers = [answer(policy, requests(cases, seed), samples=SAMPLES, seed=seed) for policy in policies]
    for same in zip(*answers, strict=True):
        messages = same[0].messages
        graded = [(text, any(world.grade(messages, text))) for answered in same for text in answered.texts]
        good, bad = ([text for text, is_bad in graded if is_bad == wanted] for wanted in (False, True))
        if good and bad:
            pairs.append((messages, rng.choice(good), rng.choice(bad)))
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


class Measured(NamedTuple):
    """models: name -> fault -> rate. reward_model: right on sampled pairs; test_pairs: on those of the test split."""

    models: dict[str, dict[str, Rate]]
    reward_model: Rate | None
    test_pairs: Rate | None


def measure(run: Path, *, cases: int = CASES, seed: int = 0) -> Measured:
    """Raises UsageError for a run without an SFT model."""
    folders = {name: run / "models" / name for name in POLICIES if (run / "models" / name / "config.json").exists()}
    if "sft" not in folders:
        raise UsageError(f"{run}: no models/sft; `cai run` or `cai train-sft` makes it")
    models = {"base": read_json(folders["sft"] / "training.json")["start"]["name"], **folders}
    found = {name: behaviour(str(folder), cases=cases, seed=seed) for name, folder in models.items()}
    reward_model = run / "models" / "rm"
    if not (reward_model / "config.json").exists():
        return Measured(found, None, None)
    policies = [str(models["base"]), str(models["sft"])]
    right = reward_model_accuracy(str(reward_model), policies, cases=cases, seed=seed)
    return Measured(found, right, _test_pairs(reward_model))


def _test_pairs(reward_model: Path) -> Rate:
    training = read_json(reward_model / "training.json")
    pairs = training["data"]["test"].get("comparisons", 0)
    return wilson(round(training["metrics"].get("eval/scores/accuracy", 0.0) * pairs), pairs)


def table(found: Measured) -> list[str]:
    """Lines for a terminal, a column for each model."""
    lines = [f"{'':9}" + "".join(f"{name:<33}" for name in found.models)]
    lines += [f"{fault:9}" + "".join(f"{rates[fault]!s:<33}" for rates in found.models.values()) for fault in FAULTS]
    if found.reward_model and found.test_pairs:
        lines += ["", f"reward model right, answers with and without a fault:  {found.reward_model}"]
        lines += [f"reward model right, pairs of the test split:            {found.test_pairs}"]
    return [line.rstrip() for line in lines]


def main() -> None:
    parser = Arguments("pipeline.evaluate.held_out", __doc__)
    parser.add_argument("run", type=Path, help="the run's folder")
    parser.add_argument("--cases", type=count, default=CASES, help=f"requests to each model (default {CASES})")
    parser.add_argument("--seed", type=int, default=0, help="of the requests and the answers (default 0)")
    options = parser.parse_args()
    with one_line():
        print("\n".join(table(measure(options.run, cases=options.cases, seed=options.seed))))


if __name__ == "__main__":
    main()
