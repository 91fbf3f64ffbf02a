"""Critique and revision (CAI, Bai et al. 2022, section 3.1): n rounds over every draft, each round judged.

A round draws a principle, asks the model to criticise its answer under it and to rewrite the answer after the critique.
The paper takes every revision as better. Here the judge compares it with what it revised, under the same principle, in
both orders; the next round starts from the last revision that was not judged worse.

In the paper a model criticises itself. Other models may do it here: then they take turns, and the author revises.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from constitution.principles import Constitution, Principle
from constitution.prompts import CHECK_LABELS, NO_FAULT, check_prompt, critique_prompt, revision_prompt
from constitution.verdicts import judge_revision
from pipeline.config.settings import CritiqueReviseSettings, RankSettings
from pipeline.driver import Ask
from pipeline.errors import RequestFailed, UsageError
from pipeline.records import Failure, Line, Outcome, Record
from pipeline.stages.asking import Sampling, Voice, ask_labels, ask_text, compare, lost, together

NO_FAULT_P = 0.5
"""A draft has no fault under a group of principles if the judge finds that more probable than a fault."""


@dataclass(frozen=True)
class CritiqueRevise:
    """What a chain needs.

    authors: who drafted, in the order of their samples. critics: who criticises in turn; none: a draft's author itself.
    reviser: who revises every draft; None: its author. judge: verifies and stops early.
    samples: of each author.
    """

    constitution: Constitution
    authors: Sequence[Voice]
    critics: Sequence[Voice]
    reviser: Voice | None
    judge: Voice
    settings: CritiqueReviseSettings
    seed: int
    samples: int


class Roles(NamedTuple):
    """Who works on one draft. critics: in the order of their turns."""

    critics: Sequence[Voice]
    reviser: Voice


def cast(record: Record, completion: Line, using: CritiqueRevise) -> Roles:
    """Who criticises and who revises a draft.

    Several critics take turns in an order drawn by hash for each draft, so that one more of them moves no other two
    against each other; the author is left out where there is somebody else.
    """
    if using.reviser and using.critics:
        return Roles(using.critics, using.reviser)
    author = _author(completion, using)
    own = author.engine.fingerprint
    others = [voice for voice in using.critics if voice.engine.fingerprint != own] or using.critics or [author]

    def turn(voice: Voice) -> bytes:
        place = ("critic", using.seed, record.id, completion["sample"], voice.engine.name)
        return hashlib.sha256("\0".join(map(str, place)).encode()).digest()

    return Roles(sorted(others, key=turn), using.reviser or author)


def _author(completion: Line, using: CritiqueRevise) -> Voice:
    """The model that made the draft: by the sample's number, or by its name if the number of samples has changed.

    Where one model drafts, it takes over what another left. UsageError if none of several has the draft's name.
    """
    authors, name = using.authors, completion["model"]
    place = completion["sample"] // using.samples
    expected = [authors[place]] if place < len(authors) else []
    for voice in (*expected, *authors):
        if voice.engine.name == name or len(authors) == 1:
            return voice
    raise UsageError(
        f"generate: a draft is by {name!r}, but generate.models has only "
        f"{', '.join(voice.engine.name for voice in authors)}; name it there, or one model as `critic`"
    )


async def critique_revise(record: Record, ask: Ask, *, using: CritiqueRevise) -> Outcome:
    """Every draft through its rounds, all drafts at once. A chain that fails keeps the rounds it has."""
    completions = record.lines["generate"]["completions"]
    ends = await together(_chain(record, ask, completion, using) for completion in completions)
    chains = [{"sample": c["sample"], "rounds": rounds} for c, (rounds, _) in zip(completions, ends, strict=True)]
    failures = tuple(failure for _, failures in ends for failure in failures)
    return Outcome({"id": record.id, "chains": chains}, failures)


async def _chain(record: Record, ask: Ask, completion: Line, using: CritiqueRevise) -> tuple[list[Line], list[Failure]]:
    sample, text, finish_reason = completion["sample"], completion["text"], completion["finish_reason"]
    model, roles = completion["model"], cast(record, completion, using)
    rounds: list[Line] = []
    failures: list[Failure] = []
    for n in range(using.settings.rounds):
        try:
            if using.settings.early_stop and await _is_fine(record, ask, text, using):
                rounds.append(_stopped(text, model, finish_reason))
                break
            line = await _round(record, ask, sample, n, text, roles, using)
            if using.settings.verify:
                line |= await _verify(record, ask, sample, n, text, line, using, failures)
        except RequestFailed as error:
            failures.append(lost(error, sample, n))
            break
        rounds.append(line)
        if line["verdict"] != "worse":
            text, model, finish_reason = line["revision"], line["model"], line["finish_reason"]
    return rounds, failures


def _stopped(text: str, model: str, finish_reason: str) -> Line:
    """The round that did not take place, since the judge found no fault. model, finish_reason: of `text`."""
    return {
        "principle": "",
        "critic": "",
        "critique": "",
        "model": model,
        "revision": text,
        "finish_reason": finish_reason,
        "verdict": "same",
        "p": 0.5,
        "stopped": True,
    }


async def _round(record: Record, ask: Ask, sample: int, n: int, text: str, roles: Roles, using: CritiqueRevise) -> Line:
    principle = using.constitution.draw(using.seed, record.id, sample, n, using.settings.draw)
    critic, reviser = roles.critics[n % len(roles.critics)], roles.reviser
    critique = ""
    if not using.settings.direct:
        prompt = critique_prompt(record.messages, text, principle, wording=critic.wording, style=critic.style)
        sampling = _sampling(record, sample, n, "critique", using)
        critique = (await ask_text(ask, critic, prompt, "critique", sampling)).text
    how: dict[str, Any] = {"wording": reviser.wording, "style": reviser.style}
    prompt = revision_prompt(record.messages, text, critique or None, principle, **how)
    revision = await ask_text(ask, reviser, prompt, "revision", _sampling(record, sample, n, "revision", using))
    return {
        "principle": principle.id,
        "critic": critic.engine.name if critique else "",
        "critique": critique,
        "model": reviser.engine.name,
        "revision": revision.text,
        "finish_reason": revision.finish_reason,
        "verdict": "unverified",
        "stopped": False,
    }


def _sampling(record: Record, sample: int, n: int, kind: str, using: CritiqueRevise) -> Sampling:
    return Sampling(using.settings.temperature, 1.0, (using.seed, record.id, kind, n), sample)


async def _verify(
    record: Record,
    ask: Ask,
    sample: int,
    n: int,
    before: str,
    line: Line,
    using: CritiqueRevise,
    failures: list[Failure],
) -> Line:
    """The judge's `verdict` on a revision and, unless it abstains, `p`: how probably it is better than `before`."""
    if line["revision"] == before:
        return {"verdict": "same", "p": 0.5}
    principle: Principle = using.constitution[line["principle"]]
    texts = (line["revision"], before)
    try:
        judgement = await compare(ask, using.judge, record.messages, texts, principle, RankSettings())
    except RequestFailed as error:
        failures.append(lost(error, sample, n))
        return {"verdict": "abstain"}
    p_ab, p_ba = judgement.comparison.p_ab, judgement.comparison.p_ba
    verdict = judge_revision(p_ab, p_ba)
    return {"verdict": verdict, "p": judgement.comparison.p} if verdict != "abstain" else {"verdict": verdict}


