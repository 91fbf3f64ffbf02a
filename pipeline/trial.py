"""One prompt through one chain, in a run folder that is gone afterwards."""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path

from constitution.principles import Constitution
from pipeline.chain import DATA_STAGES, Chain, prepare, run_chain
from pipeline.config.settings import Settings
from pipeline.conversations import read_conversation
from pipeline.errors import EngineDown, StoppedError
from pipeline.jobs import Job, constitution_file
from pipeline.reading import Case, Wanted, select
from pipeline.records import message_id
from pipeline.store import RunFolder, StageWriter
from pipeline.voices import check_models

MODEL = "nano"
"""Of a trial for which no model was named anywhere."""


def with_some_model(settings: Settings) -> Settings:
    """The settings, with the embedded model if they name neither a model nor another way to get answers."""
    engine = settings.engine
    if engine.model or engine.base_urls or engine.script or engine.backend not in ("auto", "transformers", "vllm"):
        return settings
    return settings.model_copy(update={"engine": engine.model_copy(update={"model": MODEL})})


def try_prompt(settings: Settings, prompt: str) -> Case:
    """Drafts, critiques, revisions, verdicts and ranking of one prompt, by the stages and engines of a run.

    prompt: text, or a transcript as in docs/prompts.md. Raises UsageError for an empty one, and what a run raises.
    """
    messages = read_conversation({"prompt": prompt}, "PROMPT").messages
    check_models(settings, DATA_STAGES)
    constitution = Constitution.load(constitution_file(settings))
    with tempfile.TemporaryDirectory(prefix="cai-try-") as folder:
        run = RunFolder(Path(folder) / "try", create=True)
        line = {"id": message_id(messages), "messages": messages, "tags": [], "source": "PROMPT"}
        StageWriter(run, "prompts", "prompts").publish(0, [line], prompts=1, num_in=1)
        chain = prepare(Job(run, settings, constitution), DATA_STAGES)
        try:
            asyncio.run(run_chain(chain, max_time=settings.run.max_time, watch=_wait))
        except EngineDown:
            raise
        except StoppedError as error:
            raise StoppedError("stopped on request; nothing of a trial is kept") from error
        return select(run, Wanted(), limit=1)[0]


async def _wait(chain: Chain) -> None:
    await asyncio.Event().wait()
