"""Rows -> tokens, once; and which of them make a batch.

The optimiser's batch is what the user set: so many prompts, drawn without replacement in each epoch. Inside, they are
sorted by length and packed into microbatches of so many tokens; nothing that is trained depends on that.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from heapq import heapreplace, nlargest
from typing import Literal, NamedTuple

import numpy as np
import torch

from pipeline.errors import RequestFailed
from pipeline.lm.forward import Group
from pipeline.lm.templates import Chat
from pipeline.train import ranks
from pipeline.train.layouts import Comparison
from pipeline.train.rows import Row

TooLong = Literal["drop", "cut"]
_CPU_PASS_TOKENS = 2048


class Fresh(NamedTuple):
    """Completions that a row has for a while besides its own: token ids, and their scores."""

    completions: tuple[torch.Tensor, ...]
    scores: tuple[float, ...]


NOTHING = Fresh((), ())


class Data:
    """Tokenised rows in flat arrays: all tokens one after the other, and where each prompt and completion ends.

    left_out: reason -> rows. longest: id and tokens of the longest row that was too long. refused: id of the first row
    that the chat template refuses, and why; '' if there is none. num_cut: rows whose prompt lost its beginning, and
    plain texts that lost their end.
    label_sources: of the rows of its sources. fresh: row -> what it has besides; no part of `completions` and `digest`.
    """

    def __init__(self) -> None:
        self.ids: list[str] = []
        self.probability = array("d")
        self.scores = array("d")
        self._compared = array("i")  # of each comparison, first and second
        self._compared_probability = array("d")
        self._comparison_ends = array("q", [0])  # of each row
        self._tokens = array("i")
        self._ends = array("q", [0])  # of prompt, completion, completion, prompt, …
        self._first = array("q", [0])  # of each row, the number of its prompt's piece
        self.left_out: Counter[str] = Counter()
        self.label_sources: Counter[str] = Counter()
        self.num_cut = 0
        self.longest = ("", 0)
        self.refused = ""
        self.fresh: dict[int, Fresh] = {}

    def __len__(self) -> int:
        return len(self.ids)

    def add(self, row: Row, prompt: Sequence[int], completions: Sequence[Sequence[int]]) -> None:
        self.add_tokens(
            row.id,
            prompt,
            completions,
            probability=row.probability,
            scores=row.scores,
            comparisons=row.comparisons,
        )

    def add_tokens(
        self,
        id: str,
        prompt: Sequence[int],
        completions: Sequence[Sequence[int]],
        *,
        probability: float = 1.0,
        scores: Sequence[float] = (),
        comparisons: Sequence[Comparison] = (),
    ) -> None:
        """scores: of each completion; 0 if there are none."""
        for piece in (prompt, *completions):
            self._tokens.extend(piece)
            self._ends.append(len(self._tokens))
        self._first.append(self._first[-1] + 1 + len(completions))
        self.ids.append(id)
        self.probability.append(probability)
        self.scores.extend(scores or [0.0] * len(completions))
        for first, second, likelihood in comparisons:
            self._compared.extend((first, second))
            self._compared_probability.append(likelihood)
        self._comparison_ends.append(len(self._compared_probability))

    def group(self, index: int) -> Group:
        pieces = range(self._first[index], self._first[index + 1])
        prompt, *completions = (self._piece(number) for number in pieces)
        return Group(prompt, (*completions, *self._fresh(index).completions))

    def row_scores(self, index: int) -> list[float]:
        own = self.completions(index)
        return [*self.scores[own.start : own.stop], *self._fresh(index).scores]

    def comparisons(self, index: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Which two of a row's completions are compared, and the probability that the first is better: (C,) each.

        A pair that was added without any is one, with its own probability.
        """
        begin, end = self._comparison_ends[index : index + 2]
        if begin == end:
            return torch.tensor([0]), torch.tensor([1]), torch.tensor([self.probability[index]])
        first, second = torch.tensor(self._compared[2 * begin : 2 * end]).view(-1, 2).T
        return first, second, torch.tensor(self._compared_probability[begin:end], dtype=torch.float32)

    @property
    def num_comparisons(self) -> int:
        """Of all rows; 0 where rows are pairs."""
        return len(self._compared_probability)

    def completions(self, index: int) -> range:
        """Which completions of the whole data belong to a row."""
        return range(self._first[index] - index, self._first[index + 1] - index - 1)

    @property
    def num_completions(self) -> int:
        """Of all rows."""
        return len(self.scores)

    def num_tokens(self, index: int) -> int:
        """What goes through the backbone for a row."""
        return self._ends[self._first[index + 1]] - self._ends[self._first[index]] + self._num_fresh_tokens(index)

    def num_completion_tokens(self, index: int) -> int:
        own = self._ends[self._first[index + 1]] - self._ends[self._first[index] + 1]
        return own + self._num_fresh_tokens(index)

    @property
    def digest(self) -> str:
        """sha256 of tokens, labels and order."""
        total = hashlib.sha256()
        compared = (self._compared, self._compared_probability, self._comparison_ends)
        for part in (self._tokens, self._ends, self._first, self.probability, self.scores, *compared):
            total.update(len(part).to_bytes(8, "big") + part.tobytes())
        return total.hexdigest()

    def _fresh(self, index: int) -> Fresh:
        return self.fresh.get(index, NOTHING)

    def _num_fresh_tokens(self, index: int) -> int:
        return sum(map(len, self._fresh(index).completions))

    def _piece(self, number: int) -> torch.Tensor:
        return torch.frombuffer(self._tokens, dtype=torch.int32)[self._ends[number] : self._ends[number + 1]]


