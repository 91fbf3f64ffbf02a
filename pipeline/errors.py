"""Every error that a user can meet, and the exit code that it means.

    CaiError                    1   a bug, if it is this class itself
    ├── UsageError              2   usage, configuration or input (also a ValueError)
    │   └── EngineRefused       2   the engine will not serve this run: wrong key, unknown model
    ├── IncompleteError         3   done, but more failed or filtered than allowed
    ├── CorruptError            4   a file does not hold what was written
    ├── ResourceError           5   out of disk or memory (also an OSError)
    ├── LockedError             6   another run holds the folder
    ├── DivergedError           7   a loss or gradient is no finite number
    ├── GateError               8   a quality gate failed
    ├── StoppedError           75   stopped early and resumable
    │   └── EngineDown         75   the endpoint is gone; what was answered is kept
    ├── RequestFailed           -   one request cannot be answered; its sample fails, the run goes on
    └── PeerError               *   another process of the same training failed, and says how

A message is one line: where, what, what to do.
"""

from __future__ import annotations


class CaiError(Exception):
    """Base of all errors with a message for the user."""

    exit_code = 1


class UsageError(CaiError, ValueError):
    exit_code = 2


class EngineRefused(UsageError):
    """No request of this run can succeed (401, 403, 404 model, unknown device)."""


class IncompleteError(CaiError):
    exit_code = 3


class CorruptError(CaiError):
    exit_code = 4


class ResourceError(CaiError, OSError):
    exit_code = 5


class LockedError(CaiError):
    exit_code = 6


class DivergedError(CaiError):
    exit_code = 7


class GateError(CaiError):
    exit_code = 8


class StoppedError(CaiError):
    exit_code = 75


class EngineDown(StoppedError):
    """The engine stopped answering, after all retries."""


class PeerError(CaiError):
    """Ends this process with the exit code of another one, without a message of its own."""

    def __init__(self, exit_code: int) -> None:
        super().__init__("another process of this training failed")
        self.exit_code = exit_code


PASSING_REASONS = frozenset({"timeout", "server_error", "bad_reply"})
"""Reasons of a RequestFailed that may be gone the next time; a later call asks again what failed for one of them."""


class RequestFailed(CaiError):
    """One request cannot be answered, now or later; the sample that asked for it fails with this reason.

    reason: one word for counting, such as `too_long`, `empty`, `content_filter`, `unparsed`, `timeout`, `bad_reply`.
    detail: what the user needs to see, with a raw excerpt where there is one.
    attempts: how often it was tried. kind: the request's kind, set by whoever asked.
    """

    kind = ""

    def __init__(self, reason: str, detail: str, attempts: int = 1) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail
        self.attempts = attempts
