"""The run folder: atomic files, parts and manifests, and who may read what.

A part is published by: temporary file in the same folder, fsync, rename, fsync the folder; the stage's manifest last.
The losses of a part (`failed/STAGE.jsonl`, `filtered/STAGE.jsonl`) are appended and fsynced before the manifest counts
them; what a manifest does not count does not exist, and the next writer cuts it off. Parts of a stage are published in
order, so that a manifest always lists a prefix of them.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.errors import CaiError, CorruptError, ResourceError, UsageError
from pipeline.records import Failure, Line, canonical, digest, line_bytes

FORMAT = 1
RUN_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_RUST_ERROR = re.compile(r"\(os error (\d+)\)$")
"""How safetensors and tokenizers end the message of an I/O error, which is no OSError there."""
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG, errno.ENOMEM, errno.EMFILE, errno.ENFILE}


@contextmanager
def io_errors(path: Path | str) -> Iterator[None]:
    """Turns an OSError into a message with the path: no room -> ResourceError (5), no permission -> UsageError (2)."""
    try:
        yield
    except CaiError:
        raise
    except OSError as error:
        raise _io_error(path, error.errno, error.strerror or str(error)) from error
    except Exception as error:
        if found := _RUST_ERROR.search(str(error)):
            number = int(found[1])
            raise _io_error(path, number, os.strerror(number)) from error
        raise


def _io_error(path: Path | str, number: int | None, reason: str) -> CaiError:
    if number in _NO_ROOM:
        return ResourceError(f"{path}: {reason}; free some room and run the same command again")
    return UsageError(f"{path}: {reason}; choose a folder that can be written, or mend its permissions")


def write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_atomic(path: Path, data: bytes) -> None:
    """Replaces the file as a whole or not at all, and durably."""
    temporary = path.with_name(f".{path.name}.tmp")
    with io_errors(path):
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        try:
            write_all(fd, data)
            os.fsync(fd)
        finally:
            os.close(fd)
        os.replace(temporary, path)
        sync_folder(path.parent)


def make_folder(path: Path) -> None:
    """Creates the folder and makes its name durable."""
    if not path.is_dir():
        with io_errors(path):
            path.mkdir(parents=True, exist_ok=True)
            sync_folder(path.parent)


def read_json(path: Path) -> Any:
    """Reads a JSON file that this program wrote; CorruptError (4) if it is not whole."""
    try:
        with io_errors(path):
            data = path.read_bytes()
        return json.loads(data)
    except ValueError as error:
        if isinstance(error, UsageError):
            raise
        raise CorruptError(f"{path}: not whole JSON ({error}); restore it, or delete it and run again") from error


class RunFolder:
    """A folder `runs/NAME` and what stands in it. Opening creates it where `create` is set.

    phase: whose stages are meant by their names; those of phase 2 lie in `phase2/`. Both have the same prompts.
    """

    def __init__(self, path: Path | str, *, create: bool = False, phase: int = 1) -> None:
        self.path = Path(path)
        self.phase = phase
        self.check(self.path, create=create)
        marker = self.path / "run.json"
        if not marker.exists():
            make_folder(self.path)
            write_atomic(marker, canonical({"format": FORMAT}) + b"\n")
        info = read_json(marker)
        if not isinstance(info, dict) or info.get("format") != FORMAT:
            found = info.get("format") if isinstance(info, dict) else None
            raise UsageError(
                f"{marker}: run folder of format {found!r}, this cai knows format {FORMAT}; "
                "use the cai that made it, or another --run"
            )

    @staticmethod
    def check(path: Path, *, create: bool) -> None:
        """Raises UsageError unless there is a run or, with `create`, a place where one may be made. Writes nothing."""
        if (path / "run.json").exists():
            return
        if not create:
            raise UsageError(f"{path}: no run here; start one: cai run --run {path} --prompts FILE --model MODEL")
        name = path.resolve().name
        if not RUN_NAME.fullmatch(name):
            raise UsageError(
                f"{path}: {name!r} is no run name; use lower-case letters, digits, '.', '_', '-', at most 64"
            )
        if path.exists() and not path.is_dir():
            raise UsageError(f"{path}: is a file, not a run folder; choose another --run")
        if path.is_dir() and any(p.name not in (".run.json.tmp", "lock") for p in path.iterdir()):
            raise UsageError(f"{path}: not empty and no run folder (no run.json); choose another --run")

    def of_phase(self, phase: int) -> RunFolder:
        """The same run, seen from that phase."""
        return RunFolder(self.path, phase=phase)

    def folder(self, stage: str) -> Path:
        """Where the parts of a stage lie."""
        return self.path / self.name_of(stage)

    def name_of(self, stage: str) -> str:
        """The stage as people are told of it: with its phase, unless that is the first."""
        return stage if self.phase == 1 or stage == "prompts" else f"phase{self.phase}/{stage}"

    def manifest(self, stage: str) -> Manifest | None:
        """The stage's manifest, None if the stage has published nothing."""
        path = self.folder(stage) / "manifest.json"
        return Manifest(path, read_json(path)) if path.exists() else None

    def parts(self, stage: str) -> list[dict[str, Any]]:
        manifest = self.manifest(stage)
        return manifest.parts if manifest else []

    def read(self, stage: str) -> Iterator[Line]:
        """All published lines of a stage in order, each part verified before its first line is given out."""
        for part in self.parts(stage):
            yield from self.read_part(stage, part)

    def read_part(self, stage: str, part: Mapping[str, Any]) -> list[Line]:
        return _verified_lines(self.folder(stage) / part["file"], part)

    def check_inputs(self, stage: str) -> None:
        """UsageError if the stage was made from parts that a stage before it does not have any more."""
        now: dict[str, dict[str, str]] = {}
        for part in self.parts(stage):
            for name, sha256 in part["inputs"].items():
                if name not in now:
                    now[name] = {entry["file"]: entry["sha256"] for entry in self.parts(name)}
                if now[name].get(part["file"]) != sha256:
                    phase = "" if self.phase == 1 else f" --phase {self.phase}"
                    raise UsageError(
                        f"{self.folder(stage) / part['file']}: {name} has changed since this was made from it; "
                        f"run `cai {stage} --run {self.path}{phase}` first"
                    )

    def losses_path(self, state: str, stage: str) -> Path:
        return self.path / state / f"{self.name_of(stage).replace('/', '-')}.jsonl"

    def losses(self, state: str, stage: str) -> Iterator[Line]:
        """The counted lines of `failed/STAGE.jsonl` or `filtered/STAGE.jsonl` (state says which), verified."""
        parts = self.parts(stage)
        for number in range(len(parts)):
            yield from self.read_losses(state, stage, parts, number)

    def read_losses(self, state: str, stage: str, parts: Sequence[Mapping[str, Any]], number: int) -> list[Line]:
        """The lines of `losses` that part `number` of the stage counts. parts: all of the stage's."""
        entry = parts[number][state]
        offset = sum(part[state]["bytes"] for part in parts[:number])
        return _verified_lines(self.losses_path(state, stage), entry, offset=offset) if entry["bytes"] else []


