"""What must not be learned from: texts and pairs that show a fault, each with the fault's name.

Everything is a function of text alone and works on characters, so that it holds without spaces too.
"""

from __future__ import annotations

import re
from collections.abc import Collection

ALWAYS = ("empty", "cut", "content_filter")
OPTIONAL = ("role_confusion", "meta_prefix", "repeated_ngrams", "unchanged", "same_text")

_ROLE_NAMES = (
    "Human|HUMAN|User|USER|Assistant|ASSISTANT|AI Assistant|Usuario|Asistente|Utilisateur|Benutzer|Assistent"
    "|Пользователь|Ассистент|用户|用戶|人类|人類|助手|ユーザー|アシスタント|사용자|어시스턴트|ผู้ใช้|ผู้ช่วย"
)
_ROLE_TURN = re.compile(rf"^[ \t>#*_\[]*(?:{_ROLE_NAMES})[\]*_]*[ \t]?[:\uff1a]", re.MULTILINE)
_CHAT_MARKER = re.compile(
    r"<\|(?:im_start|im_end|start_header_id|end_header_id|eot_id|user|assistant|system|endoftext)\|>"
    r"|\[/?INST\]|<(?:start|end)_of_turn>|<</?SYS>>"
)

_EDITED = r"(?:revised|rewritten|re-written|improved|updated|edited|corrected|reworded)"
_BETTER = rf"(?:{_EDITED}|modified|better|harmless|safer)"
_ANSWER = r"(?:assistant[ ])?(?:response|answer|reply|message)"
_VERSION = rf"version(?:[ ]of[ ](?:the|my|this|that)(?:[ ]\w+){{0,2}}[ ]{_ANSWER})?"
_META_PREFIX = re.compile(
    rf"""[\s*_#"']*
    (?:(?:sure|certainly|of[ ]course|absolutely|okay|ok|yes|understood|thank[ ]you|thanks|apologies|i[ ]apologize)\b
        [^\n:\uff1a]{{0,60}}?[,.!:;]\s*)?
    (?:
        (?:here(?:[ ]is|['’]s)|this[ ]is|below[ ]is|the[ ]following[ ]is|i(?:[ ]have|['’]ve))\b[^\n:\uff1a.]{{0,30}}?
        \b(?:{_BETTER}\b[^\n:\uff1a.]{{0,20}}?[ ]{_ANSWER}|{_BETTER}[ ]{_VERSION}|revision|critique|rewrite)
        (?:[ ](?:to|that|which|for|with|based|without)[ ][^\n:\uff1a]{{0,100}}?)?
      | (?:(?:my|the|assistant['’]s)[ ])?{_EDITED}[ ](?:{_ANSWER}|{_VERSION})(?:[ ]is)?
      | (?:(?:my|the)[ ])?(?:revision|critique|rewrite)
    )[*_"'\s]*(?:\([^\n)]{{0,40}}\))?[*_"']*\s*[:\uff1a]
    """,
    re.IGNORECASE | re.VERBOSE,
)
_META_PREFIX_ELSEWHERE = re.compile(
    r"\s*(?:(?:好的|当然|當然|はい|もちろん)[^\n:\uff1a]{0,20}?)?(?:以下|这|這|下面)?[^\n:\uff1a]{0,12}?"
    r"(?:修改后|修改後|修订后|修訂後|改写后|改寫後|改进后|改進後|修正した|改善した|書き直した)的?[^\n:\uff1a]{0,12}[:\uff1a]"
    r"|\s*(?:voici|hier ist|aquí (?:está|tienes)|ecco|вот)\b[^\n:\uff1a.]{0,30}?"
    r"(?:révisée?|überarbeitete|revisada|rivista|исправленный)\b[^\n:\uff1a]{0,60}[:\uff1a]",
    re.IGNORECASE,
)

_SPACE = re.compile(r"\s+")
_EMOJI = re.compile("[\U0001f000-\U0001faff\u2600-\u27bf\u2b00-\u2bff]")
_PREFIX_LOOK = 500
_WINDOW = 20
_REPEATED_SHARE = 0.4
_LONGEST_LOOK = 20_000
_TAIL = 400
_EMOJI_SHARE = 0.2
_FEWEST_EMOJI = 10


def why_not(
    text: str, *, finish_reason: str = "stop", revised: str | None = None, filters: Collection[str] = OPTIONAL
) -> str | None:
    """The first fault of a text as a training target, None if it shows none.

    revised: for a revision, the text that it revised. filters: those of OPTIONAL that are on; ALWAYS are on.
    """
    if not text.strip():
        return "empty"
    if finish_reason == "length":
        return "cut"
    if finish_reason == "content_filter":
        return "content_filter"
    if "role_confusion" in filters and has_role_confusion(text):
        return "role_confusion"
    if "meta_prefix" in filters and has_meta_prefix(text):
        return "meta_prefix"
    if "repeated_ngrams" in filters and is_repetitive(text):
        return "repeated_ngrams"
    if "unchanged" in filters and revised is not None and is_same(text, revised):
        return "unchanged"
    return None


def has_role_confusion(text: str) -> bool:
    """Whether the text speaks for somebody else: a turn marker at a line's start, or a template marker anywhere."""
    return _ROLE_TURN.search(text) is not None or _CHAT_MARKER.search(text) is not None


def has_meta_prefix(text: str) -> bool:
    """Whether the text announces itself as a revision ("Sure, here is a revised response:") before it begins."""
    start = text.lstrip()[:_PREFIX_LOOK]
    return _META_PREFIX.match(start) is not None or _META_PREFIX_ELSEWHERE.match(start) is not None


def is_repetitive(text: str) -> bool:
    """Whether the text, or its end, is a loop or emoji noise.

    Counted in windows of 20 characters: four English words, ten Chinese ones. A unit said four times is a loop.
    """
    flat = _SPACE.sub(" ", text[-2 * _LONGEST_LOOK :]).strip()
    emoji = len(_EMOJI.findall(flat))
    if emoji >= _FEWEST_EMOJI and emoji > _EMOJI_SHARE * len(flat):
        return True
    looks = {min(len(flat), length) for length in (_LONGEST_LOOK, _TAIL)}
    return any(_repeated_share(flat[len(flat) - length :]) > _REPEATED_SHARE for length in looks)


def _repeated_share(text: str) -> float:
    """Share of the windows that stood in the text before."""
    num_windows = len(text) - _WINDOW + 1
    if num_windows < _WINDOW // 2:
        return 0.0
    return 1 - len({text[start : start + _WINDOW] for start in range(num_windows)}) / num_windows


def is_same(text: str, other: str) -> bool:
    """Whether two texts differ in white space at most."""
    return text == other or text.split() == other.split()
