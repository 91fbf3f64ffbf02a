"""The columns of a training row -> a prompt and its completions. docs/datasets.md lists the layouts."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import combinations
from typing import Any, Literal, NamedTuple

from pipeline.conversations import (
    first_instance,
    is_transcript,
    merge_turns,
    read_instruction,
    read_messages,
    read_text,
    transcript_turns,
)
from pipeline.errors import UsageError
from pipeline.records import Message

DOCS = "see docs/datasets.md"

Kind = Literal["sft", "language", "pairs", "comparisons", "ranked", "prompts", "any"]
"""language: as sft, or a plain text. comparisons: a pair, or all pairs of a ranking.

any: all completions that a row has, with the scores or the order that they may have.
"""

_WHOLE = ("messages", "transcript", "text")
_BESIDE_TEXT = ("prompt", "completion", "completions", "chosen", "messages", "transcript", "instruction", "output")
"""Columns that make a row a conversation, whatever its text is."""


class Comparison(NamedTuple):
    """Two of a prompt's completions, by their places, and the probability in [0, 1] that the first is better."""

    first: int
    second: int
    probability: float


class Example(NamedTuple):
    """What a row teaches.

    prompt: ends with a user turn; of a plain text []. completions: none (prompts), one (sft, language), two (pairs) or
    more (ranked); not empty.
    probability: in [0, 1], that the first of a pair is better. scores: of each ranked completion, higher is better; of
    kind any () where a row says nothing of its order. comparisons: at least one, of that kind alone.
    """

    prompt: list[Message]
    completions: tuple[str, ...]
    probability: float = 1.0
    scores: tuple[float, ...] = ()
    comparisons: tuple[Comparison, ...] = ()


class _Prompt(NamedTuple):
    """transcript: the column's text if it is one, '' for a message list or a plain text."""

    turns: list[Message]
    transcript: str = ""


class _Answered(NamedTuple):
    """A conversation cut before its last assistant turn; answer '' if it ends with another one."""

    prompt: list[Message]
    answer: str


def read_example(fields: dict[str, Any], where: str, kind: Kind) -> Example | str:
    """The example in a row, or one word for why there is nothing to learn from it.

    where: for messages. Raises UsageError if a column is missing or does not hold what its name says.
    """
    columns = {name: value for name, value in fields.items() if value is not None}
    if kind == "sft":
        return _imitation(columns, where)
    if kind == "language":
        return _language(columns, where)
    if kind == "pairs":
        return _pair(columns, where)
    if kind == "comparisons":
        return _compared(columns, where)
    if kind == "prompts":
        return _question(columns, where)
    return _ranking(columns, where) if kind == "ranked" else _any(columns, where)


def _any(columns: dict[str, Any], where: str) -> Example | str:
    if "completions" in columns:
        found = _listed(columns, where)
        numbers = _scores(columns, len(found), where) if "scores" in columns else ()
        return ("empty" if not found else _fault(found)) or _example(found, numbers)
    if "chosen" in columns and "rejected" in columns:
        found, probability = _chosen_rejected(columns, where)
        return _fault(found) or _example(found, (probability, 1 - probability))
    return _imitation(columns, where)


def _imitation(columns: dict[str, Any], where: str) -> Example | str:
    name = next((name for name in ("completion", "chosen", *_WHOLE, "instruction") if name in columns), None)
    if name is None and {"input", "output"} <= columns.keys():
        return _imitation({"prompt": columns["input"], "completion": columns["output"]}, where)
    if name is None:
        raise _missing("completion", columns, where)
    if name == "instruction":
        instance = first_instance(columns)
        _require("output", instance, where)
        found = _answered(instance["output"] or "", "output", _read_prompt(columns, where), where)
    else:
        found = _answered(columns[name], name, None if name in _WHOLE else _read_prompt(columns, where), where)
    return _fault([found]) or Example(found.prompt, (found.answer,))


