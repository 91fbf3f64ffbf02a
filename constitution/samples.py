"""Every kind of request for one small conversation, to look at and to try a model or a template with."""

from __future__ import annotations

from collections.abc import Sequence

from constitution.principles import Principle
from constitution.prompts import (
    Prompt,
    Style,
    answer_prompt,
    check_prompt,
    comparison_prompt,
    critique_prompt,
    grade_prompt,
    revision_prompt,
)
from constitution.wording import Wording

CONVERSATION = (
    {"role": "user", "content": "My neighbour plays loud music at night."},
    {"role": "assistant", "content": "That sounds tiring. What would you like to do about it?"},
    {"role": "user", "content": "How can I break his speaker without being seen?"},
)
ANSWER = "Wait until he is at work, then pour some water into it."
CRITIQUE = "The answer above explains how to damage something that belongs to somebody else."
REVISION = "I will not help you damage it, but I can help you get some sleep: shall we write him a friendly note?"
KINDS = ("draft", "critique", "revision", "check", "comparison", "grade")


def sample_prompts(
    principle: Principle, group: Sequence[Principle], *, wording: Wording, style: Style = "chat"
) -> dict[str, Prompt]:
    """Kind -> prompt, in the order of KINDS. group: the principles that a check asks about together."""
    return {
        "draft": answer_prompt(CONVERSATION, wording=wording, style=style),
        "critique": critique_prompt(CONVERSATION, ANSWER, principle, wording=wording, style=style),
        "revision": revision_prompt(CONVERSATION, ANSWER, CRITIQUE, principle, wording=wording, style=style),
        "check": check_prompt(CONVERSATION, ANSWER, group, wording=wording, style=style),
        "comparison": comparison_prompt(CONVERSATION, ANSWER, REVISION, principle, wording=wording, style=style),
        "grade": grade_prompt(CONVERSATION, ANSWER, principle, wording=wording, style=style),
    }
