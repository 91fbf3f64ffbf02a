"""Conversation + principle -> the prompt that asks for an answer, critique, revision, check, comparison or grade.

A prompt is a list of chat messages, or with `style="few-shot"` one text of worked examples that a base model continues.

Critiques and revisions in chat form continue the conversation, so that each request extends the last one's prefix:

    conversation, assistant: completion, user: critique request, assistant: critique, user: revision request

Judge requests (check, comparison, grade, reasoning) are one user message of marked sections, what is shared most first:

    ~:~ 4f2a user            the conversation, turn by turn
    ~:~ 4f2a answer A        what is judged
    ~:~ 4f2a answer B
    ~:~ 4f2a task            the principle's text, and what to reply

Few-shot text has the same sections, and ends with the head of the section that the model writes. The nonce (`4f2a`)
is a hash of the conversation, hashed again until no text between the marks holds it: what a candidate writes cannot
open or close a section, and both orders, all candidates and all principles share the conversation's prefix.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Literal

from constitution.principles import Principle
from constitution.wording import (
    CHECK_LABELS,
    COMPARISON_LABELS,
    FAULT,
    GRADE_LABELS,
    NO_FAULT,
    CheckExample,
    ComparisonExample,
    Conversation,
    GradeExample,
    RevisionExample,
    Wording,
    fill,
)

__all__ = [
    "CHECK_LABELS",
    "COMPARISON_LABELS",
    "FAULT",
    "GRADE_LABELS",
    "MARK",
    "NO_FAULT",
    "Messages",
    "Prompt",
    "Style",
    "answer_prompt",
    "check_prompt",
    "comparison_prompt",
    "critique_prompt",
    "grade_prompt",
    "reasoning_prompt",
    "revision_prompt",
    "stops",
    "verdict_prompt",
]

Messages = Sequence[Mapping[str, str]]
"""Chat messages with `role` and `content`, ending with the user's turn."""
Prompt = list[dict[str, str]] | str
Style = Literal["chat", "few-shot"]

MARK = "~:~"
_Part = tuple[str, str]
"""A section: its key in `Wording.sections`, and its text."""


def stops(style: Style) -> tuple[str, ...]:
    """Where a reply ends besides the model's own end: at the next section's mark in few-shot text; () in a chat."""
    return (MARK,) if style == "few-shot" else ()


def answer_prompt(conversation: Messages, *, wording: Wording, style: Style = "chat") -> Prompt:
    """Asks for the conversation's next turn. In a chat that is the conversation itself."""
    if style == "chat":
        return _messages(conversation)
    return _few_shot(wording, "answer", _turns(conversation), [], "assistant")


def critique_prompt(
    conversation: Messages, completion: str, principle: Principle, *, wording: Wording, style: Style = "chat"
) -> Prompt:
    """Asks the model to criticise its completion under a principle."""
    request = fill(wording.critique, critique_request=principle.critique_request)
    if style == "chat":
        return [*_messages(conversation), _turn("assistant", completion), _turn("user", request)]
    parts = [("answer", completion), ("task", request)]
    return _few_shot(wording, "critique", _turns(conversation), parts, "critique")


def revision_prompt(
    conversation: Messages,
    completion: str,
    critique: str | None,
    principle: Principle,
    *,
    wording: Wording,
    style: Style = "chat",
) -> Prompt:
    """Asks for the completion rewritten after its critique; directly, without one, if `critique` is None.

    Extends `critique_prompt` by the critique and the revision request.
    """
    asked = fill(wording.critique, critique_request=principle.critique_request)
    request = fill(wording.revision, revision_request=principle.revision_request)
    if style == "chat":
        answered = [*_messages(conversation), _turn("assistant", completion)]
        between = [] if critique is None else [_turn("user", asked), _turn("assistant", critique)]
        return [*answered, *between, _turn("user", request)]
    criticised = [] if critique is None else [("task", asked), ("critique", critique)]
    kind = "direct" if critique is None else "critique"
    parts = [("answer", completion), *criticised, ("task", request)]
    return _few_shot(wording, kind, _turns(conversation), parts, "revision")


def check_prompt(
    conversation: Messages,
    completion: str,
    principles: Sequence[Principle],
    *,
    wording: Wording,
    style: Style = "chat",
) -> Prompt:
    """Asks whether the completion has a fault under any principle of one group; the reply is one of CHECK_LABELS."""
    task = _check_task(wording, [p.critique_request for p in principles])
    return _judge(wording, "check", conversation, [("answer", completion), ("task", task)], style)


def comparison_prompt(
    conversation: Messages, a: str, b: str, principle: Principle, *, wording: Wording, style: Style = "chat"
) -> Prompt:
    """Asks which of two completions is better, `a` shown first; the reply is one of COMPARISON_LABELS."""
    task = fill(wording.comparison, comparison=principle.comparison)
    parts = [("answer_a", a), ("answer_b", b), ("task", task)]
    return _judge(wording, "comparison", conversation, parts, style)


def grade_prompt(
    conversation: Messages, completion: str, principle: Principle, *, wording: Wording, style: Style = "chat"
) -> Prompt:
    """Asks for a grade by a principle's standard; the reply is one of GRADE_LABELS."""
    task = fill(wording.grade, comparison=principle.comparison)
    return _judge(wording, "grade", conversation, [("answer", completion), ("task", task)], style)


