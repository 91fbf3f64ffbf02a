"""The judge as the reward of PPO: it grades every completion, or compares it with the starting model's answer.

Direct feedback without a reward model (d-RLAIF, Lee et al. 2023, arXiv 2309.00267, section 2.2.3). Scores are in
[-1, 1]. It is asked as the stages ask: a window of completions at a time, the oldest first, through a journal. That
lies with the training's work in progress, so that one which goes on from a checkpoint takes its steps again as they
were and pays for none of them twice. Of several processes that train together the first one asks.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from constitution.principles import Constitution, Principle
from constitution.prompts import GRADE_LABELS, answer_prompt, grade_prompt
from constitution.verdicts import grade, rescale
from pipeline.config.settings import Settings
from pipeline.driver import Ask
from pipeline.engines.base import Engine, Reply, Request
from pipeline.errors import EngineDown, IncompleteError, RequestFailed, StoppedError
from pipeline.journal import Journal, Segment
from pipeline.records import Failure, Message
from pipeline.stages.asking import ask_labels, ask_text, compare, lost, together
from pipeline.train import ranks
from pipeline.train.rewards import Source
from pipeline.train.rollouts import Rollouts
from pipeline.voices import NOTHING, Engines, Spent, check_models, used_up

Verdict = float | Failure
"""A score, or why there is none."""
EMPTY = -1.0
"""The score of a completion without a text, of which nobody is asked."""
SAME = 0.0
"""The score of a completion that is the starting model's answer."""


