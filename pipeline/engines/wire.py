"""A `Request` as the body of an OpenAI-protocol call; the same body is what the scripted engine answers by.

Left out on purpose: fields that are not in the protocol (`top_k`, `min_p`, `repetition_penalty`). A server whose model
brings defaults for them (vLLM: `--generation-config vllm` turns them off) samples with its own.
"""

from __future__ import annotations

import re
from typing import Any

from pipeline.engines.base import Request
from pipeline.errors import RequestFailed

TOP_LOGPROBS = 20
NOT_SERVED_STATUSES = frozenset({404, 405, 501})
"""Whoever answers so has nothing at this address, and will not the next time."""
RETRIED_STATUSES = frozenset({408, 409, 425, 429, *range(500, 600)}) - NOT_SERVED_STATUSES
REQUEST_STATUSES = {400: "refused_by_server", 413: "too_long", 422: "refused_by_server"}
"""Statuses that concern one request only, and the reason they give; every other refusal concerns the whole run."""
Body = dict[str, Any]
NO_THINKING: Body = {"chat_template_kwargs": {"enable_thinking": False}}
"""For a label request: the first token is then the label's, not that of a reasoning block. Not in the protocol."""

# What tokenizers commonly hold as special tokens. Mark-up such as <div> is left alone.
_CONTROL = re.compile(
    r"<(?=[|｜][^<>\n]{1,40}[|｜]>|/?(?:s|bos|eos|pad|unk|start_of_turn|end_of_turn|think|tool_call|tool_response)>"
    r"|</?SYS>>|(?:image|sop|eop)>)"
    r"|\[(?=/?(?:INST|THINK|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_CALLS|TOOL_RESULTS|IMG)\]|(?:g|s|)MASK\])"
)


def escape(text: str) -> tuple[str, int]:
    """Text in which no usual special token is left, and how many there were.

    A zero-width space goes behind the bracket that begins the token: a remote tokenizer, which we cannot tell to read
    content as plain text, then sees ordinary characters.
    """
    return _CONTROL.subn(lambda match: match[0] + "\u200b", text)


def label_tokens(labels: tuple[str, ...]) -> int:
    """How many tokens must be sampled to tell the labels apart: more than 1 only where one begins with another."""
    longer = [len(b) - len(a) for a in labels for b in labels if a != b and b.startswith(a)]
    return 1 + max(longer, default=0)


def request_body(request: Request, model: str) -> tuple[Body, int]:
    """The body of `/chat/completions`, or of `/completions` for raw text; and how many special tokens were escaped.

    Raises RequestFailed for text that no server can be sent.
    """
    body: Body = {"model": model}
    if isinstance(request.prompt, str):
        body["prompt"], escaped = escape(request.prompt)
    else:
        contents = [escape(message["content"]) for message in request.prompt]
        body["messages"] = [
            {"role": message["role"], "content": content}
            for message, (content, _) in zip(request.prompt, contents, strict=True)
        ]
        escaped = sum(count for _, count in contents)
    _check_unicode(body)
    if request.labels:
        body |= {"max_tokens": label_tokens(request.labels), "temperature": 0.0, "top_p": 1.0, "n": 1}
        chat = "messages" in body
        body |= {"logprobs": True, "top_logprobs": TOP_LOGPROBS} if chat else {"logprobs": TOP_LOGPROBS}
        return body, escaped
    body |= {"max_tokens": request.max_tokens, "temperature": request.temperature, "top_p": request.top_p, "n": 1}
    if request.seed is not None:
        body["seed"] = request.seed
    if request.stop:
        body["stop"] = list(request.stop)
    return body, escaped


def _check_unicode(body: Body) -> None:
    texts = [message["content"] for message in body.get("messages", ())] or [body["prompt"]]
    try:
        for text in texts:
            text.encode()
    except UnicodeEncodeError as error:
        detail = f"the prompt holds a lone surrogate at character {error.start}; clean the input"
        raise RequestFailed("lone_surrogate", detail, attempts=0) from error
