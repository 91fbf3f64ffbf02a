"""The only driver: a bounded window of records in flight, each through its whole chain, parts out in input order.

Records are admitted oldest first, and an older record's requests go before a younger one's (depth first: a
conversation's next turn arrives while its prefix is still in the engine's cache). Prompts are read lazily, part by
part. Nothing new is admitted when too many finished records wait for an older one to be published.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from pipeline.engines.base import Engine, Reply, Request
from pipeline.errors import PASSING_REASONS, CorruptError, StoppedError
from pipeline.journal import Journal, Segment
from pipeline.records import Line, Outcome, Record
from pipeline.store import RunFolder, StageWriter, failure_lines

Ask = Callable[[Engine, Request], Awaitable[Reply]]
MIN_OPEN_SHARDS = 4


class Stage(NamedTuple):
    """One step of the chain.

    run: the coroutine over one record. writer: publishes the stage's parts. tally: counts an outcome for the manifest.
    needs: stages of which a record must have a line, else it does not come in here.
    """

    name: str
    run: Callable[[Record, Ask], Awaitable[Outcome]]
    writer: StageWriter
    needs: tuple[str, ...] = ()
    tally: Callable[[Outcome], Mapping[str, int]] = lambda outcome: {}


class Progress:
    """What a bar or a log line shows; kept by the driver, read by anybody.

    total, done: records; kept: those of `done` that were published before. failed: records that no stage has a line of
    any more. failures: lost samples and verdicts, those of failed records too.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self.done = 0
        self.kept = 0
        self.failed = 0
        self.failures = 0


class Shard:
    """A prompt part in flight: what its records have come to, by stage. rows: its prompts, those not taken too."""

    def __init__(self, number: int, rows: int, records: list[Record], todo: list[Stage], segment: Segment) -> None:
        self.number = number
        self.rows = rows
        self.records = records
        self.todo = todo
        self.segment = segment
        self.pending = len(records)
        self.outcomes: dict[str, dict[str, Outcome]] = {stage.name: {} for stage in todo}


