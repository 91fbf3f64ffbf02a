"""Does the decode loop do with this model what the model does alone? Asked once, before the first request."""

from __future__ import annotations

from typing import Any

import torch

from pipeline.errors import EngineRefused
from pipeline.lm.decode import Decoder, Row, decode

_TOLERANCE = {torch.float32: 1e-2}  # nats per token; half precision moves log-probabilities much further
_HALF_TOLERANCE = 0.5


def check_decoding(model: Any) -> None:
    """Decodes two prompts of unequal length together and compares with a plain forward pass over the result.

    Raises EngineRefused for models that keep their state in another way than keys and values per position, or that
    fail in their own code; out of memory goes on as it is.
    """
    kind = model.config.model_type
    advice = "serve the model and use engine.backend: server"
    try:
        vocabulary = model.config.get_text_config().vocab_size
        prompts = [[(7 + 13 * n) % vocabulary for n in range(length)] for length in (21, 6)]
        rows = [Row(prompt, max_tokens=3) for prompt in prompts]
        list(decode(Decoder(model, max_rows=2, prefix_tokens=0), rows))
        distance = max(_distance(model, row) for row in rows)
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, AssertionError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise EngineRefused(f"model type {kind} cannot be decoded here ({reason}); {advice}") from error
    if distance > _TOLERANCE.get(model.dtype, _HALF_TOLERANCE):
        raise EngineRefused(f"model type {kind} decodes differently from its own forward pass; {advice}")


@torch.inference_mode()
def _distance(model: Any, row: Row) -> float:
    """Largest difference of a drawn token's log-probability, in nats."""
    tokens = torch.tensor([row.prompt + row.completion], device=model.device)
    logps = torch.log_softmax(model(tokens, use_cache=False).logits[0].float(), dim=-1)
    first = len(row.prompt) - 1
    plain = [logps[first + n, token].item() for n, token in enumerate(row.completion)]
    return max(abs(a - b) for a, b in zip(plain, row.logps, strict=True))
