"""Our decode loop beside `model.generate`: the same 64 prompts, the same random Llama, interleaved runs, medians.

    OMP_NUM_THREADS=2 python benchmarks/decode.py

Lengths are forced: `even`, every row makes 64 tokens; `early`, rows end after 4 to 64 tokens (`generate` runs until
the longest ends); `shared`, 8 rows each of 8 prompts. Prints new tokens per second that were wanted.
"""

from __future__ import annotations

import random
import statistics
import time
from typing import Any

import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from pipeline.lm.decode import Decoder, Row, decode

ROWS, NEW, VOCAB, ROUNDS = 64, 64, 4096, 5


def build() -> LlamaForCausalLM:
    """About 5M parameters."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=224,
        intermediate_size=608,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=1024,
        pad_token_id=0,
        eos_token_id=None,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


def ours(model: Any, prompts: list[list[int]], lengths: list[int]) -> float:
    decoder = Decoder(model, max_rows=ROWS)
    rows = [Row(prompt, max_tokens=length) for prompt, length in zip(prompts, lengths, strict=True)]
    start = time.perf_counter()
    list(decode(decoder, rows))
    return time.perf_counter() - start


def theirs(model: Any, prompts: list[list[int]], lengths: list[int]) -> float:
    width = max(map(len, prompts))
    tokens = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    settings = GenerationConfig(max_new_tokens=max(lengths), do_sample=False, pad_token_id=0)
    start = time.perf_counter()
    with torch.inference_mode():
        model.generate(tokens, attention_mask=mask, generation_config=settings)
    return time.perf_counter() - start


def main() -> None:
    model = build()
    draw = random.Random(0)
    prompts = [[draw.randrange(1, VOCAB) for _ in range(draw.randrange(80, 130))] for _ in range(ROWS)]
    even, early = [NEW] * ROWS, [draw.randrange(4, NEW + 1) for _ in range(ROWS)]
    same = [prompts[n // 8] for n in range(ROWS)]
    size = sum(parameter.numel() for parameter in model.parameters())
    print(f"{size / 1e6:.1f}M parameters, {torch.get_num_threads()} threads, {ROWS} rows, torch {torch.__version__}")
    for name, texts, lengths in (("even", prompts, even), ("early", prompts, early), ("shared", same, even)):
        pairs = [(ours(model, texts, lengths), theirs(model, texts, lengths)) for _ in range(ROUNDS + 1)][1:]
        mine, other = (statistics.median(column) for column in zip(*pairs, strict=True))
        wanted = sum(lengths)
        print(f"{name:7} ours {wanted / mine:6.0f} tokens/s   generate {wanted / other:6.0f}   x{other / mine:.2f}")


if __name__ == "__main__":
    main()
