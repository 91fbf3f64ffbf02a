"""Makes the embedded model from scratch: `python -m pipeline.nano.build [--out DIR] [--seed N] [--minutes M]`.

A Llama of about three million parameters learns lessons drawn afresh at every step; nothing is seen twice on purpose.
The loss is the mean over the tokens that the model has to say itself, each with its lesson's weight. Left out: a
validation set (lessons are never repeated; `measure` asks what is held out) and checkpoints (a build is one sitting).
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from pipeline.arguments import Arguments, minutes, one_line
from pipeline.nano import path
from pipeline.nano.card import write_card
from pipeline.nano.lessons import Lesson, draw_lesson, wording_texts
from pipeline.nano.measure import measure, table
from pipeline.nano.vocabulary import build_tokenizer
from pipeline.store import io_errors, make_folder

SHAPE = {
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 6,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "max_position_embeddings": 4096,
    "rope_theta": 10000.0,
    "initializer_range": 0.05,
    "tie_word_embeddings": True,
}
LEARNING_RATE = 2e-3
WARM_UP = 0.02
LOG_EVERY = 100
WEIGHT_DECAY = 0.05
BATCH_TOKENS = 5120
BATCH_WEIGHT = 0.215 * BATCH_TOKENS
POOL = 1024


class Row(NamedTuple):
    """A lesson in tokens. weights: 0 for what is given, else how much saying this token right counts."""

    tokens: list[int]
    weights: list[float]


class Batch(NamedTuple):
    """tokens: (B, T), padded on the right; weights: (B, T) of the tokens as targets."""

    tokens: Any
    weights: Any


def encode(lesson: Lesson, tokenizer: Any) -> Row:
    """A lesson as the chat template renders it; content never becomes a control token."""
    tokens, weights = [tokenizer.bos_token_id], [0.0]
    for message, weight in zip(lesson.messages, lesson.weights, strict=True):
        content = tokenizer(message["content"], add_special_tokens=False, split_special_tokens=True)["input_ids"]
        tokens += [tokenizer.convert_tokens_to_ids(f"<|{message['role']}|>"), *content, tokenizer.eos_token_id]
        weights += [0.0] + [weight] * (len(content) + 1)
    return Row(tokens, weights)


def batches(tokenizer: Any, rng: Random) -> Iterator[Batch]:
    """Endless batches of about BATCH_TOKENS tokens, of lessons of similar length."""
    import torch

    while True:
        rows = sorted((encode(draw_lesson(rng), tokenizer) for _ in range(POOL)), key=lambda row: len(row.tokens))
        groups: list[list[Row]] = [[]]
        for row in rows:
            if groups[-1] and len(row.tokens) * (len(groups[-1]) + 1) > BATCH_TOKENS:
                groups.append([])
            groups[-1].append(row)
        rng.shuffle(groups)
        for group in groups:
            width = max(len(row.tokens) for row in group)
            yield Batch(
                torch.tensor([r.tokens + [tokenizer.pad_token_id] * (width - len(r.tokens)) for r in group]),
                torch.tensor([r.weights + [0.0] * (width - len(r.weights)) for r in group]),
            )


def lesson_loss(model: Any, batch: Batch) -> Any:
    """Weighted cross-entropy of the tokens that have a weight, in nats, over what a batch weighs on average.

    A mean over the batch itself would let the few labels of a batch of long rows count for many. Padding on the right
    needs no mask, since attention is causal.
    """
    import torch

    hidden = model.model(input_ids=batch.tokens, use_cache=False).last_hidden_state[:, :-1]
    weights = batch.weights[:, 1:]
    said = weights > 0
    logits = model.lm_head(hidden[said]).float()
    losses = torch.nn.functional.cross_entropy(logits, batch.tokens[:, 1:][said], reduction="none")
    return (losses * weights[said]).sum() / BATCH_WEIGHT


def learning_rate(progress: float) -> float:
    """Linear warm-up, then a cosine to zero; progress in [0, 1]."""
    if progress < WARM_UP:
        return LEARNING_RATE * (progress / WARM_UP + 0.01)
    return LEARNING_RATE * 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - WARM_UP) / (1 - WARM_UP))))


def new_model(tokenizer: Any, seed: int) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **SHAPE,
    )
    model = LlamaForCausalLM(config)
    model.set_attn_implementation("eager")  # faster than the fused kernel, whose backward is slow for short rows
    return model


def new_optimizers(model: Any) -> list[Any]:
    """Muon (Jordan et al. 2024) for the layers' matrices, AdamW for the embedding and the norms."""
    import torch

    matrices = [p for p in model.model.layers.parameters() if p.dim() == 2]
    others = [p for name, p in model.named_parameters() if p.dim() == 1 or "embed" in name]
    return [
        torch.optim.Muon(matrices, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def train(model: Any, tokenizer: Any, *, seed: int, minutes: float) -> dict[str, Any]:
    """Trains in place for this long; returns the log."""
    import torch

    optimizers = new_optimizers(model)
    start, num_tokens, log, recent = time.monotonic(), 0, [], []
    for step, batch in enumerate(batches(tokenizer, Random(seed))):
        progress = (time.monotonic() - start) / (60 * minutes)
        if progress >= 1:
            break
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(progress)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = lesson_loss(model, batch)
        model.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        num_tokens += batch.tokens.numel()
        recent.append(loss.detach())
        if step % LOG_EVERY == LOG_EVERY - 1:
            mean = torch.stack(recent).mean().item()
            recent = []
            speed = num_tokens / (time.monotonic() - start)
            log.append({"step": step + 1, "tokens": num_tokens, "loss": round(mean, 5)})
            print(f"step {step + 1}  loss {mean:.4f}  {speed:,.0f} tokens/s  {100 * progress:.0f} %", file=sys.stderr)
    return {"seed": seed, "minutes": minutes, "steps": step, "tokens": num_tokens, "log": log}


def save(model: Any, tokenizer: Any, out: Path) -> None:
    """Writes the model in Hugging Face format, weights in bf16, beside its tokenizer."""
    import torch

    model.to(torch.bfloat16)
    model.generation_config.update(
        do_sample=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )
    model.save_pretrained(out)


def main() -> None:
    parser = Arguments("pipeline.nano.build", __doc__)
    parser.add_argument(
        "--out", metavar="DIR", type=Path, default=path(), help="folder to write (default: the package's own)"
    )
    parser.add_argument("--seed", type=int, default=1, help="of the first weights and of the lessons (default 1)")
    parser.add_argument("--minutes", type=minutes, default=50, help="time to train, before measuring (default 50)")
    options = parser.parse_args()
    tokenizer = build_tokenizer(wording_texts())
    with one_line(), io_errors(options.out):
        make_folder(options.out)
        tokenizer.save_pretrained(options.out)  # before the training, so that a folder that cannot be written is known
    model = new_model(tokenizer, options.seed)
    log = train(model, tokenizer, seed=options.seed, minutes=options.minutes)
    log["parameters"] = sum(p.numel() for p in model.parameters())
    save(model, tokenizer, options.out)
    figures = measure(options.out)
    log["figures"] = {name: figure._asdict() for name, figure in figures.items()}
    (options.out / "training.json").write_text(json.dumps(log, indent=1) + "\n", encoding="utf-8")
    write_card(options.out, log, figures)
    print(table(figures))


if __name__ == "__main__":
    main()