def tokenise(rows: Iterable[Row], chat: Chat, *, max_length: int, too_long: TooLong) -> Data:
    """Every row as the model will see it: the prompt as it is asked, each completion to the token that ends its turn.

    max_length: tokens of a prompt with its longest completion. A longer row is dropped, or its prompt loses its
    beginning; completions stay whole. A row that the template refuses is left out. A row without a prompt is a plain
    text; see `_take_text`. Raises EngineRefused without a chat template.
    """
    data = Data()
    for row in rows:
        take(data, row, chat, max_length=max_length, too_long=too_long)
    return data


def take(data: Data, row: Row, chat: Chat, *, max_length: int, too_long: TooLong) -> bool:
    """Adds a row to the data, or counts it as left out and says so. As `tokenise`."""
    if not row.prompt:
        return _take_text(data, row, chat, max_length=max_length, too_long=too_long)
    prompt = prompt_tokens(data, row, chat)
    if prompt is None:
        return False
    completions = [chat.completion(text).token_ids for text in row.completions]
    room = max_length - max(map(len, completions))
    if len(prompt) <= room:
        data.add(row, prompt, completions)
    elif too_long == "cut" and room > 0:
        data.num_cut += 1
        data.add(row, prompt[len(prompt) - room :], completions)
    else:
        return _leave_out(data, row, len(prompt) + max(map(len, completions)))
    return True


def _take_text(data: Data, row: Row, chat: Chat, *, max_length: int, too_long: TooLong) -> bool:
    """Of a plain text every token but the first is learned; a longer one is dropped, or loses its end.

    A text of fewer than two tokens of its own counts as empty.
    """
    (text,) = row.completions
    tokens = chat.document(text).token_ids
    if len(tokens) < 2 + len(chat.document("").token_ids):
        data.left_out["empty"] += 1
        return False
    if len(tokens) > max_length and (too_long == "drop" or max_length < 2):
        return _leave_out(data, row, len(tokens))
    data.num_cut += len(tokens) > max_length
    data.add(row, tokens[:1], [tokens[1:max_length]])
    return True


