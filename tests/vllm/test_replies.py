"""What real vLLM says, here and behind a server, against the transformers engine with the same weights in fp32."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from constitution.principles import Constitution, default_path
from constitution.prompts import comparison_prompt
from constitution.samples import sample_prompts
from pipeline import nano
from pipeline.engines.base import Engine, Reply, Request
from pipeline.engines.transformers import TransformersEngine
from pipeline.engines.vllm import VllmEngine
from pipeline.errors import RequestFailed
from pipeline.lm.templates import Chat
from pipeline.records import Message, Prompt
from tests.vllm.conftest import Asked, descendants

CLOSE = 1e-3
LABELS = ("A", "B")
BLOCK = 128
"""Tokens that vLLM's CPU build keeps and finds again together."""


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(nano.path(), dtype=torch.float32).eval()


def questions(num: int) -> list[list[Message]]:
    lines = nano.example_prompts().read_text().splitlines()[:num]
    return [json.loads(line)["messages"] for line in lines]


def kinds() -> dict[str, Prompt]:
    constitution = Constitution.load(default_path())
    principle = next(iter(constitution))
    return sample_prompts(principle, [principle], wording=constitution.wording)


def comparisons(num: int) -> list[Prompt]:
    """In the embedded model's world, so that a server lists the labels among the likeliest tokens."""
    constitution = Constitution.load(default_path())
    principle = next(iter(constitution))
    texts = ("I will not help with that.", "You can do it if you wait for a quiet moment.")
    return [
        comparison_prompt(talk, *texts[:: 1 - 2 * (n % 2)], principle, wording=constitution.wording)
        for n, talk in enumerate(questions(num))
    ]


def drafts(num: int = 24, **options: Any) -> list[Request]:
    return [Request(prompt, "draft", **{"max_tokens": 40, **options}) for prompt in questions(num)]


def samples(prompt: Prompt, seeds: Sequence[int], **options: Any) -> list[Request]:
    settings = {"max_tokens": 40, "temperature": 1.0, **options}
    return [Request(prompt, "draft", seed=seed, **settings) for seed in seeds]


def departure(chat: Chat, tokens: Sequence[int], text: str) -> int | None:
    """The first of these tokens that a text does not go on with; None if the text is what they say."""
    if chat.text(tokens) == text:
        return None
    return next((n for n in range(len(tokens)) if not text.startswith(chat.text(tokens[: n + 1]))), len(tokens) - 1)


def gap(model: Any, prompt: Sequence[int], tokens: Sequence[int], step: int) -> float:
    """How far the two likeliest tokens are apart, in nats, where token `step` was chosen."""
    with torch.no_grad():
        logps = torch.log_softmax(model(torch.tensor([[*prompt, *tokens[:step]]])).logits[0, -1], -1)
    first, second = logps.topk(2).values.tolist()
    return first - second


def check_greedy(model: Any, chat: Chat, requests: list[Request], texts: list[str], expected: list[Reply]) -> None:
    """Texts equal the expected replies, but where one departs at a step whose top two are nearly even."""
    for request, text, reply in zip(requests, texts, expected, strict=True):
        step = departure(chat, reply.token_ids, text)
        if step is not None:
            apart = gap(model, chat.prompt(request.prompt).token_ids, reply.token_ids, step)
            assert apart < CLOSE, f"{text!r} and {reply.text!r} part where the top two are {apart:g} apart"


async def together(engines: Sequence[Engine], requests: Sequence[Request]) -> list[list[Reply]]:
    """Each engine's replies, all in flight at a time."""
    replies = await asyncio.gather(*(engine.ask(request) for engine in engines for request in requests))
    return [replies[first : first + len(requests)] for first in range(0, len(replies), len(requests))]


@pytest.mark.parametrize("which", ["local", "served"])
def test_greedy_answers_are_those_of_transformers(
    which: str, reference: Asked, model: Any, request: pytest.FixtureRequest
) -> None:
    ask: Asked = request.getfixturevalue(which)
    requests = [*drafts(), *(Request(prompt, kind, max_tokens=40) for kind, prompt in kinds().items())]
    expected = reference(*requests)
    replies = ask(*requests)
    chat = reference.engine.chat  # type: ignore[attr-defined]
    check_greedy(model, chat, requests, [reply.text for reply in replies], expected)
    assert sum(a.text == b.text for a, b in zip(replies, expected, strict=True)) > len(requests) * 0.9
    assert [reply.finish_reason for reply in replies] == [reply.finish_reason for reply in expected]


