"""What gives answers a score: a reward model, or a policy by its own log-probability per token.

The latter is p of RRHF (Yuan et al. 2023, arXiv 2304.05302, eq. 1): a policy trained so serves as its own reward model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from pipeline.errors import UsageError
from pipeline.lm.adapter import is_adapter
from pipeline.lm.forward import Group, completion_ends, completion_logps, prepare
from pipeline.lm.load import check_tokenizer, context_of, fingerprint, load, load_config, load_tokenizer
from pipeline.lm.templates import Chat
from pipeline.train.batches import Data, microbatches, take
from pipeline.train.rows import Row

ScorerKind = Literal["reward", "policy"]


class Score(Protocol):
    """Scores tokens that its own tokenizer could have made. fingerprint: its identity, with that of the tokenizer."""

    @property
    def fingerprint(self) -> dict[str, str]: ...

    def __call__(self, data: Data, *, max_tokens: int) -> Tensor:
        """(N,) the score of every completion of the data, on the CPU, higher is better. max_tokens: at a time."""


class Scorer(NamedTuple):
    """A model in evaluation mode that scores. context: tokens of the longest prompt with completion."""

    kind: ScorerKind
    model: Any
    chat: Chat
    context: int
    fingerprint: dict[str, str]

    def __call__(self, data: Data, *, max_tokens: int, rows: Sequence[int] | None = None) -> Tensor:
        """As Score says. rows: the only ones to be scored; the other completions get 0."""
        compute = reward_scores if self.kind == "reward" else mean_logps
        found = torch.zeros(data.num_completions)
        with torch.no_grad():
            for part in microbatches(data, range(len(data)) if rows is None else rows, max_tokens=max_tokens):
                own = compute(self.model, [data.group(row) for row in part])
                found[[number for row in part for number in data.completions(row)]] = own.float().cpu()
        return found

    def score_rows(self, rows: Sequence[Row], *, max_tokens: int) -> tuple[list[Row], list[list[float]], Counter[str]]:
        """Rows that are not left out, the scores of each one's completions, and why how many were left out."""
        data = Data()
        kept = [row for row in rows if take(data, row, self.chat, max_length=self.context, too_long="drop")]
        scores = self(data, max_tokens=max_tokens).tolist()
        return kept, [[scores[n] for n in data.completions(place)] for place in range(len(kept))], data.left_out


def open_scorer(model: str, kind: ScorerKind, *, device: str = "auto") -> Scorer:
    """Loads a folder or a hub name. Raises UsageError if a language model is to be a reward model."""
    loaded = load(model, device=device, head="score" if kind == "reward" else "language")
    config = loaded.model.config
    _check_kind(config, kind, model)
    check_tokenizer(loaded.tokenizer, loaded.model.get_input_embeddings().num_embeddings, model)
    prepare(loaded.model)
    return Scorer(kind, loaded.model.eval(), Chat(loaded.tokenizer), context_of(config), loaded.fingerprint)


class Outline(NamedTuple):
    """A scorer without its weights. fingerprint: what is known of it without them."""

    chat: Chat
    context: int
    fingerprint: dict[str, str]


def outline(model: str, kind: ScorerKind) -> Outline:
    """Refuses what `open_scorer` refuses, as far as configuration and tokenizer tell."""
    config, tokenizer = load_config(model), load_tokenizer(model)
    if not is_adapter(model):  # its configuration is that of its base
        _check_kind(config, kind, model)
    check_tokenizer(tokenizer, config.get_text_config().vocab_size, model)
    return Outline(Chat(tokenizer), context_of(config), fingerprint(config, tokenizer, dtype=torch.float32))


def _check_kind(config: Any, kind: ScorerKind, model: str) -> None:
    if kind == "reward" and not any("SequenceClassification" in name for name in config.architectures or ()):
        raise UsageError(
            f"model {model}: no reward model but a language model; give one that `cai train-rm` made "
            "(`cai score --policy` scores with a language model)"
        )


def check_same_tokenizer(scorer: dict[str, str], trained: dict[str, str]) -> None:
    """Raises UsageError if the reward model with one fingerprint reads other tokens than the trained one writes."""
    if scorer["tokenizer"] != trained["tokenizer"]:
        raise UsageError(
            "the reward model has another tokenizer or chat template than the model that is trained; "
            "train one with `cai train-rm --model` from this model"
        )


def reward_scores(model: Any, groups: Sequence[Group]) -> Tensor:
    """(N,) fp32: what a reward model reads at the last token of every completion."""
    scores: Tensor = model.score(completion_ends(model, groups))[:, 0].float()
    return scores


def mean_logps(model: Any, groups: Sequence[Group]) -> Tensor:
    """(N,) log-probability of every completion, divided by its length."""
    return completion_logps(model, groups).means