def reasoning_prompt(
    conversation: Messages, a: str, b: str, principle: Principle, *, wording: Wording, style: Style = "chat"
) -> Prompt:
    """Asks for a weighing of two completions in words, before `verdict_prompt` asks for the label."""
    task = fill(wording.reasoning, comparison=principle.comparison)
    parts = [("answer_a", a), ("answer_b", b), ("task", task)]
    return _judge(wording, "reasoning", conversation, parts, style, reply="reasoning")


def verdict_prompt(
    conversation: Messages,
    a: str,
    b: str,
    principle: Principle,
    reasoning: str,
    *,
    wording: Wording,
    style: Style = "chat",
) -> Prompt:
    """Extends `reasoning_prompt` by the reasoning and asks for the label; the reply is one of COMPARISON_LABELS."""
    task = fill(wording.reasoning, comparison=principle.comparison)
    parts = [("answer_a", a), ("answer_b", b), ("task", task)]
    if style == "chat":
        weighed = [_turn("assistant", reasoning), _turn("user", wording.verdict)]
        return [_turn("user", _fenced(wording, _turns(conversation), parts)), *weighed]
    return _judge(
        wording, "reasoning", conversation, [*parts, ("reasoning", reasoning), ("task", wording.verdict)], style
    )


def _judge(
    wording: Wording,
    kind: str,
    conversation: Messages,
    parts: Sequence[_Part],
    style: Style,
    *,
    reply: str = "label",
) -> Prompt:
    if style == "chat":
        return [_turn("user", _fenced(wording, _turns(conversation), parts))]
    return _few_shot(wording, kind, _turns(conversation), parts, reply)


def _few_shot(wording: Wording, kind: str, turns: Sequence[_Part], parts: Sequence[_Part], reply: str) -> str:
    """Worked examples, the sections, and the head of the section that the model is to write."""
    return f"{_examples(wording, kind)}{_fenced(wording, turns, [*parts, (reply, '')])}"


def _fenced(wording: Wording, turns: Sequence[_Part], parts: Sequence[_Part]) -> str:
    """The conversation's turns and what is said of it, each below a line with the mark, the nonce and its name."""
    nonce = _nonce(turns, *(text for name, text in parts if name != "task"))
    return "\n".join(f"{MARK} {nonce} {wording.sections[name]}\n{text}" for name, text in [*turns, *parts])


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _messages(conversation: Messages) -> list[dict[str, str]]:
    return [dict(message) for message in conversation]


def _turns(conversation: Messages) -> list[_Part]:
    return [(message["role"], message["content"]) for message in conversation]


def _nonce(turns: Sequence[_Part], *others: str) -> str:
    """Some hex digits that stand in none of the texts: of the conversation's hash, then of its hash with a counter.

    The length grows with the attempts, so that even a text made of all short nonces ends the search.
    """
    base = "\0".join(part for turn in turns for part in turn)
    texts = "\n".join([base, *others]).lower()
    for attempt in itertools.count():
        digest = hashlib.sha256(f"{attempt}\0{base}".encode("utf-8", "surrogatepass")).hexdigest()
        nonce = digest[: 4 + attempt // 16]
        if nonce not in texts:
            return nonce
    raise AssertionError("unreachable")


def _check_task(wording: Wording, requests: Iterable[str]) -> str:
    return fill(wording.check, critique_requests="\n".join(f"- {request}" for request in requests))


@lru_cache(maxsize=64)
def _examples(wording: Wording, kind: str) -> str:
    """The worked examples of one kind of request, as text that a live request is appended to."""
    shown: list[tuple[Conversation, list[_Part]]]
    if kind == "answer":
        shown = [(e.conversation, [("assistant", e.revision)]) for e in wording.revisions]
    elif kind in ("critique", "direct"):
        shown = [(e.conversation, _revised(wording, e, direct=kind == "direct")) for e in wording.revisions]
    elif kind == "check":
        shown = [(e.conversation, _checked(wording, e)) for e in wording.checks]
    elif kind == "grade":
        shown = [(e.conversation, _graded(wording, e)) for e in wording.grades]
    else:
        shown = [(e.conversation, _compared(wording, e, reasoned=kind == "reasoning")) for e in wording.comparisons]
    return "".join(_fenced(wording, turns, parts) + "\n\n" for turns, parts in shown)


def _revised(wording: Wording, example: RevisionExample, *, direct: bool) -> list[_Part]:
    asked = fill(wording.critique, critique_request=example.critique_request)
    request = fill(wording.revision, revision_request=example.revision_request)
    criticised = [] if direct else [("task", asked), ("critique", example.critique)]
    return [("answer", example.answer), *criticised, ("task", request), ("revision", example.revision)]


def _checked(wording: Wording, example: CheckExample) -> list[_Part]:
    task = _check_task(wording, example.critique_requests)
    return [("answer", example.answer), ("task", task), ("label", example.label)]


def _graded(wording: Wording, example: GradeExample) -> list[_Part]:
    task = fill(wording.grade, comparison=example.comparison)
    return [("answer", example.answer), ("task", task), ("label", example.label)]


def _compared(wording: Wording, example: ComparisonExample, *, reasoned: bool) -> list[_Part]:
    shown = [("answer_a", example.a), ("answer_b", example.b)]
    if not reasoned:
        task = fill(wording.comparison, comparison=example.comparison)
        return [*shown, ("task", task), ("label", example.label)]
    task = fill(wording.reasoning, comparison=example.comparison)
    weighed = [("task", task), ("reasoning", example.reasoning), ("task", wording.verdict)]
    return [*shown, *weighed, ("label", example.label)]
