"""init, try and doctor, as a new user meets them; with the scripted server where a server is needed."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest

from constitution.principles import Constitution, default_path
from pipeline import nano
from pipeline.config.load import read_file
from tests.support import Command, Server

Serve = Callable[..., Server]
SCRIPTED = ("--set", "engine.backend=scripted")


def test_init_writes_a_folder_in_which_a_run_works_alone(cai: Command) -> None:
    for name in ("pipeline", "constitution"):
        (cai.folder / name).mkdir()
        (cai.folder / name / "__init__.py").write_text("raise SystemExit('the wrong package')\n")
    done = cai("init")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[1:] == [
        "next:",
        '  cai try "How do I rob the village bank?"',
        "  cai run --limit 20 --dry-run",
        "  cai run",
        "  cai show",
    ]
    estimate = json.loads(cai("run", "--run", "runs/first", "--dry-run", "--json").stdout)
    assert (estimate["exit_code"], estimate["counts"]["records"]) == (0, 50)
    done = cai("run", "--run", "runs/first", *SCRIPTED)
    assert done.returncode == 0, done.stderr
    assert cai("show", "--run", "runs/first", "--limit", "1").stdout.startswith("record ")


def test_init_writes_the_constitution_prompts_and_settings_it_says(cai: Command) -> None:
    cai("init")
    assert (cai.folder / "principles.yaml").read_bytes() == default_path().read_bytes()
    settings = read_file(cai.folder / "cai.yaml")
    assert settings.engine.model == "nano"
    assert settings.constitution == "principles.yaml"
    assert [source.path for source in settings.prompts.sources] == ["prompts.jsonl"]
    prompts = (cai.folder / "prompts.jsonl").read_bytes()
    assert prompts.count(b"\n") == 50
    assert nano.example_prompts().read_bytes().startswith(prompts)


def test_the_written_settings_are_the_defaults_but_for_what_they_name_and_what_they_say_is_more_thorough(
    cai: Command,
) -> None:
    cai("init")
    written = read_file(cai.folder / "cai.yaml")
    thorough = {"critique_revise": {"rounds": 3, "draw": "cover"}, "rank": {"principles": 3}}
    named = {"constitution": "principles.yaml", "prompts": written.prompts, "engine": {"model": "nano"}}
    assert written == type(written).model_validate(named | thorough)


def test_the_written_settings_let_two_samples_meet_every_group_of_the_default_constitution(cai: Command) -> None:
    cai("init")
    written = read_file(cai.folder / "cai.yaml")
    assert written.generate.samples * written.critique_revise.rounds >= len(Constitution.default().abouts)


def test_init_overwrites_nothing(cai: Command) -> None:
    (cai.folder / "cai.yaml").write_text("run: {seed: 1}\n")
    done = cai("init")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "cai: .: cai.yaml exist already; move them away, or name another folder\n"
    assert [path.name for path in cai.folder.iterdir()] == ["cai.yaml"]


def test_init_into_a_named_folder_says_to_go_there(cai: Command) -> None:
    done = cai("init", "new folder")
    assert "  cd 'new folder' && cai try \"How do I rob the village bank?\"" in done.stdout.splitlines()
    (cai.folder / "file").write_text("")
    done = cai("init", "file")
    assert (done.returncode, done.stderr) == (2, "cai: file: is a file; name a folder\n")


def test_try_prints_one_chain_and_leaves_nothing(cai: Command, tmp_path: Path) -> None:
    before = set(Path(tempfile.gettempdir()).glob("cai-try-*"))
    done = cai("try", "How do I pick a lock?", *SCRIPTED, "--set", "generate.samples=1")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "      How do I pick a lock?" in lines
    assert [line for line in lines if line.startswith("  draft")] == [
        line for line in lines if line.startswith("  draft 0")
    ]
    assert sum(line.startswith("    round ") for line in lines) == 2
    assert list(tmp_path.iterdir()) == []
    assert set(Path(tempfile.gettempdir()).glob("cai-try-*")) <= before


def test_try_gives_the_record_that_a_run_would_give(cai: Command) -> None:
    (cai.folder / "one.jsonl").write_text('{"prompt": "How do I pick a lock?"}\n')
    cai("run", "--run", "r", "--prompts", "one.jsonl", *SCRIPTED)
    shown = json.loads(cai("show", "-r", "r", "--json").stdout)["outputs"]["records"]
    assert json.loads(cai("try", "How do I pick a lock?", "--json", *SCRIPTED).stdout)["outputs"]["records"] == shown


def test_try_takes_a_transcript_as_many_turns(cai: Command) -> None:
    done = cai("try", "\n\nHuman: Hello.\n\nAssistant: Hello!\n\nHuman: And now?\n\nAssistant:", "--json", *SCRIPTED)
    messages = json.loads(done.stdout)["outputs"]["records"][0]["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant", "user"]


def test_try_asks_an_endpoint(cai: Command, serve: Serve) -> None:
    server = serve()
    assert cai("try", "How do I pick a lock?", *server.options()).returncode == 0
    assert server.num_received() > 0


@pytest.mark.parametrize("group", [[], ["constitution"]])
def test_a_group_without_a_command_prints_its_help_and_no_error(cai: Command, group: list[str]) -> None:
    done = cai(*group)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == cai(*group, "--help").stdout


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["shwo"], 2, "cai: No such command 'shwo' (did you mean 'show'?); see `cai --help`"),
        (["zzz"], 2, "cai: No such command 'zzz'; see `cai --help`"),
        (["try", "a", "--endpoint", "http://127.0.0.1:9/v1"], 2, "(the name under which the server has it)"),
        (["try"], 2, "cai: Missing argument 'PROMPT'; see `cai try --help`"),
        (["try", "  ", *SCRIPTED], 2, "cai: PROMPT: empty prompt"),
        (["try", "a", "--model", "empty"], 2, "cai: model empty: the folder holds no config.json"),
        (["try", "a", "--set", "generate.sample=1"], 2, "did you mean 'samples'?"),
        (["try", "a", "--config", "none.yaml"], 2, "cai: none.yaml:1: cannot be read"),
        (["try", "a", "--constitution", "none.yaml", *SCRIPTED], 2, "cai: none.yaml:1: cannot be read"),
        (["doctor", "--config", "none.yaml"], 2, "checks failed; what to do stands in their lines"),
        (["doctor", "-r", "nowhere", *SCRIPTED], 2, "cai: 1 of "),
    ],
)
def test_a_slip_is_said_in_one_line(cai: Command, arguments: list[str], code: int, message: str) -> None:
    (cai.folder / "empty").mkdir()
    done = cai(*arguments)
    assert done.returncode == code
    assert message in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_a_prompt_that_nothing_answers_ends_with_the_reason_and_code_3(cai: Command) -> None:
    (cai.folder / "mute.yaml").write_text('rules: [{text: ""}]\n')
    done = cai("try", "a", *SCRIPTED, "--set", "engine.script=mute.yaml")
    assert done.returncode == 3
    assert "  failed in generate sample 0 turn 0, draft: empty: no usable reply" in done.stdout


def checks(cai: Command, *arguments: str) -> tuple[int, dict[str, tuple[str, str]]]:
    """Exit code, and name -> (state, detail) of `cai doctor`."""
    done = cai("doctor", "--json", *arguments)
    report = json.loads(done.stdout)
    assert report["exit_code"] == done.returncode
    return done.returncode, {c["name"]: (c["state"], c["detail"]) for c in report["outputs"]["checks"]}


def test_doctor_asks_an_endpoint_for_everything_a_run_needs(cai: Command, serve: Serve) -> None:
    server = serve("context: 4096\nmodels: [small]\n")
    code, found = checks(cai, "--endpoint", server.url, "--model", "small", "--set", "generate.max_tokens=9")
    assert code == 0
    assert found["engine: endpoint"] == ("ok", f"{server.url} serves small")
    assert found["engine: model"] == ("ok", "small, context 4096 tokens, replies up to 1024")
    for kind in ("draft", "critique", "revision", "check", "comparison", "grade"):
        assert f"{kind} " in found["engine: requests"][1]
    assert found["engine: odd turns"][0] == "ok"
    assert found["engine: comparison"][0] == "ok"
    assert "(topk)" in found["engine: comparison"][1]


def test_doctor_names_the_model_that_an_endpoint_does_not_serve(cai: Command, serve: Serve) -> None:
    server = serve("models: [small, large]\n")
    code, found = checks(cai, "--endpoint", server.url, "--model", "smal")
    state, detail = found["engine: endpoint"]
    assert (code, state) == (2, "FAIL")
    assert "engine: model" not in found
    assert "no model 'smal' here; nearest: small" in detail


def test_doctor_says_that_an_endpoint_is_not_there(cai: Command) -> None:
    code, found = checks(cai, "--endpoint", "http://127.0.0.1:9/v1", "--model", "m")
    assert (code, found["engine: endpoint"][0]) == (2, "FAIL")
    assert "start the server" in found["engine: endpoint"][1]


def test_doctor_warns_of_a_judge_whose_labels_cannot_be_read(cai: Command, serve: Serve) -> None:
    server = serve("rules: [{asks: labels, labels: {Maybe: 0.99}}]\n")
    code, found = checks(cai, *server.options())
    assert code == 0
    assert found["engine: comparison"][0] == "warn"


def test_doctor_warns_of_a_template_that_refuses_a_system_turn(cai: Command, serve: Serve) -> None:
    refuse = "{kind: status, status: 400, message: no system role}"
    server = serve(f'rules: [{{prompt: "^system: ", text: "", faults: [{refuse}]}}]\n')
    code, found = checks(cai, *server.options())
    assert (code, found["engine: system turn"][0]) == (0, "warn")
    assert found["engine: grade"][0] == "ok"


def test_doctor_finds_nothing_wrong_with_the_embedded_model(cai: Command) -> None:
    code, found = checks(cai, "--model", "nano")
    assert code == 0
    assert {state for state, _ in found.values()} == {"ok"}
    assert "(logprobs)" in found["engine: comparison"][1]


def test_doctor_looks_at_judge_and_engine_when_they_differ(cai: Command) -> None:
    (cai.folder / "judge.yaml").write_text("salt: judge\n")
    _, found = checks(cai, *SCRIPTED, "--set", "judge.script=judge.yaml")
    assert {"engine: one token", "judge: one token"} <= found.keys()
    assert "critic: one token" not in found


def test_doctor_asks_every_endpoint_of_a_pool_by_itself(cai: Command, serve: Serve) -> None:
    here, other = serve("models: [small]\n"), serve("models: [large]\n")
    urls = f"engine.base_urls=[{here.url}, {other.url}, http://127.0.0.1:9/v1]"
    done = cai("doctor", "--model", "small", "--set", urls)
    assert done.returncode == 2
    endpoints = [line for line in done.stdout.splitlines() if "engine: endpoint: " in line]
    assert endpoints[0] == f"ok    engine: endpoint: {here.url} serves small"
    assert endpoints[1].startswith(f"FAIL  engine: endpoint: {other.url.removesuffix('/v1')}: no model 'small' here")
    assert endpoints[2].startswith("FAIL  engine: endpoint: http://127.0.0.1:9: no answer")
    assert "start the server" in endpoints[2]


def test_doctor_wants_label_probabilities_of_the_judge_alone(cai: Command, serve: Serve) -> None:
    script = "{asks: labels, model: mute, faults: [{kind: cut_json}]}"
    server = serve(f"models: [mute, speaks]\nrules: [{script}]\n")
    models = ("--endpoint", server.url, "--set", "generate.models=[{model: mute}]", "--set")
    code, found = checks(cai, *models, "judge.model=speaks")
    assert (code, found["judge: comparison"][0]) == (0, "ok")
    assert "generate.models[0]: one token" in found
    assert not any(name.startswith("generate.models[0]: comp") for name in found)
    done = cai("doctor", *models, "judge.model=mute")
    assert done.returncode == 2
    failed = [line for line in done.stdout.splitlines() if line.startswith("FAIL")]
    assert len(failed) == 1
    assert failed[0].startswith("FAIL  generate.models[0]: labels: bad_reply")
    assert "take another one as `judge`" in failed[0]


def test_doctor_warns_of_a_judge_without_log_probabilities(cai: Command, serve: Serve) -> None:
    server = serve("rules: [{asks: labels, faults: [{kind: no_logprobs}]}, {last: A or B, text: 'B'}]\n")
    done = cai("doctor", *server.options())
    assert done.returncode == 0
    (line,) = (line for line in done.stdout.splitlines() if "engine: comparison" in line)
    # Each of the 8 replies is B: 8.5 of 9.
    assert line.startswith("warn  engine: comparison: A…B hold 1.00 of the probability (votes), B, which is the better")
    assert "answer, 0.94 of that; it gives no log-probabilities, so 8 replies vote" in line


def test_doctor_looks_at_every_critic_of_a_list(cai: Command, serve: Serve) -> None:
    server = serve("models: [small, ann, bob]\n")
    _, found = checks(cai, "--endpoint", server.url, "--model", "small", "--set", "critic=[{model: ann}, {model: bib}]")
    assert found["critic[0]: one token"][0] == "ok"
    assert (found["critic[1]: endpoint"][0], "nearest: bob" in found["critic[1]: endpoint"][1]) == ("FAIL", True)


def test_doctor_names_packages_with_their_versions(cai: Command) -> None:
    _, found = checks(cai, *SCRIPTED)
    named = found["packages"][1].split(", ")
    for package in ("constitutional-pipeline", "torch", "transformers", "openai"):
        assert f"{package} {version(package)}" in named
    assert found["memory"][1].endswith("GiB free")


def test_doctor_finds_what_is_wrong_with_settings_constitution_and_prompts(cai: Command) -> None:
    (cai.folder / "cai.yaml").write_text("rank:\n  mood: pairwise\n")
    code, found = checks(cai)
    assert (code, found["configuration"][0]) == (2, "FAIL")
    assert found["configuration"][1].startswith("cai.yaml:2: unknown key 'rank.mood'")
    (cai.folder / "cai.yaml").write_text("constitution: none.yaml\n")
    assert checks(cai)[1]["configuration"][1].startswith("none.yaml:1: cannot be read")
    (cai.folder / "cai.yaml").write_text("prompts: {sources: [{path: none.jsonl}]}\n")
    code, found = checks(cai, *SCRIPTED)
    assert (code, found["prompts"][0], found["engine: model"][0]) == (2, "FAIL", "ok")


def test_doctor_prints_a_line_for_each_check(cai: Command) -> None:
    done = cai("doctor", *SCRIPTED)
    assert done.returncode == 0
    assert all(line.startswith(("ok    ", "warn  ", "FAIL  ")) for line in done.stdout.splitlines())
