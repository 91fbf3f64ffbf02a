"""Conversations and raw text -> tokens, so that what a text says can never become what a template does.

Text is data: where a message holds the text of a control token, its letters are encoded, never the token. A message
without such text is encoded together with its surroundings, exactly as the model's own chat template has it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import jinja2
from tokenizers import Tokenizer

from pipeline.errors import EngineRefused, RequestFailed
from pipeline.records import Message, Prompt, digest

# Markers that templates write as ordinary letters: <|x|>, [INST], <<SYS>>, <think>.
_LITERALS = re.compile(r"<\|[\w.-]{1,40}\|>|\[/?[A-Z][A-Z_]{2,30}\]|<</?[A-Z]{2,20}>>|</?[a-z][a-z_]{2,30}>")
_THINK, _THOUGHT = "<think>", "</think>"
# Some templates write a date. Today's would change a run's prompts overnight; this is those templates' own default.
_DATE = "26 Jul 2024"
_BORDER = 48  # characters of a raw prompt's end that can share a token with what follows
_TEXT_ENDS = ("<|endoftext|>", "<|end_of_text|>")
"""What ends a text in pretraining, where the tokenizer's own end of a chat model is that of a turn."""


_KEPT_PIECES = 1024
_ENDS, _STARTS = (
    ("a word", "A stop.", "(a bracket)", 'a "quote"', "why?", "this:", "12", "é", "😀"),
    ("~:~ W", "- a", "A", "1", "é", "“"),
)
_PARAGRAPHS = "\n\n".join(f"{start} {end}" for end in _ENDS for start in _STARTS)
"""Paragraphs that begin and end in many ways."""


class Encoded(NamedTuple):
    """token_ids of a prompt; neutralised: how many texts of control tokens in its content were encoded as letters."""

    token_ids: list[int]
    neutralised: int


