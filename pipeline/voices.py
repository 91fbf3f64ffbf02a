"""The engines of one call, how each is spoken to, and what they have cost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from constitution.principles import Constitution
from pipeline import nano
from pipeline.checks import TEMPLATE_CURE, preflight
from pipeline.config.settings import EngineSettings, RunSettings, Settings
from pipeline.engines import open_engine
from pipeline.engines.backends import check_engine, check_gpu, only_read
from pipeline.engines.base import Engine
from pipeline.errors import EngineRefused, RequestFailed
from pipeline.jobs import MAX_TOKENS, NANO_MAX_TOKENS
from pipeline.records import digest
from pipeline.stages.asking import Voice


class Spent(NamedTuple):
    """What a call has cost so far. cost: in the currency of the prices."""

    tokens: int
    cost: float

    def plus(self, other: Spent) -> Spent:
        return Spent(self.tokens + other.tokens, self.cost + other.cost)


NOTHING = Spent(0, 0.0)


def used_up(spent: Spent, settings: RunSettings) -> str:
    """The budget that is used up, '' if none is."""
    for name, budget, used in (
        ("run.budget_tokens", settings.budget_tokens, spent.tokens),
        ("run.budget_cost", settings.budget_cost, spent.cost),
    ):
        if budget is not None and used >= budget:
            return name
    return ""


class Engines:
    """The engines of one call; equal settings share one."""

    def __init__(self, constitution: Constitution) -> None:
        self._constitution = constitution
        self._open: dict[str, Engine] = {}
        self._voices: dict[tuple[str, str], Voice] = {}
        self._prices: dict[Engine, tuple[float, float]] = {}

    def voice(self, settings: EngineSettings, max_tokens: int | None = None) -> Voice:
        """The engine of a section, and how to speak to it."""
        is_nano, settings = _is_nano(settings), only_read(_with_folder(settings))
        key = digest(settings.model_dump(mode="json", exclude={"style"}))
        if key not in self._open:
            try:
                self._open[key] = open_engine(settings, name="nano" if is_nano else None)
            except RequestFailed as error:
                raise EngineRefused(f"{settings.model}: {error}; {TEMPLATE_CURE}") from error
            if settings.price_in is not None or settings.price_out is not None:
                self._prices[self._open[key]] = (settings.price_in or 0.0, settings.price_out or 0.0)
        default = NANO_MAX_TOKENS if is_nano else MAX_TOKENS
        voice = Voice(self._open[key], self._constitution.wording, settings.style, max_tokens or default)
        known = self._voices.setdefault((key, settings.style), voice)
        if known.max_tokens < voice.max_tokens:
            self._voices[key, settings.style] = voice
        return voice

    def preflight(self, folder: Path, kinds: Collection[str]) -> list[str]:
        """What is doubtful before the first request; see checks.py. folder: of the run. kinds: what will be asked."""
        checks = preflight(folder, self._voices.values(), self._constitution, kinds)
        return [str(check) for check in checks if check.state != "ok"]

    @property
    def neutralised(self) -> int:
        """Texts of special tokens in prompts that were sent as plain text."""
        return sum(engine.neutralised for engine in self._open.values())

    def cost(self, usage: Mapping[Engine, Counter[str]]) -> float | None:
        """Of so many tokens, in the currency of the prices; None without any. A model without a price costs nothing."""
        if not self._prices:
            return None
        return sum(
            (found["prompt_tokens"] * price_in + found["completion_tokens"] * price_out) / 1e6
            for engine, found in usage.items()
            for price_in, price_out in [self._prices.get(engine, (0.0, 0.0))]
        )

    def spent(self, usage: Mapping[Engine, Counter[str]]) -> Spent:
        tokens = sum(found["prompt_tokens"] + found["completion_tokens"] for found in usage.values())
        return Spent(tokens, self.cost(usage) or 0.0)

    @property
    def concurrency(self) -> int:
        """Places for requests, of all engines together."""
        return sum(engine.concurrency for engine in self._open.values())

    async def start(self) -> None:
        for engine in self._open.values():
            await engine.start()

    async def close(self) -> None:
        for engine in self._open.values():
            await engine.close()


def check_models(settings: Settings, names: Sequence[str]) -> None:
    """EngineRefused for what cannot work of the models that these stages of phase 1 ask; nothing is opened."""
    found: dict[str, EngineSettings] = {}
    revises = "critique-revise" in names
    if "generate" in names or (revises and "critic" not in settings.critics):
        found |= settings.generators
    if revises:
        found |= settings.critics
    if revises or "rank" in names:
        found["judge"] = settings.engine_for(settings.judge)
    check_sections(found)


def check_sections(engines: Mapping[str, EngineSettings]) -> None:
    """EngineRefused for what cannot work of these, by their sections, alone and together."""
    named = {section: _with_folder(settings) for section, settings in engines.items()}
    for section, settings in named.items():
        check_engine(settings, section)
    check_gpu(named)


def _is_nano(settings: EngineSettings) -> bool:
    return settings.model == "nano" and settings.backend in ("auto", "transformers", "vllm")


def _with_folder(settings: EngineSettings) -> EngineSettings:
    """`nano` stands for the embedded model's folder."""
    return settings.model_copy(update={"model": str(nano.path())}) if _is_nano(settings) else settings
