"""What a user can get wrong: one line that says where, what and what to do, and the right exit code."""

from __future__ import annotations

import json
import os
import socket
import subprocess
from collections.abc import Callable

import pytest

from tests.support import Command, Server, kill_group, lines, published, wait_for, write_prompts

Serve = Callable[..., Server]
SCRIPTED = ("--set", "engine.backend=scripted")


def refusal(done: subprocess.CompletedProcess[str], code: int = 2) -> str:
    """The one line of the error; nothing else went wrong."""
    assert done.returncode == code, (done.returncode, done.stderr)
    assert "Traceback" not in done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("cai: ")]
    assert len(errors) == 1
    assert done.stderr.splitlines()[-1] == errors[0]
    return errors[0]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b'{"prompt": "One?"}\n{"question": "Two?"}\n', "p.jsonl:2: "),
        (b'{"prompt": "One?"}\nTwo?\n', "p.jsonl:2: not a JSON object"),
        (b'{"prompt": "One?"}\n\n{"prompt": "  "}\n', "p.jsonl:3: "),
        (b'{"prompt": "One?"}\n{"prompt": "caf\xe9"}\n', "p.jsonl:2: not UTF-8 at byte offset 34"),
        (b'{"prompt": "\\ud800"}\n', "p.jsonl:1: "),
        (
            b'{"id": "x", "prompt": "One?"}\n{"id": "x", "prompt": "Two?"}\n',
            "the id 'x' stands for two different prompts",
        ),
    ],
)
def test_a_wrong_line_is_refused_with_its_place(cai: Command, content: bytes, says: str) -> None:
    (cai.folder / "p.jsonl").write_bytes(content)
    message = refusal(cai("run", "--run", "r", "--prompts", "p.jsonl", *SCRIPTED))
    assert says in message
    assert not (cai.folder / "r" / "generate").exists()


def test_a_missing_file_a_folder_and_a_wrong_column_are_refused(cai: Command) -> None:
    assert "gone.jsonl: no such file" in refusal(cai("run", "--run", "r", "--prompts", "gone.jsonl", *SCRIPTED))
    (cai.folder / "folder").mkdir()
    assert "folder: a directory" in refusal(cai("run", "--run", "r", "--prompts", "folder", *SCRIPTED))
    (cai.folder / "p.csv").write_text("prompt\nOne?\n")
    assert "unknown kind of file" in refusal(cai("run", "--run", "r", "--prompts", "p.csv", *SCRIPTED))


def test_no_prompts_at_all_are_refused(cai: Command) -> None:
    assert "no prompts; use --prompts FILE" in refusal(cai("run", "--run", "r", *SCRIPTED))
    (cai.folder / "empty.jsonl").write_text("")
    assert "empty.jsonl" in refusal(cai("run", "--run", "r", "--prompts", "empty.jsonl", *SCRIPTED))
    prompts = write_prompts(cai.folder / "p.jsonl", 2)
    assert cai("generate", "--run", "r", "--prompts", prompts, *SCRIPTED).returncode == 0
    assert "empty.jsonl" in refusal(cai("generate", "--run", "r", "--prompts", "empty.jsonl", *SCRIPTED))


