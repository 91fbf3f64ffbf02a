"""What `cai doctor` looks at: the machine, the settings, and whether the model answers every kind of request."""

from __future__ import annotations

import asyncio
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Literal

from constitution.principles import Constitution, ConstitutionError
from constitution.prompts import CHECK_LABELS, COMPARISON_LABELS, GRADE_LABELS
from constitution.verdicts import read_labels
from pipeline.checks import GIB, TEMPLATE_CURE, Check, disk, lengths, memory, num_tokens, samples
from pipeline.config.settings import EngineSettings, Settings
from pipeline.engines import open_engine
from pipeline.engines.backends import only_read, resolve_backend
from pipeline.engines.base import Request
from pipeline.engines.votes import NUM_VOTES
from pipeline.errors import CaiError, RequestFailed, UsageError
from pipeline.jobs import constitution_file
from pipeline.records import Prompt
from pipeline.sources import Spec, read
from pipeline.stages.asking import Voice
from pipeline.store import RunFolder
from pipeline.trial import with_some_model
from pipeline.voices import Engines, check_sections

PACKAGE, EXTRAS = "constitutional-pipeline", ("vllm", "qlora")
MAX_WAIT_S = 60.0
"""A server that takes longer than this for one word is reported, not waited for."""

_LABELS = {"comparison": COMPARISON_LABELS, "check": CHECK_LABELS, "grade": GRADE_LABELS}
_USER, _SYSTEM = {"role": "user", "content": "Hello."}, {"role": "system", "content": "Be kind."}
_ODD_TURNS: dict[str, Prompt] = {"system turn": [_SYSTEM, _USER], "two user turns": [_USER, _USER]}


def examine(run: Path | None, read_settings: Callable[[], Settings]) -> Iterator[Check]:
    """Checks one after the other, each as soon as it is known; those that need a failed one are left out.

    run: an existing run to look at too. read_settings: may raise UsageError.
    """
    yield Check("python", "ok", platform.python_version())
    yield from _packages()
    yield _devices()
    yield memory()
    yield disk(run or Path())
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
    judge = settings.engine_for(settings.judge)
    for name, engine in _engines(settings).items():
        yield from _examine_engine(name, engine, constitution, judges=engine == judge)


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


def _packages() -> Iterator[Check]:
    """Every package that is needed, and those for extras that are there, against the versions asked for."""
    from packaging.requirements import Requirement

    found = [f"{PACKAGE} {metadata.version(PACKAGE)}"]
    for requirement in map(Requirement, metadata.requires(PACKAGE) or ()):
        if requirement.marker and not any(requirement.marker.evaluate({"extra": extra}) for extra in EXTRAS):
            continue
        installed = _installed(requirement.name)
        if installed is None:
            if requirement.marker is None:
                yield Check(requirement.name, "FAIL", "not installed", f"python -m pip install '{requirement}'")
            continue
        name, version = installed.name, installed.version
        if version in requirement.specifier:
            found.append(f"{name} {version}")
            continue
        wanted = f"{requirement.name}{requirement.specifier}"
        state: Literal["warn", "FAIL"] = "FAIL" if requirement.marker is None else "warn"
        yield Check(requirement.name, state, f"{version}, wanted is {wanted}", f"python -m pip install '{wanted}'")
    yield Check("packages", "ok", ", ".join(found))


def _installed(package: str) -> metadata.Distribution | None:
    """Also where its module comes from a package of another name, as vLLM's for CPUs does."""
    with suppress(metadata.PackageNotFoundError):
        return metadata.distribution(package)
    others = metadata.packages_distributions().get(package)
    return metadata.distribution(others[0]) if others else None


def _devices() -> Check:
    import torch

    found = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        found.append(f"{torch.cuda.get_device_name(index)}, {free / GIB:.1f} of {total / GIB:.1f} GiB free")
    if torch.backends.mps.is_available():
        found.append("Apple GPU")
    found.append(f"{os.cpu_count()} CPU cores")
    if Path("/dev/nvidia0").exists() and not torch.cuda.is_available():
        cure = f"torch {torch.__version__} cannot use the NVIDIA GPU; install the build of torch that fits its driver"
        return Check("devices", "warn", "; ".join(found), cure)
    return Check("devices", "ok", "; ".join(found))


def _engines(settings: Settings) -> dict[str, EngineSettings]:
    """The different engines of a run, by the section that names them first."""
    found: dict[str, EngineSettings] = {}
    for name, section in settings.engines.items():
        if section not in found.values():
            found[name] = section
    return found


