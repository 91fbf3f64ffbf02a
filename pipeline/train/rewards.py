"""What gives a rollout its score: a reward model, a policy as RRHF ranks, a Python function, or a callable from above.

`Score` is all that PPO knows of them. A judge comes in as a callable, since training opens no engine. Of several
processes that train together each calls it with the same rollouts and gets all scores.
"""

from __future__ import annotations

import math
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pipeline.dataset_folder import file_sha256
from pipeline.errors import UsageError
from pipeline.lm.templates import Chat
from pipeline.train import ranks
from pipeline.train.batches import Data, own_share, pass_tokens, tokenise
from pipeline.train.rollouts import Rollouts
from pipeline.train.rows import Row
from pipeline.train.scorers import ScorerKind, open_scorer

Score = Callable[[Rollouts], Tensor]
"""(B,) a score for every completion, higher is better."""
Function = Callable[[list[Any], list[str]], list[float]]


class Source(NamedTuple):
    """fingerprint: identity, for card and resuming. model: a reward model that a value function may begin as.

    measure: what more is to be logged of the last scores.
    """

    score: Score
    fingerprint: dict[str, str]
    model: Any | None = None
    measure: Callable[[], dict[str, float]] = dict


def open_reward_model(
    name: str, kind: ScorerKind, *, tokenizer: str, reencode: bool, max_tokens: int, device: str
) -> Source:
    """A reward model, or a policy whose mean log-probability is the score, as `cai score` has them.

    tokenizer: digest of the policy's. reencode: have a model with another one read the text again; else it is refused
    (UsageError). max_tokens: that go through the model at a time.
    """
    scorer = open_scorer(name, kind, device=device)
    is_other = scorer.fingerprint["tokenizer"] != tokenizer
    check_reencoding(name, is_other, reencode=reencode)

    def score(rollouts: Rollouts) -> Tensor:
        data = ranks.together(lambda: reencoded(rollouts, scorer.chat)) if is_other else rollouts.data
        own = own_share(data, range(len(data)))
        size = pass_tokens(max_tokens, scorer.model.device)
        scores = ranks.together(lambda: scorer(data, max_tokens=size, rows=own))
        ranks.add_up([scores])
        return scores.to(rollouts.logps.device)

    return Source(score, scorer.fingerprint, scorer.model if kind == "reward" and not is_other else None)


def check_reencoding(name: str, is_other: bool, *, reencode: bool) -> None:
    """is_other: whether the model of this name has another tokenizer than the policy."""
    if is_other and not reencode:
        raise UsageError(
            f"model {name}: its tokenizer or chat template is not the policy's; train it from the same model, "
            "or set train_ppo.reencode: true to have it read the text"
        )


def reencoded(rollouts: Rollouts, chat: Chat) -> Data:
    """The same conversations in another model's tokens. Raises UsageError if its chat template refuses one."""
    prompts = zip(rollouts.conversations, rollouts.data.ids, strict=True)
    texts = [[rollouts.texts[n] for n in rollouts.data.completions(row)] for row in range(len(rollouts.data))]
    rows = [Row(id, prompt, tuple(own), 1.0, (), "policy") for (prompt, id), own in zip(prompts, texts, strict=True)]
    data = tokenise(rows, chat, max_length=1 << 30, too_long="drop")
    if data.refused:
        raise UsageError(f"the reward model cannot read prompt {data.refused}; leave it out, or take another model")
    return data


def find_function(path: str) -> tuple[str, str]:
    """The file and the function's name; the file is there, and is not run."""
    file, _, name = path.rpartition(":")
    if not Path(file).is_file():
        raise UsageError(f"train_ppo.reward: {file}: no such file; give FILE.py:FUNCTION")
    return file, name


def open_function(path: str) -> Source:
    """`FILE.py:FUNCTION`, a function of conversations and completions that gives as many numbers. Raises UsageError."""
    file, name = find_function(path)
    sys.path.append(str(Path(file).resolve().parent))  # for what it imports from beside it, and behind all else
    try:
        function = runpy.run_path(file)[name]
    except (Exception, SystemExit) as error:
        raise UsageError(f"train_ppo.reward: {path}: cannot be had: {type(error).__name__}: {error}") from error
    return Source(FunctionScore(path, function), {"function": f"{name} {file_sha256(Path(file))}"})


class FunctionScore:
    """Calls a user's function and checks what it gives. path: for messages."""

    def __init__(self, path: str, function: Function) -> None:
        self.path, self.function = path, function

    def __call__(self, rollouts: Rollouts) -> Tensor:
        return torch.tensor(ranks.first(lambda: self._checked(rollouts)), device=rollouts.logps.device)

    def _checked(self, rollouts: Rollouts) -> list[float]:
        data = rollouts.data
        owners = [row for row in range(len(data)) for _ in data.completions(row)]
        try:
            found = self.function([rollouts.conversations[row] for row in owners], list(rollouts.texts))
            scores = [float(score) for score in found]
        except (Exception, SystemExit) as error:
            raise UsageError(f"{self.path}: raised {type(error).__name__}: {error}") from error
        if len(scores) != len(owners):
            raise UsageError(f"{self.path}: gave {len(scores)} scores for {len(owners)} completions")
        for score, row in zip(scores, owners, strict=True):
            if not math.isfinite(score):
                raise UsageError(f"{self.path}: gave {score} for a completion of prompt {data.ids[row]}; no number")
        return scores