def test_unknown_keys_and_values_are_refused_with_the_nearest(cai: Command) -> None:
    prompts = write_prompts(cai.folder / "p.jsonl", 2)
    args = ["generate", "--run", "r", "--prompts", prompts]
    assert "did you mean 'samples'" in refusal(cai(*args, "--set", "generate.sample=2"))
    assert "rank.order" in refusal(cai(*args, "--set", "rank.order=both"))
    (cai.folder / "cai.yaml").write_text("engine:\n  backend: scripted\ngenerat:\n  samples: 2\n")
    message = refusal(cai(*args))
    assert "cai.yaml:3: unknown key 'generat'; did you mean 'generate'?" in message
    assert not (cai.folder / "r").exists()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "empty"),
        ("engine: {backend: scripted}\nengine: {}\n", "engine"),
        ("engine: &a {backend: scripted}\njudge: *a\n", "alias"),
        ("engine: !!python/object/apply:os.system ['true']\n", "cai.yaml:1"),
        ("engine: [\n", "cai.yaml"),
    ],
)
def test_a_malformed_config_is_refused_before_anything_is_written(cai: Command, text: str, says: str) -> None:
    (cai.folder / "cai.yaml").write_text(text)
    message = refusal(cai("generate", "--run", "r", "--prompts", write_prompts(cai.folder / "p.jsonl", 2)))
    assert "cai.yaml" in message
    assert says in message
    assert not (cai.folder / "r").exists()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ([], "engine.model: no model given"),
        (["--model", "./gone"], "model ./gone: no such folder; check engine.model"),
        (["--model", "empty"], "model empty: the folder holds no config.json"),
        (["--model", "nano", "--set", 'judge={"model": "./gone"}'], "model ./gone: no such folder; check judge.model"),
        (["--model", "m", "--endpoint", "foo"], "'foo' is no http(s) address"),
        (["--set", "engine.script=gone.yaml"], "gone.yaml: [Errno 2] No such file"),
        (["--model", "nano", "--set", "engine.device=warp"], "engine.device: warp is not available here"),
        (["--model", "nano", "--set", "engine.adapter=lora"], "engine.adapter: the transformers backend does not"),
        (["--model", "nano", "--set", "judge.adapter=lora"], "judge.adapter: the transformers backend does not"),
        (["--model", "nano", "--set", "critic=[{dtype: float32}, {script: s}]"], "critic[1].script: the transformers"),
        (["--model", "nano", "--run", "UP CASE"], "'UP CASE' is no run name"),
    ],
)
def test_what_cannot_work_is_refused_before_prompts_are_brought_in_and_by_a_dry_run(
    cai: Command, options: list[str], says: str
) -> None:
    (cai.folder / "empty").mkdir()
    call = ["run", "--run", "r", "--prompts", write_prompts(cai.folder / "p.jsonl", 2), *options]
    assert says in refusal(cai(*call))
    assert says in refusal(cai(*call, "--dry-run"))
    assert sorted(os.listdir(cai.folder)) == ["empty", "p.jsonl"]


def test_a_stage_by_itself_refuses_what_cannot_work_too(cai: Command) -> None:
    prompts = write_prompts(cai.folder / "p.jsonl", 2)
    for dry in ([], ["--dry-run"]):
        assert "UP" in refusal(cai("generate", "--run", "UP", "--prompts", prompts, *SCRIPTED, *dry))
        assert "no such folder" in refusal(cai("generate", "--run", "r", "--prompts", prompts, "--model", "./no", *dry))
    assert os.listdir(cai.folder) == ["p.jsonl"]
    assert cai("generate", "--run", "r", "--prompts", prompts, *SCRIPTED).returncode == 0
    before = published(cai.folder / "r")
    assert "judge.device: the scripted backend" in refusal(cai("rank", "--run", "r", "--set", "judge.device=cpu"))
    assert published(cai.folder / "r") == before


def test_an_unknown_model_stops_the_run_at_once(cai: Command, serve: Serve) -> None:
    server = serve("models: [llama-small, llama-large]")
    prompts = write_prompts(cai.folder / "p.jsonl", 50)
    args = ["--prompts", prompts, "--endpoint", server.url, "--set", "engine.concurrency=4"]
    message = refusal(cai("generate", "--run", "r", *args, "--model", "lama-small"))
    assert "lama-small" in message
    assert server.num_received() <= 8
    assert refusal(cai("generate", "--run", "s", "--prompts", prompts, "--model", "no/such-folder")).count(
        "no/such-folder"
    )


def test_an_endpoint_that_is_not_there_is_no_bug(cai: Command) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    args = ["--prompts", write_prompts(cai.folder / "p.jsonl", 2), "--endpoint", f"http://127.0.0.1:{port}/v1"]
    done = cai("generate", "--run", "r", *args, "--model", "m", "--set", "engine.timeout_s=1")
    assert f"127.0.0.1:{port}" in refusal(done, 75)


@pytest.mark.parametrize(("allowed", "code"), [("0.5", 0), ("0.01", 3)])
def test_a_prompt_longer_than_the_context_fails_alone(cai: Command, serve: Serve, allowed: str, code: int) -> None:
    server = serve("context: 2000")
    prompts = write_prompts(cai.folder / "p.jsonl", 4)
    with prompts.open("a") as file:
        file.write(json.dumps({"id": "long", "prompt": "word " * 2500}) + "\n")
    settings = ["--set", f"run.max_failed_share={allowed}", "--set", "generate.max_tokens=50"]
    done = cai("generate", "--run", "r", "--prompts", prompts, *server.options(*settings))
    assert done.returncode == code, done.stderr
    assert "in 5, ok 4, filtered 0, failed 1" in done.stdout
    failed = [json.loads(line) for line in (cai.folder / "r/failed/generate.jsonl").read_text().splitlines()]
    assert [(f["id"], f["sample"], f["kind"], f["reason"]) for f in failed] == [
        ("long", sample, "draft", "too_long") for sample in (0, 1)
    ]
    if code == 3:
        assert "generate: failed 1 of 5, more than run.max_failed_share (1%)" in refusal(done, 3)


