import itertools
import os
import resource
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import dataset_writer
from pipeline.dataset_folder import read_card, verify
from pipeline.dataset_writer import DatasetWriter, Published
from pipeline.errors import CorruptError, ResourceError, UsageError

SCHEMA = pa.schema({"id": pa.string(), "text": pa.string()})


def publish(folder: Path, ids: Iterable[str], test: Iterable[str] = (), text: str = "# Rows\n") -> Published:
    writer = DatasetWriter(folder, SCHEMA)
    for split, names in (("train", ids), ("test", test)):
        for name in names:
            writer.add(split, {"id": name, "text": f"text of {name}"})
    return writer.publish(text)


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_rows_leave_sorted_by_the_bytes_of_their_ids(tmp_path: Path) -> None:
    ids = ["b", "a/2", "a", "é", "\U0001f600", "a b", "Z", "\uff21"]
    assert publish(tmp_path, ids) == Published("v0001", {"train": 8, "test": 0}, True)
    table = pq.read_table(tmp_path / "v0001" / "train.parquet")
    assert table["id"].to_pylist() == sorted(ids, key=str.encode)
    assert table.schema.equals(SCHEMA)
    assert not (tmp_path / "v0001" / "test.parquet").exists()


def test_sorting_on_disk_gives_the_bytes_of_sorting_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = [f"r{(i * 37) % 5000}" for i in range(5000)]
    publish(tmp_path / "memory", ids, ["x"])
    monkeypatch.setattr(dataset_writer, "_SORT_BYTES", 2000)
    monkeypatch.setattr(dataset_writer, "_FAN_IN", 3)
    publish(tmp_path / "disk", ids, ["x"])
    assert tree(tmp_path / "disk") == tree(tmp_path / "memory")
    assert pq.ParquetFile(tmp_path / "disk" / "v0001" / "train.parquet").num_row_groups == 5


def test_an_id_that_comes_twice_is_a_bug(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="two rows with the id b"):
        publish(tmp_path, ["b", "a", "b"])


def test_the_same_rows_make_no_new_version_and_a_new_card_text_none_either(tmp_path: Path) -> None:
    publish(tmp_path, "ab")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    assert publish(tmp_path, "ba") == Published("v0001", {"train": 2, "test": 0}, False)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()} == before
    assert not publish(tmp_path, "ab", text="# Other\n").is_new
    assert (tmp_path / "README.md").read_text().endswith("---\n# Other\n")
    assert publish(tmp_path, "abc").version == "v0002"
    assert publish(tmp_path, "ab").version == "v0003"


def test_datasets_keeps_two_runs_apart_in_its_cache(tmp_path: Path) -> None:
    from datasets import load_dataset

    for run, ids in (("one", "ab"), ("two", "abc"), ("three", "abd")):
        publish(tmp_path / run / "sft", ids)
        loaded = load_dataset(str(tmp_path / run / "sft"), split="train", cache_dir=str(tmp_path / "cache"))
        assert loaded["id"][:] == list(ids)


def test_a_dataset_without_rows_leaves_nothing_unless_it_had_some(tmp_path: Path) -> None:
    from datasets import load_dataset

    folder = tmp_path / "set"
    assert publish(folder, "") == Published("", {"train": 0, "test": 0}, False)
    assert not folder.exists()
    publish(folder, "a")
    assert publish(folder, "").version == "v0002"
    assert read_card(folder)["files"] == {}
    assert "No row was left for this dataset" in (folder / "README.md").read_text()
    with pytest.raises(FileNotFoundError, match="data files"):
        load_dataset(str(folder), split="train", cache_dir=str(tmp_path / "cache"))
    assert not publish(folder, "").is_new
    assert publish(folder, "a").version == "v0003"
    assert "No row was left" not in (folder / "README.md").read_text()


class Killed(BaseException):
    """Not an Exception, so that nothing can catch it and go on."""


def dying(calls: Any, call: Any, at: int) -> Any:
    """The call, which dies before (even `at`) or after (odd) its turn among all calls."""

    def step(*arguments: Any) -> Any:
        turn = 2 * next(calls)
        if turn == at:
            raise Killed
        result = call(*arguments)
        if turn + 1 == at:
            raise Killed
        return result

    return step


def test_a_publication_killed_at_any_step_is_made_good_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dataset_writer, "_SORT_BYTES", 100)
    old, new = [f"r{i}" for i in range(20)], [f"r{i}" for i in range(40)]
    publish(tmp_path / "old", old)
    shutil.copytree(tmp_path / "old", tmp_path / "good")
    publish(tmp_path / "good", new, ["x"])
    for at in itertools.count():
        folder = tmp_path / f"killed-{at}"
        shutil.copytree(tmp_path / "old", folder)
        calls = itertools.count()
        with monkeypatch.context() as patch:
            for name in ("fsync", "rename", "replace", "unlink"):
                patch.setattr(os, name, dying(calls, getattr(os, name), at))
            try:
                publish(folder, new, ["x"])
                break
            except Killed:
                assert read_card(folder)["version"] in ("v0001", "v0002")
                assert verify(folder)
        publish(folder, new, ["x"])
        assert tree(folder) == tree(tmp_path / "good")
    assert at > 16


def test_a_killed_publication_that_is_not_repeated_leaves_no_trace(tmp_path: Path) -> None:
    publish(tmp_path, "a")
    before = tree(tmp_path)
    shutil.copytree(tmp_path / "v0001", tmp_path / "v0002")
    shutil.copytree(tmp_path / "v0001", tmp_path / ".new")
    publish(tmp_path, "a")
    assert tree(tmp_path) == before


def test_a_flipped_bit_is_found_and_nothing_is_built_on_it(tmp_path: Path) -> None:
    publish(tmp_path, "ab")
    path = tmp_path / "v0001" / "train.parquet"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    for again in (lambda: verify(tmp_path), lambda: publish(tmp_path, "ab")):
        with pytest.raises(CorruptError, match=r"v0001/train\.parquet"):
            again()
    path.unlink()
    with pytest.raises(CorruptError, match=r"v0001/train\.parquet"):
        verify(tmp_path)
    (tmp_path / "README.md").write_text("no front matter")
    with pytest.raises(CorruptError, match=r"README\.md"):
        publish(tmp_path, "ab")


def test_no_room_and_a_place_that_is_no_folder_are_named(tmp_path: Path) -> None:
    publish(tmp_path / "set", "a")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limit[1]))
    try:
        with pytest.raises(ResourceError, match=r"\.new/train\.parquet: File too large; free some room"):
            publish(tmp_path / "set", [f"r{i}" for i in range(3000)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert read_card(tmp_path / "set")["version"] == "v0001"
    assert publish(tmp_path / "set", [f"r{i}" for i in range(3000)]).version == "v0002"
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="file"):
        publish(tmp_path / "file" / "set", "ab")
