"""Completions from the model that is being trained, on the device where it is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

from pipeline.config.settings import TrainSettings
from pipeline.errors import UsageError
from pipeline.lm.decode import Decoder, Row, decode
from pipeline.lm.load import ends
from pipeline.train import shards
from pipeline.train.batches import Data
from pipeline.train.loop import autocast


class Sample(NamedTuple):
    """tokens: of a completion, to the one that ends its turn if is_whole, else to where it was cut."""

    tokens: list[int]
    is_whole: bool


class Generate(Protocol):
    """Draws a completion to each prompt."""

    def __call__(self, model: Any, prompts: Sequence[list[int]], seeds: Sequence[int]) -> list[Sample]:
        """One for each prompt, a function of weights, prompt and seed alone but for rounding."""


class Sampler(NamedTuple):
    """Decodes with a key-value cache that is new for every call, since the weights have changed in between.

    eos: tokens that end a completion. max_tokens: of a completion; prompt and completion stay within `context`.
    temperature: 0 is greedy.
    """

    eos: frozenset[int]
    max_tokens: int
    context: int
    temperature: float
    settings: TrainSettings

    def __call__(self, model: Any, prompts: Sequence[list[int]], seeds: Sequence[int]) -> list[Sample]:
        rows = [
            Row(
                prompt,
                max(1, min(self.max_tokens, self.context - len(prompt))),
                temperature=self.temperature,
                seed=seed,
                eos=self.eos,
            )
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]
        with _as_for_decoding(model), autocast(model, self.settings):
            for _ in decode(Decoder(model), rows):
                pass
        return [Sample(row.completion, row.finish_reason == "stop") for row in rows]


def make_sampler(
    model: Any, eos: frozenset[int], data: Data, settings: TrainSettings, *, temperature: float
) -> Sampler:
    """Completions may be as long as the longest of the data. Raises UsageError for a model that is divided."""
    if shards.is_sharded(model):
        raise UsageError("parallel: fsdp: a divided model cannot sample; use parallel: ddp, or train without sampling")
    text = model.config.get_text_config()
    context = getattr(text, "max_position_embeddings", None) or 1 << 20
    longest = max(len(completion) for row in range(len(data)) for completion in data.group(row).completions)
    found = eos | set(ends(text, model.generation_config))
    return Sampler(frozenset(found), longest, context, temperature, settings)


@contextmanager
def _as_for_decoding(model: Any) -> Iterator[None]:
    """Evaluation mode, in which gradient checkpointing drops no cache, and an attention that takes a mask."""
    was_training, attention = model.training, model.config._attn_implementation
    softcap = getattr(model.config.get_text_config(), "attn_logit_softcapping", None)
    model.eval()
    model.set_attn_implementation("eager" if softcap else "sdpa")
    try:
        yield
    finally:
        model.set_attn_implementation(attention)
        model.train(was_training)
