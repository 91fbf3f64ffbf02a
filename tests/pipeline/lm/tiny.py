"""Small random models and a byte-level tokenizer, made on the spot."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers as t
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXT = [
    "The quick brown fox jumps over the lazy dog while five boxing wizards watch.",
    "Please help me to write a letter to the bank about the old bicycle, said the user.",
    "The answer is: (A) or (B)? Choose the response that is more helpful and harmless.",
]


def tiny_tokenizer(*, template: str | None = CHATML, vocab_size: int = 400, text: Sequence[str] = ()) -> Any:
    """Byte-level BPE with <|pad|>, <|im_start|>, <|im_end|> as special tokens 0, 1, 2."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|pad|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*TEXT * 3, *text], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token="<|im_end|>")
    fast.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    fast.chat_template = template
    return fast


def tiny_llama(
    *, vocab_size: int = 400, hidden: int = 32, layers: int = 2, context: int = 512, seed: int = 0
) -> LlamaForCausalLM:
    """A random Llama whose next-token distribution is far from flat, so that greedy choices are not ties."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=8 * hidden // 3 // 8 * 8,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=context,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=2,
    )
    return sharpen(LlamaForCausalLM(config))


def sharpen(model: Any, *, std: float = 0.15) -> Any:
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=std)
    return model.eval()


def save_tiny(folder: Path, **options: Any) -> Path:
    """A model folder as `save_pretrained` leaves it."""
    tiny_llama(**options).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def families() -> dict[str, Callable[[], Any]]:
    """Small random models; those with sliding windows have one that is shorter than the prompts."""
    size: dict[str, Any] = {
        "vocab_size": 300,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    heads, window = {"num_key_value_heads": 2, "head_dim": 16}, {"sliding_window": 20}
    gpt2 = {"vocab_size": 300, "n_embd": 64, "n_layer": 4, "n_head": 4, "n_positions": 512, "eos_token_id": 2}
    qwen2 = {"num_key_value_heads": 2, "use_sliding_window": True, "max_window_layers": 2}
    return {
        "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**size, **heads)),
        "qwen2": lambda: t.Qwen2ForCausalLM(t.Qwen2Config(**size, **qwen2, **window)),
        "qwen3": lambda: t.Qwen3ForCausalLM(t.Qwen3Config(**size, **heads)),
        "mistral": lambda: t.MistralForCausalLM(t.MistralConfig(**size, **heads, **window)),
        "gemma": lambda: t.GemmaForCausalLM(t.GemmaConfig(**size, **heads)),
        "gemma2": lambda: t.Gemma2ForCausalLM(t.Gemma2Config(**size, **heads, **window)),
        "gemma3": lambda: t.Gemma3ForCausalLM(t.Gemma3TextConfig(**size, **heads, **window)),
        "gpt2": lambda: t.GPT2LMHeadModel(t.GPT2Config(**gpt2, bos_token_id=1, pad_token_id=0)),
        "gpt_neox": lambda: t.GPTNeoXForCausalLM(t.GPTNeoXConfig(**size)),
    }
