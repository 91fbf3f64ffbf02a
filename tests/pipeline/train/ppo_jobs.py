"""Small PPO trainings for tests: random networks, prompts on the spot, a few steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification

from pipeline.config.settings import Settings, TrainPpoSettings
from pipeline.lm.load import load
from pipeline.lm.templates import Chat
from pipeline.train import rows
from pipeline.train.networks import Networks, open_networks
from pipeline.train.ppo import train_ppo
from pipeline.train.prompts import Prompts, tokenise_prompts
from pipeline.train.rewards import Source, open_reward_model
from pipeline.train.scorers import ScorerKind
from pipeline.train.stage import Job, Report
from tests.pipeline.lm.tiny import save_tiny, tiny_tokenizer
from tests.pipeline.train.tiny_jobs import asked_after_steps, run_job

KEYS = {"batch_size": 8, "minibatch_size": 4, "max_tokens": 8, "learning_rate": 1e-3, "num_inner_epochs": 2}


def ppo_settings(**keys: Any) -> TrainPpoSettings:
    return Settings.model_validate({"train_ppo": {**KEYS, **keys}}).train_ppo


def save_reward_model(folder: Path, start: Path) -> Path:
    """A reward model of random weights with the policy's tokenizer, whose scores differ visibly."""
    torch.manual_seed(7)
    model = AutoModelForSequenceClassification.from_pretrained(start, num_labels=1)
    torch.nn.init.normal_(model.score.weight, std=0.5)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def save_pair(folder: Path) -> tuple[Path, Path]:
    """A policy's start, and a reward model."""
    start = save_tiny(folder / "start")
    return start, save_reward_model(folder / "rm", start)


def run_ppo(data: Path, start: Path, reward_model: Path | None, out: Path, *, keys: Any = None, **job: Any) -> Report:
    made = Job(sources=[rows.Source(str(data))], start=str(start), out=out, **asked_after_steps(**job))
    return train_ppo(made, ppo_settings(**(keys or {})), reward_model=reward_model and str(reward_model))


def run_any(trainer: str, data: Path, models: tuple[Path, Path], out: Path, **options: Any) -> Report:
    """Any trainer. models: of `save_pair`. What is said of the sources is not told."""
    if say := options.pop("say", None):
        options["say"] = lambda message: None if "rows used" in message else say(message)
    if trainer == "ppo":
        return run_ppo(data, *models, out, **options)
    return run_job(trainer, data, models[0], out, **options)


def open_scores(model: Path, kind: ScorerKind, tokenizer: str, *, reencode: bool = False) -> Source:
    return open_reward_model(str(model), kind, tokenizer=tokenizer, reencode=reencode, max_tokens=1000, device="cpu")


def opened(start: Path, reward_model: Path, **keys: Any) -> tuple[Networks, Chat, Prompts, Any]:
    """Networks, chat, six prompts of unequal length, and the source of scores."""
    settings = ppo_settings(**keys)
    loaded = load(str(start), dtype="float32", device="cpu")
    chat = Chat(loaded.tokenizer)
    texts = ["please help", "write a letter to the bank about the old bicycle", "a b", "the user said", "me", "to the"]
    found = (rows.Row(str(n), [{"role": "user", "content": text}], (), 1.0, (), "") for n, text in enumerate(texts))
    prompts = tokenise_prompts(found, chat, max_length=100, too_long="drop")
    tokenizer = loaded.fingerprint["tokenizer"]
    source = open_scores(reward_model, "reward", tokenizer)
    networks = open_networks(loaded.model, str(start), source.model, settings, device="cpu")
    return networks, chat, prompts, source
