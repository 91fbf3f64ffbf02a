from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline import lock
from pipeline.errors import LockedError
from pipeline.lock import STALE_S, boot_id, locked

HOLD = "import sys, time; from pathlib import Path; from pipeline.lock import locked\nwith locked(Path(sys.argv[1])):\n"


def hold(folder: Path) -> subprocess.Popen:
    """Another process that holds the lock."""
    code = HOLD + "    print('held', flush=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout
    assert process.stdout.readline() == "held\n"
    return process


def write_lock(folder: Path, *, age_s: float = 0.0, **holder: object) -> None:
    path = folder / "lock"
    path.write_text(json.dumps({"host": socket.gethostname(), "boot_id": boot_id(), "pid": os.getpid(), **holder}))
    os.utime(path, (time.time() - age_s, time.time() - age_s))


def test_a_second_process_is_told_the_pid_and_host_of_the_holder(tmp_path: Path) -> None:
    holder = hold(tmp_path)
    try:
        with pytest.raises(LockedError, match=f"process {holder.pid} on host {socket.gethostname()}"), locked(tmp_path):
            pass
    finally:
        holder.kill()
        holder.wait()


def test_the_lock_of_a_killed_process_is_taken_over_at_once(tmp_path: Path) -> None:
    holder = hold(tmp_path)
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert json.loads((tmp_path / "lock").read_text())["pid"] == holder.pid
    with locked(tmp_path):
        assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()


def test_a_lock_that_was_given_back_holds_nobody(tmp_path: Path) -> None:
    with locked(tmp_path):
        pass
    assert (tmp_path / "lock").read_bytes() == b""
    with locked(tmp_path):
        pass


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b'{"host": 1}'])
def test_a_lock_file_that_says_nothing_holds_nobody(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "lock").write_bytes(content)
    os.utime(tmp_path / "lock", (0, 0))
    with locked(tmp_path):
        pass


def test_another_host_holds_the_lock_until_60_s_of_silence(tmp_path: Path) -> None:
    write_lock(tmp_path, host="elsewhere", pid=77, age_s=STALE_S - 5)
    with pytest.raises(LockedError, match="process 77 on host elsewhere"), locked(tmp_path):
        pass
    write_lock(tmp_path, host="elsewhere", pid=77, age_s=STALE_S + 5)
    with locked(tmp_path):
        pass


def test_a_refused_call_leaves_the_holders_name_in_the_file(tmp_path: Path) -> None:
    write_lock(tmp_path, host="elsewhere", pid=77)
    before = (tmp_path / "lock").read_bytes()
    with pytest.raises(LockedError), locked(tmp_path):
        pass
    assert (tmp_path / "lock").read_bytes() == before


def test_without_flock_the_process_or_its_boot_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_flock(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", no_flock)
    write_lock(tmp_path)
    with pytest.raises(LockedError, match=f"process {os.getpid()}"), locked(tmp_path):
        pass
    gone = subprocess.Popen(["true"])
    gone.wait()
    for holder in ({"pid": gone.pid}, {"boot_id": "another start"}):
        write_lock(tmp_path, **holder)
        with locked(tmp_path):
            pass


def test_the_holder_gives_signs_of_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "HEARTBEAT_S", 0.01)
    with locked(tmp_path):
        os.utime(tmp_path / "lock", (0, 0))
        end = time.monotonic() + 5
        while os.stat(tmp_path / "lock").st_mtime < 1 and time.monotonic() < end:
            time.sleep(0.01)
        assert time.time() - os.stat(tmp_path / "lock").st_mtime < 5
