"""PPO trainings with a live judge that are killed, run out of budget or lose their endpoint: asked once, same bytes."""

from __future__ import annotations

import json
import re
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from constitution.principles import Constitution, default_path
from pipeline.config.settings import Settings
from pipeline.errors import EngineDown, StoppedError
from pipeline.journal import Journal
from pipeline.live_judge import live_judge
from pipeline.train import rows
from pipeline.train.output import JOURNAL, work_path
from pipeline.train.ppo import train_ppo
from pipeline.train.stage import Job
from tests.pipeline.cli.test_torchrun import TORCHRUN, finish
from tests.pipeline.lm.tiny import save_tiny
from tests.pipeline.train.test_ppo import lines, weights
from tests.pipeline.train.tiny_jobs import asked_after_steps, write_rows
from tests.support import CAI, Command, Server, environment

Serve = Callable[..., Server]
KEYS = {"batch_size": 8, "minibatch_size": 8, "max_tokens": 8, "learning_rate": 1e-3, "advantages": "policy-gradient"}


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("start"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """3 steps' prompts, and 6 to validate with."""
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl")


class Call(NamedTuple):
    """tokens: that the judge and the starting model took. error: what stopped it."""

    journal: Journal
    tokens: int
    error: StoppedError | None


def train(
    data: Path, start: Path, out: Path, kind: str, *, keys: Any = None, judge: Any = None, run: Any = None, **more: Any
) -> Call:
    """keys: of `train_ppo`. judge, run: these sections. more: of the job."""
    tree = {"engine": {"backend": "scripted", "concurrency": 2}, "judge": judge or {}, "run": run or {}}
    settings = Settings.model_validate({**tree, "train_ppo": {**KEYS, **(keys or {})}})
    job = Job(sources=[rows.Source(str(data))], start=str(start), out=out, **asked_after_steps(**more))
    folder, constitution, stopped = work_path(out) / JOURNAL, Constitution.load(default_path()), None
    with live_judge(settings, constitution, str(start), kind, folder=folder) as (found, source):
        try:
            train_ppo(job, settings.train_ppo, judge=source)
        except StoppedError as error:
            stopped = error
    return Call(found.journal, found.engines.spent(found.journal.usage).tokens, stopped)


def same(one: Path, other: Path) -> bool:
    """Whether two models and their logs are the same but for times."""
    logs = [[lines(folder, name) for name in ("metrics", "samples")] for folder in (one, other)]
    return weights(one) == weights(other) and logs[0] == logs[1]


@pytest.mark.parametrize("kind", ["graded", "judge"])
def test_budgets_stop_a_training_time_and_again_and_nothing_is_asked_twice(
    kind: str, data: Path, start: Path, tmp_path: Path
) -> None:
    whole = train(data, start, tmp_path / "whole", kind)
    assert lines(tmp_path / "whole")[0]["eval/no_verdict"] == 0.0
    assert lines(tmp_path / "whole")[1]["objective/no_verdict"] == 0.0
    budget, calls = whole.tokens // 5, list[Call]()
    while not calls or calls[-1].error:
        calls.append(train(data, start, tmp_path / "stopped", kind, run={"budget_tokens": budget}))
    for call in calls[:-1]:
        assert call.error is not None
        assert (call.error.exit_code, "stopped at run.budget_tokens" in str(call.error)) == (75, True)
        assert budget <= call.tokens < 1.5 * budget  # what was in flight is still answered
    assert len(calls) > 3
    assert sum(call.journal.asked for call in calls) == whole.journal.asked
    assert same(tmp_path / "stopped", tmp_path / "whole")


def test_an_endpoint_that_goes_away_leaves_a_checkpoint_and_is_asked_for_the_rest(
    data: Path, start: Path, tmp_path: Path, serve: Serve
) -> None:
    server = serve()
    judge = {"backend": "server", "model": "scripted", "base_urls": [server.url], "timeout_s": 1.0}
    stop = {"keys": {"eval_every": 3}, "judge": judge}
    call = train(data, start, tmp_path / "ppo", "graded", **stop, watch=lambda progress: server.stop())
    assert isinstance(call.error, EngineDown)
    assert [path.name for path in (work_path(tmp_path / "ppo") / "checkpoints").iterdir()] == ["step-00000001"]
    assert [line["step"] for line in lines(work_path(tmp_path / "ppo"))] == [0, 1]
    again = Server(server.ledger.parent, url=server.url)
    try:
        train(data, start, tmp_path / "ppo", "graded", **stop)
    finally:
        again.stop()
    assert again.repeated() == 0
    train(data, start, tmp_path / "whole", "graded", keys=stop["keys"], judge={**judge, "base_urls": [serve().url]})
    assert same(tmp_path / "ppo", tmp_path / "whole")


def test_replies_outlive_a_change_of_settings(data: Path, start: Path, tmp_path: Path) -> None:
    """Other settings begin a new training, whose first answers are those of the old one."""
    first = train(data, start, tmp_path / "ppo", "graded", should_stop=lambda: True)
    second = train(data, start, tmp_path / "ppo", "graded", keys={"learning_rate": 2e-3})
    assert second.journal.replayed >= first.journal.asked > 0
    assert not work_path(tmp_path / "ppo").exists()


def cai_options(folder: Path, url: str, *more: str) -> list[str]:
    keys = {"reward": "judge", "max_tokens": 4, "batch_size": 8, "minibatch_size": 8, "value_start": "zero"}
    judge = {"backend": "server", "model": "scripted", "base_urls": f"[{url}]", "price_in": 3.0, "price_out": 0.0}
    sections = {"train_ppo": {**keys, "save_every": 2}, "judge": judge}
    settings = [f"{section}.{key}={value}" for section, keys in sections.items() for key, value in keys.items()]
    assignments = [part for each in (*settings, *more) for part in ("--set", each)]
    return ["train-ppo", "--model", "nano", "--data", str(folder / "rows.jsonl"), "--json", *assignments]


def test_a_killed_training_pays_for_no_reply_twice_and_ends_in_the_same_bytes(
    cai: Command, tmp_path: Path, serve: Serve
) -> None:
    write_rows(tmp_path / "rows.jsonl")
    server, other, work = serve(), serve(), tmp_path / ".ppo.training"
    planned = cai(*cai_options(tmp_path, other.url), "--out", "whole", "--dry-run")
    most = json.loads(planned.stdout)["counts"]["judge_requests"]
    assert other.num_received() == 0
    whole = cai(*cai_options(tmp_path, other.url), "--out", "whole")
    assert whole.returncode == 0, whole.stderr
    counts = json.loads(whole.stdout)["counts"]["work"]
    assert most / 2 < other.num_received() <= most
    assert 0 < counts["cost"] < 3.0 * counts["prompt_tokens"] / 1e6  # the starting model's answers cost nothing
    fault = f"before:1:replace {work}/checkpoints/.step-00000002"
    killed = cai(*cai_options(tmp_path, server.url), "--out", "ppo", fault=fault)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    asked = server.num_received()
    done = cai(*cai_options(tmp_path, server.url), "--out", "ppo")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["counts"]["work"]["replayed"] >= asked > 0
    assert "more from the journal" in done.stderr
    assert server.repeated() == other.repeated() == 0
    assert {line["key"] for line in server.received()} == {line["key"] for line in other.received()}
    assert same(tmp_path / "ppo", tmp_path / "whole")


def test_of_two_processes_one_asks_and_both_stop_at_its_budget(tmp_path: Path, serve: Serve) -> None:
    write_rows(tmp_path / "rows.jsonl", 16)
    server = serve()
    for run, expected in (("run.budget_tokens=400", [75, 75]), ("run.seed=0", [])):
        process = subprocess.Popen(
            [*TORCHRUN, CAI, *cai_options(tmp_path, server.url, run), "--out", "ppo"],
            cwd=tmp_path,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        out, err, codes = finish(process)
        assert codes == expected, err
        assert json.loads(out)["counts"]["work"]["replies"] > 0
        assert err.count("asked: ") == 1
    assert server.repeated() == 0
    assert [line["step"] for line in lines(tmp_path / "ppo")] == [0, 1, 2]


def test_a_judge_whose_replies_cannot_be_read_ends_the_command_with_3(cai: Command, tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl")
    (tmp_path / "script.yaml").write_text("rules: [{asks: labels, labels: {}}]")
    options = cai_options(tmp_path, "http://127.0.0.1:1/v1", "judge.backend=scripted", "judge.script=script.yaml")
    done = cai(*options, "--out", "ppo")
    assert done.returncode == 3, done.stderr
    assert re.search(r"(\d) of 6 answers have no verdict \(abstain \1\), and run.max_failed_share is 1%", done.stderr)
    assert not (tmp_path / "ppo").exists()
