"""Lets one system call of a Python process kill it, or fail; with this folder on PYTHONPATH, the program has no hook.

FAULT=KIND:N or KIND:N:PLACE says what happens at the N-th call (from 1) of os.write, pwrite, fsync, replace, ftruncate
or mkdir; with PLACE only those count whose name and file, such as `fsync /x/run/journal`, hold it.

    before, after    SIGKILL just before it or just after it
    torn             a write: half of the bytes, then SIGKILL; any other call: as `before`
    enospc, eio, …   this call and all that count after it fail with that error
    count            nothing; name and file of every call are appended to the file FAULT_LOG
"""

import errno
import functools
import itertools
import os
import signal

_write = os.write
_numbers = itertools.count(1)
_kind, _, _rest = os.environ.get("FAULT", "").partition(":")
_at, _, _place = _rest.partition(":")


def _describe(name, target):
    return f"{name} {os.readlink(f'/proc/self/fd/{target}') if isinstance(target, int) else os.path.abspath(target)}"


def _die():
    os.kill(os.getpid(), signal.SIGKILL)


def _note(text):
    fd = os.open(os.environ["FAULT_LOG"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    _write(fd, f"{text}\n".encode())
    os.close(fd)


def _wrapped(name, call):
    @functools.wraps(call)
    def wrapper(*args, **kwargs):
        if _kind == "count":
            _note(_describe(name, args[0]))
        if _kind == "count" or _place not in _describe(name, args[0]):
            return call(*args, **kwargs)
        number = next(_numbers)
        code = getattr(errno, _kind.upper(), 0)
        if code and number >= int(_at):
            raise OSError(code, os.strerror(code))
        if number == int(_at) and _kind in ("before", "torn"):
            if _kind == "torn" and name == "write":
                call(args[0], args[1][: len(args[1]) // 2])
            _die()
        result = call(*args, **kwargs)
        if number == int(_at) and _kind == "after":
            _die()
        return result

    return wrapper


if _kind:
    for _name in ("write", "pwrite", "fsync", "replace", "ftruncate", "mkdir"):
        setattr(os, _name, _wrapped(_name, getattr(os, _name)))
