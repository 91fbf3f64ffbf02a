"""What a training would do and need, and whether it would be refused: `--dry-run`."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NamedTuple

import torch

from pipeline.config.settings import TrainSettings
from pipeline.lm.load import Head, check_tokenizer, context_of, fingerprint, load_config, load_tokenizer
from pipeline.lm.templates import Chat
from pipeline.train.batches import steps_per_epoch
from pipeline.train.best import Best
from pipeline.train.layouts import Kind
from pipeline.train.memory import Memory, advise, measure, weight_bytes
from pipeline.train.scorers import check_same_tokenizer, outline
from pipeline.train.stage import Job, check_divides, counts_of, read_data
from pipeline.train.trackers import check_installed


class Plan(NamedTuple):
    """What a training would do. advice: what would fit into memory, '' if this does. answers: that PPO has scored."""

    counts: dict[str, Any]
    steps: int
    memory: Memory
    advice: str
    answers: int = 0


def plan(
    job: Job, settings: TrainSettings, kind: Kind, head: Head, *, metrics: Collection[str], scorer: str | None = None
) -> Plan:
    """Reads and tokenises, loads no weights, and refuses what `train` refuses, but for the folder it writes to.

    metrics: that an evaluation will have. scorer: a reward model that is loaded beside the trained one.
    """
    check_installed(job.trackers)
    check_divides(settings)
    config, tokenizer = load_config(job.start), load_tokenizer(job.start)
    check_tokenizer(tokenizer, config.get_text_config().vocab_size, job.start)
    if scorer:
        own = fingerprint(config, tokenizer, dtype=torch.float32)
        check_same_tokenizer(outline(scorer, "reward").fingerprint, own)
    data, _ = read_data(job, settings, kind, Chat(tokenizer), context_of(config))
    if len(data["test"]):
        Best(settings.select).check(metrics)
    steps = steps_per_epoch(len(data["train"]), settings.batch_size) * settings.epochs
    beside = weight_bytes(scorer, job.device, "score") if scorer else 0
    need = (job.start, data["train"], settings, job.device, head, beside)
    memory = measure(*need)
    return Plan(counts_of(data), steps, memory, advise(memory, *need))