def _examine_engine(
    name: str, settings: EngineSettings, constitution: Constitution, *, judges: bool
) -> Iterator[Check]:
    try:
        check_sections({name: settings})
    except CaiError as error:
        yield Check(f"{name}: model", "FAIL", str(error))
        return
    settings = settings.model_copy(update={"timeout_s": min(settings.timeout_s, MAX_WAIT_S)})
    if resolve_backend(settings) == "server":
        # Each by itself, for a pool works as long as one of them does.
        one_each = [only_read(settings).model_copy(update={"base_urls": (url,)}) for url in settings.base_urls]
        endpoints = [asyncio.run(_endpoint(name, one)) for one in one_each]
        yield from endpoints
        if endpoints and all(check.state == "FAIL" for check in endpoints):
            return
    engines = Engines(constitution)
    try:
        voice = engines.voice(settings)
    except CaiError as error:
        yield Check(f"{name}: model", "FAIL", str(error))
        return
    yield from asyncio.run(_ask_all(name, voice, engines, constitution, judges=judges))


async def _endpoint(name: str, settings: EngineSettings) -> Check:
    """Whether one server answers and serves the model."""
    place = f"{name}: endpoint"
    try:
        engine = open_engine(settings)
    except CaiError as error:
        return Check(place, "FAIL", str(error))
    try:
        await engine.start()
    except CaiError as error:
        return Check(place, "FAIL", str(error))
    finally:
        await engine.close()
    return Check(place, "ok", f"{settings.base_urls[0]} serves {engine.name}")


async def _ask_all(
    name: str, voice: Voice, engines: Engines, constitution: Constitution, *, judges: bool
) -> list[Check]:
    """The checks of an open engine; the first that fails is the last. judges: whether it will be asked for labels."""
    prompts = samples(voice, constitution)
    done: list[Check] = []
    step = "model"
    try:
        await engines.start()
        context = f"context {voice.engine.context} tokens" if voice.engine.context else "context unknown"
        done.append(Check(f"{name}: model", "ok", f"{voice.engine.name}, {context}, replies up to {voice.max_tokens}"))
        step = "requests"
        sizes = {kind: await _num_tokens(voice, kind, prompt) for kind, prompt in prompts.items()}
        done.append(lengths(name, voice, sizes))
        if voice.style == "chat":
            done.append(await _odd_turns(name, voice))
        step = "one token"
        reply = await voice.engine.ask(Request(prompts["draft"], "draft", max_tokens=1))
        done.append(Check(f"{name}: one token", "ok", repr(reply.text or reply.reasoning)))
        step = "labels"
        done += [await _labels(name, voice, kind, prompts[kind]) for kind in _LABELS if judges]
    except CaiError as error:
        cure = _CURES.get(step, "") if isinstance(error, RequestFailed) else ""
        done.append(Check(f"{name}: {step}", "FAIL", str(error), cure))
    finally:
        await engines.close()
    return done


_CURES = {
    "requests": TEMPLATE_CURE,
    "one token": "it answers nothing; look into the server's log, or take another model",
    "labels": "a judge has to answer with labels; take another one as `judge`, see docs/api-judge.md",
}
"""What to do where one request fails; other errors say it themselves."""


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
    size = num_tokens(voice, prompt)
    if size is not None:
        return size
    return (await voice.engine.ask(Request(prompt, kind, max_tokens=1))).usage.prompt_tokens


async def _labels(name: str, voice: Voice, kind: str, prompt: Prompt) -> Check:
    labels = _LABELS[kind]
    reply = await voice.engine.ask(Request(prompt, kind, labels=labels))
    reading = read_labels(reply.logprobs, labels)
    detail = f"{labels[0]}…{labels[-1]} hold {reading.label_mass:.2f} of the probability ({reply.method})"
    if kind == "comparison" and reading.status == "ok":
        detail += f", B, which is the better answer, {reading.probabilities['B']:.2f} of that"
    if reading.status == "ok" and reply.method == "votes":
        cure = f"it gives no log-probabilities, so {NUM_VOTES} replies vote; another judge is cheaper and finer"
        return Check(f"{name}: {kind}", "warn", detail, cure)
    if reading.status == "ok":
        return Check(f"{name}: {kind}", "ok", detail)
    cure = (
        f"its verdicts would abstain; try {'chat' if voice.style == 'few-shot' else 'few-shot'} style or another judge"
    )
    return Check(f"{name}: {kind}", "warn", detail, cure)
