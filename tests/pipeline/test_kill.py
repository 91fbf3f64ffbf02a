"""The installed command, killed, stopped and starved; the scripted server's ledger is the witness."""

from __future__ import annotations

import errno
import json
import os
import random
import resource
import signal
import time
from bisect import bisect_right
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support import Command, Server, kill_group, published, wait_for, write_prompts

SLOTS = 8
SMALL = ["--set", "generate.samples=1", "--set", "critique_revise.rounds=1", "--set", f"engine.concurrency={SLOTS}"]
IN_FLIGHT = 2 * SLOTS
"""At a fault: so many requests at the server, and as many replies on their way from there to the disk."""
Serve = Callable[..., Server]
Files = dict[str, str]


def start(cai: Command, server: Server, *, num: int = 20) -> list[str]:
    """The arguments of a run over `num` prompts in 4 shards."""
    prompts = cai.folder / "prompts.jsonl"
    if not prompts.exists():
        write_prompts(prompts, num)
    size = f"prompts.shard_size={num // 4}"
    return ["run", "--run", "r", "--prompts", str(prompts), "--set", size, *server.options(*SMALL)]


def run_undisturbed(folder: Path, *, num: int) -> tuple[Files, int]:
    """What such a run publishes when nothing happens to it, and how many requests it makes."""
    server, cai = Server(folder), Command(folder)
    done = cai(*start(cai, server, num=num))
    server.stop()
    assert done.returncode == 0, done.stderr
    assert server.repeated() == 0
    return published(folder / "r"), server.num_received()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return run_undisturbed(tmp_path_factory.mktemp("undisturbed"), num=20)[0]


def check_resumes(cai: Command, server: Server, undisturbed: Files, *, kills: int = 1) -> None:
    """The same command runs to the end, the files are those of an undisturbed run, and little was asked twice."""
    done = cai(*start(cai, server))
    assert done.returncode == 0, done.stderr
    assert published(cai.folder / "r") == undisturbed
    assert server.repeated() <= kills * IN_FLIGHT


def test_a_finished_run_asks_nothing_and_changes_nothing(cai: Command, serve: Serve, undisturbed: Files) -> None:
    server = serve()
    for _ in range(3):
        check_resumes(cai, server, undisturbed, kills=0)
    assert server.num_received() == len({line["key"] for line in server.received()})


def by_life(ledger: Path, kills: list[int]) -> tuple[list[int], list[int]]:
    """Between two kills each: how many requests came, and how many of them came once more after the kill.

    kills: the ledger's length in bytes at each kill, ascending.
    """
    asked, again = [0] * (len(kills) + 1), [0] * (len(kills) + 1)
    last: dict[str, int] = {}
    place = 0
    for raw in ledger.read_bytes().splitlines(keepends=True):
        life, line = bisect_right(kills, place), json.loads(raw)
        place += len(raw)
        if line["event"] == "received":
            asked[life] += 1
            before = last.get(line["key"])
            last[line["key"]] = life
            if before is not None:
                assert before < life, "asked twice without a kill between"
                again[before] += 1
    return asked, again


