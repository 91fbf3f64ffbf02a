from __future__ import annotations

import errno
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest

from pipeline import store
from pipeline.errors import CorruptError, ResourceError, UsageError
from pipeline.records import Failure
from pipeline.store import Manifest, RunFolder, StageWriter, failure_lines, io_errors, write_atomic

LINES = [{"id": f"r{n}", "text": f"naïve \u2028 {n}"} for n in range(5)]


def losses(*ids: str) -> list[dict[str, Any]]:
    return [line for id in ids for line in failure_lines("generate", id, [Failure(0, 1, "draft", "empty", "…", 3)])]


def run_with_parts(path: Path, fingerprint: str = "f") -> RunFolder:
    """Two parts of `generate`: three lines and a failed record, then two lines."""
    run = RunFolder(path / "r", create=True)
    writer = StageWriter(run, "generate", fingerprint)
    writer.publish(0, LINES[:3], prompts=4, num_in=4, failed=losses("x"), num_failed=1, tally={"cut": 1})
    writer.publish(1, LINES[3:], prompts=2, num_in=2, tally={"cut": 2})
    return run


def test_published_lines_come_back_in_order_with_their_counts(tmp_path: Path) -> None:
    run = run_with_parts(tmp_path)
    assert list(run.read("generate")) == LINES
    manifest = run.manifest("generate")
    assert manifest
    assert manifest.counts == {"in": 6, "ok": 5, "filtered": 0, "failed": 1, "cut": 3}
    assert [loss["id"] for loss in run.losses("failed", "generate")] == ["x"]
    assert list(run.losses("filtered", "generate")) == []


def test_a_manifest_states_the_sha256_rows_and_bytes_of_its_files(tmp_path: Path) -> None:
    run = run_with_parts(tmp_path)
    for part in json.loads((run.path / "generate" / "manifest.json").read_text())["parts"]:
        data = (run.path / "generate" / part["file"]).read_bytes()
        assert part["sha256"] == hashlib.sha256(data).hexdigest()
        assert (part["bytes"], part["rows"]) == (len(data), data.count(b"\n"))


def test_a_file_without_a_manifest_does_not_exist(tmp_path: Path) -> None:
    run = run_with_parts(tmp_path)
    (run.path / "generate" / "part-00002.jsonl").write_text('{"id": "stray"}\n')
    assert len(list(run.read("generate"))) == 5
    (run.path / "generate" / "manifest.json").unlink()
    assert list(run.read("generate")) == []


def flips(data: bytes) -> list[tuple[int, bytes]]:
    return [(at, data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]) for at in range(len(data))]


def test_a_flipped_bit_anywhere_in_a_part_is_found_with_its_line(tmp_path: Path) -> None:
    run = run_with_parts(tmp_path)
    path = run.path / "generate" / "part-00000.jsonl"
    whole = path.read_bytes()
    for at, flipped in flips(whole):
        path.write_bytes(flipped)
        line = whole[:at].count(b"\n") + 1
        # A newline that is gone joins its line with the next one, if there is one.
        where = f":{line}:" if at < len(whole) - 1 else ""
        with pytest.raises(CorruptError, match=f"part-00000.jsonl{where}"):
            list(run.read("generate"))


def test_a_flipped_bit_anywhere_in_the_losses_is_found_with_its_line(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "r", create=True)
    writer = StageWriter(run, "generate", "f")
    writer.publish(0, LINES[:1], prompts=2, num_in=2, failed=losses("x"), num_failed=1)
    writer.publish(1, LINES[1:2], prompts=3, num_in=3, failed=losses("y", "z"), num_failed=2)
    path = run.losses_path("failed", "generate")
    whole = path.read_bytes()
    for at, flipped in flips(whole):
        path.write_bytes(flipped)
        line = whole[:at].count(b"\n") + 1
        where = f":{line}:" if whole[at : at + 1] != b"\n" else ":"
        with pytest.raises(CorruptError, match=f"failed/generate.jsonl{where}"):
            list(run.losses("failed", "generate"))


def test_a_flipped_bit_anywhere_in_a_manifest_is_found(tmp_path: Path) -> None:
    run = run_with_parts(tmp_path)
    path = run.path / "generate" / "manifest.json"
    for at, flipped in flips(path.read_bytes()[:-1]):
        path.write_bytes(flipped)
        with pytest.raises(CorruptError, match=r"generate/manifest\.json"):
            run.manifest("generate")
        assert at >= 0


def test_a_part_that_is_gone_or_shorter_is_corruption(tmp_path: Path) -> None:
    run = run_with_parts(tmp_path)
    path = run.path / "generate" / "part-00001.jsonl"
    data = path.read_bytes()
    path.write_bytes(data[:-5])
    with pytest.raises(CorruptError, match=f"part-00001.jsonl: {len(data) - 5} bytes, its manifest says {len(data)}"):
        list(run.read("generate"))
    path.unlink()
    with pytest.raises(CorruptError, match=r"part-00001\.jsonl: listed in the manifest but cannot be read"):
        list(run.read("generate"))


