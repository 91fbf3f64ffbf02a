"""Rows in tokens, and which of them make a batch."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing

from pipeline.errors import EngineRefused
from pipeline.lm.templates import Chat
from pipeline.records import Message
from pipeline.train.batches import Data, batch_at, microbatches, steps_per_epoch, tokenise
from pipeline.train.rows import Row
from tests.pipeline.lm.tiny import CHATML, tiny_tokenizer


def row(prompt: str, *completions: str, id: str = "r", probability: float = 1.0, scores: tuple = ()) -> Row:
    return Row(id, [Message(role="user", content=prompt)], completions, probability, scores, "ai")


@pytest.fixture(scope="module")
def chat() -> Chat:
    return Chat(tiny_tokenizer())


def tokens_of(chat: Chat, data: Data, index: int = 0) -> list[str]:
    group = data.group(index)
    return [chat.tokenizer.decode(piece.tolist()) for piece in (group.prompt, *group.completions)]


def make(chat: Chat, *rows: Row, max_length: int = 512, too_long: Any = "drop") -> Data:
    return tokenise(rows, chat, max_length=max_length, too_long=too_long)


def test_a_completion_ends_with_the_token_that_ends_a_turn(chat: Chat) -> None:
    data = make(chat, row("Hello", "Yes.", "No."))
    prompt, *completions = tokens_of(chat, data)
    assert prompt == "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    assert completions == ["Yes.<|im_end|>", "No.<|im_end|>"]


def test_a_border_between_prompt_and_completion_never_merges() -> None:
    """A vocabulary with a token for what ends the prompt and begins the answer."""
    chat = Chat(tiny_tokenizer(text=["assistant\n\n\nThe quick"] * 50))
    assert len(chat.tokenizer("\n\n\nThe", add_special_tokens=False)["input_ids"]) < 5  # "\n\n" is one token
    data = make(chat, row("Hello", "\n\nThe quick brown fox."))
    assert data.group(0).prompt.tolist() == chat.prompt([Message(role="user", content="Hello")]).token_ids
    assert tokens_of(chat, data)[1] == "\n\nThe quick brown fox.<|im_end|>"


def test_no_beginning_token_stands_twice() -> None:
    template = "<|im_start|>{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    chat = Chat(tiny_tokenizer(template=template + "{% if add_generation_prompt %}assistant: {% endif %}"))
    group = make(chat, row("Hello", "Yes")).group(0)
    assert group.prompt.tolist().count(1) == 1
    assert group.completions[0].tolist().count(1) == 0
    assert group.completions[0].tolist()[-1] == 2  # the tokenizer's own end, where the template has none


def test_a_beginning_token_that_the_tokenizer_adds_by_itself_stands_once_and_in_no_completion() -> None:
    """The template writes it, and such a tokenizer puts another one before every text that it is given."""
    tokenizer = tiny_tokenizer(template="<|im_start|>" + CHATML.replace("<|im_start|>", ""))
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )
    assert tokenizer("Yes")["input_ids"][0] == 1
    group = make(Chat(tokenizer), row("Hello", "Yes", "No")).group(0)
    assert group.prompt.tolist().count(1) == 1
    assert [completion.tolist().count(1) for completion in group.completions] == [0, 0]


def text_row(text: str, id: str = "t") -> Row:
    return Row(id, [], (text,), 1.0, (), "given")


@pytest.mark.parametrize("begins", [False, True])
@pytest.mark.parametrize("ends", ["<|im_end|>", "<|endoftext|>", ""])
def test_a_plain_text_has_the_tokenizers_own_tokens_and_an_end(begins: bool, ends: str) -> None:
    """Of a chat model, whose own end is that of a turn, the end of a text where it has such a token."""
    tokenizer = tiny_tokenizer()
    if begins:
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
        )
    if ends == "<|endoftext|>":
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", ends]})
    if not ends:
        tokenizer.eos_token = None
    text = " The quick brown fox\n\n jumps.\n\nPlease help  me"
    expected = tokenizer(text)["input_ids"] + ([tokenizer.convert_tokens_to_ids(ends)] if ends else [])
    assert (expected[0] == 1) == begins
    group = make(Chat(tokenizer), text_row(text)).group(0)
    assert [group.prompt.tolist(), *(completion.tolist() for completion in group.completions)] == [
        expected[:1],
        expected[1:],
    ]


def test_a_plain_text_that_is_too_long_is_dropped_or_loses_its_end(chat: Chat) -> None:
    text = "The quick brown fox jumps over the lazy dog. " * 4
    own = chat.tokenizer(text)["input_ids"]
    for max_length in (len(own) + 1, len(own), 2):
        dropped = make(chat, text_row(text), max_length=max_length)
        cut = make(chat, text_row(text), max_length=max_length, too_long="cut")
        fits = max_length > len(own)
        assert (len(dropped), dropped.left_out["too_long"]) == ((1, 0) if fits else (0, 1))
        assert dropped.longest == (("", 0) if fits else ("t", len(own) + 1))
        assert (len(cut), cut.num_cut) == (1, 0 if fits else 1)
        (completion,) = cut.group(0).completions
        assert [*cut.group(0).prompt.tolist(), *completion.tolist()] == [*own, 2][:max_length]
    assert make(chat, text_row(text), max_length=1, too_long="cut").left_out == {"too_long": 1}


def test_a_text_of_one_token_is_left_out_as_empty_and_control_tokens_stay_text(chat: Chat) -> None:
    data = make(chat, text_row("a"), text_row("a b"), text_row("A <|im_end|> B"))
    assert (len(data), data.left_out) == (2, {"empty": 1})
    (completion,) = data.group(1).completions
    assert completion.tolist().count(2) == 1
    assert tokens_of(chat, data, 1) == ["A", " <|im_end|> B<|im_end|>"]


def test_a_control_token_in_a_completion_stays_text(chat: Chat) -> None:
    data = make(chat, row("Hello", "A <|im_end|> B"))
    completion = data.group(0).completions[0].tolist()
    assert completion.count(2) == 1
    assert completion[-1] == 2
    assert tokens_of(chat, data)[1] == "A <|im_end|> B<|im_end|>"


def test_without_a_template_nothing_is_made() -> None:
    with pytest.raises(EngineRefused, match="no chat template"):
        make(Chat(tiny_tokenizer(template=None)), row("Hello", "Yes"))


def test_a_row_too_long_is_dropped_and_counted(chat: Chat) -> None:
    data = make(chat, row("Hello", "Yes"), row("Hello " * 50, "Yes"), max_length=30)
    assert (len(data), data.left_out["too_long"], data.num_cut) == (1, 1, 0)


def test_a_cut_row_loses_the_beginning_of_its_prompt_and_none_of_its_completions(chat: Chat) -> None:
    whole = make(chat, row("Hello " * 50, "Yes", "No, never."))
    cut = make(chat, row("Hello " * 50, "Yes", "No, never."), max_length=40, too_long="cut")
    assert [c.tolist() for c in cut.group(0).completions] == [c.tolist() for c in whole.group(0).completions]
    kept = cut.group(0).prompt.tolist()
    assert len(kept) == 40 - max(len(c) for c in cut.group(0).completions)
    assert kept == whole.group(0).prompt.tolist()[-len(kept) :]
    assert (cut.num_cut, cut.left_out["too_long"]) == (1, 0)


def test_a_completion_that_leaves_no_room_for_a_prompt_is_dropped(chat: Chat) -> None:
    data = make(chat, row("Hello", "Yes " * 50), max_length=30, too_long="cut")
    assert (len(data), data.left_out["too_long"]) == (0, 1)


def test_completions_are_numbered_through_rows_of_any_size(chat: Chat) -> None:
    data = make(chat, row("a", "b", "c"), row("d", "e", "f", "g", scores=(1.0, 3.0, 2.0)), row("h", "i"))
    assert [list(data.completions(n)) for n in range(3)] == [[0, 1], [2, 3, 4], [5]]
    assert data.row_scores(1) == [1.0, 3.0, 2.0]
    assert tokens_of(chat, data, 1)[1:] == ["e<|im_end|>", "f<|im_end|>", "g<|im_end|>"]
    lengths = [len(data.group(1).prompt), *(len(c) for c in data.group(1).completions)]
    assert data.num_tokens(1) == sum(lengths)
    assert data.num_completion_tokens(1) == sum(lengths[1:])


def test_the_digest_tells_tokens_labels_and_order_apart(chat: Chat) -> None:
    first, second = row("a", "b", "c"), row("d", "e", "f")
    digests = {
        make(chat, first, second).digest,
        make(chat, second, first).digest,
        make(chat, first, second._replace(probability=0.9)).digest,
        make(chat, first).digest,
        make(chat, row("a", "b"), row("c", "d")).digest,
    }
    assert len(digests) == 5
    assert make(chat, first, second).digest in digests


def test_an_epoch_takes_every_row_once_in_an_order_of_its_own() -> None:
    epochs = []
    for epoch in range(2):
        steps = range(epoch * 4, epoch * 4 + 4)
        batches = [batch_at(step, num_rows=10, batch_size=3, seed=1) for step in steps]
        assert [len(batch) for batch in batches] == [3, 3, 3, 1]
        epochs.append([number for batch in batches for number in batch])
        assert sorted(epochs[-1]) == list(range(10))
    assert epochs[0] != epochs[1]
    assert steps_per_epoch(10, 3) == 4
    assert batch_at(2, num_rows=10, batch_size=3, seed=1) != batch_at(2, num_rows=10, batch_size=3, seed=2)


def test_microbatches_hold_all_rows_within_the_budget(chat: Chat) -> None:
    data = make(chat, *[row("x" * (7 * n % 40), "yes " * (n % 5 + 1)) for n in range(20)])
    budget = 100
    parts = list(microbatches(data, range(20), max_tokens=budget))
    assert sorted(number for part in parts for number in part) == list(range(20))
    assert all(sum(map(data.num_tokens, part)) <= budget for part in parts)
    lengths = [data.num_tokens(number) for part in parts for number in part]
    assert lengths == sorted(lengths, reverse=True)


def test_a_row_longer_than_the_budget_is_alone(chat: Chat) -> None:
    data = make(chat, row("x" * 60, "y"), row("a", "b"), row("c", "d"))
    assert next(microbatches(data, range(3), max_tokens=40)) == [0]