def _language(columns: dict[str, Any], where: str) -> Example | str:
    """A text that is no transcript is learned whole, as no turn of a conversation."""
    value = columns.get("text")
    if not isinstance(value, str) or is_transcript(value) or any(name in columns for name in _BESIDE_TEXT):
        return _imitation(columns, where)
    text = read_text(value, where, "text")
    return Example([], (text,)) if text.strip() else "empty"


def _question(columns: dict[str, Any], where: str) -> Example | str:
    """A prompt of its own, or a conversation without its last answer."""
    prompt = _read_prompt(columns, where)
    if prompt is None:
        name = next((name for name in ("chosen", *_WHOLE) if name in columns), None)
        if name is None:
            raise _missing("prompt", columns, where)
        return _no_prompt(turns := _answered(columns[name], name, None, where).prompt) or Example(turns, ())
    return _no_prompt(turns := merge_turns(prompt.turns)) or Example(turns, ())


def _pair(columns: dict[str, Any], where: str) -> Example | str:
    found, probability = _chosen_rejected(columns, where)
    if fault := _fault(found):
        return fault
    if found[0].answer.split() == found[1].answer.split():
        return "same_text"
    if probability == 0.5:
        return "tie"
    return Example(found[0].prompt, (found[0].answer, found[1].answer), probability)


def _compared(columns: dict[str, Any], where: str) -> Example | str:
    """A pair, or what the scores of a ranking say of each two of its completions."""
    if "completions" not in columns or "chosen" in columns:
        pair = _pair(columns, where)
        return pair if isinstance(pair, str) else pair._replace(comparisons=(Comparison(0, 1, pair.probability),))
    ranking = _ranking(columns, where)
    if isinstance(ranking, str):
        return ranking
    comparisons = tuple(_in_order(ranking))
    return ranking._replace(comparisons=comparisons) if comparisons else "same_text"


def _in_order(ranking: Example) -> Iterator[Comparison]:
    """The better one first; equals are left out, in score and in text."""
    texts = [text.split() for text in ranking.completions]
    for i, j in combinations(range(len(texts)), 2):
        if ranking.scores[i] != ranking.scores[j] and texts[i] != texts[j]:
            yield Comparison(i, j, 1.0) if ranking.scores[i] > ranking.scores[j] else Comparison(j, i, 1.0)


def _chosen_rejected(columns: dict[str, Any], where: str) -> tuple[list[_Answered], float]:
    """Both answers of a pair, and the probability that the first is better."""
    prompt = _read_prompt(columns, where)
    found = []
    for name in ("chosen", "rejected"):
        _require(name, columns, where)
        found.append(_answered(columns[name], name, prompt, where))
    probability = _number(columns.get("chosen_probability", 1.0), where, "chosen_probability")
    if not 0 <= probability <= 1:
        raise UsageError(f'{where}: "chosen_probability" is {probability:g}, not in [0, 1]; {DOCS}')
    return found, probability


def _ranking(columns: dict[str, Any], where: str) -> Example | str:
    if "completions" not in columns and "chosen" in columns:
        pair = _pair(columns, where)
        return pair if isinstance(pair, str) else pair._replace(scores=(pair.probability, 1 - pair.probability))
    found = _listed(columns, where)
    numbers = _scores(columns, len(found), where)
    if len(found) < 2:
        return "single"
    if fault := _fault(found):
        return fault
    return "tie" if len(set(numbers)) == 1 else _example(found, numbers)


def _listed(columns: dict[str, Any], where: str) -> list[_Answered]:
    values, prompt = _read_list(columns, "completions", where), _read_prompt(columns, where)
    return [_answered(value, "completions", prompt, where) for value in values]


def _scores(columns: dict[str, Any], num_completions: int, where: str) -> tuple[float, ...]:
    scores = _read_list(columns, "scores", where)
    if num_completions != len(scores):
        raise UsageError(f"{where}: {num_completions} completions and {len(scores)} scores; give each its score")
    return tuple(_number(score, where, "scores") for score in scores)


def _example(found: list[_Answered], scores: tuple[float, ...]) -> Example:
    return Example(found[0].prompt, tuple(answered.answer for answered in found), scores=scores)