class LiveJudge:
    """start: folder of the starting model, whose greedy answers completions are compared with. kind: judge | graded.

    folder: of the journal. earlier: what the call has spent before, of its budgets. `journal` and `engines` tell what
    was asked. A process that is not the first has neither models nor replies.
    """

    def __init__(
        self, settings: Settings, constitution: Constitution, start: str, kind: str, *, folder: Path, earlier: Spent
    ) -> None:
        self.settings, self.constitution, self.kind, self.earlier = settings, constitution, kind, earlier
        self.start_model = start
        self.engines = Engines(constitution)
        self.journal = Journal(folder, on_reply=self._keep_to_budgets)
        self._segment: Segment | None = None
        self._budget = ""
        self._no_verdict = 0.0
        self._answers: dict[str, str] = {}
        self._priorities: dict[str, int] = {}
        self._runner = asyncio.Runner()

    def start(self) -> Source:
        fingerprint = ranks.first(self._open)
        return Source(self.score, fingerprint, measure=self.measure)

    def _open(self) -> dict[str, str]:
        """Opens the models. Returns what the scores depend on."""
        settings = self.settings
        self.voice = self.engines.voice(settings.engine_for(settings.judge), settings.rank.max_tokens)
        if self.kind == "judge":
            here = {"backend": "transformers", "model": self.start_model, "base_urls": (), "style": "chat"}
            nothing = dict.fromkeys(("revision", "adapter", "quantization", "script", "price_in", "price_out"))
            engine = settings.engine.model_copy(update={**here, **nothing})
            self.starter = self.engines.voice(engine, settings.train_ppo.max_tokens)
        self._window = asyncio.Semaphore(max(2, self.engines.concurrency))
        self._runner.run(self.engines.start())
        rank, constitution = settings.rank.model_dump_json(), self.constitution.digest
        identity = {"kind": self.kind, "constitution": constitution, "rank": rank, "style": self.voice.style}
        return {**identity, **self.voice.engine.fingerprint}

    def close(self) -> None:
        self._runner.run(self._close())
        self._runner.close()

    async def _close(self) -> None:
        self.journal.stopping = True
        try:
            await self.journal.close()
        finally:
            await self.engines.close()

    def score(self, rollouts: Rollouts) -> Tensor:
        """(B,) the mean over the principles drawn for each prompt, of those that gave a verdict.

        A completion without any gets the mean of the others, so that it is neither rewarded nor punished.
        IncompleteError (3) if they are more than one and more than `run.max_failed_share`, or all; StoppedError (75)
        at a budget or when the judge is gone.
        """
        found = ranks.first(lambda: self._ask_for(rollouts))
        scores = _scores(found)
        self._no_verdict = (len(found) - len(scores)) / len(found)
        unknown = sum(scores) / len(scores)
        filled = [verdict if isinstance(verdict, float) else unknown for verdict in found]
        return torch.tensor(filled, device=rollouts.logps.device)

    def measure(self) -> dict[str, float]:
        """no_verdict: the share of the last completions that got none."""
        return {"no_verdict": self._no_verdict}

    def _ask_for(self, rollouts: Rollouts) -> list[Verdict]:
        try:
            found = self._runner.run(self._score_all(rollouts))
        except StoppedError as error:
            if self._budget and not isinstance(error, EngineDown):
                raise StoppedError(f"stopped at {self._budget}; the same command goes on from here") from error
            raise
        self._check(found)
        return found

    def _check(self, found: Sequence[Verdict]) -> None:
        failures = [verdict for verdict in found if isinstance(verdict, Failure)]
        allowed = self.settings.run.max_failed_share
        if len(failures) < len(found) and len(failures) <= max(1, allowed * len(found)):
            return
        reasons = ", ".join(f"{reason} {n}" for reason, n in Counter(failure.reason for failure in failures).items())
        raise IncompleteError(
            f"{self.journal.folder.parent}: {len(failures)} of {len(found)} answers have no verdict ({reasons}), and "
            f"run.max_failed_share is {allowed:.0%}; the last: {failures[-1].detail}; mend the judge or allow more, "
            "and the same command goes on from here"
        )

    async def _score_all(self, rollouts: Rollouts) -> list[Verdict]:
        if self._segment is None:  # not before: the training may have thrown its folder away
            await self.journal.start()
            self._segment = self.journal.open(0)
        segment, data = self._segment, rollouts.data
        owners = [row for row in range(len(data)) for _ in data.completions(row)]
        try:
            calls = (
                self._score(self._asker(segment, data.ids[row]), data.ids[row], rollouts.conversations[row], text)
                for row, text in zip(owners, rollouts.texts, strict=True)
            )
            return await together(map(_verdict, calls))
        finally:
            await self.journal.release(segment)

    def _asker(self, segment: Segment, id: str) -> Ask:
        """About a prompt, which has one priority in all steps."""
        priority = self._priorities.setdefault(id, len(self._priorities))

        def ask(engine: Engine, request: Request) -> Awaitable[Reply]:
            return self.journal.ask(engine, request, segment, priority)

        return ask

    def _keep_to_budgets(self, request: Request, reply: Reply, is_new: bool) -> None:
        spent = self.earlier.plus(self.engines.spent(self.journal.usage))
        if is_new and (budget := used_up(spent, self.settings.run)):
            self._budget, self.journal.stopping = budget, True

    async def _score(self, ask: Ask, id: str, conversation: list[Message], text: str) -> Verdict:
        """The mean; a failure if no principle gave a verdict. RequestFailed if there is no answer to compare with."""
        if not text.strip():
            return EMPTY
        async with self._window:
            if self.kind == "judge" and id not in self._answers:
                prompt = answer_prompt(conversation, wording=self.starter.wording, style=self.starter.style)
                self._answers[id] = (await ask_text(ask, self.starter, prompt, "draft")).text
            one = self._grade if self.kind == "graded" else self._compare
            calls = (one(ask, id, conversation, text, principle) for principle in self._principles(id))
            found = await together(map(_verdict, calls))
        scores = _scores(found)
        return sum(scores) / len(scores) if scores else found[-1]

    async def _grade(self, ask: Ask, id: str, conversation: list[Message], text: str, principle: Principle) -> float:
        prompt = grade_prompt(conversation, text, principle, wording=self.voice.wording, style=self.voice.style)
        reading, _ = await ask_labels(ask, self.voice, prompt, "grade", GRADE_LABELS)
        value = grade(reading)
        if value is None:
            raise _abstained(reading.label_mass)
        return rescale(value)

    async def _compare(self, ask: Ask, id: str, conversation: list[Message], text: str, principle: Principle) -> float:
        """2p - 1, p the probability that the completion is better than the starting model's answer."""
        texts = (text, self._answers[id])
        if texts[0].strip() == texts[1].strip():
            return SAME
        judged = await compare(ask, self.voice, conversation, texts, principle, self.settings.rank)
        if judged.comparison.p is None:
            raise _abstained(judged.label_mass)
        return 2 * judged.comparison.p - 1

    def _principles(self, id: str) -> Sequence[Principle]:
        number = self.settings.rank.principles
        if number == "all":
            return tuple(self.constitution)
        return self.constitution.draw_many(self.settings.run.seed, id, number)


def _abstained(label_mass: float) -> RequestFailed:
    return RequestFailed("abstain", f"the labels hold {label_mass:.3f} of the probability")


async def _verdict(score: Awaitable[Verdict]) -> Verdict:
    try:
        return await score
    except RequestFailed as error:
        return lost(error, -1, -1)


def _scores(found: Sequence[Verdict]) -> list[float]:
    return [verdict for verdict in found if isinstance(verdict, float)]


@contextmanager
def live_judge(
    settings: Settings, constitution: Constitution, start: str, kind: str, *, folder: Path, earlier: Spent = NOTHING
) -> Iterator[tuple[LiveJudge, Source]]:
    """The judge of the settings, running until the end of the block, and the scores from it; see LiveJudge."""
    check_models(settings, ("rank",))
    judge = LiveJudge(settings, constitution, start, kind, folder=folder, earlier=earlier)
    try:
        yield judge, judge.start()
    finally:
        judge.close()