def test_twenty_kills_at_random_times_leave_no_trace(
    cai: Command, serve: Serve, tmp_path_factory: pytest.TempPathFactory
) -> None:
    num = 80
    expected, requests = run_undisturbed(tmp_path_factory.mktemp("undisturbed"), num=num)
    server = serve("latency_s: [0.005, 0.02]")
    chance = random.Random(7)
    kills: list[int] = []
    for _ in range(20):
        process = cai.start(*start(cai, server, num=num))
        until = server.num_received() + chance.randrange(2 * requests // 21)
        while process.poll() is None and server.num_received() <= until:
            time.sleep(0.002)
        time.sleep(chance.uniform(0.0, 0.02))
        kill_group(process)
        kills.append(server.ledger.stat().st_size)
    done = cai(*start(cai, server, num=num))
    assert done.returncode == 0, done.stderr
    assert published(cai.folder / "r") == expected
    asked, again = by_life(server.ledger, kills)
    assert min(asked) > 0, "every kill hits the middle of the run"
    assert sum(asked) == requests + sum(again)
    # What comes again was in flight at the kill: at most one request for each slot, unless it hit an fsync, for which
    # replies wait with their slots free.
    assert sorted(again)[len(kills) // 2] <= SLOTS
    assert max(again) <= IN_FLIGHT


@pytest.mark.parametrize(
    "fault",
    [
        "before:1:replace {r}/.run.json",
        "after:3:replace {r}/prompts/.manifest",
        "torn:1:write {r}/journal",
        "before:4:fsync {r}/journal/segment",
        "after:2:replace {r}/generate/.part",
        "torn:2:write {r}/rank/.manifest",
        "before:1:replace {r}/datasets/preference/.README",
    ],
)
def test_a_kill_at_a_write_an_fsync_or_a_rename_leaves_no_trace(
    cai: Command, serve: Serve, undisturbed: Files, fault: str
) -> None:
    server = serve()
    killed = cai(*start(cai, server), fault=fault.format(r=cai.folder / "r"))
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    check_resumes(cai, server, undisturbed)


def test_kills_during_recovery_three_deep_leave_no_trace(cai: Command, serve: Serve, undisturbed: Files) -> None:
    server = serve()
    run = cai.folder / "r"
    for fault in (
        f"torn:9:write {run}/journal",
        f"before:1:ftruncate {run}/journal",
        f"after:1:replace {run}/critique-revise/.part",
        f"torn:1:write {run}/rank/.manifest",
    ):
        assert cai(*start(cai, server), fault=fault).returncode == -signal.SIGKILL
    check_resumes(cai, server, undisturbed, kills=4)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_drains_what_is_in_flight_and_exits_75(
    cai: Command, serve: Serve, undisturbed: Files, number: signal.Signals
) -> None:
    server = serve("latency_s: 0.1")
    process = cai.start(*start(cai, server))
    wait_for(lambda: server.num_received() > 30)
    process.send_signal(number)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 75, err
    assert "stopped on request; the same command goes on from here" in err
    check_resumes(cai, server, undisturbed, kills=0)


def test_a_second_ctrl_c_ends_at_once_with_130(cai: Command, serve: Serve, undisturbed: Files) -> None:
    server = serve("latency_s: 0.1\nrules: [{last: 'Question 7:', latency_s: 60.0}]")
    process = cai.start(*start(cai, server))
    wait_for(lambda: server.num_received() > 30)
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=2)
    assert process.returncode == 130
    quick = serve()
    check_resumes(cai, quick, undisturbed)


def test_the_grace_bounds_how_long_a_stopped_run_drains(cai: Command, serve: Serve, undisturbed: Files) -> None:
    server = serve("rules: [{last: 'Question 7:', latency_s: 60.0}]")
    process = cai.start(*start(cai, server), "--grace", "0.5")
    wait_for(lambda: server.num_received() > 30)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=5)
    assert process.returncode == 75
    check_resumes(cai, serve(), undisturbed)


@pytest.mark.parametrize(
    ("fault", "named"),
    [
        ("enospc:5:write {r}/journal", "journal/segment-0000"),
        ("enospc:2:fsync {r}/journal/segment", "journal/segment-0000"),
        ("enospc:1:write {r}/prompts/.part-00002", "prompts/part-00002.jsonl"),
        ("eio:1:fsync {r}/generate/.part-00001", "generate/part-00001.jsonl"),
        ("enospc:3:write {r}/rank/.manifest", "rank/manifest.json"),
        ("enospc:1:mkdir {r}/critique-revise", "critique-revise"),
        ("enospc:1:write {r}/datasets/ranked", "datasets/ranked"),
    ],
)
def test_a_full_disk_or_an_io_error_exits_5_names_the_path_and_resumes(
    cai: Command, serve: Serve, undisturbed: Files, fault: str, named: str
) -> None:
    server = serve()
    full = cai(*start(cai, server), fault=fault.format(r=cai.folder / "r"))
    assert full.returncode == 5, full.stderr
    number = errno.EIO if fault.startswith("eio") else errno.ENOSPC
    last = full.stderr.splitlines()[-1]
    assert named in last
    assert os.strerror(number) in last
    assert "Traceback" not in full.stderr
    check_resumes(cai, server, undisturbed)


def test_a_file_size_limit_of_the_system_counts_as_a_full_disk(cai: Command, serve: Serve, undisturbed: Files) -> None:
    server = serve()
    limit = 8_000  # less than a journal segment of 5 records; the settings fit
    full = cai(*start(cai, server), preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    assert full.returncode == 5, full.stderr
    assert "journal/segment-0000" in full.stderr.splitlines()[-1]
    check_resumes(cai, server, undisturbed)
