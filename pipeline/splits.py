"""Which rows are trained on and which are kept for testing: a choice by hash, the same wherever a prompt is met."""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Iterable

from pipeline.config.settings import SplitSettings
from pipeline.records import Message


def split_of(messages: Iterable[Message], shares: SplitSettings) -> str:
    """sft, preference or test, by a hash of the first user turn: prompts that begin alike stay together."""
    first = next((message["content"] for message in messages if message["role"] == "user"), "")
    normalised = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", first).casefold())
    at = row_hash("split", " ".join(normalised.split())) / 2**64
    if at < shares.sft:
        return "sft"
    return "preference" if at < shares.sft + shares.preference or shares.test == 0 else "test"


def row_hash(use: str, text: str) -> int:
    """Uniform in [0, 2**64), independent for every use."""
    return int.from_bytes(hashlib.sha256(f"{use}\0{text}".encode()).digest()[:8], "big")