async def _is_fine(record: Record, ask: Ask, text: str, using: CritiqueRevise) -> bool:
    """Whether the judge finds no fault under any `about` group; the groups are asked in turn, up to the first fault."""
    judge, constitution = using.judge, using.constitution
    for about in constitution.abouts:
        prompt = check_prompt(
            record.messages, text, constitution.in_group(about), wording=judge.wording, style=judge.style
        )
        reading, _ = await ask_labels(ask, judge, prompt, "check", CHECK_LABELS)
        if reading.probabilities.get(NO_FAULT, 0.0) <= NO_FAULT_P:
            return False
    return True


def tally(outcome: Outcome) -> Mapping[str, int]:
    """Verdicts over all rounds; drafts that their first round found nothing to improve in, or made worse; losses.

    A sample is lost when a round of it got no critique, revision or check: its chain ends there, its draft lives on.
    """
    counts: Counter[str] = Counter()
    counts["lost_samples"] = len({f.sample for f in outcome.failures if f.kind != "comparison"})
    counts["lost_verdicts"] = sum(f.kind == "comparison" for f in outcome.failures)
    for chain in outcome.line["chains"] if outcome.line else ():
        counts["samples"] += 1
        counts.update(f"verdict_{entry['verdict']}" for entry in chain["rounds"])
        counts["stopped"] += sum(entry["stopped"] for entry in chain["rounds"])
        if chain["rounds"]:
            first = chain["rounds"][0]
            counts["first_rounds"] += 1
            counts["drafts_satisfied"] += first["stopped"] or first["verdict"] == "same"
            counts["drafts_worsened"] += first["verdict"] == "worse"
    return counts
