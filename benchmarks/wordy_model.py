"""A Llama of random weights that speaks in words and never ends a reply, for benchmarks of serving.

Its head can say no control token, so every reply runs to `max_tokens`: lengths are forced for whoever asks, with no
option for it in the pipeline, in vLLM or in a peer. The first token of a reply is A or B, which gives judgements; all
others are whole words, so that a text is tokenised into the very tokens that were sampled and prefixes stay cached.

Two dimensions of the residual stream carry this. No layer writes to them: dimension 0 is the same for every token,
dimension 1 is set for tokens that a reply begins behind, and the head reads both.
"""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from pipeline import nano

SHAPES: dict[str, dict[str, int]] = {
    "30M": {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 10, "num_attention_heads": 8},
    "700M": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 16, "num_attention_heads": 32},
}
"""By name, about the number of parameters."""
LABELS = ("A", "B")
BEFORE_REPLY = ("<|assistant|>", "\u010a")
"""The last token of a chat prompt and that of a few-shot text, a newline as byte-level vocabularies write it."""
WORD = re.compile("\u0120[a-z]+")
"""A space and letters."""
NEVER, SURE = -30.0, 12.0
"""Logits of what must not be said, and of a label behind BEFORE_REPLY; those of words are about 0."""


def build(folder: Path, *, shape: str, context: int) -> int:
    """Writes model and tokenizer (the embedded model's) in Hugging Face format. Returns the number of parameters."""
    tokenizer = AutoTokenizer.from_pretrained(nano.path())
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        **SHAPES[shape],
        num_key_value_heads=2,
        max_position_embeddings=context,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        _speak_in_words(model, tokenizer)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


def _speak_in_words(model: Any, tokenizer: Any) -> None:
    words, vocabulary = _words(tokenizer), tokenizer.get_vocab()
    labels = [vocabulary[label] for label in LABELS]
    before = [vocabulary[token] for token in BEFORE_REPLY]
    embedding, head = model.model.embed_tokens.weight, model.lm_head.weight
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight[:2] = 0.0
        layer.mlp.down_proj.weight[:2] = 0.0
    embedding[:, :2] = torch.tensor([1.0, 0.0])
    embedding[before, 1] = 1.0
    one = _constant(model, words)
    head[:, 0] = NEVER / one
    head[:, 1] = 0.0
    head[words, 0] = 0.0
    head[labels, 1] = (SURE - NEVER) / one


def _constant(model: Any, words: list[int]) -> torch.Tensor:
    """What a residual of 1 is behind the final norm, on average over a text of words."""
    text = torch.tensor([random.Random(0).choices(words, k=256)])
    return model.model(text).last_hidden_state[0, :, 0].mean()


def _words(tokenizer: Any) -> list[int]:
    return sorted(n for token, n in tokenizer.get_vocab().items() if WORD.fullmatch(token))


def write_prompts(path: Path, *, count: int, length: int, seed: int = 0) -> None:
    """Different prompts of `length` words each, a token a word, as JSONL."""
    tokenizer = AutoTokenizer.from_pretrained(nano.path())
    words, draw = tokenizer.convert_ids_to_tokens(_words(tokenizer)), random.Random(seed)
    with path.open("w") as file:
        for number in range(count):
            text = "".join(draw.choices(words, k=length)).replace("\u0120", " ")
            line = {"id": f"{number:08d}", "messages": [{"role": "user", "content": "A" + text}]}
            file.write(json.dumps(line) + "\n")
