"""Prompts for PPO: conversations that the policy is to answer, with their tokens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

from pipeline.lm.templates import Chat
from pipeline.records import Message
from pipeline.train import rows
from pipeline.train.batches import Data, TooLong, prompt_tokens


class Prompts(NamedTuple):
    """conversations: what the rows of the data say; the data's rows have no completions."""

    data: Data
    conversations: list[list[Message]]

    def __len__(self) -> int:
        return len(self.data)

    @property
    def counts(self) -> Counter[str]:
        return Counter({"rows": len(self.data), "cut": self.data.num_cut, **self.data.left_out})


def tokenise_prompts(found: Iterable[rows.Row], chat: Chat, *, max_length: int, too_long: TooLong) -> Prompts:
    """max_length: tokens of a prompt; a longer one is left out, or loses its beginning."""
    prompts = Prompts(Data(), [])
    for row in found:
        tokens = prompt_tokens(prompts.data, row, chat)
        if tokens is None:
            continue
        if len(tokens) > max_length and (too_long == "drop" or max_length < 1):
            prompts.data.left_out["too_long"] += 1
            continue
        prompts.data.num_cut += len(tokens) > max_length
        prompts.data.add(row, tokens[-max_length:], [])
        prompts.conversations.append(row.prompt)
    return prompts
