"""What can be looked at in no time: room on the disk, free memory, and whether a model's template takes our requests.

`cai doctor` reports all of it and more; a run looks at its start, so that nothing is paid for before it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple

from constitution.principles import Constitution
from constitution.samples import sample_prompts
from pipeline.errors import EngineRefused, RequestFailed, ResourceError
from pipeline.records import Prompt
from pipeline.stages.asking import Voice

GIB = 1 << 30
FEW_BYTES, TOO_FEW_BYTES = GIB, GIB // 20
TEMPLATE_CURE = "its chat template does not take what a run asks; set engine.style: few-shot, or take another model"


class Check(NamedTuple):
    """What was looked at, how it is, and what to do if it is not well."""

    name: str
    state: Literal["ok", "warn", "FAIL"]
    detail: str
    cure: str = ""

    def __str__(self) -> str:
        return f"{self.name}: {self.detail}" + (f"; {self.cure}" if self.cure else "")


def memory() -> Check:
    """Main memory, or what a container allows of it; what the system would give back counts as free."""
    free, total = _memory()
    detail = f"{free / GIB:.1f} of {total / GIB:.1f} GiB free"
    if free < FEW_BYTES:
        return Check("memory", "warn", detail, "close other programs, or lower engine.concurrency")
    return Check("memory", "ok", detail)


def _memory() -> tuple[int, int]:
    """(free, total) bytes."""
    page = os.sysconf("SC_PAGE_SIZE")
    free = total = page * os.sysconf("SC_PHYS_PAGES")
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return free, total
    free = next((int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")), free)
    group = Path("/sys/fs/cgroup")
    try:
        limit = int((group / "memory.max").read_text())
        used = int((group / "memory.current").read_text())
    except (OSError, ValueError):  # no limit is the word "max"
        return free, total
    return min(free, limit - used), min(total, limit)


def disk(folder: Path) -> Check:
    """Room and the right to write where a run would stand: at `folder`, or the nearest folder above it that exists."""
    there = next(path for path in (folder.resolve(), *folder.resolve().parents) if path.is_dir())
    if not os.access(there, os.W_OK):
        return Check("disk", "FAIL", f"{there} cannot be written", "mend its permissions, or work in another folder")
    free = shutil.disk_usage(there).free
    detail = f"{there}: {free / GIB:.1f} GiB free"
    if free >= FEW_BYTES:
        return Check("disk", "ok", detail)
    return Check(
        "disk", "FAIL" if free < TOO_FEW_BYTES else "warn", detail, "free some room; `cai run --dry-run` counts"
    )


def samples(voice: Voice, constitution: Constitution) -> dict[str, Prompt]:
    """Every kind of request, as this model would get it."""
    principle = next(iter(constitution))
    group = constitution.in_group(principle.about)
    return sample_prompts(principle, group, wording=voice.wording, style=voice.style)


def lengths(name: str, voice: Voice, sizes: dict[str, int]) -> Check:
    """Whether requests of these tokens, by kind, leave room for a reply."""
    detail = "tokens: " + ", ".join(f"{kind} {size}" for kind, size in sizes.items())
    context, longest = voice.engine.context, max(sizes.values())
    if context and longest >= context:
        cure = f"none of a context of {context} is left for a reply; raise engine.context, or take another model"
        return Check(f"{name}: requests", "FAIL", detail, cure)
    if context and longest + voice.max_tokens > context:
        left = context - longest
        cure = f"{left} of {voice.max_tokens} tokens are left for a reply to the longest; lower max_tokens"
        return Check(f"{name}: requests", "warn", detail, cure)
    return Check(f"{name}: requests", "ok", detail)


def num_tokens(voice: Voice, prompt: Prompt) -> int | None:
    """By the model's own tokenizer and template; None if they are not in this process."""
    chat = getattr(voice.engine, "chat", None)
    return None if chat is None else len(chat.prompt(prompt).token_ids)


def preflight(
    folder: Path, voices: Iterable[Voice], constitution: Constitution, kinds: Collection[str]
) -> Iterator[Check]:
    """What a run looks at before its first request of these kinds; nothing is asked.

    ResourceError where it cannot write; EngineRefused for a model whose template or context does not take them.
    """
    room = disk(folder)
    if room.state == "FAIL":
        raise ResourceError(str(room))
    yield room
    yield memory()
    for voice in voices:
        name = voice.engine.name
        prompts = {kind: prompt for kind, prompt in samples(voice, constitution).items() if kind in kinds}
        try:
            counted = {kind: num_tokens(voice, prompt) for kind, prompt in prompts.items()}
        except RequestFailed as error:
            raise EngineRefused(f"{name}: {error}; {TEMPLATE_CURE}") from error
        sizes = {kind: size for kind, size in counted.items() if size is not None}
        if sizes:
            length = lengths(name, voice, sizes)
            if length.state == "FAIL":
                raise EngineRefused(str(length))
            yield length
