"""What gives a rollout its score: a reward model, a policy as RRHF ranks, a Python function, or a callable from above.

`Score` is all that PPO knows of them. A judge comes in as a callable, since training opens no engine.
"""

from __future__ import annotations

import math
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pipeline.config.settings import TrainPpoSettings
from pipeline.dataset_folder import file_sha256
from pipeline.errors import UsageError
from pipeline.lm.forward import completion_ends, completion_logps, prepare
from pipeline.lm.load import load
from pipeline.lm.templates import Chat
from pipeline.train.batches import Data, microbatches, tokenise
from pipeline.train.loop import autocast
from pipeline.train.rollouts import Rollouts, completions_of
from pipeline.train.rows import Row

Score = Callable[[Rollouts], Tensor]
"""(B,) a score for every completion, higher is better."""
Function = Callable[[list[Any], list[str]], list[float]]


class Source(NamedTuple):
    """fingerprint: identity, for card and resuming. model: a reward model that a value function may begin as."""

    score: Score
    fingerprint: dict[str, str]
    model: Any | None = None


def open_reward_model(
    name: str, settings: TrainPpoSettings, *, tokenizer: str, device: str, is_policy: bool = False
) -> Source:
    """A reward model, or a policy whose mean log-probability is the score (Yuan et al. 2023, eq. 1).

    tokenizer: digest of the policy's. Raises UsageError if the model's is another one, unless settings.reencode.
    """
    loaded = load(name, dtype="float32", device=device, head="language" if is_policy else "score")
    is_reward_model = any("SequenceClassification" in each for each in loaded.model.config.architectures or ())
    if not (is_policy or is_reward_model):
        raise UsageError(
            f"model {name}: no reward model; make one with `cai train-rm`, or set train_ppo.reward: policy"
        )
    chat = None
    if loaded.fingerprint["tokenizer"] != tokenizer:
        if not settings.reencode:
            raise UsageError(
                f"model {name}: its tokenizer or chat template is not the policy's; train it from the same model, "
                "or set train_ppo.reencode: true to have it read the text"
            )
        chat = Chat(loaded.tokenizer)
    prepare(loaded.model)
    scorer = ModelScore(loaded.model.requires_grad_(False), settings, chat)
    return Source(scorer, loaded.fingerprint, None if is_policy or chat else loaded.model)


class ModelScore:
    """chat: of a model with a tokenizer of its own, else None."""

    def __init__(self, model: Any, settings: TrainPpoSettings, chat: Chat | None) -> None:
        self.model, self.settings, self.chat = model, settings, chat
        self.has_head = model.get_output_embeddings() is not None

    @torch.no_grad()
    def __call__(self, rollouts: Rollouts) -> Tensor:
        data = rollouts.data if self.chat is None else reencoded(rollouts, self.chat)
        scores = torch.zeros(len(rollouts.texts), device=self.model.device)
        for rows in microbatches(data, range(len(data)), max_tokens=self.settings.microbatch_tokens):
            groups = [data.group(row) for row in rows]
            with autocast(self.model, self.settings):
                if self.has_head:
                    found = completion_logps(self.model, groups).means
                else:
                    found = self.model.score(completion_ends(self.model, groups))[:, 0]
            scores[completions_of(data, rows)] = found.float()
        return scores.to(rollouts.logps.device)


def reencoded(rollouts: Rollouts, chat: Chat) -> Data:
    """The same conversations in another model's tokens."""
    prompts = zip(rollouts.conversations, rollouts.data.ids, strict=True)
    texts = [[rollouts.texts[n] for n in rollouts.data.completions(row)] for row in range(len(rollouts.data))]
    rows = [Row(id, prompt, tuple(own), 1.0, (), "policy") for (prompt, id), own in zip(prompts, texts, strict=True)]
    return tokenise(rows, chat, max_length=1 << 30, too_long="drop")


def open_function(path: str) -> Source:
    """`FILE.py:FUNCTION`, a function of conversations and completions that gives as many numbers. Raises UsageError."""
    file, _, name = path.rpartition(":")
    if not Path(file).is_file():
        raise UsageError(f"train_ppo.reward: {file}: no such file; give FILE.py:FUNCTION")
    try:
        function = runpy.run_path(file)[name]
    except Exception as error:
        raise UsageError(f"train_ppo.reward: {path}: cannot be had: {type(error).__name__}: {error}") from error
    return Source(FunctionScore(path, function), {"function": f"{name} {file_sha256(Path(file))}"})


class FunctionScore:
    """Calls a user's function and checks what it gives. path: for messages."""

    def __init__(self, path: str, function: Function) -> None:
        self.path, self.function = path, function

    def __call__(self, rollouts: Rollouts) -> Tensor:
        data = rollouts.data
        owners = [row for row in range(len(data)) for _ in data.completions(row)]
        try:
            found = self.function([rollouts.conversations[row] for row in owners], list(rollouts.texts))
            scores = [float(score) for score in found]
        except Exception as error:
            raise UsageError(f"{self.path}: raised {type(error).__name__}: {error}") from error
        if len(scores) != len(owners):
            raise UsageError(f"{self.path}: gave {len(scores)} scores for {len(owners)} completions")
        for score, row in zip(scores, owners, strict=True):
            if not math.isfinite(score):
                raise UsageError(f"{self.path}: gave {score} for a completion of prompt {data.ids[row]}; no number")
        return torch.tensor(scores, device=rollouts.logps.device)
