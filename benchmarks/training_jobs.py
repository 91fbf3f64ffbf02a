"""Models and rows for train.py and ppo.py: Llamas with random weights; tokens, synthetic or of hh-rlhf."""

from __future__ import annotations

import gzip
import json
import math
import os
import random
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 4096
CONTEXT = 2048
SHAPES: dict[str, dict[str, int]] = {
    "5M": {"hidden_size": 224, "intermediate_size": 608, "num_hidden_layers": 6, "num_attention_heads": 7},
    "30M": {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8},
}
"""By name, about the number of parameters."""
RATIOS = {"4:1": 4.0, "1:1": 1.0, "1:4": 0.25}
"""Prompt : completion."""
WORDS = (20, 120)
"""Least and most words of a prompt and of a completion, before they are scaled to a ratio; a word is a token."""
SPECIAL = ("<pad>", "<end>")

Pair = dict[str, list[int]]


def build(folder: Path, shape: str, tokenizer: Tokenizer) -> int:
    """Writes model and tokenizer in Hugging Face format. Returns the number of parameters."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        **SHAPES[shape],
        max_position_embeddings=CONTEXT,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=SPECIAL[0], eos_token=SPECIAL[1])
    fast.save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


def train_tokenizer(texts: Iterator[str]) -> Tokenizer:
    """A byte-level BPE, so that a row of real text has about as many tokens as with a real model."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def synthetic(ratio: str, count: int, seed: int = 0) -> list[Pair]:
    """Prompt and completions have the same mean length in all ratios together."""
    draw, share = random.Random(f"{ratio} {seed}"), RATIOS[ratio] / (1 + RATIOS[ratio])

    def tokens(scale: float) -> list[int]:
        return [draw.randrange(len(SPECIAL), VOCABULARY) for _ in range(round(scale * draw.randint(*WORDS)))]

    return [
        {"prompt": tokens(2 * share), "chosen": tokens(2 - 2 * share), "rejected": tokens(2 - 2 * share)}
        for _ in range(count)
    ]


def real_texts(path: Path) -> Iterator[tuple[str, str, str]]:
    """Prompt, chosen and rejected of hh-rlhf's transcripts; the last turn is the completion."""
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            turn = "\n\nAssistant:"
            prompt = row["chosen"][: row["chosen"].rindex(turn) + len(turn)]
            if row["rejected"].startswith(prompt):
                yield prompt, row["chosen"][len(prompt) :], row["rejected"][len(prompt) :]


def real(path: Path, tokenizer: Tokenizer, count: int, max_length: int = 1024, seed: int = 0) -> list[Pair]:
    """A sample of the pairs that fit."""
    texts = list(real_texts(path))
    random.Random(seed).shuffle(texts)
    pairs: list[Pair] = []
    for text in texts:
        prompt, chosen, rejected = (tokenizer.encode(part).ids for part in text)
        if chosen and rejected and len(prompt) + max(len(chosen), len(rejected)) < max_length:
            pairs.append({"prompt": prompt, "chosen": [*chosen, 1], "rejected": [*rejected, 1]})
        if len(pairs) == count:
            break
    return pairs


def write(path: Path, pairs: list[Pair]) -> dict[str, Any]:
    """One pair a line. Returns mean lengths."""
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return {name: round(sum(len(pair[name]) for pair in pairs) / len(pairs)) for name in pairs[0]}


@torch.no_grad()
def set_odds_of_end(folder: Path, probability: float) -> None:
    """Gives the token that ends an answer about this probability everywhere.

    One feature of all embeddings gets a constant, which lasts through the layers, and only that token's logit sees it.
    """
    model = LlamaForCausalLM.from_pretrained(folder)
    embeddings, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    embeddings[:, 0] += 1.0
    head[:, 0] = 0
    head[1] = 0
    draw = torch.Generator().manual_seed(0)
    states = model.model(torch.randint(2, VOCABULARY, (4, 128), generator=draw)).last_hidden_state
    others = (states @ head[2:].T).logsumexp(-1).mean()
    head[1, 0] = (math.log(probability / (1 - probability)) + others) / states[..., 0].mean()
    model.save_pretrained(folder)


def run(work: Path, command: Sequence[Any], job: dict[str, Any]) -> Any:
    """What a command prints in its last line, given the job in a file. It finds this project's tests, too."""
    path = work / "job.json"
    path.write_text(json.dumps(job))
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([*command, path], capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))} {path}\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])
