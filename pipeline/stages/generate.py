"""Draft answers: k samples of every model to every prompt (CAI, Bai et al. 2022, section 3.1; temperature 1)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from constitution.prompts import answer_prompt
from pipeline.config.settings import GenerateSettings
from pipeline.driver import Ask
from pipeline.errors import RequestFailed
from pipeline.records import Failure, Line, Outcome, Record
from pipeline.stages.asking import Sampling, Voice, ask_text, lost, together


async def generate(
    record: Record, ask: Ask, *, models: Sequence[Voice], settings: GenerateSettings, seed: int
) -> Outcome:
    """Sample n of model m has the number m * samples + n.

    A lost sample is a failure, or filtered if a content filter took it; the record lives while one completion is left.
    """
    asked = [(voice, m * settings.samples + n) for m, voice in enumerate(models) for n in range(settings.samples)]
    drafts = await together(_draft(record, ask, voice, sample, settings, seed) for voice, sample in asked)
    completions = [draft for draft in drafts if isinstance(draft, dict)]
    losses = [draft for draft in drafts if isinstance(draft, Failure)]
    return Outcome(
        {"id": record.id, "completions": completions} if completions else None,
        tuple(loss for loss in losses if loss.reason != "content_filter"),
        tuple(loss for loss in losses if loss.reason == "content_filter"),
    )


async def _draft(
    record: Record, ask: Ask, voice: Voice, sample: int, settings: GenerateSettings, seed: int
) -> Line | Failure:
    prompt = answer_prompt(record.messages, wording=voice.wording, style=voice.style)
    sampling = Sampling(settings.temperature, settings.top_p, (seed, record.id, "generate", 0), sample)
    try:
        reply = await ask_text(ask, voice, prompt, "draft", sampling)
    except RequestFailed as error:
        return lost(error, sample, 0)
    return {
        "sample": sample,
        "text": reply.text,
        "model": voice.engine.name,
        "finish_reason": reply.finish_reason,
        "num_tokens": reply.usage.completion_tokens,
    }


def tally(outcome: Outcome) -> Mapping[str, int]:
    """Samples asked for and lost; completions, and how many were cut at max_tokens."""
    completions = outcome.line["completions"] if outcome.line else []
    num_lost = len(outcome.failures) + len(outcome.filtered)
    return {
        "samples": len(completions) + num_lost,
        "lost_samples": num_lost,
        "completions": len(completions),
        "completions_cut": sum(completion["finish_reason"] == "length" for completion in completions),
    }
