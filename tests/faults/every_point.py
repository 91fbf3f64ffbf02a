"""Kills runs at one system call after the other; each must recover to the files of an undisturbed run. By hand:

python -m tests.faults.every_point            a run of 20 records: before every write, fsync, rename, truncation and
                                              mkdir, and in the middle of every write; half an hour
python -m tests.faults.every_point --sites    a run of 200: before the first, middle and last hit of each call site
"""

from __future__ import annotations

import argparse
import itertools
import re
import signal
import tempfile
from collections import Counter
from pathlib import Path

from tests.support import Command, Server, published, write_prompts

IN_FLIGHT = 2 * 8
SETTINGS = ("generate.samples=1", "critique_revise.rounds=1", "engine.concurrency=8")


class Walk:
    """A run of `num` records in parts of `shard_size`, undisturbed once, then with faults. sites: call -> its hits."""

    def __init__(self, num: int, shard_size: int) -> None:
        self.num = num
        self.settings = (*SETTINGS, f"prompts.shard_size={shard_size}")
        folder, cai, server = self._begin("none")
        done = cai(*self._arguments(folder, server), fault="count", log=folder / "calls")
        server.stop()
        assert done.returncode == 0, done.stderr
        self.undisturbed = published(folder / "r")
        calls = (folder / "calls").read_text().replace(f"{folder}/", "").splitlines()
        self.sites = Counter(re.split(r"\d", call)[0] for call in calls)

    def _begin(self, fault: str) -> tuple[Path, Command, Server]:
        folder = Path(tempfile.mkdtemp(prefix=f"point-{re.sub('[^a-z0-9]+', '-', fault)}-"))
        write_prompts(folder / "p.jsonl", self.num)
        return folder, Command(folder), Server(folder)

    def _arguments(self, folder: Path, server: Server) -> list[str]:
        settings = [part for setting in self.settings for part in ("--set", setting)]
        return ["run", "--run", "r", "--prompts", str(folder / "p.jsonl"), *server.options(*settings)]

    def recovers(self, kind: str, number: int, site: str = "") -> bool:
        """Whether a run with this fault recovers; False when it ended before the fault. Raises what is wrong.

        site: name of the call and beginning of the file's path from the run's folder on.
        """
        folder, cai, server = self._begin(f"{kind}-{number}-{site}")
        name, _, path = site.partition(" ")
        fault = f"{kind}:{number}:{name} {folder}/{path}" if path else f"{kind}:{number}:{name} "
        try:
            killed = cai(*self._arguments(folder, server), fault=fault)
            if killed.returncode == 0:
                return False
            assert killed.returncode == -signal.SIGKILL, (fault, killed.returncode, killed.stderr)
            done = cai(*self._arguments(folder, server))
            assert done.returncode == 0, (fault, done.stderr)
            assert published(folder / "r") == self.undisturbed, (fault, folder)
            assert server.repeated() <= IN_FLIGHT, (fault, server.repeated(), folder)
            return True
        finally:
            server.stop()


def every_point(walk: Walk) -> None:
    for kind, site in (("before", ""), ("torn", "write")):
        number = next(n for n in itertools.count(1) if not walk.recovers(kind, n, site))
        print(f"{kind} {site}: recovered from all of {number - 1} points", flush=True)


def each_site(walk: Walk) -> None:
    for site, hits in sorted(walk.sites.items()):
        # The number of journal writes depends on the moment; a point that was not reached was no fault.
        reached = sum(walk.recovers("before", number, site) for number in sorted({1, (hits + 1) // 2, hits}))
        print(f"{site}: {hits} hits, recovered from {reached}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sites", action="store_true")
    if parser.parse_args().sites:
        each_site(Walk(200, 20))
    else:
        every_point(Walk(20, 10))


if __name__ == "__main__":
    main()