def _verified_lines(path: Path, entry: Mapping[str, Any], *, offset: int | None = None) -> list[Line]:
    """Lines of a file, or of its piece at `offset`, checked against bytes, sha256 and rows of a manifest's entry."""
    try:
        with io_errors(path), open(path, "rb") as file:
            file.seek(offset or 0)
            data = file.read() if offset is None else file.read(entry["bytes"])
    except UsageError as error:
        raise CorruptError(
            f"{path}: listed in the manifest but cannot be read; delete the stage's folder and run it again"
        ) from error
    lines = data.split(b"\n")
    if hashlib.sha256(data).hexdigest() != entry["sha256"] or len(lines) != entry["rows"] + 1:
        raise CorruptError(_what_is_wrong(path, data, lines, entry, offset or 0))
    return [json.loads(line) for line in lines[:-1]]


def _what_is_wrong(path: Path, data: bytes, lines: Sequence[bytes], entry: Mapping[str, Any], offset: int) -> str:
    cure = "delete its stage's manifest.json and run again: it is made anew from the journal"
    if len(data) != entry["bytes"]:
        return f"{path}: {len(data)} bytes, its manifest says {entry['bytes']}; {cure}"
    before = path.read_bytes()[:offset].count(b"\n")
    sums = bytes.fromhex(entry["line_sums"])
    for number, line in enumerate(lines[:-1]):
        if line_sum(line) != sums[2 * number : 2 * number + 2]:
            return f"{path}:{before + number + 1}: this line was changed after it was written; {cure}"
    return f"{path}: sha256 differs from its manifest's; {cure}"


def line_sum(line: bytes) -> bytes:
    """Two bytes that tell which line of a part was changed; that the part is whole is what its sha256 says."""
    return hashlib.blake2b(line, digest_size=2).digest()


class Manifest:
    """What a stage has published: read-only view of `manifest.json`."""

    def __init__(self, path: Path, content: dict[str, Any]) -> None:
        body = {key: value for key, value in content.items() if key != "sha256"} if isinstance(content, dict) else {}
        if not isinstance(content, dict) or content.get("sha256") != digest(body):
            raise CorruptError(f"{path}: its content does not match its own sha256; delete it and run the stage again")
        self.fingerprint: str = body["fingerprint"]
        self.parts: list[dict[str, Any]] = body["parts"]
        self.extra: dict[str, Any] = body["extra"]

    @property
    def counts(self) -> Counter[str]:
        """in, ok, filtered, failed over all parts, and the stage's own tallies."""
        total: Counter[str] = Counter()
        for part in self.parts:
            total.update(part["counts"])
        return total


