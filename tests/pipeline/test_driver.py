from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from pipeline.driver import MIN_OPEN_SHARDS, Ask, Driver, Stage
from pipeline.engines.base import Request
from pipeline.errors import CorruptError, EngineDown, StoppedError
from pipeline.journal import Journal
from pipeline.records import Failure, Outcome, Record
from pipeline.store import RunFolder, StageWriter
from tests.support import Told, play, published, write_prompts

Run = Callable[[Record, Ask], Awaitable[Outcome]]


def with_prompts(path: Path, num: int, shard_size: int) -> RunFolder:
    run = RunFolder(path / "r", create=True)
    writer = StageWriter(run, "prompts", "prompts")
    for number, start in enumerate(range(0, num, shard_size)):
        lines = [
            {"id": f"r{n}", "messages": [{"role": "user", "content": f"Q{n}?"}], "tags": [], "source": "s"}
            for n in range(start, min(num, start + shard_size))
        ]
        writer.publish(number, lines, prompts=len(lines), num_in=len(lines))
    return run


def driver_of(run: RunFolder, *stages: tuple[str, Run], window: int = 4, **options: Any) -> Driver:
    names = [name for name, _ in stages]
    chain = [
        Stage(name, call, StageWriter(run, name, f"made by {name}"), tuple(names[:place]))
        for place, (name, call) in enumerate(stages)
    ]
    return Driver(run, chain, Journal(run.path / "journal"), window=window, **options)


def asking(engine: Told, kind: str = "draft") -> Run:
    async def call(record: Record, ask: Ask) -> Outcome:
        reply = await ask(engine, Request(record.messages, kind, seed=1, temperature=1.0))
        return Outcome({"id": record.id, "text": reply.text})

    return call


def test_at_most_the_window_is_in_flight_and_the_oldest_goes_first(tmp_path: Path) -> None:
    running: list[int] = []
    most = 0

    async def call(record: Record, ask: Ask) -> Outcome:
        nonlocal most
        running.append(record.ordinal)
        most = max(most, len(running))
        assert record.ordinal < min(running) + 4
        await asyncio.sleep(0.001)
        running.remove(record.ordinal)
        return Outcome({"id": record.id})

    driver = driver_of(with_prompts(tmp_path, 40, 7), ("generate", call))
    asyncio.run(driver.run())
    assert most == 4
    assert driver.progress.done == driver.progress.total == 40


def test_requests_carry_the_records_place_as_their_priority(tmp_path: Path) -> None:
    engine = Told(lambda request: "x")
    asyncio.run(driver_of(with_prompts(tmp_path, 9, 2), ("generate", asking(engine)), window=3).run())
    asked = [int(request.prompt[0]["content"][1:-1]) for request in engine.requests]
    assert sorted(asked) == list(range(9))
    assert engine.priorities == asked


@pytest.mark.parametrize("phase", [1, 2])
def test_all_requests_of_a_record_have_one_priority_that_no_other_has_also_after_a_stop(
    phase: int, tmp_path: Path
) -> None:
    def fail(request: Request) -> str:
        if request.kind == "comparison" and "Q7" in str(request.prompt):
            raise EngineDown("gone")
        return "x"

    run, engines = with_prompts(tmp_path, 12, 5).of_phase(phase), (Told(fail), Told(lambda request: "x"))
    taken = [number for number in range(12) if phase == 1 or number % 3]
    for engine in engines:
        stages = ("generate", asking(engine)), ("rank", asking(engine, "comparison"))
        driver = driver_of(run, *stages, takes=lambda prompt: int(prompt["id"][1:]) in taken)
        with pytest.raises(EngineDown) if engine.say is fail else nullcontext():
            asyncio.run(driver.run())
    found: dict[int, set[int]] = {}
    for engine in engines:
        assert engine.kinds()["comparison"] > 0
        for request, priority in zip(engine.requests, engine.priorities, strict=True):
            found.setdefault(int(request.prompt[0]["content"][1:-1]), set()).add(priority)
    assert found == {number: {number} for number in taken}


