"""One engine on several real local servers: one slow, one failing, one dying and returning. Their ledgers are the
witnesses.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from pipeline.config.settings import Settings
from pipeline.engines import endpoints as endpoints_module
from pipeline.engines import server as server_module
from pipeline.engines.base import Reply, Request
from pipeline.engines.endpoints import Limit
from pipeline.engines.scripted import ScriptedEngine
from pipeline.engines.scripted_answers import Fault, Script
from pipeline.engines.scripted_server import running
from pipeline.engines.server import ServerEngine
from pipeline.errors import EngineDown, EngineRefused
from tests.pipeline.engines.serving import chat

CHAINS, TURNS, PLACES = 150, 3, 4


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "FIRST_WAIT_S", 0.002)
    monkeypatch.setattr(endpoints_module, "FIRST_PROBE_S", 0.02)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


class Node:
    """A scripted server that can die and come back at the same address. Its ledger goes on."""

    def __init__(self, script: Script, ledger: Path) -> None:
        self.script, self.ledger = script, ledger
        self.url = ""
        self._stack = AsyncExitStack()

    async def start(self) -> None:
        port = urlsplit(self.url).port or 0
        self.url = await self._stack.enter_async_context(running(self.script, port=port, ledger=self.ledger))

    async def stop(self) -> None:
        await self._stack.aclose()

    def events(self) -> list[dict[str, Any]]:
        """Of the ledger, without the probes; each with the ledger's name as `node`."""
        lines = [json.loads(line) for line in self.ledger.read_text().splitlines()]
        probes = {line["key"] for line in lines if line["event"] == "received" and "Hello." in json.dumps(line["body"])}
        return [{**line, "node": self.ledger.stem} for line in lines if line["key"] not in probes]


@asynccontextmanager
async def pool(nodes: list[Node], **options: Any) -> AsyncIterator[ServerEngine]:
    for node in nodes:
        await node.start()
    engine = ServerEngine("scripted", [node.url for node in nodes], **{"concurrency": PLACES, **options})
    try:
        yield engine
    finally:
        await engine.close()
        for node in nodes:
            await node.stop()


async def until_received(node: Node, number: int) -> None:
    while node.ledger.read_text().count('"received"') < number:  # noqa: ASYNC110 - the ledger is a file
        await asyncio.sleep(0.002)


def question(chain: int, said: tuple[str, ...] = (), form: str = "chat") -> Request:
    """form: chat; alike: a chat that begins as all others do; few-shot: text behind examples that all share."""
    begin = {"chat": "", "alike": "Read this. " * 50, "few-shot": "An example.\n" * 50}[form]
    turns = [{"role": "user", "content": f"{begin}question {chain}"}]
    for reply in said:
        turns += [{"role": "assistant", "content": reply}, {"role": "user", "content": "And then?"}]
    prompt = "\n".join(turn["content"] for turn in turns) if form == "few-shot" else turns
    return Request(prompt, "draft", max_tokens=96, temperature=1.0, seed=7)


async def converse(engine: Any, chain: int, form: str = "chat") -> tuple[str, ...]:
    """What is said in a chain of turns, each request an extension of the last one."""
    said: tuple[str, ...] = ()
    for _ in range(TURNS):
        said = (*said, (await engine.ask(question(chain, said, form), priority=chain)).text)
    return said


async def count_idle(engine: ServerEngine, seen: Counter[str]) -> None:
    """Counts the steps of the event loop with requests in the queue, and those in which an endpoint has a place too."""
    places = engine._pool
    while True:
        if any(not turn.done() for waiting in places._waiting.values() for *_, turn in waiting):
            seen["queued"] += 1
            seen["idle"] += any(endpoint.has_place() for endpoint in places.usable())
        await asyncio.sleep(0)


def converse_all(
    nodes: list[Node], during: Callable[[], Awaitable[None]] | None = None, form: str = "chat"
) -> list[tuple[str, ...]]:
    """All chains at once, so that requests queue until the last ones; `during` runs beside them.

    At no step of the event loop may an endpoint have a place that is free while a request waits.
    """
    seen: Counter[str] = Counter()

    async def act() -> list[tuple[str, ...]]:
        async with pool(nodes) as engine:
            await engine.start()
            counting = asyncio.ensure_future(count_idle(engine, seen))
            beside = asyncio.ensure_future(during()) if during else None
            said = await asyncio.gather(*(converse(engine, chain, form) for chain in range(CHAINS)))
            if beside:
                await beside
            counting.cancel()
            return said

    said = asyncio.run(act())
    assert seen["queued"] > CHAINS
    assert seen["idle"] == 0
    return said


def expected(form: str = "chat") -> list[tuple[str, ...]]:
    async def act() -> list[tuple[str, ...]]:
        return await asyncio.gather(*(converse(ScriptedEngine(), chain, form) for chain in range(CHAINS)))

    return asyncio.run(act())