def _leave_out(data: Data, row: Row, length: int) -> bool:
    """Counts a row that is too long; False."""
    data.left_out["too_long"] += 1
    data.longest = max(data.longest, (row.id, length), key=lambda each: each[1])
    return False


def prompt_tokens(data: Data, row: Row, chat: Chat) -> list[int] | None:
    """Tokens of a row's prompt; None if the chat template refuses it, and the data counts it."""
    try:
        return chat.prompt(row.prompt, reasoning=False).token_ids
    except RequestFailed as error:
        data.left_out[error.reason] += 1
        data.refused = data.refused or f"{row.id}: {error.detail}"
        return None


def batch_at(step: int, *, num_rows: int, batch_size: int, seed: int) -> list[int]:
    """Row numbers of one step's batch. Every epoch has its own order; its last batch may be smaller."""
    per_epoch = steps_per_epoch(num_rows, batch_size)
    epoch, number = divmod(step, per_epoch)
    order = np.random.default_rng([seed, epoch]).permutation(num_rows)
    return order[number * batch_size : (number + 1) * batch_size].tolist()


def steps_per_epoch(num_rows: int, batch_size: int) -> int:
    return -(-num_rows // batch_size)


def deal(data: Data, rows: Sequence[int], num_shares: int) -> list[list[int]]:
    """The rows in shares of about as many tokens each; some are empty if there are fewer rows."""
    shares: list[list[int]] = [[] for _ in range(num_shares)]
    loads = [(0, number) for number in range(num_shares)]
    for row in sorted(rows, key=data.num_tokens, reverse=True):
        load, number = loads[0]
        shares[number].append(row)
        heapreplace(loads, (load + data.num_tokens(row), number))
    return shares


def dealt_microbatches(
    data: Data, rows: Sequence[int], *, rank: int, size: int, max_tokens: int
) -> Iterator[list[int]]:
    """The microbatches of one of `size` processes; the last ones may be empty, so that all have as many."""
    parts = [list(microbatches(data, share, max_tokens=max_tokens)) for share in deal(data, rows, size)]
    yield from parts[rank]
    yield from [[]] * (max(map(len, parts)) - len(parts[rank]))


def own_microbatches(data: Data, rows: Sequence[int], *, max_tokens: int) -> Iterator[tuple[list[int], bool]]:
    """Those of this process, and whether they count: the shortest row fills up, so that all have as many."""
    shortest = min(rows, key=data.num_tokens)
    for part in dealt_microbatches(data, rows, rank=ranks.rank(), size=ranks.size(), max_tokens=max_tokens):
        yield part or [shortest], bool(part)


def own_share(data: Data, rows: Sequence[int]) -> list[int]:
    """Those of the rows that are this process's."""
    return deal(data, rows, ranks.size())[ranks.rank()]


def microbatches(data: Data, rows: Sequence[int], *, max_tokens: int) -> Iterator[list[int]]:
    """The rows in groups of at most so many tokens, longest first; a longer row is alone."""
    held: list[int] = []
    total = 0
    for row in sorted(rows, key=data.num_tokens, reverse=True):
        length = data.num_tokens(row)
        if held and total + length > max_tokens:
            yield held
            held, total = [], 0
        held.append(row)
        total += length
    if held:
        yield held


def pass_tokens(microbatch_tokens: int, device: torch.device) -> int:
    """At most so many go through PPO's networks at once: on a CPU fewer, which takes no longer and less memory."""
    return min(microbatch_tokens, _CPU_PASS_TOKENS) if device.type == "cpu" else microbatch_tokens


def longest_microbatch(data: Data, *, batch_size: int, max_tokens: int) -> list[int]:
    """The rows that take the most memory, of the batch of the longest rows."""
    batch = nlargest(batch_size, range(len(data)), key=data.num_tokens)
    return max(microbatches(data, batch, max_tokens=max_tokens), key=lambda part: sum(map(data.num_tokens, part)))
