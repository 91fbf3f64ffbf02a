"""The words around the principles: templates, names of sections, worked examples.

`wording.yaml` holds the default; a constitution may override any part. Model text is never a template: `fill` goes over
a template once and does not look at what it put in.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from constitution import yamlfile
from constitution.yamlfile import Node

NO_FAULT, FAULT = "No", "Yes"
CHECK_LABELS = (NO_FAULT, FAULT)
"""Replies to a check: `No` = nothing to point out."""
COMPARISON_LABELS = ("A", "B")
GRADE_LABELS = tuple(str(grade) for grade in range(1, 11))

TEMPLATES = {
    "critique": ("critique_request",),
    "revision": ("revision_request",),
    "check": ("critique_requests",),
    "comparison": ("comparison",),
    "grade": ("comparison",),
    "reasoning": ("comparison",),
    "verdict": (),
}
"""Template -> the placeholders that it must hold, and may hold."""

SECTIONS = (
    "system",
    "user",
    "assistant",
    "answer",
    "answer_a",
    "answer_b",
    "task",
    "critique",
    "revision",
    "reasoning",
    "label",
)
_PLACEHOLDER = re.compile(r"\{([a-z_]+)\}")
_ROLES = ("system", "user", "assistant")

Conversation = tuple[tuple[str, str], ...]
"""(role, content) of each turn, ending with the user's."""


class RevisionExample(NamedTuple):
    conversation: Conversation
    answer: str
    critique_request: str
    critique: str
    revision_request: str
    revision: str


class ComparisonExample(NamedTuple):
    conversation: Conversation
    a: str
    b: str
    comparison: str
    reasoning: str
    label: str


class CheckExample(NamedTuple):
    conversation: Conversation
    answer: str
    critique_requests: tuple[str, ...]
    label: str


class GradeExample(NamedTuple):
    conversation: Conversation
    answer: str
    comparison: str
    label: str


@dataclass(frozen=True, eq=False)
class Wording:
    """Templates by their field's name; `sections` maps each of `SECTIONS` to the name shown; worked examples.

    Compared by identity, so that rendered examples can be cached for it.
    """

    critique: str
    revision: str
    check: str
    comparison: str
    grade: str
    reasoning: str
    verdict: str
    sections: Mapping[str, str]
    revisions: tuple[RevisionExample, ...]
    comparisons: tuple[ComparisonExample, ...]
    checks: tuple[CheckExample, ...]
    grades: tuple[GradeExample, ...]

    def plain(self) -> dict[str, Any]:
        """Everything that this wording says, as JSON can hold it."""
        return asdict(self)

    def overridden(self, node: Node) -> Wording:
        """This wording with the parts that a constitution's `wording:` gives in their place."""
        given = node.mapping("wording", (*TEMPLATES, "sections", "examples"))
        changes: dict[str, Any] = {name: _template(name, given[name]) for name in TEMPLATES if name in given}
        if "sections" in given:
            changes["sections"] = {**self.sections, **_sections(given["sections"])}
        if "examples" in given:
            lists = given["examples"].mapping("examples", _EXAMPLES)
            for name, entries in lists.items():
                changes[name] = tuple(_EXAMPLES[name](entry) for entry in entries.items(name))
        wording = replace(self, **changes)
        if len(set(wording.sections.values())) < len(SECTIONS):
            node.fail("two sections have the same name", "give each its own")
        return wording


def fill(template: str, **values: str) -> str:
    """Puts each value in the place of its `{name}`, in one pass: braces inside a value stay as they are."""
    return _PLACEHOLDER.sub(lambda match: values.get(match[1], match[0]), template)


@cache
def default_wording() -> Wording:
    """The wording of `wording.yaml`."""
    root = yamlfile.read(Path(__file__).with_name("wording.yaml"))
    root.mapping("wording", (*TEMPLATES, "sections", "examples"), (*TEMPLATES, "sections", "examples"))
    blank = Wording("", "", "", "", "", "", "", {}, (), (), (), ())
    return blank.overridden(root)


def _template(name: str, node: Node) -> str:
    template = node.text(f"template {name!r}")
    found = set(_PLACEHOLDER.findall(template))
    allowed = set(TEMPLATES[name])
    for placeholder in sorted(found - allowed):
        usable = ", ".join(f"{{{known}}}" for known in sorted(allowed)) or "none"
        node.fail(f"unknown placeholder {{{placeholder}}} in template {name!r}", f"usable here: {usable}")
    for placeholder in sorted(allowed - found):
        node.fail(f"template {name!r} has no {{{placeholder}}}", "add it where the principle's text belongs")
    return template


def _sections(node: Node) -> dict[str, str]:
    names = {key: value.text(f"section {key!r}") for key, value in node.mapping("sections", SECTIONS).items()}
    for key, name in names.items():
        if "\n" in name:
            node.fail(f"section {key!r} has several lines", "write a name of one line", key=key)
    return names


def _conversation(node: Node) -> Conversation:
    turns = []
    for item in node.items("conversation"):
        turn = item.mapping("a turn", _ROLES)
        if len(turn) != 1:
            item.fail("a turn is not one role and its text", "write one line such as - user: …")
        ((role, content),) = turn.items()
        turns.append((role, content.text(role)))
    if turns[-1][0] != "user":
        node.fail("the conversation does not end with the user's turn", "end it with - user: …")
    return tuple(turns)


def _label(node: Node, labels: tuple[str, ...]) -> str:
    label = node.text("label")
    if label not in labels:
        node.fail(f"label {label!r}", f"use one of {', '.join(labels)}")
    return label


def _texts(node: Node, fields: tuple[str, ...], texts: tuple[str, ...]) -> tuple[dict[str, Node], dict[str, Any]]:
    """The example's nodes, and its conversation and plain texts ready for its class."""
    given = node.mapping("an example", fields, fields)
    values: dict[str, Any] = {name: given[name].text(name) for name in texts}
    return given, {"conversation": _conversation(given["conversation"]), **values}


def _revision_example(node: Node) -> RevisionExample:
    fields = RevisionExample._fields
    return RevisionExample(**_texts(node, fields, fields[1:])[1])


def _comparison_example(node: Node) -> ComparisonExample:
    fields = ComparisonExample._fields
    given, values = _texts(node, fields, fields[1:-1])
    return ComparisonExample(**values, label=_label(given["label"], COMPARISON_LABELS))


def _check_example(node: Node) -> CheckExample:
    given, values = _texts(node, CheckExample._fields, ("answer",))
    requests = given["critique_requests"].items("critique_requests")
    texts = tuple(request.text("a critique request") for request in requests)
    return CheckExample(**values, critique_requests=texts, label=_label(given["label"], CHECK_LABELS))


def _grade_example(node: Node) -> GradeExample:
    fields = GradeExample._fields
    given, values = _texts(node, fields, fields[1:-1])
    return GradeExample(**values, label=_label(given["label"], GRADE_LABELS))


_EXAMPLES: dict[str, Callable[[Node], Any]] = {
    "revisions": _revision_example,
    "comparisons": _comparison_example,
    "checks": _check_example,
    "grades": _grade_example,
}
