"""The columns of an input row -> a conversation. docs/prompts.md lists the forms.

Only what a row holds is read here; where rows come from is in sources.py.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from pipeline.errors import UsageError
from pipeline.records import Message

DOCS = "see docs/prompts.md"
ROLES = ("system", "user", "assistant")

_COLUMNS = ("messages", "prompt", "chosen", "rejected", "transcript", "text", "instruction")
_TRANSCRIPT_ONLY = ("chosen", "rejected", "transcript", "text")
_MARKER = re.compile(r"(?:\A\s*|\r?\n\r?\n)(Human|Assistant):(?=\s|\Z)")
_UNSTORABLE = re.compile("[\x00\ud800-\udfff]")
_SPEAKER = {"Human": "user", "Assistant": "assistant"}


class Conversation(NamedTuple):
    """messages: ends with a user turn. answer: what the assistant said after it, or ''.
    merged_turns: turns that were joined to one of the same role before them."""

    messages: list[Message]
    answer: str
    merged_turns: int


def read_conversation(fields: dict[str, Any], where: str, column: str | None = None) -> Conversation:
    """The prompt of a row, and the answer that followed it.

    where: for messages. column: the one that holds the prompt, if the user named it. Raises UsageError.
    """
    turns = _turns(fields, where, column) + _completion(fields, where)
    end = len(turns)
    while end and turns[end - 1]["role"] == "assistant":
        end -= 1
    messages, answer = merge_turns(turns[:end]), merge_turns(turns[end:])
    if not messages or messages[-1]["role"] != "user":
        raise UsageError(f"{where}: no user turn to answer; a prompt ends with a user turn, {DOCS}")
    if not messages[-1]["content"].strip():
        raise UsageError(f"{where}: empty prompt; remove the line or give it text")
    return Conversation(messages, answer[0]["content"] if answer else "", end - len(messages))


def read_strings(fields: dict[str, Any], name: str, where: str) -> list[str]:
    """An optional list of texts, none of them empty."""
    values = fields.get(name)
    values = [] if values is None else values
    if not isinstance(values, list):
        raise UsageError(f'{where}: "{name}" is {type(values).__name__}, not a list of texts; {DOCS}')
    if not all(read_text(value, where, name).strip() for value in values):
        raise UsageError(f'{where}: an empty text in "{name}"; remove it')
    return values


def read_id(value: Any, where: str) -> str:
    """The input's id, or '' if it has none. Whole numbers become their digits."""
    if value is None:
        return ""
    text = str(value) if isinstance(value, int) and not isinstance(value, bool) else read_text(value, where, "id")
    if not text.isprintable() or not 0 < len(text.encode()) <= 256:
        raise UsageError(f'{where}: "id" needs 1 to 256 printable bytes; leave it out to have one made')
    return text


def _turns(fields: dict[str, Any], where: str, column: str | None) -> list[Message]:
    names = (column,) if column else _COLUMNS
    name = next((name for name in names if fields.get(name) is not None), None)
    if name is None:
        wanted = f'no "{column}"' if column else 'no "messages" and no "prompt"'
        found = ", ".join(map(repr, fields)) or "none"
        raise UsageError(f"{where}: {wanted}; columns found: {found}; {DOCS}")
    value = fields[name]
    if name == "instruction":
        return [read_instruction(fields, where)]
    if isinstance(value, list):
        return read_messages(value, where)
    text = read_text(value, where, name)
    if is_transcript(text):
        return transcript_turns(text)
    if name in _TRANSCRIPT_ONLY and not column:
        raise UsageError(f'{where}: "{name}" has no "\\n\\nHuman:"; a plain prompt is "prompt", {DOCS}')
    return [Message(role="user", content=text)]


def _completion(fields: dict[str, Any], where: str) -> list[Message]:
    """The answer beside a `prompt` or an `instruction`, as turns to be cut off again."""
    value = fields.get("completion") or ("instruction" in fields and first_instance(fields).get("output")) or []
    if isinstance(value, list):
        return read_messages(value, where)
    return [Message(role="assistant", content=read_text(value, where, "completion"))]


def first_instance(fields: dict[str, Any]) -> dict[str, Any]:
    """Where a seed task keeps `input` and `output`: in its first instance, or flat."""
    instances = fields.get("instances")
    if isinstance(instances, list) and instances and isinstance(instances[0], dict):
        return instances[0]
    return fields


def is_transcript(text: str) -> bool:
    """Whether a string is turns of "\\n\\nHuman:" and "\\n\\nAssistant:"."""
    first = _MARKER.match(text)
    if first is None:
        return False
    return text.startswith(("\n\n", "\r\n\r\n")) or _MARKER.search(text, first.end()) is not None


def transcript_turns(text: str) -> list[Message]:
    """The turns of a transcript, the white space around each removed; a text before the first marker is left out."""
    parts = _MARKER.split(text)
    return [
        Message(role=_SPEAKER[speaker], content=content.strip())
        for speaker, content in zip(parts[1::2], parts[2::2], strict=True)
    ]


def read_messages(value: list[Any], where: str) -> list[Message]:
    """A list of `role` and `content`; other keys are ignored."""
    return [_message(message, where) for message in value]


def read_instruction(fields: dict[str, Any], where: str) -> Message:
    """`instruction`, and its `input` after a blank line if it has one."""
    text = read_text(fields["instruction"], where, "instruction")
    extra = read_text(first_instance(fields).get("input") or "", where, "input")
    return Message(role="user", content=f"{text}\n\n{extra}" if extra.strip() else text)


def _message(message: Any, where: str) -> Message:
    if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
        raise UsageError(f'{where}: a message without "role" and "content"; {DOCS}')
    if message["role"] not in ROLES:
        raise UsageError(f"{where}: unknown role {message['role']!r}; the roles are {', '.join(ROLES)}")
    return Message(role=message["role"], content=read_text(message["content"], where, "content"))


def merge_turns(turns: list[Message]) -> list[Message]:
    """Turns of one role in a row become one, with a blank line between."""
    messages: list[Message] = []
    for turn in turns:
        if messages and messages[-1]["role"] == turn["role"]:
            contents = [content for content in (messages[-1]["content"], turn["content"]) if content]
            messages[-1] = Message(role=turn["role"], content="\n\n".join(contents))
        else:
            messages.append(turn)
    return messages


def read_text(value: Any, where: str, name: str) -> str:
    """A text that can be stored as UTF-8 and shown."""
    if not isinstance(value, str):
        raise UsageError(f'{where}: "{name}" is {type(value).__name__}, not text; {DOCS}')
    if bad := _UNSTORABLE.search(value):
        what = "NUL" if bad[0] == "\0" else f"lone surrogate \\u{ord(bad[0]):04x}"
        raise UsageError(f'{where}: {what} at character {bad.start()} of "{name}"; remove it')
    return value
