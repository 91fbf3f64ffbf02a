"""One writer per run folder, and per folder of work in progress.

`flock` holds the file while the process lives, so that a killed run leaves nothing to clean up on this host. On a
shared file system where another host's flock is not seen, the holder's heartbeat (the file's modification time, every
10 s) speaks for it, and 60 s of silence make the lock stale.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from pipeline.errors import LockedError, UsageError
from pipeline.store import io_errors, make_folder

LOCK = "lock"
"""The file's name."""
HEARTBEAT_S = 10.0
STALE_S = 60.0


_RUN = "works on this run; wait for it, stop it, or choose another --run"
_WORK = "works here; wait for it, stop it, or choose another name"


@contextmanager
def locked(folder: Path, *, said: str = _RUN) -> Iterator[None]:
    """Holds `folder/lock`; LockedError (6) names the holder if another process does. said: what it does there."""
    path = folder / LOCK
    make_folder(folder)
    with io_errors(path):
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        _take(fd, path, said)
        done = threading.Event()
        beat = threading.Thread(target=_heartbeat, args=(fd, done), name="lock-heartbeat", daemon=True)
        beat.start()
        try:
            yield
        finally:
            done.set()
            beat.join()
            os.ftruncate(fd, 0)
    finally:
        os.close(fd)


@contextmanager
def working(folder: Path) -> Iterator[Path]:
    """Holds a folder of work in progress, which may be deleted meanwhile; if it is empty at the end it goes, too."""
    with locked(folder, said=_WORK):
        try:
            yield folder
        finally:
            if [path.name for path in folder.glob("*")] == [LOCK]:
                shutil.rmtree(folder, ignore_errors=True)


class Holder(NamedTuple):
    """Who works on a run. silence_s: since its last sign of life."""

    host: str
    pid: int
    silence_s: float


def holder(folder: Path) -> Holder | None:
    """Who holds `folder/lock`, as far as can be told without touching it; None if nobody does."""
    path = folder / LOCK
    try:
        fd = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}; mend its permissions") from error
    try:
        found, silence_s = _read_holder(fd), max(0.0, time.time() - os.fstat(fd).st_mtime)
    finally:
        os.close(fd)
    if not _is_alive(found, silence_s, has_flock=False):
        return None
    return Holder(str(found.get("host")), int(str(found.get("pid"))), silence_s)


def _take(fd: int, path: Path, said: str) -> None:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        has_flock = True
    except BlockingIOError:
        raise LockedError(_held(path, _read_holder(fd), said)) from None
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        has_flock = False
    holder = _read_holder(fd)
    if _is_alive(holder, time.time() - os.fstat(fd).st_mtime, has_flock=has_flock):
        raise LockedError(_held(path, holder, said))
    if not os.fstat(fd).st_nlink:
        raise LockedError(f"{path}: another process ended its work here just now; run the same command again")
    with io_errors(path):
        os.ftruncate(fd, 0)
        os.pwrite(
            fd,
            json.dumps({"host": socket.gethostname(), "boot_id": boot_id(), "pid": os.getpid()}).encode(),
            0,
        )
        os.fsync(fd)


def _is_alive(holder: dict[str, object], silence_s: float, *, has_flock: bool) -> bool:
    """Whether the process that last wrote the lock still holds it, now that this one got the flock or there is none."""
    if not holder:
        return False
    if holder.get("host") != socket.gethostname():
        return silence_s < STALE_S
    if has_flock or holder.get("boot_id") != boot_id():
        return False
    try:
        os.kill(int(str(holder.get("pid"))), 0)
    except (ProcessLookupError, ValueError):
        return False
    except PermissionError:
        return True
    return True


def _held(path: Path, holder: dict[str, object], said: str) -> str:
    who = f"process {holder.get('pid')} on host {holder.get('host')}" if holder else "another process"
    return f"{path}: {who} {said}"


def _read_holder(fd: int) -> dict[str, object]:
    try:
        holder = json.loads(os.pread(fd, 4096, 0))
    except ValueError:
        return {}
    return holder if isinstance(holder, dict) else {}


def _heartbeat(fd: int, done: threading.Event) -> None:
    while not done.wait(HEARTBEAT_S):
        with contextlib.suppress(OSError):
            os.utime(fd)


def boot_id() -> str:
    """Identity of this start of the machine; empty where the system does not tell."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
