"""The judge as the reward of PPO: it grades every completion, or compares it with the starting model's answer.

Direct feedback without a reward model (d-RLAIF, Lee et al. 2023, arXiv 2309.00267, section 2.2.3). Scores are in
[-1, 1]. Its replies are not kept: a policy in training hardly ever says the same thing again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from constitution.principles import Constitution, Principle
from constitution.prompts import GRADE_LABELS, answer_prompt, grade_prompt
from constitution.verdicts import grade, rescale
from pipeline.config.settings import Settings
from pipeline.engines.base import Engine, Reply, Request
from pipeline.errors import RequestFailed
from pipeline.records import Message
from pipeline.stages.asking import ask_labels, ask_text, compare, together
from pipeline.voices import Engines

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.train.rewards import Source
    from pipeline.train.rollouts import Rollouts

NO_VERDICT = 0.0
"""The score of what the judge says nothing of: neither better nor worse."""


class LiveJudge:
    """start: folder of the starting model, whose greedy answers completions are compared with. kind: judge | graded."""

    def __init__(self, settings: Settings, constitution: Constitution, start: str, kind: str) -> None:
        self.settings, self.constitution, self.kind = settings, constitution, kind
        self.engines = Engines(constitution)
        self.voice = self.engines.voice(settings.engine_for(settings.judge), settings.rank.max_tokens)
        if kind == "judge":
            here = {"backend": "transformers", "model": start, "base_urls": (), "style": "chat"}
            nothing = dict.fromkeys(("revision", "adapter", "quantization", "script"))
            engine = settings.engine.model_copy(update={**here, **nothing})
            self.starter = self.engines.voice(engine, settings.train_ppo.max_tokens)
        self._places = asyncio.Semaphore(max(1, self.engines.concurrency))
        self._answers: dict[str, str] = {}
        self._runner = asyncio.Runner()

    @property
    def source(self) -> Source:
        from pipeline.train.rewards import Source

        rank = self.settings.rank.model_dump_json()
        identity = {"kind": self.kind, "constitution": self.constitution.digest, "rank": rank}
        return Source(self.score, {**identity, **self.voice.engine.fingerprint})

    def start(self) -> None:
        self._runner.run(self.engines.start())

    def close(self) -> None:
        self._runner.run(self.engines.close())
        self._runner.close()

    def score(self, rollouts: Rollouts) -> Tensor:
        """(B,) the mean over the principles drawn for each prompt."""
        import torch

        data = rollouts.data
        owners = [row for row in range(len(data)) for _ in data.completions(row)]
        asked = [
            self._score(data.ids[row], rollouts.conversations[row], text)
            for row, text in zip(owners, rollouts.texts, strict=True)
        ]
        return torch.tensor(self._runner.run(together(asked)), device=rollouts.logps.device)

    async def _score(self, id: str, conversation: list[Message], text: str) -> float:
        if not text.strip():
            return -1.0
        if self.kind == "judge" and id not in self._answers:
            prompt = answer_prompt(conversation, wording=self.starter.wording, style=self.starter.style)
            self._answers[id] = (await ask_text(self._ask, self.starter, prompt, "draft")).text
        one = self._grade if self.kind == "graded" else self._compare
        scores = await together(one(id, conversation, text, principle) for principle in self._principles(id))
        return sum(scores) / len(scores)

    async def _grade(self, id: str, conversation: list[Message], text: str, principle: Principle) -> float:
        voice = self.voice
        prompt = grade_prompt(conversation, text, principle, wording=voice.wording, style=voice.style)
        try:
            reading, _ = await ask_labels(self._ask, voice, prompt, "grade", GRADE_LABELS)
        except RequestFailed:
            return NO_VERDICT
        value = grade(reading) if reading.status == "ok" else None
        return NO_VERDICT if value is None else rescale(value)

    async def _compare(self, id: str, conversation: list[Message], text: str, principle: Principle) -> float:
        """2p - 1, p the probability that the completion is better than the starting model's answer."""
        texts = (text, self._answers[id])
        if texts[0].strip() == texts[1].strip():
            return NO_VERDICT
        try:
            judged = await compare(self._ask, self.voice, conversation, texts, principle, self.settings.rank)
        except RequestFailed:
            return NO_VERDICT
        p = judged.comparison.p
        return NO_VERDICT if p is None else 2 * p - 1

    def _principles(self, id: str) -> Sequence[Principle]:
        number = self.settings.rank.principles
        if number == "all":
            return tuple(self.constitution)
        return self.constitution.draw_many(self.settings.run.seed, id, number)

    def _ask(self, engine: Engine, request: Request) -> Awaitable[Reply]:
        async def in_turn() -> Reply:
            async with self._places:
                return await engine.ask(request)

        return in_turn()


@contextmanager
def live_judge(settings: Settings, constitution: Constitution, start: str, kind: str) -> Iterator[Source]:
    """The judge of the settings, running until the end of the block."""
    judge = LiveJudge(settings, constitution, start, kind)
    try:
        judge.start()
        yield judge.source
    finally:
        judge.close()