@pytest.mark.parametrize("shard_size", [1, 3, 50])
def test_one_slow_record_does_not_let_finished_ones_pile_up(tmp_path: Path, shard_size: int) -> None:
    window, started, num = 8, 0, 50 + 8 * shard_size
    release = asyncio.Event()

    async def call(record: Record, ask: Ask) -> Outcome:
        nonlocal started
        started += 1
        if record.ordinal == 0:
            await release.wait()
        return Outcome({"id": record.id})

    async def whole() -> int:
        driver = driver_of(with_prompts(tmp_path, num, shard_size), ("generate", call), window=window)
        task = asyncio.create_task(driver.run())
        before = -1
        while before != started:
            before = started
            await asyncio.sleep(0.05)
        assert driver.run_folder.parts("generate") == []
        release.set()
        await task
        return before

    bound = max(MIN_OPEN_SHARDS * shard_size, 2 * window + shard_size)
    assert asyncio.run(whole()) <= bound < num
    assert started == num


def test_parts_come_out_in_input_order_whatever_finishes_first(tmp_path: Path) -> None:
    async def call(record: Record, ask: Ask) -> Outcome:
        await asyncio.sleep(0.02 if record.ordinal < 3 else 0)
        return Outcome({"id": record.id})

    run = with_prompts(tmp_path, 12, 3)
    asyncio.run(driver_of(run, ("generate", call), window=12).run())
    assert [line["id"] for line in run.read("generate")] == [f"r{n}" for n in range(12)]


def test_a_record_goes_through_its_whole_chain_without_waiting_for_the_others(tmp_path: Path) -> None:
    order: list[str] = []

    def step(name: str) -> Run:
        async def call(record: Record, ask: Ask) -> Outcome:
            order.append(f"{name} {record.id}")
            if (name, record.ordinal) == ("generate", 1):
                await asyncio.sleep(0.05)
            return Outcome({"id": record.id})

        return call

    run = with_prompts(tmp_path, 3, 3)
    asyncio.run(driver_of(run, ("generate", step("generate")), ("rank", step("rank"))).run())
    assert order.index("rank r2") < order.index("rank r1")


def test_a_failed_or_filtered_record_goes_no_further_and_is_counted_once(tmp_path: Path) -> None:
    lost = Failure(-1, -1, "draft", "empty", "", 3)

    async def first(record: Record, ask: Ask) -> Outcome:
        if record.ordinal % 4 == 1:
            return Outcome(None, failures=(lost, lost))
        if record.ordinal % 4 == 2:
            return Outcome(None, filtered=(lost,))
        return Outcome({"id": record.id}, failures=(lost,) if record.ordinal % 4 == 3 else ())

    async def second(record: Record, ask: Ask) -> Outcome:
        assert record.lines["generate"]["id"] == record.id
        return Outcome({"id": record.id})

    run = with_prompts(tmp_path, 12, 5)
    asyncio.run(driver_of(run, ("generate", first), ("rank", second)).run())
    counts = [run.manifest(name).counts for name in ("generate", "rank")]  # type: ignore[union-attr]
    assert counts[0] == {"in": 12, "ok": 6, "filtered": 3, "failed": 3}
    assert counts[1] == {"in": 6, "ok": 6, "filtered": 0, "failed": 0}
    assert len(list(run.losses("failed", "generate"))) == 2 * 3 + 3
    assert len(list(run.losses("filtered", "generate"))) == 3


def test_an_exception_in_a_stage_ends_the_run_and_leaves_what_was_paid_for(tmp_path: Path) -> None:
    engine = Told(lambda request: "x")
    asked = asking(engine)

    async def buggy(record: Record, ask: Ask) -> Outcome:
        outcome = await asked(record, ask)
        if record.ordinal == 20:
            raise ZeroDivisionError(record.id)
        return outcome

    run = with_prompts(tmp_path, 40, 10)
    with pytest.raises(ZeroDivisionError, match="r20"):
        asyncio.run(driver_of(run, ("generate", buggy)).run())
    paid = len(engine.requests)
    assert paid <= 20 + 4 + 1
    assert len(list(run.read("generate"))) in (10, 20)
    asyncio.run(driver_of(run, ("generate", asked)).run())
    assert len(list(run.read("generate"))) == 40
    assert len(engine.requests) <= 40 + 4