def history(nodes: list[Node]) -> list[dict[str, Any]]:
    return sorted((event for node in nodes for event in node.events()), key=lambda event: event["t"])


def is_kept_busy(events: list[dict[str, Any]], node: str) -> bool:
    """Whether the others together never received more than one request for each place in the system while this
    endpoint had nothing to do and requests queued.

    So many may come, though no place is ever free (`converse_all` looks): servers and client share an event loop, and
    in the round of it that carries a reply to the client and the next request back, every other place gets one too; a
    place whose request is reset at once gets a second. While requests queue there are chains for all places; the last
    turns of as many chains are left out.
    """
    places = PLACES * len({event["node"] for event in events})
    in_flight = since = longest = 0
    for event in events[: -2 * TURNS * places]:
        if event["node"] == node:
            in_flight += 1 if event["event"] == "received" else -1
            since = 0
        elif event["event"] == "received" and not in_flight:
            since += 1
            longest = max(longest, since)
    return longest <= places


def chain_of(event: dict[str, Any]) -> str:
    return re.findall(r"question \d+", json.dumps(event["body"]))[0]


@pytest.mark.parametrize("form", ["chat", "alike", "few-shot"])
def test_two_healthy_endpoints_get_each_request_once_and_chains_stay_where_they_began(
    form: str, tmp_path: Path
) -> None:
    nodes = [Node(Script(latency_s=(0.01, 0.03)), tmp_path / f"{name}.jsonl") for name in "ab"]
    assert converse_all(nodes, form=form) == expected(form)
    events = history(nodes)
    received = [event for event in events if event["event"] == "received"]
    assert len(received) == CHAINS * TURNS
    assert all(is_kept_busy(events, name) for name in "ab")
    homes: dict[str, list[str]] = {}
    for event in received:
        homes.setdefault(chain_of(event), []).append(event["node"])
    assert len(homes) == CHAINS
    moves = sum(a != b for nodes_of in homes.values() for a, b in pairwise(nodes_of))
    assert moves < 0.1 * CHAINS * (TURNS - 1)


