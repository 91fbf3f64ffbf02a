"""Labels by token from a real vLLM server, also where no top list would hold them, against the transformers engine."""

from __future__ import annotations

import pytest

from pipeline.engines.base import Request
from pipeline.errors import RequestFailed
from pipeline.records import Prompt
from tests.vllm.conftest import Asked

CLOSE = 1e-3
GRADES = (*"123456789", "10")
PROMPTS: tuple[Prompt, ...] = (
    [{"role": "user", "content": "Which one is it, A or B?"}],
    [{"role": "user", "content": "Wait for a quiet moment."}, {"role": "assistant", "content": "No."}],
    "Which one is it?\n~:~ 8fc1 label\n",
)


@pytest.mark.parametrize("labels", [("A", "B"), ("Yes", "No"), GRADES, ("A", "AB", "B")])
def test_every_label_has_the_models_own_probability(labels: tuple[str, ...], served: Asked, reference: Asked) -> None:
    """AB is two tokens, of which the first is A."""
    requests = [Request(prompt, "comparison", labels=labels) for prompt in PROMPTS]
    for reply, expected in zip(served(*requests), reference(*requests), strict=True):
        assert (reply.method, reply.finish_reason) == ("logprobs", "labels")
        assert reply.logprobs == pytest.approx(expected.logprobs, abs=CLOSE)


def test_labels_that_one_request_cannot_tell_apart_are_read_from_the_top_list(served: Asked) -> None:
    sets = (("AB", "BA"), ("A", "B"))
    replies = served(*(Request(PROMPTS[0], "comparison", labels=labels) for labels in sets))
    assert [reply.method for reply in replies] == ["topk", "logprobs"]


def test_a_prompt_that_is_too_long_leaves_labels_exact(served: Asked) -> None:
    long = Request([{"role": "user", "content": "steal a car " * 3000}], "comparison", labels=("A", "B"))
    with pytest.raises(RequestFailed, match="too_long"):
        served(long)
    (reply,) = served(Request(PROMPTS[0], "comparison", labels=("A", "B")))
    assert reply.method == "logprobs"
