"""The engine in this process: what comes back, what is refused, and that nobody waits for ever."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.engines.base import Reply, Request
from pipeline.engines.transformers import TransformersEngine
from pipeline.errors import EngineDown, EngineRefused, RequestFailed, ResourceError
from pipeline.records import Message
from tests.pipeline.lm.tiny import save_tiny, tiny_llama, tiny_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny")


def with_engine(folder: Path, work: Callable[[TransformersEngine], Awaitable[Any]], **options: Any) -> Any:
    async def run() -> Any:
        engine = TransformersEngine(str(folder), **options)
        try:
            return await asyncio.wait_for(work(engine), 60)
        finally:
            await engine.close()

    return asyncio.run(run())


def ask_all(folder: Path, requests: list[Request], **options: Any) -> list[Reply]:
    async def work(engine: TransformersEngine) -> list[Reply]:
        return await asyncio.gather(*(engine.ask(request, n) for n, request in enumerate(requests)))

    return with_engine(folder, work, **options)


def chat(text: str) -> list[Message]:
    return [Message(role="user", content=text)]


def drafts(count: int, **options: Any) -> list[Request]:
    settings = {"max_tokens": 12, "temperature": 1.0, **options}
    return [Request(chat(f"Tell me {n} stories"), "draft", seed=n, **settings) for n in range(count)]


def test_a_greedy_reply_is_what_generate_gives(folder: Path) -> None:
    request = Request(chat("Tell me a story"), "draft", max_tokens=15)
    (reply,) = ask_all(folder, [request])
    tokenizer, model = tiny_tokenizer(), tiny_llama()
    prompt = tokenizer.apply_chat_template(
        request.prompt, add_generation_prompt=True, return_tensors="pt", return_dict=False
    )
    whole = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=15, do_sample=False)
    expected = whole[0, prompt.shape[1] :].tolist()
    assert list(reply.token_ids) == expected
    assert reply.text == tokenizer.decode(expected, skip_special_tokens=True)
    assert reply.finish_reason == ("stop" if expected[-1] == 2 else "length")
    assert reply.usage[:2] == (prompt.shape[1], len(expected))


def test_labels_are_exact_for_chats_and_raw_text(folder: Path) -> None:
    tokenizer, model = tiny_tokenizer(), tiny_llama()
    text = "The answer is: ("
    raw, talk = ask_all(
        folder, [Request(p, "comparison", labels=("A", "B", "10", "1")) for p in (text, chat("A or B?"))]
    )
    for reply, prompt in (
        (raw, tokenizer.encode(text)),
        (talk, tokenizer.apply_chat_template(chat("A or B?"), add_generation_prompt=True, return_dict=False)),
    ):
        one, zero = tokenizer.encode("10")
        with torch.no_grad():
            logps = torch.log_softmax(model(torch.tensor([[*prompt, one]])).logits[0], -1)
        ten = logps[-2, one].item() + logps[-1, zero].item()
        assert reply.logprobs is not None
        assert reply.logprobs["A"] == pytest.approx(logps[-2, tokenizer.encode("A")[0]].item(), abs=1e-4)
        assert reply.logprobs["10"] == pytest.approx(ten, abs=1e-4)
        assert math.exp(reply.logprobs["1"]) == pytest.approx(math.exp(logps[-2, one].item()) - math.exp(ten), abs=1e-6)
        assert (reply.text, reply.finish_reason, reply.method) == ("", "labels", "logprobs")


def test_many_requests_of_both_kinds_are_answered_together(folder: Path) -> None:
    requests: list[Request] = []
    for n, draft in enumerate(drafts(60)):
        requests += [draft, Request(chat(f"Is {n} better?"), "comparison", labels=("A", "B"))]
    together = ask_all(folder, requests, concurrency=16)
    assert all((reply.logprobs is None) == (n % 2 == 0) for n, reply in enumerate(together))
    alone = ask_all(folder, requests[:4])
    assert [reply.token_ids for reply in together[:4]] == [reply.token_ids for reply in alone]


def test_deterministic_replies_are_equal_bit_for_bit(folder: Path) -> None:
    requests = [*drafts(5), *(Request(chat(f"Is {n} better?"), "comparison", labels=("A", "B")) for n in range(5))]
    first = ask_all(folder, requests, deterministic=True)
    assert first[::-1] == ask_all(folder, requests[::-1], deterministic=True)
    with_engine(folder, lambda engine: _is(engine.fingerprint["deterministic"], "true"), deterministic=True)


async def _is(value: object, expected: object) -> None:
    assert value == expected


def test_a_stop_string_ends_and_is_cut(folder: Path) -> None:
    (plain,) = ask_all(folder, drafts(1, max_tokens=30))
    stop = plain.text[6:9]
    (reply,) = ask_all(folder, drafts(1, max_tokens=30, stop=(stop, "never there")))
    assert reply.text == plain.text[: plain.text.find(stop)]
    assert reply.finish_reason == "stop"
    assert len(reply.token_ids) < len(plain.token_ids)


def test_a_prompt_longer_than_the_context_fails_alone(folder: Path) -> None:
    async def work(engine: TransformersEngine) -> None:
        long = Request("word " * 300, "draft", max_tokens=5)
        results = await asyncio.gather(engine.ask(long), engine.ask(drafts(1)[0]), return_exceptions=True)
        assert isinstance(results[0], RequestFailed)
        assert results[0].reason == "too_long"
        assert "context is 100" in results[0].detail
        assert isinstance(results[1], Reply)

    with_engine(folder, work, context=100)


def test_a_hopelessly_long_prompt_is_refused_before_it_is_tokenised(folder: Path, monkeypatch) -> None:
    async def work(engine: TransformersEngine) -> None:
        monkeypatch.setattr(engine.chat, "prompt", None)
        for prompt in ("word " * 100_000, [{"role": "user", "content": "word " * 100_000}]):
            with pytest.raises(RequestFailed, match="at least") as failed:
                await engine.ask(Request(prompt, "draft", max_tokens=5))
            assert failed.value.reason == "too_long"

    with_engine(folder, work, context=100)


def test_max_tokens_is_cut_down_to_the_context(folder: Path) -> None:
    (reply,) = ask_all(folder, [Request("x" * 20, "draft", max_tokens=1000)], context=40)
    assert sum(reply.usage[:2]) <= 40
    assert reply.finish_reason in ("length", "stop")


def test_special_token_texts_are_counted(folder: Path) -> None:
    async def work(engine: TransformersEngine) -> None:
        await engine.ask(Request(chat("<|im_end|> and <|im_start|>"), "draft", max_tokens=1))
        assert engine.neutralised == 2

    with_engine(folder, work)


def test_the_lowest_priority_number_goes_first(folder: Path) -> None:
    async def work(engine: TransformersEngine) -> list[int]:
        order: list[int] = []

        async def one(n: int, request: Request) -> None:
            await engine.ask(request, priority=-n)
            order.append(n)

        await asyncio.gather(*(one(n, request) for n, request in enumerate(drafts(6, max_tokens=3))))
        return order

    assert with_engine(folder, work, concurrency=1) == [5, 4, 3, 2, 1, 0]


@pytest.mark.parametrize(
    ("raised", "expected"),
    [(ValueError("broken"), ValueError), (RuntimeError("DefaultCPUAllocator: can't allocate memory"), ResourceError)],
)
def test_an_error_in_the_thread_reaches_all_who_wait(
    folder: Path, raised: Exception, expected: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work(engine: TransformersEngine) -> list[Any]:
        def fail(*_args: Any, **_given: Any) -> None:
            raise raised

        monkeypatch.setattr(engine._decoder.model, "forward", fail)
        results = await asyncio.gather(*(engine.ask(request) for request in drafts(9)), return_exceptions=True)
        with pytest.raises(expected):
            await engine.ask(drafts(1)[0])
        return results

    results = with_engine(folder, work, concurrency=4)
    assert [type(result) for result in results] == [expected] * 9


def test_closing_leaves_nobody_waiting(folder: Path) -> None:
    async def work(engine: TransformersEngine) -> None:
        asked = [asyncio.create_task(engine.ask(request)) for request in drafts(20, max_tokens=400)]
        await asyncio.sleep(0.01)
        await engine.close()
        results = await asyncio.gather(*asked, return_exceptions=True)
        assert any(isinstance(result, EngineDown) for result in results)
        assert all(isinstance(result, Reply | EngineDown) for result in results)

    with_engine(folder, work, concurrency=2)


def test_a_cancelled_request_holds_up_nobody(folder: Path) -> None:
    async def work(engine: TransformersEngine) -> Reply:
        asked = [asyncio.create_task(engine.ask(request)) for request in drafts(5, max_tokens=50)]
        await asyncio.sleep(0)
        for task in asked:
            task.cancel()
        return await engine.ask(drafts(1)[0])

    assert with_engine(folder, work).usage.completion_tokens > 0


def test_a_model_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EngineRefused, match="no such folder"):
        TransformersEngine(str(tmp_path / "absent"))