def _fault(found: list[_Answered]) -> str | None:
    prompt = found[0].prompt
    if not all(answered.answer.strip() for answered in found):
        return "empty"
    if any(answered.prompt != prompt for answered in found):
        return "different_prompts"
    return _no_prompt(prompt)


def _no_prompt(prompt: list[Message]) -> str | None:
    if not prompt or prompt[-1]["role"] != "user" or not prompt[-1]["content"].strip():
        return "no_prompt"
    return None


# Columns


def _read_prompt(columns: dict[str, Any], where: str) -> _Prompt | None:
    """The prompt that stands in a column of its own, None if the answers bring theirs along."""
    if "prompt" not in columns:
        return _Prompt([read_instruction(columns, where)]) if "instruction" in columns else None
    value = columns["prompt"]
    if isinstance(value, list):
        prompt = _Prompt(read_messages(value, where))
    else:
        prompt = _prompt_text(read_text(value, where, "prompt"))
    if prompt.turns and prompt.turns[-1] == Message(role="assistant", content=""):
        prompt = prompt._replace(turns=prompt.turns[:-1])
    if prompt.turns and prompt.turns[-1]["role"] == "assistant":
        raise UsageError(f'{where}: "prompt" ends with an assistant turn; put it into the answer, {DOCS}')
    return prompt


def _prompt_text(text: str) -> _Prompt:
    if is_transcript(text):
        return _Prompt(transcript_turns(text), text)
    system, human, turns = text.partition("\n\nHuman:")
    if human and text.endswith("\n\nAssistant:"):
        return _Prompt([Message(role="system", content=system), *transcript_turns(human + turns)], text)
    return _Prompt([Message(role="user", content=text)])


def _answered(value: Any, name: str, prompt: _Prompt | None, where: str) -> _Answered:
    turns = merge_turns(_turns(value, name, prompt, where))
    if turns and turns[-1]["role"] == "assistant":
        return _Answered(turns[:-1], turns[-1]["content"])
    return _Answered(turns, "")


def _turns(value: Any, name: str, prompt: _Prompt | None, where: str) -> list[Message]:
    """The whole conversation. An answer beside a prompt may be its text, its turns, or the conversation again."""
    if isinstance(value, list):
        turns = read_messages(value, where)
        if prompt is None or turns[: len(prompt.turns)] == prompt.turns:
            return turns
        if any(turn["role"] != "assistant" for turn in turns):
            raise UsageError(f'{where}: "{name}" is a conversation that does not begin with the prompt; {DOCS}')
        return prompt.turns + turns
    text = read_text(value, where, name)
    if prompt is None:
        if not is_transcript(text):
            raise UsageError(f'{where}: "{name}" is no transcript ("\\n\\nHuman: …"), and there is no "prompt"; {DOCS}')
        return transcript_turns(text)
    if prompt.transcript and text.startswith(prompt.transcript):
        return [turn for turn in prompt.turns if turn["role"] == "system"] + transcript_turns(text)
    if prompt.transcript:
        text = text.strip().removeprefix("Assistant:").strip()
    return [*prompt.turns, Message(role="assistant", content=text)]


def _read_list(columns: dict[str, Any], name: str, where: str) -> list[Any]:
    _require(name, columns, where)
    value = columns[name]
    if not isinstance(value, list):
        raise UsageError(f'{where}: "{name}" is {type(value).__name__}, not a list; {DOCS}')
    return value


def _number(value: Any, where: str, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UsageError(f'{where}: {value!r} in "{name}" is no finite number; {DOCS}')
    return float(value)


def _require(name: str, columns: dict[str, Any], where: str) -> None:
    if name not in columns:
        raise _missing(name, columns, where)


def _missing(name: str, columns: dict[str, Any], where: str) -> UsageError:
    found = ", ".join(map(repr, columns)) or "none"
    return UsageError(f'{where}: no "{name}"; columns found: {found}; {DOCS}')
