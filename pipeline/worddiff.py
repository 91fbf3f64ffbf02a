"""What changed between two texts, word by word; character by character in scripts that put no spaces between words."""

from __future__ import annotations

import re
from difflib import SequenceMatcher
from typing import Literal, NamedTuple

# Kana, Thai, Lao, Tibetan, Burmese, Khmer and the Han characters are single units; other letters make words.
_UNSPACED = (
    "\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
_UNITS = re.compile(rf"\s+|[{_UNSPACED}]|[^\W{_UNSPACED}]+(?:['’][^\W{_UNSPACED}]+)*|\S")


_Change = tuple[bool, str, str]
"""Whether both texts have it, and what stands there in the old and in the new one."""


class Piece(NamedTuple):
    """A stretch of text. state: same (in both), cut (only in the old text), new (only in the new one)."""

    state: Literal["same", "cut", "new"]
    text: str


def word_diff(before: str, after: str) -> list[Piece]:
    """Pieces in reading order. `same` and `cut` together are `before`, `same` and `new` are `after`, to the letter."""
    old, new = _UNITS.findall(before), _UNITS.findall(after)
    # White space is no anchor, so that two texts are not held together by their spaces.
    matcher = SequenceMatcher(str.isspace, old, new)
    changes = [(tag == "equal", "".join(old[i:j]), "".join(new[k:m])) for tag, i, j, k, m in matcher.get_opcodes()]
    return _pieces(_joined(changes))


def marked(pieces: list[Piece]) -> str:
    """Plain text with `[-cut-]` and `{+new+}`."""
    marks = {"same": "{}", "cut": "[-{}-]", "new": "{{+{}+}}"}
    return "".join(marks[piece.state].format(piece.text) for piece in pieces)


def _joined(changes: list[_Change]) -> list[_Change]:
    """Changes become one where little stands between them, so that a phrase reads as a phrase: white space alone, or
    less than half of what changed on either side."""
    joined: list[_Change] = []
    for place, (is_same, old, new) in enumerate(changes):
        if is_same and 0 < place < len(changes) - 1:
            sides = [max(map(len, change[1:])) for change in (joined[-1], changes[place + 1])]
            is_same = not old.isspace() and 2 * len(old) >= min(sides)
        if joined and not is_same and not joined[-1][0]:
            joined[-1] = (False, joined[-1][1] + old, joined[-1][2] + new)
        else:
            joined.append((is_same, old, new))
    return joined


def _pieces(changes: list[_Change]) -> list[Piece]:
    pieces: list[Piece] = []
    for is_same, old, new in changes:
        if is_same:
            pieces.append(Piece("same", old))
            continue
        pieces += [Piece("cut", old)] if old else []
        pieces += [Piece("new", new)] if new else []
    return pieces
