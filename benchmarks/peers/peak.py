"""The peak memory of the process that asks, for both sides of a benchmark."""

from __future__ import annotations

from pathlib import Path


def peak_kib() -> int:
    """KiB resident at most. That of `getrusage` begins at the peak of the process that has started this one."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1])
