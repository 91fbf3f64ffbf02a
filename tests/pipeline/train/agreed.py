"""A model, rows and trainings that both we and TRL take up: benchmarks/agreement.py has run TRL on them.

Numbers come from numpy's RandomState, whose streams do not change between versions.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

STEPS, BATCH_SIZE, VOCABULARY = 20, 8, 64
LEARNING_RATE = 1e-4
PAD, END = 0, 1


class Case(NamedTuple):
    """ours, theirs: options of the trainer's own settings and of TRL's.

    theirs_at_a_time: pairs in a microbatch of TRL; its batch is the same.
    """

    trainer: str
    ours: dict[str, Any]
    theirs: dict[str, Any]
    theirs_at_a_time: int = BATCH_SIZE


CASES = {
    "sft": Case("sft", {}, {}),
    "rm": Case("rm", {"center_coef": 0.0}, {}),
    # Theirs multiplies the square of the scores' sum, ours that of their mean.
    "rm-centred": Case("rm", {"center_coef": 0.4}, {"center_rewards_coefficient": 0.1}),
    "dpo": Case("dpo", {"beta": 0.5}, {"beta": 0.5}),
    # TRL's `robust` is another loss. Conservative DPO is its `aot`, if no two pairs of a microbatch can be sorted.
    "dpo-smoothed": Case(
        "dpo", {"beta": 0.5, "label_smoothing": 0.1}, {"beta": 0.5, "label_smoothing": 0.1, "loss_type": "aot"}, 1
    ),
    "dpo-normalised": Case("dpo", {"beta": 2.0, "length_normalised": True}, {"beta": 2.0, "loss_type": "sigmoid_norm"}),
    # Theirs always takes log-probabilities per token.
    "ipo": Case("dpo", {"beta": 0.5, "loss": "ipo", "length_normalised": True}, {"beta": 0.5, "loss_type": "ipo"}),
}


def make_model(head: str = "language") -> Any:
    """About 6,000 parameters, the same ones on every machine. head: language, or score."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        pad_token_id=PAD,
        bos_token_id=None,
        eos_token_id=END,
        num_labels=1,
    )
    model = (LlamaForSequenceClassification if head == "score" else LlamaForCausalLM)(config)
    draw = np.random.RandomState(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.from_numpy(0.2 * draw.standard_normal(parameter.shape)))
    return model.eval()


def make_rows() -> list[dict[str, list[int]]]:
    """One epoch of pairs in the order in which they are trained: prompt, chosen, rejected, of unequal lengths."""
    draw = np.random.RandomState(1)

    def tokens(most: int) -> list[int]:
        return draw.randint(2, VOCABULARY, size=draw.randint(1, most)).tolist()

    return [
        {"prompt": tokens(24), "chosen": [*tokens(12), END], "rejected": [*tokens(16), END]}
        for _ in range(STEPS * BATCH_SIZE)
    ]
