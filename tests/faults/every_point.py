"""Kills a run of 20 records before each single write, fsync, rename, truncation and mkdir, and in the middle of each
write; every time the same command must end with the files of an undisturbed run. Takes about half an hour by hand:

    python -m tests.faults.every_point [--every N] [--start N]
"""

from __future__ import annotations

import argparse
import itertools
import signal
import tempfile
from pathlib import Path

from tests.support import Command, Server, published, write_prompts

IN_FLIGHT = 2 * 8
SETTINGS = ("generate.samples=1", "critique_revise.rounds=1", "engine.concurrency=8", "prompts.shard_size=10")


def arguments(folder: Path, server: Server) -> list[str]:
    settings = [part for setting in SETTINGS for part in ("--set", setting)]
    return ["run", "--run", "r", "--prompts", str(folder / "p.jsonl"), *server.options(*settings)]


def in_folder(fault: str) -> tuple[Path, Command, Server]:
    folder = Path(tempfile.mkdtemp(prefix=f"point-{fault.replace(':', '-')}-"))
    write_prompts(folder / "p.jsonl", 20)
    return folder, Command(folder), Server(folder)


def check(fault: str, undisturbed: dict[str, str]) -> bool:
    """Whether a run with this fault recovers; False when it ended before the fault. Raises what is wrong."""
    folder, cai, server = in_folder(fault)
    try:
        killed = cai(*arguments(folder, server), fault=fault)
        if killed.returncode == 0:
            return False
        assert killed.returncode == -signal.SIGKILL, (fault, killed.returncode, killed.stderr)
        done = cai(*arguments(folder, server))
        assert done.returncode == 0, (fault, done.stderr)
        assert published(folder / "r") == undisturbed, (fault, folder)
        assert server.repeated() <= IN_FLIGHT, (fault, server.repeated(), folder)
        return True
    finally:
        server.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--every", type=int, default=1, help="only every N-th point")
    parser.add_argument("--start", type=int, default=1, help="the first point")
    options = parser.parse_args()
    folder, cai, server = in_folder("none")
    done = cai(*arguments(folder, server))
    server.stop()
    assert done.returncode == 0, done.stderr
    undisturbed = published(folder / "r")
    for kind in ("before:{}", "torn:{}:write"):
        reached = itertools.takewhile(
            lambda number, kind=kind: check(kind.format(number), undisturbed),
            itertools.count(options.start, options.every),
        )
        print(f"{kind.format('N')}: recovered from all of {len(list(reached))} points")


if __name__ == "__main__":
    main()