class Driver:
    """Sends the records of a run through `stages`.

    window: records in flight. limit: only the first `limit` prompts of the run. inputs: stages that ran before these.
    takes: which prompts come in; the others are counted as `not_taken`.
    A call of `stop` lets the requests in flight finish (for `grace_s` seconds), then `run` raises StoppedError.
    """

    def __init__(
        self,
        run: RunFolder,
        stages: Sequence[Stage],
        journal: Journal,
        *,
        window: int,
        limit: int | None = None,
        inputs: Sequence[str] = (),
        takes: Callable[[Line], bool] = lambda prompt: True,
        grace_s: float = 30.0,
    ) -> None:
        self.run_folder = run
        self.stages = stages
        self.journal = journal
        self.window = window
        self.limit = limit
        for name in inputs:
            run.check_inputs(name)
        self._inputs = {name: run.parts(name) for name in inputs}
        self._takes = takes
        self.grace_s = grace_s
        parts = run.parts("prompts")
        total = sum(part["rows"] for part in parts)
        self.progress = Progress(total if limit is None else min(limit, total))
        self._parts = parts
        self._tasks: set[asyncio.Task[None]] = set()
        self._open: deque[Shard] = deque()
        self._changed = asyncio.Event()
        self._error: BaseException | None = None
        self._stopped_for = ""

    def stop(self, reason: str = "on request") -> None:
        """Admit nothing new, let what is in flight finish. Safe to call from a signal handler of the loop."""
        self._stopped_for = self._stopped_for or reason
        self.journal.stopping = True
        self._changed.set()

    async def run(self) -> None:
        """Runs to the end of the prompts. Raises StoppedError after `stop`, and whatever else ended the run."""
        await self.journal.start()
        try:
            await self._admit_all()
        except StoppedError:
            await self._drain()
            raise
        finally:
            await self._wind_up()

    async def _admit_all(self) -> None:
        for shard in self._shards():
            self._open.append(shard)
            for record in shard.records:
                await self._wait_until(lambda: len(self._tasks) < self.window)
                self._admit(shard, record)
            await self._wait_until(self._may_open_another)
        await self._wait_until(lambda: not self._open)
        for stage in self.stages:
            self._check_balance(stage)

    def _may_open_another(self) -> bool:
        waiting = sum(len(shard.records) for shard in self._open)
        return len(self._open) < MIN_OPEN_SHARDS or waiting < 2 * self.window

    def _shards(self) -> Iterator[Shard]:
        """Reads the prompt parts that some stage has still to do, lazily."""
        ordinal = 0
        for number, part in enumerate(self._parts):
            rows = self._rows_to_do(number, part, ordinal)
            if rows == 0:
                return
            todo: list[Stage] = []
            for stage in self.stages:
                is_known = not any(before.name in stage.needs for before in todo)
                if not stage.writer.has(number, rows, self._made_from(stage, number) if is_known else {}):
                    todo.append(stage)
            if todo:
                records = self._read_records(number, part, rows, ordinal, todo)
                self.progress.done += rows - len(records)
                self.progress.kept += rows - len(records)
                yield Shard(number, rows, records, todo, self.journal.open(number))
            else:
                self.progress.done += rows
                self.progress.kept += rows
            ordinal += part["rows"]

    def _made_from(self, stage: Stage, number: int) -> dict[str, str]:
        """The parts that part `number` of a stage is made from, by their sha256."""
        return {name: self._part(name, number)["sha256"] for name in ("prompts", *stage.needs)}

    def _part(self, name: str, number: int) -> dict[str, Any]:
        """The manifest's entry of a part that the run has, or that this call has published."""
        if name == "prompts":
            return self._parts[number]
        parts = next((stage.writer.parts for stage in self.stages if stage.name == name), None)
        return self._inputs[name][number] if parts is None else parts[number]

    def _rows_to_do(self, number: int, part: Mapping[str, Any], ordinal: int) -> int:
        """How many of a part's prompts are within the limit and have been through the stages before these."""
        rows: int = part["rows"] if self.limit is None else max(0, min(part["rows"], self.limit - ordinal))
        for parts in self._inputs.values():
            rows = min(rows, parts[number]["prompts"] if number < len(parts) else 0)
        return rows

    def _read_records(
        self, number: int, part: Mapping[str, Any], rows: int, ordinal: int, todo: Sequence[Stage]
    ) -> list[Record]:
        lines = self.run_folder.read_part("prompts", part)[:rows]
        records = [
            Record(line["id"], line["messages"], ordinal + place, line["tags"], line.get("completions", []))
            for place, line in enumerate(lines)
            if self._takes(line)
        ]
        by_id = {record.id: record for record in records}
        done = {stage.name: stage.writer.parts for stage in self.stages if stage not in todo}
        for name, parts in {**self._inputs, **done}.items():
            for line in self.run_folder.read_part(name, parts[number]):
                if line["id"] in by_id:
                    by_id[line["id"]].lines[name] = line
        return records

    def _check_balance(self, stage: Stage) -> None:
        """Every id is ok, filtered or failed, and all that the stage before let through came in here."""
        for number, part in enumerate(stage.writer.parts):
            counts = part["counts"]
            before = self._part(stage.needs[-1], number) if stage.needs else None
            expected = before["counts"]["ok"] if before else part["prompts"] - counts.get("not_taken", 0)
            is_comparable = before is None or before["prompts"] == part["prompts"]
            if counts["in"] != counts["ok"] + counts["filtered"] + counts["failed"] or (
                is_comparable and counts["in"] != expected
            ):
                raise CorruptError(
                    f"{stage.writer.folder / part['file']}: {expected} ids came, and they do not balance: {counts}; "
                    "please report it with this folder"
                )

    def _admit(self, shard: Shard, record: Record) -> None:
        task = asyncio.create_task(self._chain(shard, record))
        self._tasks.add(task)
        task.add_done_callback(self._record_ended)

    def _record_ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        # The first error ends the run; those that it brings about in other records tell nothing new.
        if error is not None and self._error is None:
            self._error = error
            if not isinstance(error, StoppedError):
                self._cancel_all()
        self._changed.set()

    def _cancel_all(self) -> None:
        """At once, so that nothing more is asked that could not be kept."""
        for task in self._tasks:
            task.cancel()

    async def _chain(self, shard: Shard, record: Record) -> None:
        journal, segment, priority = self.journal, shard.segment, record.ordinal

        def ask(engine: Engine, request: Request) -> Awaitable[Reply]:
            return journal.ask(engine, request, segment, priority)

        for stage in shard.todo:
            if all(name in record.lines for name in stage.needs):
                outcome = await stage.run(record, ask)
                shard.outcomes[stage.name][record.id] = outcome
                self.progress.failures += len(outcome.failures)
                if outcome.line is not None:
                    record.lines[stage.name] = outcome.line
                elif not outcome.filtered:
                    self.progress.failed += 1
        shard.pending -= 1
        self.progress.done += 1

    async def _wait_until(self, holds: Callable[[], bool]) -> None:
        """Waits for the condition, publishing what has finished meanwhile; raises when the run has to end."""
        while True:
            if self._error:
                raise self._error
            if self.journal.stopping and self._open:
                raise StoppedError(f"stopped {self._stopped_for}; the same command goes on from here")
            if holds():
                return
            self._changed.clear()
            await self._changed.wait()
            await self._publish_finished()

    async def _publish_finished(self) -> None:
        while self._open and self._open[0].pending == 0:
            shard = self._open.popleft()
            await self.journal.release(shard.segment)
            for stage in shard.todo:
                await asyncio.to_thread(publish, stage, shard, self._made_from(stage, shard.number))

    async def _drain(self) -> None:
        """Lets the requests in flight finish, and publishes what they complete."""
        self.journal.stopping = True
        if self._tasks:
            await asyncio.wait(set(self._tasks), timeout=self.grace_s)
        await self._publish_finished()

    async def _wind_up(self) -> None:
        """Ends what is still in flight and makes the journal durable."""
        self.journal.stopping = True
        self._cancel_all()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        try:
            await self.journal.close()
        finally:
            for shard in self._open:
                shard.segment.close()


def publish(stage: Stage, shard: Shard, inputs: Mapping[str, str]) -> None:
    """Publishes one stage's part of a finished shard."""
    outcomes, name = shard.outcomes[stage.name], stage.writer.run.name_of(stage.name)
    lines: list[Line] = []
    failed: list[Line] = []
    filtered: list[Line] = []
    tally: Counter[str] = Counter()
    num_failed = num_filtered = 0
    for record in shard.records:
        outcome = outcomes.get(record.id)
        if outcome is None:
            continue
        failed += failure_lines(name, record.id, outcome.failures)
        filtered += failure_lines(name, record.id, outcome.filtered)
        tally.update(stage.tally(outcome))
        if outcome.line is not None:
            lines.append(outcome.line)
        elif outcome.failures:
            num_failed += 1
        else:
            num_filtered += 1
        tally.update("passing" for failure in outcome.failures if failure.reason in PASSING_REASONS)
    if not_taken := shard.rows - len(shard.records):
        tally["not_taken"] = not_taken
    stage.writer.publish(
        shard.number,
        lines,
        prompts=shard.rows,
        num_in=len(outcomes),
        inputs=inputs,
        failed=failed,
        filtered=filtered,
        num_failed=num_failed,
        num_filtered=num_filtered,
        tally=tally,
    )