def test_the_comparison_of_greedy_answers_finds_a_wrong_token(reference: Asked, model: Any) -> None:
    (request,) = drafts(1)
    expected = reference(request)
    chat = reference.engine.chat  # type: ignore[attr-defined]
    tokens = list(expected[0].token_ids)
    tokens[2] = (tokens[2] + 1) % 2000
    with pytest.raises(AssertionError, match="apart"):
        check_greedy(model, chat, [request], [chat.text(tokens)], expected)


@pytest.mark.parametrize("which", ["local", "served"])
def test_label_log_probabilities_are_those_of_transformers(
    which: str, reference: Asked, request: pytest.FixtureRequest
) -> None:
    ask: Asked = request.getfixturevalue(which)
    requests = [Request(prompt, "comparison", labels=LABELS) for prompt in comparisons(8)]
    for reply, expected in zip(ask(*requests), reference(*requests), strict=True):
        assert reply.logprobs == pytest.approx(expected.logprobs, abs=CLOSE)
        assert reply.logprobs is not None
        assert set(reply.logprobs) == set(LABELS)


def test_labels_of_several_tokens_do_not_count_for_one_another(local: Asked, reference: Asked) -> None:
    labels = ("A", "AB", "1", "10", "100")
    requests = [Request(prompt, "grade", labels=labels) for prompt in [*questions(4), "Rating: "]]
    for reply, expected in zip(local(*requests), reference(*requests), strict=True):
        assert reply.logprobs == pytest.approx(expected.logprobs, abs=CLOSE)
        assert (reply.text, reply.finish_reason, reply.method) == ("", "labels", "logprobs")


def test_merged_samples_are_the_single_ones(local: Asked) -> None:
    prompt = questions(1)[0]
    requests = samples(prompt, [2**63 - 1, 11, 9, 10, 40])
    merged = [reply.token_ids for reply in local(*requests)]
    single = [local(request)[0].token_ids for request in requests]
    assert merged == single
    assert len(set(merged)) > 1


def test_a_seed_gives_the_same_reply_in_other_company(local: Asked) -> None:
    mine = samples(questions(1)[0], [5])
    alone = local(*mine)[0]
    others = [request for n, prompt in enumerate(questions(12)) for request in samples(prompt, [n, 100 + n])]
    assert local(*others, *mine)[-1].token_ids == alone.token_ids


def test_sampled_prompts_of_more_tokens_than_one_step_computes_are_all_answered(local: Asked) -> None:
    requests = [request for n in range(8) for request in samples(f"{n} ago, there was a house. " * 150, [n])]
    replies = local(*requests)
    assert sum(reply.usage.prompt_tokens for reply in replies) > 2 * 4096
    assert all(reply.token_ids for reply in replies)


def test_a_stop_string_ends_and_is_cut(local: Asked, reference: Asked) -> None:
    plain = local(*drafts(1))[0]
    stop = plain.text[6:9]
    requests = drafts(1, stop=(stop, "never there"))
    (reply,), (expected,) = local(*requests), reference(*requests)
    assert reply.text == plain.text[: plain.text.find(stop)]
    assert (reply.finish_reason, len(reply.token_ids)) == ("stop", len(expected.token_ids))
    assert reply.token_ids == expected.token_ids


def test_a_reply_is_cut_at_max_tokens_and_its_cost_counted(local: Asked) -> None:
    (request,) = drafts(1, max_tokens=3)
    (reply,) = local(request)
    assert (reply.finish_reason, len(reply.token_ids)) == ("length", 3)
    assert reply.usage[:2] == (len(local.engine.chat.prompt(request.prompt).token_ids), 3)  # type: ignore[attr-defined]


def test_the_next_turn_finds_its_beginning_in_the_cache(local: Asked) -> None:
    no = Message(role="assistant", content="I will not help with that.")
    turns = [turn for question in questions(40) for turn in (*question, no)][:-1]
    (said,) = local(Request(turns, "draft", max_tokens=20))
    turns += [Message(role="assistant", content=said.text), *questions(1)[0]]
    (reply,) = local(Request(turns, "critique", max_tokens=4))
    (scored,) = local(Request(turns, "comparison", labels=LABELS))
    assert said.usage.prompt_tokens > 4 * BLOCK
    assert reply.usage.cached_tokens > said.usage.prompt_tokens - BLOCK
    assert scored.usage.cached_tokens > said.usage.prompt_tokens - BLOCK