def test_an_engine_that_goes_down_stops_the_run_resumably(tmp_path: Path) -> None:
    def say(request: Request) -> str:
        if "Q15" in str(request.prompt):
            raise EngineDown("127.0.0.1: gone")
        return "x"

    run, down, up = with_prompts(tmp_path, 20, 5), Told(say), Told(lambda request: "x")
    with pytest.raises(EngineDown, match="gone"):
        asyncio.run(driver_of(run, ("generate", asking(down))).run())
    assert len(list(run.read("generate"))) == 15
    asyncio.run(driver_of(run, ("generate", asking(up))).run())
    assert len(down.requests) + len(up.requests) == 20 + 1


def test_a_stop_lets_what_is_in_flight_finish_and_keeps_it(tmp_path: Path) -> None:
    run, engine = with_prompts(tmp_path, 30, 5), Told(lambda request: "x")
    driver = driver_of(run, ("generate", asking(engine)))

    async def slow(request: Request, priority: int = 0) -> Any:
        if len(engine.requests) == 12:
            driver.stop()
        await asyncio.sleep(0.01)
        return await Told.ask(engine, request, priority)

    engine.ask = slow  # type: ignore[method-assign]
    with pytest.raises(StoppedError, match="the same command goes on from here"):
        asyncio.run(driver.run())
    asked = len(engine.requests)
    assert 12 <= asked <= 12 + 4
    del engine.ask
    asyncio.run(driver_of(run, ("generate", asking(engine))).run())
    assert len(engine.requests) == 30


def test_a_stop_waits_no_longer_than_its_grace(tmp_path: Path) -> None:
    async def hangs(record: Record, ask: Ask) -> Outcome:
        driver.stop()
        await asyncio.Event().wait()
        raise AssertionError

    driver = driver_of(with_prompts(tmp_path, 3, 3), ("generate", hangs), grace_s=0.1)
    began = time.monotonic()
    with pytest.raises(StoppedError):
        asyncio.run(driver.run())
    assert time.monotonic() - began < 2


@pytest.mark.parametrize(("limit", "expected"), [(1, 1), (5, 5), (7, 7), (100, 12)])
def test_a_limit_takes_the_first_prompts_of_the_run(tmp_path: Path, limit: int, expected: int) -> None:
    run = with_prompts(tmp_path, 12, 5)
    engine = Told(lambda request: "x")
    asyncio.run(driver_of(run, ("generate", asking(engine)), limit=limit).run())
    assert [line["id"] for line in run.read("generate")] == [f"r{n}" for n in range(expected)]
    asyncio.run(driver_of(run, ("generate", asking(engine))).run())
    assert len(list(run.read("generate"))) == len(engine.requests) == 12


def test_a_stage_takes_only_the_prompts_that_the_stages_before_it_have_been_through(tmp_path: Path) -> None:
    run, engine = with_prompts(tmp_path, 12, 5), Told(lambda request: "x")
    asyncio.run(driver_of(run, ("generate", asking(engine)), limit=7).run())
    writer = StageWriter(run, "rank", "g")
    stage = Stage("rank", asking(engine, "comparison"), writer, ("generate",))
    asyncio.run(Driver(run, [stage], Journal(run.path / "journal"), window=4, inputs=("generate",)).run())
    assert [line["id"] for line in run.read("rank")] == [f"r{n}" for n in range(7)]