class StageWriter:
    """Publishes the parts of one stage, in order, from the first that is missing or made from something else.

    fingerprint: identity of everything the stage's lines depend on, besides the prompts. Parts of another fingerprint
    are not listed any more from the first publication on; their files are replaced one by one.
    """

    def __init__(self, run: RunFolder, stage: str, fingerprint: str) -> None:
        self.run = run
        self.stage = stage
        self.fingerprint = fingerprint
        self.folder = run.folder(stage)
        manifest = run.manifest(stage)
        is_same = manifest is not None and manifest.fingerprint == fingerprint
        self.parts: list[dict[str, Any]] = list(manifest.parts) if manifest and is_same else []
        self.extra: dict[str, Any] = dict(manifest.extra) if manifest and is_same else {}
        self._lists_others = manifest is not None and not is_same

    def has(self, number: int, prompts: int, inputs: Mapping[str, str]) -> bool:
        """Whether part `number` stands, covers `prompts` prompts and was made from these `inputs` (see `publish`).

        If not, or if it has failures that may be gone by now (tally `passing`), it and those after it are forgotten.
        """
        if number < len(self.parts):
            part = self.parts[number]
            path = self.folder / part["file"]
            is_whole = path.exists() and path.stat().st_size == part["bytes"]
            is_final = is_whole and not part["counts"].get("passing")
            if is_final and part["prompts"] >= prompts and part["inputs"] == inputs:
                return True
            self._lists_others = True
            del self.parts[number:]
        return False

    def publish(
        self,
        number: int,
        lines: Sequence[Line],
        *,
        prompts: int,
        num_in: int,
        inputs: Mapping[str, str] | None = None,
        failed: Sequence[Line] = (),
        filtered: Sequence[Line] = (),
        num_failed: int = 0,
        num_filtered: int = 0,
        tally: Mapping[str, int] | None = None,
    ) -> None:
        """Publishes part `number`, which must be the next one.

        prompts: how many prompts of the prompt part were considered; num_in: how many of them came in here.
        inputs: stage -> sha256 of its part of the same number, of all stages whose lines this part was made from.
        failed, filtered: every loss, also of single samples; num_failed, num_filtered: records without a line.
        """
        if number != len(self.parts):
            raise ValueError(f"part {number} of {self.stage} is not next, {len(self.parts)} is")
        if num_in != len(lines) + num_failed + num_filtered:
            raise ValueError(
                f"{self.stage} part {number}: {num_in} in, "
                f"{len(lines)} ok, {num_filtered} filtered, {num_failed} failed"
            )
        make_folder(self.folder)
        if self._lists_others:
            # Before the files of those parts are replaced: a manifest whose hashes do not hold must never be seen.
            self.write_manifest()
            self._lists_others = False
        name = f"part-{number:05d}.jsonl"
        encoded = [line_bytes(line) for line in lines]
        data = b"".join(encoded)
        write_atomic(self.folder / name, data)
        counts = {
            "in": num_in,
            "ok": len(lines),
            "filtered": num_filtered,
            "failed": num_failed,
            **(tally or {}),
        }
        self.parts.append(
            {
                "file": name,
                "prompts": prompts,
                "inputs": dict(inputs or {}),
                **_entry(encoded, data),
                "counts": counts,
                "failed": self._append_losses("failed", failed),
                "filtered": self._append_losses("filtered", filtered),
            }
        )
        self.write_manifest()

    def _append_losses(self, state: str, losses: Sequence[Line]) -> dict[str, Any]:
        path = self.run.losses_path(state, self.stage)
        offset = sum(part[state]["bytes"] for part in self.parts)
        encoded = [line_bytes(line) for line in losses]
        data = b"".join(encoded)
        if data or (path.exists() and path.stat().st_size != offset):
            make_folder(path.parent)
            with io_errors(path):
                is_new = not path.exists()
                fd = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
                try:
                    if os.fstat(fd).st_size < offset:
                        raise CorruptError(
                            f"{path}: shorter than its manifest says; delete {self.folder}/manifest.json and run again"
                        )
                    os.ftruncate(fd, offset)
                    os.lseek(fd, offset, os.SEEK_SET)
                    write_all(fd, data)
                    os.fsync(fd)
                finally:
                    os.close(fd)
                if is_new:
                    sync_folder(path.parent)
        return _entry(encoded, data)

    def write_manifest(self) -> None:
        body = {
            "format": FORMAT,
            "stage": self.stage,
            "fingerprint": self.fingerprint,
            "parts": self.parts,
            "extra": self.extra,
        }
        make_folder(self.folder)
        write_atomic(self.folder / "manifest.json", canonical({**body, "sha256": digest(body)}) + b"\n")


def _entry(encoded: Sequence[bytes], data: bytes) -> dict[str, Any]:
    sums = b"".join(line_sum(line[:-1]) for line in encoded)
    return {
        "rows": len(encoded),
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
        "line_sums": sums.hex(),
    }


def failure_lines(stage: str, record_id: str, failures: Sequence[Failure]) -> list[Line]:
    return [failure.line(record_id, stage) for failure in failures]
