"""The embedded model's tokenizer: bytes, common words, and whole phrases of its world as single tokens.

A phrase in one token is copied in one step, which is what a model this small gets wrong. A regular expression cuts the
text at the known phrases first, then into words; a piece that is in the vocabulary is one token (`ignore_merges`), any
other falls back to byte pairs, so that every UTF-8 text survives the round trip.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from pipeline.nano import words

CONTROL = ("<|pad|>", "<|begin|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>")
CHAT_TEMPLATE = (
    "{{ '<|begin|>' }}"
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
WORDS = r" ?\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]|\s+(?!\S)|\s"
NUM_MERGES = 500


def world_phrases() -> list[str]:
    """The phrases of the world as they stand in its sentences."""
    inner = words.HARMFUL_VERBS + words.HARMFUL_OBJECTS + words.BENIGN_VERBS + words.BENIGN_OBJECTS
    phrases = [" " + phrase for phrase in inner + words.STEPS + words.REASONS]
    for clause in words.RUDE_FIRST + words.RUDE_LAST + words.POLITE + words.ELSEWHERE + words.SYSTEMS:
        phrases += [clause.strip(), " " + clause.strip()]
    return [phrase for phrase in phrases if phrase.strip()]


def world_words() -> set[str]:
    """Every word of the world's sentences and every common word, with and without a space before it."""
    turns = [turn for talk in words.TALKS for turn in talk]
    texts = [*words.WAYS, *turns, *words.HELPS, *words.REFUSALS, *words.CRITIQUES.values(), *world_phrases()]
    found = {word for text in texts for word in _words(re.sub(r"\{\w+\}", "", text))}
    bare = {word.strip() for word in found} - {""}
    return bare | {" " + word for word in bare} | {" " + word for word in words.COMMON.split()}


def _words(text: str) -> list[str]:
    from tokenizers import Regex, pre_tokenizers

    split = pre_tokenizers.Split(Regex(WORDS), behavior="isolated")
    return [word for word, _ in split.pre_tokenize_str(text)]


def build_tokenizer(wording: Iterable[str]) -> Any:
    """The tokenizer for the world and for this wording: the fixed texts in which a constitution is asked about.

    Each line of the wording becomes one token, and each of its words too, so that an edited line still reads well.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    lines = {line for text in wording for line in text.split("\n")}
    spoken = {word.strip() for line in lines for word in _words(line)} - {""}
    known = world_words() | spoken | {" " + word for word in spoken} | {str(i) for i in range(100)}
    phrases = {*world_phrases(), *(line for line in lines if len(_words(line)) > 1)}
    pattern = "|".join(re.escape(phrase) for phrase in sorted(phrases, key=lambda phrase: (-len(phrase), phrase)))
    pattern = rf"(?:{pattern})(?:(?<=[^\p{{L}}\p{{N}}])|(?![\p{{L}}\p{{N}}]))|{WORDS}"

    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=len(alphabet) + NUM_MERGES, initial_alphabet=alphabet, show_progress=False)
    trained.train_from_iterator([" " + word for word in words.COMMON.split()] + sorted(known), trainer)
    merges = [(left, right) for left, right in _merges(trained)]

    pieces = [_byte_level(piece) for piece in [*sorted(known), *sorted(phrases)]]
    entries = [*CONTROL, *alphabet, *("".join(merge) for merge in merges), *pieces]
    vocabulary = {entry: i for i, entry in enumerate(dict.fromkeys(entries))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        bos_token="<|begin|>",
        eos_token="<|end|>",
        additional_special_tokens=["<|system|>", "<|user|>", "<|assistant|>"],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=4096,
    )


def _merges(tokenizer: Any) -> list[list[str]]:
    import json

    return json.loads(tokenizer.to_str())["model"]["merges"]


def _byte_level(text: str) -> str:
    """A text in the printable alphabet in which byte-level vocabularies are written."""
    from tokenizers import pre_tokenizers

    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return "".join(piece for piece, _ in level.pre_tokenize_str(text))