def test_a_later_writer_goes_on_behind_the_parts_that_stand(tmp_path: Path) -> None:
    run = run_with_parts(tmp_path)
    before = run.losses_path("failed", "generate").read_bytes()
    run.losses_path("failed", "generate").write_bytes(before + b'{"id": "torn')
    writer = StageWriter(run, "generate", "f")
    assert writer.has(0, 4, {})
    assert writer.has(1, 2, {})
    assert not writer.has(2, 1, {})
    writer.publish(2, [], prompts=1, num_in=1, failed=losses("y"), num_failed=1)
    assert [loss["id"] for loss in run.losses("failed", "generate")] == ["x", "y"]


@pytest.mark.parametrize(
    ("prompts", "inputs"), [(5, {}), (4, {"prompts": "other"})], ids=["more prompts", "other inputs"]
)
def test_a_part_that_must_be_redone_is_forgotten_with_those_after_it(
    tmp_path: Path, prompts: int, inputs: dict[str, str]
) -> None:
    run = run_with_parts(tmp_path)
    writer = StageWriter(run, "generate", "f")
    assert not writer.has(0, prompts, inputs)
    assert not writer.has(1, 2, {})
    writer.publish(0, LINES[:1], prompts=prompts, num_in=1, inputs=inputs)
    assert list(run.read("generate")) == LINES[:1]
    assert list(run.losses("failed", "generate")) == []


def test_no_manifest_ever_lists_a_file_that_was_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_with_parts(tmp_path)
    seen: list[int] = []

    def replace(source: Any, target: Any) -> None:
        os.rename(source, target)
        list(run.read("generate"))  # verifies every part that a reader would trust at this moment
        list(run.losses("failed", "generate"))
        seen.append(len(run.parts("generate")))

    monkeypatch.setattr(store.os, "replace", replace)
    writer = StageWriter(run, "generate", "another fingerprint")
    writer.publish(0, LINES[:2], prompts=4, num_in=2)
    writer.publish(1, LINES[3:], prompts=2, num_in=2)
    assert seen == [0, 0, 1, 1, 2]


def test_counts_that_do_not_balance_and_parts_out_of_order_are_bugs(tmp_path: Path) -> None:
    writer = StageWriter(RunFolder(tmp_path / "r", create=True), "generate", "f")
    with pytest.raises(ValueError, match="5 in, 3 ok, 0 filtered, 1 failed"):
        writer.publish(0, LINES[:3], prompts=5, num_in=5, num_failed=1)
    with pytest.raises(ValueError, match="part 1 of generate is not next, 0 is"):
        writer.publish(1, LINES, prompts=5, num_in=5)


def test_a_stage_made_from_parts_that_are_gone_is_refused(tmp_path: Path) -> None:
    run = run_with_parts(tmp_path)
    shas = [part["sha256"] for part in run.parts("generate")]
    writer = StageWriter(run, "rank", "g")
    for number, sha in enumerate(shas):
        writer.publish(number, [], prompts=1, num_in=0, inputs={"generate": sha})
    run.check_inputs("rank")
    StageWriter(run, "generate", "other").publish(0, LINES[:2], prompts=4, num_in=2)
    with pytest.raises(UsageError, match=r"rank/part-00000.jsonl: generate has changed .* `cai rank --run"):
        run.check_inputs("rank")


def test_writing_atomically_leaves_the_old_file_when_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "f.json"
    write_atomic(path, b"old")

    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(store.os, "fsync", full)
    with pytest.raises(ResourceError, match=r"f\.json: No space left on device; free some room"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (errno.ENOSPC, ResourceError), (errno.EDQUOT, ResourceError), (errno.EIO, ResourceError),
        (errno.EFBIG, ResourceError), (errno.EACCES, UsageError), (errno.EROFS, UsageError), (errno.EPERM, UsageError),
    ],
)  # fmt: skip
def test_an_os_error_becomes_a_message_with_the_path(number: int, kind: type[Exception]) -> None:
    with pytest.raises(kind, match=rf"^runs/a/x: {os.strerror(number)}; "), io_errors("runs/a/x"):
        raise OSError(number, os.strerror(number))


@pytest.mark.parametrize("name", ["first", "a.b-c_9", "9", "x" * 64])
def test_plain_names_are_run_names(tmp_path: Path, name: str) -> None:
    RunFolder(tmp_path / name, create=True)
    assert json.loads((tmp_path / name / "run.json").read_text()) == {"format": 1}


@pytest.mark.parametrize("name", ["First", "-a", ".a", "a b", "é", "x" * 65])
def test_other_names_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="is no run name"):
        RunFolder(tmp_path / name, create=True)
    assert not (tmp_path / name).exists()


@pytest.mark.parametrize("content", ['{"format":2}', '{"format":"1"}', "{}", "[1]"])
def test_another_format_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(UsageError, match="this cai knows format 1"):
        RunFolder(tmp_path)


def test_a_run_json_that_was_torn_is_corrupt(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"for')
    with pytest.raises(CorruptError, match=r"run\.json: not whole JSON"):
        RunFolder(tmp_path)


def test_a_manifest_cannot_be_had_from_what_is_no_mapping(tmp_path: Path) -> None:
    for content in ([], {"parts": []}, {"sha256": "0"}):
        with pytest.raises(CorruptError, match=r"m\.json"):
            Manifest(tmp_path / "m.json", content)  # type: ignore[arg-type]