def test_a_folder_that_is_no_run_or_of_another_format_is_refused(cai: Command) -> None:
    prompts = write_prompts(cai.folder / "p.jsonl", 2)
    args = ["--prompts", prompts, *SCRIPTED]
    (cai.folder / "other").mkdir()
    (cai.folder / "other" / "thesis.tex").write_text("")
    assert "other: not empty and no run folder" in refusal(cai("run", "--run", "other", *args))
    assert os.listdir(cai.folder / "other") == ["thesis.tex"]
    (cai.folder / "newer").mkdir()
    (cai.folder / "newer" / "run.json").write_text('{"format":2}\n')
    assert "run folder of format 2, this cai knows format 1" in refusal(cai("run", "--run", "newer", *args))
    assert "'Run 1' is no run name" in refusal(cai("run", "--run", "Run 1", *args))
    assert "p.jsonl: " in refusal(cai("run", "--run", "p.jsonl", *args))
    for command in ("critique-revise", "rank", "export"):
        assert "gone: no run here" in refusal(cai(command, "--run", "gone"))
    assert not (cai.folder / "gone").exists()


def test_stages_without_the_stages_before_them_are_refused(cai: Command) -> None:
    prompts = write_prompts(cai.folder / "p.jsonl", 2)
    assert cai("generate", "--run", "r", "--prompts", prompts, *SCRIPTED).returncode == 0
    assert cai("generate", "--run", "s", "--prompts", prompts, "--limit", "1", *SCRIPTED).returncode == 0
    (cai.folder / "s" / "generate" / "manifest.json").unlink()
    assert "no drafts to revise; run `cai generate --run s` first" in refusal(cai("critique-revise", "--run", "s"))


def test_a_second_run_on_the_same_folder_is_told_who_holds_it(cai: Command, serve: Serve) -> None:
    server = serve("latency_s: 5.0")
    args = ["generate", "--run", "r", "--prompts", write_prompts(cai.folder / "p.jsonl", 2), *server.options()]
    first = cai.start(*args)
    wait_for(lambda: server.num_received() > 0)
    message = refusal(cai(*args), 6)
    assert f"process {first.pid} on host {socket.gethostname()} works on this run" in message
    kill_group(first)
    quick = serve()
    assert cai(*args[:5], *quick.options()).returncode == 0  # the dead holder's lock is taken over at once
    assert len(lines(cai.folder / "r", "generate")) == 2


def test_a_folder_that_cannot_be_written_is_refused_with_its_path(cai: Command) -> None:
    args = ["--prompts", write_prompts(cai.folder / "p.jsonl", 2), *SCRIPTED]
    (cai.folder / "file").write_text("")
    assert "file/r: " in refusal(cai("run", "--run", "file/r", *args))
    # In /sys nobody can make a folder, not even root.
    message = refusal(cai("run", "--run", "/sys/r", *args))
    assert "/sys/r: " in message
    assert "choose a folder that can be written" in message


def test_a_run_that_became_read_only_is_refused_with_its_path(cai: Command) -> None:
    assert (
        cai("generate", "--run", "r", "--prompts", write_prompts(cai.folder / "p.jsonl", 2), *SCRIPTED).returncode == 0
    )
    before = published(cai.folder / "r")
    message = refusal(cai("rank", "--run", "r", fault=f"erofs:1: {cai.folder}/r"))
    assert message.startswith("cai: r/lock: Read-only file system; choose a folder that can be written")
    assert published(cai.folder / "r") == before


def test_a_refused_call_leaves_a_finished_run_as_it_was(cai: Command) -> None:
    prompts = write_prompts(cai.folder / "p.jsonl", 3)
    assert cai("run", "--run", "r", "--prompts", prompts, *SCRIPTED).returncode == 0
    before = published(cai.folder / "r")
    refusal(cai("run", "--run", "r", "--prompts", "gone.jsonl"))
    refusal(cai("run", "--run", "r", "--set", "rank.mode=best"))
    refusal(cai("run", "--run", "r", "--constitution", "gone.yaml"))
    assert published(cai.folder / "r") == before
    assert cai("run", "--run", "r").returncode == 0
    assert published(cai.folder / "r") == before


def test_the_json_object_tells_of_a_refusal_too(cai: Command) -> None:
    done = cai("run", "--run", "r", "--prompts", "gone.jsonl", "--json", *SCRIPTED)
    report = json.loads(done.stdout)
    assert (done.returncode, report["exit_code"], report["command"], report["run"]) == (2, 2, "run", "r")
    assert "gone.jsonl: no such file" in report["error"]["message"]