class Chat:
    """A tokenizer with its chat template.

    eos: tokens that end a turn, besides the tokenizer's own and the template's.
    template_hash: sha256 of the template's text, "" if there is none.
    opens_reasoning: the reply begins inside a <think> block.
    """

    def __init__(self, tokenizer: Any, *, eos: Iterable[int] = ()) -> None:
        self.tokenizer = tokenizer
        self._backend: Tokenizer = tokenizer.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        self._letters = _without_added_tokens(self._backend)
        self.template = tokenizer.get_chat_template() if tokenizer.chat_template else ""
        self.template_hash = hashlib.sha256(self.template.encode()).hexdigest() if self.template else ""
        added = tokenizer.added_tokens_decoder
        special = {n for n, token in added.items() if token.special}
        self._control = special | {n for n, token in added.items() if token.content in self.template}
        ends = sorted(n for n in special if added[n].content in _TEXT_ENDS)
        self._text_end = (ends or [n for n in (tokenizer.eos_token_id,) if n is not None])[:1]
        self._hidden = special - {n for n, token in added.items() if token.content in (_THINK, _THOUGHT)}
        texts = {added[n].content for n in self._control} | set(_LITERALS.findall(self.template))
        self._marker = re.compile(
            "|".join(re.escape(text) for text in sorted(texts, key=lambda t: (-len(t), t)) if text.strip()) or "(?!)"
        )
        self._normalised = any(added[n].normalized for n in self._control) and self._backend.normalizer is not None
        self._leading = _leading_tokens(self._backend)
        self._piece = lru_cache(_KEPT_PIECES)(lambda piece: self._backend.encode(piece, add_special_tokens=False).ids)
        self._cut = self._find_cut()
        self._label_ids: dict[tuple[str, ...], tuple[tuple[int, ...], ...]] = {}
        self.eos = frozenset(eos) | ({tokenizer.eos_token_id} - {None})
        self._turn_parts: tuple[str, list[int]] | None = None
        self._takes_system = self._takes_repeats = True
        self.opens_reasoning = False
        if self.template:
            self._probe()

    def prompt(self, prompt: Prompt, *, reasoning: bool = True) -> Encoded:
        """Tokens of a conversation up to where the reply begins, or of raw text behind the model's first token.

        reasoning: False asks templates that can to leave the reasoning block out.
        Raises EngineRefused without a template, RequestFailed (`bad_roles`) when the template refuses the conversation.
        """
        if isinstance(prompt, str):
            (text,), hidden, seam = self._hide([prompt])
            token_ids = self._leading + (self._encode(text, hidden, seam) if hidden else self._in_pieces(text))
        else:
            messages = self._fit(prompt)
            contents, hidden, seam = self._hide([message["content"] for message in messages])
            safe = [Message(role=m["role"], content=text) for m, text in zip(messages, contents, strict=True)]
            token_ids = self._encode(self._render(safe, reply=True, reasoning=reasoning), hidden, seam)
        return Encoded(token_ids, len(hidden))

    def document(self, text: str) -> Encoded:
        """Tokens of a text by itself, with the model's first token and the one that ends a text, where it has them."""
        (safe,), hidden, seam = self._hide([text])
        return Encoded([*self._leading, *self._encode(safe, hidden, seam), *self._text_end], len(hidden))

    def _in_pieces(self, text: str) -> list[int]:
        """Tokens of raw text, of which most is worked examples that were seen before."""
        pieces = self._cut.split(text) if self._cut else [text]
        return [token for piece in pieces for token in self._piece(piece)]

    def _find_cut(self) -> re.Pattern[str] | None:
        """Where text is cut into pieces that have the same tokens alone: at blank lines, if that is so in a sample."""
        for cut in (re.compile(r"(?<=\n\n)(?=\S)"), re.compile(r"(?<=\S)(?=\n\n)")):
            pieces = [token for piece in cut.split(_PARAGRAPHS) for token in self._piece(piece)]
            if pieces == self._backend.encode(_PARAGRAPHS, add_special_tokens=False).ids:
                return cut
        return None

    def completion(self, text: str) -> Encoded:
        """Tokens of a reply behind a conversation's prompt (without reasoning), to the token that ends the turn.

        They never merge with the prompt's tokens. Raises EngineRefused without a template.
        """
        border, ending = self._turn()
        (safe,), hidden, seam = self._hide([text])
        before = self._backend.encode(border, add_special_tokens=False).ids
        probe = [Message(role="user", content="x")]
        token_ids = self._encode(border + self._lead(probe, border, "x") + safe, hidden, seam)
        if token_ids[: len(before)] != before:
            token_ids = before + self._encode(safe, hidden, seam)
        return Encoded(token_ids[len(before) :] + ending, len(hidden))

    def labels(self, prompt: Prompt, labels: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """Tokens of each label at the beginning of the reply to this prompt, with the space a template puts there."""
        if isinstance(prompt, str):
            return tuple(self._continue(prompt[-_BORDER:], label) for label in labels)
        key = tuple(labels)
        if key not in self._label_ids:
            probe = [Message(role="user", content="x")]
            border = self._render(probe, reply=True, reasoning=False)
            self._label_ids[key] = tuple(
                self._continue(border, self._lead(probe, border, label) + label) for label in labels
            )
        return self._label_ids[key]

    def text(self, token_ids: Sequence[int]) -> str:
        """The reply's text: special tokens left out, reasoning markers kept."""
        shown = [token for token in token_ids if token not in self._hidden]
        return self.tokenizer.decode(shown, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def _fit(self, messages: Sequence[Message]) -> list[Message]:
        """Folds system turns into the next user turn and merges turns of one role, where the template asks for it."""
        if not self.template:
            raise EngineRefused("the model has no chat template; set engine.style: few-shot, or give a chat model")
        turns: list[Message] = []
        held: list[str] = []
        for message in messages:
            if message["role"] == "system" and not self._takes_system:
                held.append(message["content"])
                continue
            parts = [*held, message["content"]] if message["role"] == "user" else [message["content"]]
            held = [] if message["role"] == "user" else held
            if turns and turns[-1]["role"] == message["role"] and not self._takes_repeats:
                parts.insert(0, turns.pop()["content"])
            turns.append(Message(role=message["role"], content="\n\n".join(parts)))
        return [*turns, Message(role="user", content="\n\n".join(held))] if held else turns

    def _render(self, messages: Sequence[Message], *, reply: bool, reasoning: bool = True) -> str:
        extra = {} if reasoning else {"enable_thinking": False}
        try:
            return self.tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=reply, date_string=_DATE, **extra
            )
        except (jinja2.TemplateError, TypeError) as error:
            roles = ", ".join(message["role"] for message in messages)
            raise RequestFailed("bad_roles", f"the chat template refuses the turns [{roles}]: {error}") from error

    def _hide(self, texts: Sequence[str]) -> tuple[list[str], list[str], str]:
        """Puts numbered seams for texts of control tokens. Returns the texts, what was replaced, the seam's word."""
        if self._normalised:
            texts = [self._normal(text) for text in texts]
        if not any(self._marker.search(text) for text in texts):
            return list(texts), [], ""
        seam = "x" + digest(list(texts))[:20] + "x"  # depends on all texts, so none can contain it
        hidden: list[str] = []

        def number(match: re.Match[str]) -> str:
            hidden.append(match[0])
            return f"{seam}{len(hidden) - 1}z"

        return [self._marker.sub(number, text) for text in texts], hidden, seam

    def _normal(self, text: str) -> str:
        """The text as the tokenizer's normaliser has it, if only that shows a control token's text."""
        normal = self._backend.normalizer.normalize_str(text)
        return normal if self._marker.search(normal) and not self._marker.search(text) else text

    def _encode(self, text: str, hidden: Sequence[str], seam: str) -> list[int]:
        if not hidden:
            return self._backend.encode(text, add_special_tokens=False).ids
        token_ids: list[int] = []
        for n, part in enumerate(re.split(f"{seam}([0-9]+)z", text)):
            if n % 2:
                token_ids += self._spell(hidden[int(part)])
            elif part:
                token_ids += self._backend.encode(part, add_special_tokens=False).ids
        return token_ids

    def _spell(self, marker: str) -> list[int]:
        """A control token's text as letters; one by one where the template itself writes these letters.

        Where one by one is what the template has too (a vocabulary without longer pieces), a space keeps them apart.
        """
        is_token = self.tokenizer.convert_tokens_to_ids(marker) in self._control
        token_ids = self._letters.encode(marker, add_special_tokens=False).ids if is_token else []
        if not token_ids or self._control & set(token_ids):
            token_ids = self._one_by_one(marker)
        if token_ids == self._backend.encode(marker, add_special_tokens=False).ids:
            token_ids = self._one_by_one(f"{marker[0]} {marker[1:]}")
        return token_ids

    def _one_by_one(self, text: str) -> list[int]:
        return [n for char in text for n in self._letters.encode(char, add_special_tokens=False).ids]

    def _continue(self, border: str, label: str) -> tuple[int, ...]:
        """Tokens of a label behind a text whose own tokens stay as they are."""
        before = self._backend.encode(border, add_special_tokens=False).ids
        whole = self._backend.encode(border + label, add_special_tokens=False).ids
        if whole[: len(before)] == before and len(whole) > len(before):
            return tuple(whole[len(before) :])
        return tuple(self._backend.encode(label, add_special_tokens=False).ids)

    def _turn(self) -> tuple[str, list[int]]:
        """What stands before a reply, and the tokens that end one: the template's, or the tokenizer's own."""
        if not self._turn_parts:
            probe = self._fit([Message(role="user", content="x")])
            border = self._render(probe, reply=True, reasoning=False)
            turn = self._render([*probe, Message(role="assistant", content="otherprobe")], reply=False)
            tokens = self._backend.encode(turn.rpartition("otherprobe")[2], add_special_tokens=False).ids
            end = next((n for n, token in enumerate(tokens) if token in self.eos), None)
            ending = [self.tokenizer.eos_token_id] if end is None else tokens[: end + 1]
            self._turn_parts = border, [token for token in ending if token is not None]
        return self._turn_parts

    def _lead(self, probe: list[Message], border: str, label: str) -> str:
        """White space that the template puts before a reply."""
        whole = self._render([*probe, Message(role="assistant", content=label)], reply=False, reasoning=False)
        lead, found, _ = whole.removeprefix(border).partition(label)
        return lead if whole.startswith(border) and found and not lead.strip() else ""

    def _probe(self) -> None:
        """Learns from trial conversations what the template accepts and how it ends a turn."""
        user, other = Message(role="user", content="firstprobe"), Message(role="user", content="otherprobe")
        self._takes_system = self._accepts([Message(role="system", content="otherprobe"), user])
        self._takes_repeats = self._accepts([user, other])
        self.opens_reasoning = self._render([user], reply=True).rstrip().endswith(_THINK)
        turn = self._render([user, Message(role="assistant", content="otherprobe")], reply=False)
        ending = self._backend.encode(turn.rpartition("otherprobe")[2], add_special_tokens=False).ids[:1]
        self.eos |= self._hidden & set(ending)

    def _accepts(self, messages: list[Message]) -> bool:
        try:
            text = self._render(messages, reply=True)
        except RequestFailed:
            return False
        return all(message["content"] in text for message in messages)


def split_reasoning(text: str, *, opened: bool = False) -> tuple[str, str]:
    """(reasoning, answer) of a reply; a block that never closes leaves no answer.

    opened: the template has begun the block already.
    """
    body = text.lstrip()
    if not opened and not body.startswith(_THINK):
        return "", text
    reasoning, closed, answer = body.removeprefix(_THINK).partition(_THOUGHT)
    return reasoning.strip(), answer.lstrip() if closed else ""


def _without_added_tokens(backend: Tokenizer) -> Tokenizer:
    """The same vocabulary, in which no text is matched as a whole token."""
    spec = json.loads(backend.to_str())
    return Tokenizer.from_str(json.dumps({**spec, "added_tokens": [], "post_processor": None}))


def _leading_tokens(backend: Tokenizer) -> list[int]:
    """What the tokenizer puts before raw text (a beginning-of-text token, or nothing)."""
    plain = backend.encode("a", add_special_tokens=False).ids
    whole = backend.encode("a", add_special_tokens=True).ids
    starts = [n for n in range(len(whole)) if whole[n : n + len(plain)] == plain]
    return whole[: starts[0]] if starts else []