def test_a_prompt_longer_than_the_context_fails_alone(local: Asked) -> None:
    long = [Message(role="user", content="steal a car " * 3000)]
    with pytest.raises(RequestFailed, match=r"too_long: prompt has .* context is 4096"):
        local(Request(long, "draft", max_tokens=5))
    with pytest.raises(RequestFailed, match="too_long"):
        local(Request(long, "comparison", labels=LABELS))
    assert local(*drafts(1))[0].text


def test_nothing_of_the_generation_config_is_used(local: Asked) -> None:
    """The embedded model's says that replies are sampled; a greedy one is not, and the seed does not matter."""
    requests = [replace(request, seed=seed) for seed in (1, 2) for request in drafts(2)]
    first, second, *again = (reply.token_ids for reply in local(*requests))
    assert [first, second] == again


def test_the_fingerprint_is_that_of_transformers_but_for_the_backend(local: Asked, reference: Asked) -> None:
    ours, theirs = local.engine.fingerprint, reference.engine.fingerprint
    shared = {key: value for key, value in theirs.items() if key != "deterministic"}
    assert {key: ours[key] for key in shared} == shared
    assert ours["backend"] == "vllm"


def test_a_model_that_slept_wakes_up_to_be_shared_by_adapters(local: Asked, tmp_path: Path) -> None:
    """An adapter answers like the model with the adapter added to its weights; the bare model's rows run beside."""
    requests = [*drafts(8), *(Request(prompt, "comparison", labels=LABELS) for prompt in comparisons(2))]
    before = local(*requests)
    local.run(local.engine.sleep())  # type: ignore[attr-defined]
    folders = [write_adapter(tmp_path / str(seed), seed) for seed in (1, 2)]
    engines = [VllmEngine(str(nano.path()), concurrency=32, adapter=str(adapter)) for adapter, _ in folders]
    local.run(local.engine.wake())  # type: ignore[attr-defined]
    processes = set(descendants(os.getpid()))
    for engine in engines:
        local.run(engine.start())
    assert set(descendants(os.getpid())) == processes
    base, *tuned = local.run(together([local.engine, *engines], requests))
    for replies, (_, merged) in zip(tuned, folders, strict=True):
        reference = TransformersEngine(str(merged), dtype="float32", device="cpu")
        (expected,) = local.run(together([reference], requests))
        model = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32).eval()
        check_greedy(model, reference.chat, requests[:8], [reply.text for reply in replies[:8]], expected[:8])
        for reply, label in zip(replies[8:], expected[8:], strict=True):
            assert reply.logprobs == pytest.approx(label.logprobs, abs=CLOSE)
    assert len({tuple(reply.text for reply in replies) for replies in (base, *tuned)}) == 3
    assert len({json.dumps(engine.fingerprint) for engine in (local.engine, *engines)}) == 3
    for engine in engines:
        local.run(engine.close())
    for replies in (base, local(*requests)):
        assert [reply.text for reply in replies] == [reply.text for reply in before]


def test_records_tell_a_model_with_an_adapter_from_the_model_alone(runner: asyncio.Runner, tmp_path: Path) -> None:
    """Trainers put theirs in `models/NAME/adapter`, which says nothing but NAME."""
    trained, _ = write_adapter(tmp_path / "sft", 1)
    own = shutil.copytree(trained, tmp_path / "polite")
    folders = (None, str(trained), str(own))
    engines = [VllmEngine(str(nano.path()), name="nano", adapter=folder) for folder in folders]
    assert [engine.name for engine in engines] == ["nano", "nano+sft", "nano+polite"]
    for engine in engines:
        runner.run(engine.close())


def write_adapter(folder: Path, seed: int, rank: int = 4, alpha: int = 8) -> tuple[Path, Path]:
    """A random LoRA adapter for the embedded model, as peft lays it out, and the model with it in its weights."""
    adapter, merged = folder / "adapter", folder / "merged"
    shutil.copytree(nano.path(), merged)
    adapter.mkdir()
    model = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    chance, tensors = torch.Generator().manual_seed(seed), {}
    for name, module in model.named_modules():
        if name.endswith(("q_proj", "v_proj")):
            down = torch.randn(rank, module.in_features, generator=chance) / module.in_features**0.5
            up = torch.randn(module.out_features, rank, generator=chance) / 10
            tensors[f"base_model.model.{name}.lora_A.weight"] = down
            tensors[f"base_model.model.{name}.lora_B.weight"] = up
            module.weight.data += alpha / rank * up @ down
    save_file(tensors, adapter / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": alpha, "bias": "none"}
    settings |= {"target_modules": ["q_proj", "v_proj"], "base_model_name_or_path": "nano"}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    model.save_pretrained(merged)
    return adapter, merged
