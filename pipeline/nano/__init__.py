"""The embedded model: a toy of a few megabytes whose answers can be graded exactly, made from scratch by `build`.

`path()` is what `--model nano` stands for. Nothing heavy is imported here.
"""

from __future__ import annotations

from pathlib import Path


def path() -> Path:
    """The folder of the embedded model, in Hugging Face format."""
    return Path(__file__).parent / "weights"


def example_prompts() -> Path:
    """400 prompts of the embedded model's world: JSONL with `messages` and `tags`."""
    return Path(__file__).parent / "prompts.jsonl"
