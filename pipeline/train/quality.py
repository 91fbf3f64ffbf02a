"""Answers grouped by their quality: the best of each prompt, the best share of all, or bands from worst to best.

Best of n is rejection sampling as in Ouyang et al. 2022 and Touvron et al. 2023 (arXiv 2307.09288, section 3.2.3).
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from pipeline.errors import UsageError
from pipeline.records import Message

if TYPE_CHECKING:
    import pyarrow as pa

MAX_GRADES = 100


class Grouping(NamedTuple):
    """all: every prompt with its scored answers. value: the share of top-quantile, the number of grades."""

    kind: Literal["all", "best-of-n", "top-quantile", "graded"] = "all"
    value: float = 0.0

    def __str__(self) -> str:
        return f"{self.kind}={self.value:g}" if self.value else self.kind


ALL = Grouping()


class Answer(NamedTuple):
    text: str
    score: float
    label_source: str


class Scored(NamedTuple):
    """A prompt with its different answers, the best first."""

    id: str
    prompt: list[Message]
    answers: list[Answer]
    tags: list[str]


def parse_grouping(text: str) -> Grouping:
    """`best-of-n`, `top-quantile=SHARE` or `graded=NUMBER`. Raises UsageError."""
    kind, _, value = text.partition("=")
    if text == "best-of-n":
        return Grouping("best-of-n")
    try:
        if kind == "top-quantile" and 0 < float(value) <= 1:
            return Grouping("top-quantile", float(value))
        if kind == "graded" and 2 <= int(value) <= MAX_GRADES:
            return Grouping("graded", int(value))
    except ValueError:
        pass
    raise UsageError(
        f"--group {text}: use best-of-n, top-quantile=SHARE (above 0, up to 1) or graded=NUMBER (2 to {MAX_GRADES})"
    )


def borders(scores: Sequence[float], grouping: Grouping) -> list[float]:
    """Where a higher band begins, rising; a score that equals a border is above it. () scores have none."""
    if grouping.kind not in ("top-quantile", "graded") or not len(scores):
        return []
    ordered = np.sort(scores)
    if grouping.kind == "top-quantile":
        places = [len(ordered) - math.ceil(round(grouping.value * len(ordered), 9))]
    else:
        places = [math.ceil(band * len(ordered) / grouping.value) for band in range(1, int(grouping.value))]
    return [float(ordered[min(place, len(ordered) - 1)]) for place in places]


def choose(scored: Scored, grouping: Grouping, edges: Sequence[float]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a prompt, each with the part of the output it belongs to: '' or `grade-N`, N the best."""
    start = {"prompt": scored.prompt, "tags": scored.tags}
    if grouping.kind == "all":
        sources = {answer.label_source for answer in scored.answers}
        yield (
            "",
            {
                **start,
                "id": scored.id,
                "completions": [_turn(answer) for answer in scored.answers],
                "scores": [answer.score for answer in scored.answers],
                "label_source": sources.pop() if len(sources) == 1 else "mixed",
            },
        )
        return
    taken = scored.answers[:1] if grouping.kind == "best-of-n" else scored.answers
    for place, answer in enumerate(taken):
        row = {**start, "id": f"{scored.id}/{place}", "completion": _turn(answer), "score": answer.score}
        row["label_source"] = answer.label_source
        grade = 1 + bisect_right(edges, answer.score)
        if grouping.kind == "graded":
            yield f"grade-{grade}", {**row, "grade": grade}
        elif grouping.kind == "best-of-n" or grade > 1:
            yield "", row


def parts(grouping: Grouping) -> list[str]:
    """Names of all parts of an output."""
    return [f"grade-{n}" for n in range(1, int(grouping.value) + 1)] if grouping.kind == "graded" else [""]


def schema(grouping: Grouping) -> pa.Schema:
    import pyarrow as pa

    text, real = pa.string(), pa.float64()
    chat = pa.list_(pa.struct({"role": text, "content": text}))
    if grouping.kind == "all":
        own = {"completions": pa.list_(chat), "scores": pa.list_(real)}
    else:
        own = {"completion": chat, "score": real}
    if grouping.kind == "graded":
        own["grade"] = pa.int64()
    return pa.schema({"id": text, "prompt": chat, **own, "tags": pa.list_(text), "label_source": text})


def _turn(answer: Answer) -> list[Message]:
    return [Message(role="assistant", content=answer.text)]
