"""Records joined over the stages, and which of them come first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import CorruptError
from pipeline.reading import Case, Wanted, cases, select
from pipeline.records import Failure, Line, Record
from pipeline.store import RunFolder, StageWriter


def entry(verdict: str, p: float | None, principle: str = "kind") -> Line:
    line: Line = {"principle": principle, "critique": "c", "revision": "r", "finish_reason": "stop"}
    return {**line, "verdict": verdict, "stopped": False, **({} if p is None else {"p": p})}


def candidate(origin: str, score: float, rank: int) -> Line:
    return {"origin": origin, "sample": 0, "round": int(origin == "revision"), "model": "m", "text": origin} | {
        "score": score,
        "rank": rank,
    }


def ranked(*candidates: Line) -> Line:
    return {"candidates": list(candidates), "comparisons": []}


WON, LOST = (
    ranked(candidate("draft", -0.5, 2), candidate("revision", 0.5, 1)),
    ranked(candidate("draft", 0.5, 1), candidate("revision", -0.5, 2)),
)
LOST_CLEARLY = ranked(candidate("draft", 2.0, 1), candidate("revision", -2.0, 2))


def write_run(folder: Path, records: dict[str, dict[str, Any]], *, shard_size: int = 2) -> RunFolder:
    """records: id -> what the stages said: `rounds`, `rank`, or `failed` for a record without drafts."""
    run = RunFolder(folder / "run", create=True)
    writers = {name: StageWriter(run, name, name) for name in ("prompts", "generate", "critique-revise", "rank")}
    ids = list(records)
    for number, start in enumerate(range(0, len(ids), shard_size)):
        shard = ids[start : start + shard_size]
        lost = [id for id in shard if records[id].get("failed")]
        kept = [id for id in shard if id not in lost]
        prompt = {"messages": [{"role": "user", "content": "?"}], "tags": [], "source": "s"}
        lines: dict[str, list[Line]] = {
            "prompts": [{"id": id, **prompt} for id in shard],
            "generate": [{"id": id, "completions": []} for id in kept],
            "critique-revise": [
                {"id": id, "chains": [{"sample": 0, "rounds": records[id].get("rounds", [])}]} for id in kept
            ],
            "rank": [{"id": id, **records[id]["rank"]} for id in kept if "rank" in records[id]],
        }
        for name, found in lines.items():
            is_first = name == "generate"
            failed = [Failure(0, 0, "draft", "empty", "…", 3).line(id, name) for id in lost] if is_first else []
            writers[name].publish(
                number,
                found,
                prompts=len(shard),
                num_in=len(found) + len(failed),
                failed=failed,
                num_failed=len(failed),
            )
    return run


def test_the_worst_come_first_in_the_stated_order(tmp_path: Path) -> None:
    run = write_run(
        tmp_path,
        {
            "fine": {"rounds": [entry("improved", 0.9)], "rank": WON},
            "lost-a-sample": {"failed": True},
            "hardly-better": {"rounds": [entry("improved", 0.56)], "rank": WON},
            "beaten": {"rounds": [entry("same", 0.5)], "rank": LOST},
            "worse": {"rounds": [entry("improved", 0.6), entry("worse", 0.4)], "rank": WON},
            "beaten-clearly": {"rounds": [entry("same", 0.5)], "rank": LOST_CLEARLY},
            "much-worse": {"rounds": [entry("worse", 0.1)], "rank": LOST},
            "unverified": {"rounds": [entry("unverified", None)]},
        },
    )
    order = [case.record.id for case in select(run, Wanted(), limit=8)]
    assert order == [
        "much-worse",
        "worse",
        "beaten-clearly",
        "beaten",
        "lost-a-sample",
        "hardly-better",
        "fine",
        "unverified",
    ]
    assert [case.record.id for case in select(run, Wanted(), limit=2)] == order[:2]


def test_in_order_means_as_they_came(tmp_path: Path) -> None:
    run = write_run(tmp_path, {id: {"rounds": []} for id in ("c", "a", "b")})
    assert [case.record.id for case in select(run, Wanted(), limit=2, worst_first=False)] == ["c", "a"]


def test_filters_take_ids_by_their_beginning_principles_verdicts_and_losses(tmp_path: Path) -> None:
    compared = {**WON, "comparisons": [{"a": 0, "b": 1, "principle": "true", "status": "ok"}]}
    run = write_run(
        tmp_path,
        {
            "ab1": {"rounds": [entry("same", 0.5, "kind"), entry("worse", 0.2, "safe")], "rank": WON},
            "ab2": {"rounds": [entry("improved", 0.9, "kind")], "rank": compared},
            "cd3": {"failed": True},
        },
    )

    def ids(**wanted: Any) -> list[str]:
        return [case.record.id for case in cases(run, Wanted(**wanted))]

    assert ids(id_prefix="ab") == ["ab1", "ab2"]
    assert ids(principle="safe") == ["ab1"]
    assert ids(principle="true") == ["ab2"]
    assert ids(principle="kind", verdict="improved") == ["ab2"]
    assert ids(with_losses=True) == ["cd3"]
    assert ids(id_prefix="zz") == []


def test_a_record_carries_its_own_losses_from_any_part(tmp_path: Path) -> None:
    run = write_run(tmp_path, {id: {"failed": id in "be"} for id in "abcdef"})
    lost = {case.record.id: [line["id"] for line in case.failed] for case in cases(run, Wanted())}
    assert lost == {"a": [], "b": ["b"], "c": [], "d": [], "e": ["e"], "f": []}
    assert lost.keys() == {line["id"] for line in run.read("prompts")}


def test_stages_that_have_not_come_so_far_leave_records_half_told(tmp_path: Path) -> None:
    run = write_run(tmp_path, {"a": {"rounds": []}, "b": {"rounds": []}}, shard_size=1)
    writer = StageWriter(run, "critique-revise", "critique-revise")
    del writer.parts[1:]
    writer.write_manifest()
    stages = {case.record.id: set(case.record.lines) for case in cases(run, Wanted())}
    assert stages == {"a": {"generate", "critique-revise"}, "b": {"generate"}}


def test_a_part_that_was_changed_is_not_shown(tmp_path: Path) -> None:
    run = write_run(tmp_path, {"a": {"rounds": []}})
    path = run.path / "generate" / "part-00000.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"a"', b'"b"'))
    with pytest.raises(CorruptError, match=r"part-00000\.jsonl:1: this line was changed"):
        select(run, Wanted(), limit=1)


def test_a_record_as_plain_data_has_what_the_files_have() -> None:
    record = Record("a", [{"role": "user", "content": "?"}], 0, ["t"], ["given"], {"rank": {"id": "a", **WON}})
    plain = Case(record, [{"id": "a", "reason": "empty"}], []).plain()
    assert list(plain) == ["id", "messages", "tags", "completions", "rank", "failed", "filtered"]
    assert (plain["completions"], plain["failed"]) == (["given"], [{"id": "a", "reason": "empty"}])