@pytest.mark.parametrize("form", ["alike", "few-shot"])
def test_chains_that_begin_alike_spread_where_one_endpoint_had_room_for_all(form: str, tmp_path: Path) -> None:
    nodes = [Node(Script(latency_s=(0.01, 0.03)), tmp_path / f"{name}.jsonl") for name in "ab"]

    async def act() -> None:
        async with pool(nodes) as engine:
            for first in range(0, 5 * PLACES, PLACES):
                await asyncio.gather(*(converse(engine, first + n, form) for n in range(PLACES)))

    asyncio.run(act())
    received = [[chain_of(event) for event in node.events() if event["event"] == "received"] for node in nodes]
    assert [len(chains) for chains in received] == [5 * PLACES * TURNS // 2] * 2
    assert not set(received[0]) & set(received[1])


def test_four_endpoints_one_slow_and_none_failing_get_each_request_once_and_none_is_idle(tmp_path: Path) -> None:
    """Every request is sent 1.0 times."""
    nodes = [Node(Script(latency_s=0.01), tmp_path / f"{name}.jsonl") for name in "abc"]
    nodes.append(Node(Script(latency_s=0.08), tmp_path / "slow.jsonl"))
    assert converse_all(nodes) == expected()
    events = history(nodes)
    assert sum(event["event"] == "received" for event in events) == CHAINS * TURNS
    assert {event["status"] for event in events if event["event"] == "answered"} == {200}
    assert all(is_kept_busy(events, name) for name in ("a", "b", "c", "slow"))


def test_four_endpoints_one_slow_one_failing_one_dying_and_returning(tmp_path: Path) -> None:
    faults = (Fault(kind="status", status=500, rate=0.15), Fault(kind="reset", rate=0.18))
    plain, _, _, dying = nodes = [
        Node(Script(latency_s=0.01), tmp_path / "plain.jsonl"),
        Node(Script(latency_s=0.08), tmp_path / "slow.jsonl"),
        Node(Script(latency_s=0.01, faults=faults), tmp_path / "failing.jsonl"),
        Node(Script(latency_s=0.01), tmp_path / "dying.jsonl"),
    ]
    before_death = 0

    async def die_and_return() -> None:
        nonlocal before_death
        await until_received(dying, 20)
        await dying.stop()
        before_death = len(dying.events())
        await until_received(plain, 60)
        await dying.start()

    assert converse_all(nodes, die_and_return) == expected()
    events = history(nodes)
    answered = Counter(event["key"] for event in events if event["event"] == "answered" and event["status"] == 200)
    assert len(answered) == CHAINS * TURNS
    assert set(answered.values()) == {1}
    outcomes = Counter((event["node"], event["fault"]) for event in events if event["event"] == "answered")
    assert outcomes["failing", "status"] > 5
    assert outcomes["failing", "reset"] > 5
    assert len(dying.events()) > before_death + 20
    assert all(is_kept_busy(events, name) for name in ("plain", "slow"))


def test_when_all_endpoints_are_gone_the_run_stops(tmp_path: Path) -> None:
    nodes = [Node(Script(), tmp_path / f"{name}.jsonl") for name in "ab"]

    async def act() -> None:
        async with pool(nodes) as engine:
            await engine.ask(chat("x"))
            for node in nodes:
                await node.stop()
            with pytest.raises(EngineDown, match="given up after 8 tries"):
                await engine.ask(chat("y"))
            with pytest.raises(EngineDown, match="no answer"):
                await engine.start()

    asyncio.run(act())


def test_what_hangs_at_one_endpoint_is_answered_by_another(tmp_path: Path) -> None:
    hanging, fine = nodes = [
        Node(Script(faults=(Fault(kind="hang"),)), tmp_path / "hanging.jsonl"),
        Node(Script(), tmp_path / "fine.jsonl"),
    ]

    async def act() -> list[Reply]:
        async with pool(nodes, timeout_s=1.0) as engine:
            return await asyncio.gather(*(engine.ask(chat(f"{number}")) for number in range(12)))

    assert all(reply.text for reply in asyncio.run(act()))
    assert len([event for event in hanging.events() if event["event"] == "received"]) <= 2 * PLACES
    assert len([event for event in fine.events() if event["event"] == "received"]) == 12


def test_all_endpoints_have_to_serve_the_model(tmp_path: Path) -> None:
    nodes = [
        Node(Script(models=("scripted",), context=4096), tmp_path / "a.jsonl"),
        Node(Script(models=("other",)), tmp_path / "b.jsonl"),
    ]

    async def act() -> None:
        async with pool(nodes) as engine:
            with pytest.raises(EngineRefused, match="no model 'scripted' here; nearest: other; all endpoints"):
                await engine.start()

    asyncio.run(act())


def test_one_that_is_not_up_at_the_start_is_left_out_until_it_is(tmp_path: Path) -> None:
    _, late = nodes = [
        Node(Script(), tmp_path / "up.jsonl"),
        Node(Script(), tmp_path / "late.jsonl"),
    ]

    async def act() -> None:
        async with pool(nodes) as engine:
            await late.stop()
            await engine.start()
            await asyncio.gather(*(engine.ask(chat(f"{number}")) for number in range(9)))
            assert not late.events()
            await late.start()
            while not late.events():
                await asyncio.gather(*(engine.ask(chat(f"more {number}", max_tokens=9)) for number in range(9)))

    asyncio.run(act())


def test_a_busy_endpoint_rests_as_long_as_it_asks_and_others_take_its_requests(tmp_path: Path) -> None:
    busy = Fault(kind="status", status=429, retry_after="0.5", first=1)
    nodes = [Node(Script(faults=(busy,)), tmp_path / "busy.jsonl"), Node(Script(), tmp_path / "fine.jsonl")]

    async def act() -> None:
        async with pool(nodes, concurrency=1) as engine:
            for number in range(20):
                await engine.ask(chat(f"{number}"), priority=number)

    asyncio.run(act())
    times = [event["t"] for event in nodes[0].events() if event["event"] == "received"]
    assert all(later - earlier >= 0.5 for earlier, later in pairwise(times))
    assert sum(event["event"] == "received" for event in nodes[1].events()) == 20


def test_the_limit_halves_once_for_what_was_sent_before_and_grows_as_tcp_does() -> None:
    limit = Limit(64)
    limit.overloaded(1.0)
    limit.overloaded(1.0)
    assert limit.value == 32
    limit.replied()
    assert limit.value == pytest.approx(32 + 1 / 32)
    limit.restart()
    for _ in range(31):
        limit.replied()
    assert limit.value == 32


def test_a_pool_has_the_fingerprint_of_a_single_endpoint() -> None:
    one = ServerEngine("m", ["http://a:1/v1"], revision="2")
    several = ServerEngine("m", ["http://b:1/v1", "http://c:1/v1"], revision="2")
    assert one.fingerprint == several.fingerprint


@pytest.mark.parametrize(("urls", "kept"), [(["a", "b"], True), (["b"], True), (["a", "c"], False)])
def test_a_key_goes_to_no_address_that_it_was_not_named_with(urls: list[str], kept: bool) -> None:
    engine = {"model": "m", "base_urls": ["http://a/v1", "http://b/v1"], "api_key_env": "ENGINE_KEY"}
    settings = Settings.model_validate({"engine": engine})
    found = settings.engine_for({"base_urls": [f"http://{host}/v1" for host in urls]})
    assert found.api_key_env == ("ENGINE_KEY" if kept else "")