def test_ids_that_do_not_balance_are_a_bug_that_is_seen(tmp_path: Path) -> None:
    run, engine = with_prompts(tmp_path, 4, 4), Told(lambda request: "x")
    asyncio.run(driver_of(run, ("generate", asking(engine))).run())
    sha = run.parts("prompts")[0]["sha256"]
    lines = list(run.read("generate"))
    StageWriter(run, "generate", "other").publish(0, lines[:3], prompts=4, num_in=3, inputs={"prompts": sha})
    stage = Stage("generate", asking(engine), StageWriter(run, "generate", "other"))
    with pytest.raises(CorruptError, match="4 ids came, and they do not balance"):
        asyncio.run(Driver(run, [stage], Journal(run.path / "journal"), window=4).run())


SCRIPT = """
rules:
  - {last: 'Question 1:', asks: text, text: ''}
  - {last: 'Question 2:', asks: text, text: '', reasoning: hm}
  - {last: 'Question 3:', faults: [{kind: content_filter}]}
  - {last: 'Question 4:', faults: [{kind: length}]}
  - {last: 'Question 5:', faults: [{kind: status, status: 400, code: context_length_exceeded}]}
  - {last: 'Question 6:', faults: [{kind: cut_json}]}
  - {last: 'Question 7:', faults: [{kind: html}]}
  - {last: 'Question 8:', faults: [{kind: choices}]}
  - {prompt: 'Question 9:', asks: labels, labels: {A: 0.02, B: 0.03}}
  - {prompt: 'Question 10:', asks: labels, faults: [{kind: cut_json}]}
"""


def test_every_id_ends_in_one_state_with_its_reason(tmp_path: Path) -> None:
    (tmp_path / "script.yaml").write_text(SCRIPT)
    prompts = write_prompts(tmp_path / "p.jsonl", 20)
    prompts.write_text(prompts.read_text() * 2)
    tree = {
        "prompts": {"sources": [{"path": str(prompts)}], "shard_size": 6},
        "engine": {"script": str(tmp_path / "script.yaml")},
    }
    play(tmp_path / "r", tree, export=False)
    run = RunFolder(tmp_path / "r")
    reading = run.manifest("prompts").extra["readings"][0]  # type: ignore[union-attr]
    assert (reading["lines"], reading["known"], reading["new"], reading["duplicates"]) == (40, 0, 20, 20)
    place = {line["id"]: n for n, line in enumerate(run.read("prompts"))}
    came = set(place)
    for stage in ("generate", "critique-revise", "rank"):
        counts = run.manifest(stage).counts  # type: ignore[union-attr]
        ok = [line["id"] for line in run.read(stage)]
        failed, filtered = (
            {line["id"] for line in run.losses(state, stage)} - set(ok) for state in ("failed", "filtered")
        )
        assert counts["in"] == len(came) == counts["ok"] + counts["filtered"] + counts["failed"]
        assert sorted(ok) == sorted(came - failed - filtered)
        assert (counts["ok"], counts["failed"], counts["filtered"]) == (len(ok), len(failed), len(filtered))
        came = set(ok)
    reasons = {
        place[line["id"]]: (line["kind"], line["reason"], line["attempts"]) for line in run.losses("failed", "generate")
    }
    assert {place[line["id"]]: line["reason"] for line in run.losses("filtered", "generate")} == {3: "content_filter"}
    assert reasons == {
        1: ("draft", "empty", 3),
        2: ("draft", "reasoning_only", 3),
        5: ("draft", "too_long", 1),
        6: ("draft", "bad_reply", 1),
        7: ("draft", "bad_reply", 1),
        8: ("draft", "bad_reply", 1),
    }
    by_place = {place[line["id"]]: line for line in run.read("generate")}
    assert {c["finish_reason"] for c in by_place[4]["completions"]} == {"length"}
    assert run.manifest("generate").counts["completions_cut"] == 2  # type: ignore[union-attr]
    unranked = {(place[line["id"]], line["reason"]) for line in run.losses("failed", "rank")}
    assert unranked == {(9, "unrankable"), (10, "unrankable"), (10, "bad_reply")}
    verdicts = {
        place[line["id"]]: {r["verdict"] for c in line["chains"] for r in c["rounds"]}
        for line in run.read("critique-revise")
    }
    assert verdicts[9] == verdicts[10] == {"abstain"}
    assert published(tmp_path / "r", ("rank",))
