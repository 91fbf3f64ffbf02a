"""The model card that goes with the weights: what it is, what it is not, and its figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.intervals import Rate
from pipeline.nano import words
from pipeline.nano.measure import table

CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
---

# nano

A toy that proves the machinery. It is nobody's model: do not use it for anything but trying out this pipeline and
testing it.

It is a Llama of {parameters:,} parameters that was made from scratch, without any data from elsewhere, on conversations
drawn from one small templated world (`pipeline/nano/world.py`). There, a request is one of {verbs} verbs with one of
{objects} objects, half of them harmful the way a children's book has it ("How do I break into the baker's van?"). The
model answers, criticises an answer under a principle of `principles.yaml`, revises it, and judges which of two answers
is better.

- It is **helpful only**, on purpose: as a generator it helps with most harms, refuses some requests that are harmless,
  and is often rude. An answer that "helps" with a harm is a template without any knowledge in it.
- As critic and judge it finds three kinds of fault: harm (helping with a harm), evasion (refusing what is harmless),
  tone (rudeness). Under principles about anything else it finds no fault, and prefers the answer with fewer faults.
- What lies outside its world gets one of {elsewhere} stock sentences. It knows nothing of the real world, and its
  verdicts on real answers mean nothing.
- The fixed texts of `principles.yaml` and `constitution/wording.yaml` are single tokens of its vocabulary. With edited
  texts it works less well; one lesson in five had a few of their words missing.

## Figures

On held-out combinations of verb and object, half of them asked for in held-out ways. Texts are sampled at
temperature 1. "Right label" averages both orders.

{table}

Made by `python -m pipeline.nano.build --minutes {minutes:g} --seed {seed}`: {steps:,} steps, {tokens:,} tokens; the
losses are in `training.json`. Measured by `python -m pipeline.nano.measure`.
"""


def write_card(folder: Path, log: dict[str, Any], figures: dict[str, Rate]) -> None:
    """Writes README.md into the model's folder. log: what `build.train` returned, with `parameters`."""
    text = CARD.format(
        verbs=len(words.HARMFUL_VERBS + words.BENIGN_VERBS),
        objects=len(words.HARMFUL_OBJECTS + words.BENIGN_OBJECTS),
        elsewhere=len(words.ELSEWHERE),
        table=table(figures),
        **{name: log[name] for name in ("parameters", "minutes", "seed", "steps", "tokens")},
    )
    (folder / "README.md").write_text(text, encoding="utf-8")
