"""Where the server engine begins: the address, the key, the list of models, what a server can do."""

from __future__ import annotations

import asyncio
import logging
import traceback
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.settings import Settings
from pipeline.engines import open_engine
from pipeline.engines import server as server_module
from pipeline.engines.base import Reply, Request
from pipeline.engines.scripted_answers import Fault, Rule, Script, answer, content_key
from pipeline.engines.scripted_server import running
from pipeline.engines.server import ServerEngine
from pipeline.engines.wire import NO_THINKING, Body, request_body
from pipeline.errors import EngineRefused, RequestFailed, UsageError
from tests.pipeline.engines.serving import ask, chat, play, received


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "FIRST_WAIT_S", 0.002)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@pytest.mark.parametrize(
    ("status", "cure"),
    [(401, "MY_KEY"), (403, "MY_KEY"), *((status, "base_url") for status in (404, 405, 501)), (307, "redirects")],
)
def test_what_no_request_can_pass_ends_the_run(
    status: int, cure: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("MY_KEY", "sk-secret-123")
    ledger = tmp_path / "ledger.jsonl"
    script = Script(faults=(Fault(kind="status", status=status, message="bad key sk-secret-123"),))
    failures = ask(script, *(chat(f"{n}") for n in range(9)), ledger=ledger, api_key_env="MY_KEY", concurrency=2)
    assert {type(failure) for failure in failures} == {EngineRefused}
    assert all(failure.exit_code == 2 for failure in failures if isinstance(failure, EngineRefused))
    message = str(failures[0])
    assert cure in message
    assert "http://127.0.0.1:" in message
    assert len(received(ledger)) <= 2
    shown = "".join(traceback.format_exception(failures[0]))  # type: ignore[arg-type]
    assert "sk-secret-123" not in message + shown + caplog.text + ledger.read_text()


def test_start_lists_models_reads_the_context_and_names_the_nearest() -> None:
    script = Script(models=("qwen-small", "llama-large"), context=4096)

    async def act(engine: ServerEngine) -> tuple[list[str], int | None]:
        return await engine.start(), engine.context

    assert play(script, act, model="llama-large") == (["qwen-small", "llama-large"], 4096)
    assert play(script, act, model="llama-large", context=100)[1] == 100
    with pytest.raises(EngineRefused, match="nearest: llama-large"):
        play(script, act, model="llama-larg")


def list_models(*answers: bytes, **options: Any) -> tuple[Any, list[bytes]]:
    """What `start` returns or raises when the server gives these answers one after the other, and the heads it got."""
    seen: list[bytes] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.append(await reader.readuntil(b"\r\n\r\n"))
        head, _, body = answers[min(len(seen), len(answers)) - 1].partition(b"|")
        writer.write(b"HTTP/1.1 %s\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s" % (head, len(body), body))
        await writer.drain()
        writer.close()

    async def once() -> Any:
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        engine = ServerEngine("m", [f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"], **options)
        try:
            return await engine.start()
        except EngineRefused as error:
            return error
        finally:
            await engine.close()
            server.close()

    return asyncio.run(once()), seen


def test_the_key_is_sent_to_the_server_and_nothing_without_one(monkeypatch: pytest.MonkeyPatch) -> None:
    refused, (head,) = list_models(b"401 No")
    assert isinstance(refused, EngineRefused)
    assert b"uthorization" not in head
    monkeypatch.setenv("OTHER_KEY", "sk-other\n")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-openai")
    _, (head,) = list_models(b"401 No", api_key_env="OTHER_KEY")
    assert b"Bearer sk-other\r\n" in head
    assert b"sk-openai" not in head
    refused, (head,) = list_models(b"401 No", api_key_env="")
    assert b"uthorization" not in head
    assert "set api_key_env" in str(refused)
    monkeypatch.setenv("OTHER_KEY", "sk-o\nther")
    with pytest.raises(UsageError, match="OTHER_KEY: ") as raised:
        list_models(b"401 No", api_key_env="OTHER_KEY")
    assert "sk-o" not in str(raised.value)


@pytest.mark.parametrize("answer", [b"404 No", b"405 No", b"501 No", b"400 No|{}", b'200 OK|{"data": 3}'])
def test_a_server_without_a_list_of_models_is_taken_as_it_is(answer: bytes) -> None:
    assert list_models(answer)[0] == []


@pytest.mark.parametrize("busy", [b"429 Busy", b"503 Loading"])
def test_a_server_that_is_busy_at_the_start_is_asked_again(busy: bytes) -> None:
    names, seen = list_models(busy, busy, b'200 OK|{"data": [{"id": "m"}]}')
    assert names == ["m"]
    assert len(seen) == 3


def test_a_preflight_that_was_refused_does_not_end_the_engine() -> None:
    async def act(engine: ServerEngine) -> Reply:
        with pytest.raises(EngineRefused):
            await engine.start()
        engine.name = "small"
        return await engine.ask(chat("x"))

    assert play(Script(models=("small",)), act, model="other").text


@pytest.mark.parametrize("place", range(160, 201, 5))
def test_a_key_across_the_end_of_an_excerpt_is_hidden_whole(place: int, monkeypatch: pytest.MonkeyPatch) -> None:
    key = "sk-0123456789-abcdefghij-ABCDEFGHIJ"
    monkeypatch.setenv("OPENAI_API_KEY", key)
    echo = "x" * place + key
    script = Script(
        rules=(
            Rule(last="status", faults=(Fault(kind="status", status=400, message=echo),)),
            Rule(last="choices", text=echo, faults=(Fault(kind="choices", choices=2),)),
            Rule(last="cut", text=echo, faults=(Fault(kind="cut_json"),)),
        )
    )
    for failure in ask(script, chat("status"), chat("choices"), chat("cut")):
        assert isinstance(failure, RequestFailed)
        assert "sk-0" not in failure.detail


def engine_section(url: str, **more: Any) -> dict[str, Any]:
    return {"backend": "server", "model": "scripted", "base_urls": [url], **more}


@pytest.mark.parametrize(
    ("judge", "sent"), [({}, False), ({"api_key_env": "JUDGE_KEY"}, True), ({"api_key_env": "UNSET_KEY"}, False)]
)
def test_a_key_goes_to_the_endpoint_it_was_named_with_only(
    judge: dict[str, Any], sent: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("ENGINE_KEY", "JUDGE_KEY", "OPENAI_API_KEY"):
        monkeypatch.setenv(name, f"sk-{name}")

    async def act() -> None:
        first, second = tmp_path / "engine.jsonl", tmp_path / "judge.jsonl"
        async with running(Script(), ledger=first) as one, running(Script(), ledger=second) as other:
            settings = Settings.model_validate(
                {
                    "engine": engine_section(one, api_key_env="ENGINE_KEY"),
                    "judge": {"base_urls": [other], **judge},
                    "critic": {"base_urls": [one.replace("/v1", "/v1/")], "timeout_s": 5},
                }
            )
            for section in ({}, settings.judge, settings.critic):
                engine = open_engine(settings.engine_for(section))
                await engine.ask(chat("x"))
                await engine.close()

    asyncio.run(act())
    assert [line["authorized"] for line in received(tmp_path / "engine.jsonl")] == [True, True]
    assert [line["authorized"] for line in received(tmp_path / "judge.jsonl")] == [sent]


@pytest.mark.parametrize(("owner", "asked"), [("vllm", True), ("sglang", True), ("scripted", False)])
def test_a_label_request_asks_servers_that_can_to_leave_the_thinking_out(
    owner: str, asked: bool, tmp_path: Path
) -> None:
    ledger = tmp_path / "ledger.jsonl"

    async def act(engine: ServerEngine) -> None:
        await engine.start()
        await engine.ask(Request([{"role": "user", "content": "A or B"}], "comparison", labels=("A", "B")))
        await engine.ask(chat("x"))
        await engine.ask(Request("A or B", "comparison", labels=("A", "B")))

    play(Script(owned_by=owner), act, ledger=ledger)
    bodies = [line["body"] for line in received(ledger)]
    assert [body.get("chat_template_kwargs") for body in bodies] == [
        {"enable_thinking": False} if asked else None,
        None,
        None,
    ]


@pytest.mark.parametrize("url", ["ftp://host/v1", "localhost:8000", "http://user:secret@host/v1"])
def test_a_bad_address_is_refused_without_showing_a_password(url: str) -> None:
    with pytest.raises(UsageError) as raised:
        ServerEngine("m", [url])
    assert "secret" not in str(raised.value)


def test_a_server_that_refuses_to_leave_the_thinking_out_is_asked_without(tmp_path: Path) -> None:
    """The scripted server refuses by a hash of the body; the salt makes it refuse just the one with the switch."""
    ledger = tmp_path / "ledger.jsonl"
    first, second = (
        Request([{"role": "user", "content": f"{word}: A or B"}], "comparison", labels=("A", "B"))
        for word in ("first", "second")
    )

    def scripted(salt: int) -> Script:
        refusal = Fault(kind="status", status=400, message="no chat_template_kwargs here", rate=0.5)
        return Script(owned_by="vllm", salt=str(salt), faults=(refusal,))

    def refuses(script: Script, request: Request, more: Body) -> bool:
        body = request_body(request, "scripted")[0] | more
        return answer(script, body, content_key(body), 0).fault is not None

    script = next(
        found
        for found in map(scripted, range(1000))
        if refuses(found, first, NO_THINKING) and not refuses(found, first, {}) and not refuses(found, second, {})
    )

    async def act(engine: ServerEngine) -> list[Reply]:
        await engine.start()
        return [await engine.ask(first), await engine.ask(second)]

    assert [reply.finish_reason for reply in play(script, act, ledger=ledger)] == ["labels", "labels"]
    assert ["chat_template_kwargs" in line["body"] for line in received(ledger)] == [True, False, False]
