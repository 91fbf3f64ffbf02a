"""`cai run` as a whole: which steps it takes, that single commands give the same, that nothing is done twice."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from pipeline import nano
from pipeline.config.settings import RecipeSettings, Settings
from pipeline.recipe import Export, Stages, Step, Train, steps, trainers
from pipeline.standing import standing
from pipeline.store import RunFolder, read_json
from tests.support import Command, Server, published, wait_for, write_prompts

PHASE_1 = Stages(1, ("generate", "critique-revise", "rank"))
SAMPLES = [Stages(2, ("generate",)), Stages(2, ("rank",)), Export(before_samples=False)]
SMALL = {
    "engine.deterministic": "true",
    "critique_revise.rounds": "1",
    "critique_revise.verify": "false",
    "export.split": "{sft: 0.4, preference: 0.4, test: 0.2}",
    "train_sft.learning_rate": "1e-3",
    "train_sft.batch_size": "4",
    "train_dpo.batch_size": "4",
    "train_ppo.batch_size": "8",
    "train_ppo.max_tokens": "32",
    "recipe.trainers": "[ppo, dpo, sft, rm]",
}
NUM_PROMPTS = 20


def test_the_default_recipe_is_the_paper_s() -> None:
    found = steps(RecipeSettings(), ("sft", "rm", "dpo"))
    sft, policies = Train("sft"), [Train("rm"), Train("dpo")]
    assert found == [PHASE_1, Export(before_samples=True), sft, *SAMPLES, *policies]


def test_ppo_comes_after_the_reward_model_however_they_are_listed() -> None:
    found = steps(RecipeSettings(), ("ppo", "rm", "sft"))
    assert [step for step in found if isinstance(step, Train)] == [Train("sft"), Train("rm"), Train("ppo")]


@pytest.mark.parametrize(
    ("recipe", "asked", "expected"),
    [
        ({}, (), []),
        ({}, ("sft",), [Train("sft")]),
        ({"phases": 1}, ("sft", "rm", "dpo"), [Train("sft")]),
        ({"pairs": "revisions"}, ("sft", "dpo"), [Train("sft"), Train("dpo")]),
    ],
)
def test_nothing_is_sampled_that_nobody_trains_on(
    recipe: dict[str, Any], asked: tuple[Any, ...], expected: list[Step]
) -> None:
    assert steps(RecipeSettings(**recipe), asked) == [PHASE_1, Export(before_samples=False), *expected]


def test_a_recipe_without_sft_samples_the_run_s_own_model() -> None:
    assert steps(RecipeSettings(pairs="both"), ("rrhf",))[2:] == [*SAMPLES, Train("rrhf")]


@pytest.mark.parametrize(
    ("engine", "expected", "why"),
    [
        ({"model": "nano"}, ("sft", "rm", "dpo"), ""),
        ({"model": "m", "base_urls": ["http://127.0.0.1:1/v1"]}, (), "no model of its own"),
        ({"backend": "scripted"}, (), "no model of its own"),
        ({"model": str(nano.path())}, (), "no GPU"),
    ],
)
def test_auto_trains_where_that_makes_sense_and_says_why_not(
    monkeypatch: pytest.MonkeyPatch, engine: dict[str, Any], expected: tuple[str, ...], why: str
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    found, said = trainers(Settings.model_validate({"engine": engine}))
    assert found == expected
    assert why in said
    asked = Settings.model_validate({"engine": engine, "recipe": {"trainers": ["sft"]}})
    assert trainers(asked) == (("sft",), "")


def test_a_run_through_an_endpoint_ends_with_its_datasets_and_says_so(cai: Command, serve: Any) -> None:
    server: Server = serve()
    write_prompts(cai.folder / "p.jsonl", 20)
    done = cai("run", "--run", "r", "--prompts", "p.jsonl", *server.options())
    assert done.returncode == 0, done.stderr
    assert "no training: the run has no model of its own to train, only an endpoint" in done.stdout
    assert standing(RunFolder(cai.folder / "r")).to_do == []
    before = server.num_received()
    asked = cai("run", "--run", "r", "--set", "recipe.trainers=[sft]")
    assert (asked.returncode, server.num_received()) == (2, before)
    assert "no model to start from" in asked.stderr


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`cai run` on the embedded model, both phases and their trainings, in the folder of its prompts `p.jsonl`."""
    folder = tmp_path_factory.mktemp("whole")
    prompts = nano.example_prompts().read_text().splitlines(keepends=True)[:NUM_PROMPTS]
    (folder / "p.jsonl").write_text("".join(prompts))
    done = Command(folder)("run", "--run", "r", *arguments(folder), timeout=300)
    assert done.returncode == 0, done.stderr
    return folder / "r"


def arguments(folder: Path) -> list[str]:
    assignments = [part for key, value in SMALL.items() for part in ("--set", f"{key}={value}")]
    return ["--prompts", str(folder / "p.jsonl"), "--model", "nano", *assignments]


def starts(run: Path) -> dict[str, str]:
    """Model -> the name of what it was trained from."""
    found = {path.parent.name: read_json(path) for path in run.glob("models/*/training.json")}
    return {name: Path(training["start"]["name"]).name for name, training in found.items()}


def test_a_run_trains_on_phase_1_and_then_from_its_sft_model_on_samples_of_it(whole: Path) -> None:
    assert starts(whole) == {"sft": "weights", "rm": "sft", "dpo": "sft", "ppo": "sft"}
    sampled = list(RunFolder(whole, phase=2).read("generate"))
    assert {completion["model"] for line in sampled for completion in line["completions"]} == {"sft"}
    found = standing(RunFolder(whole))
    assert found.to_do == []
    assert found.stages["phase2/generate"].counts["ok"] == len(sampled) > 0
    assert all(model.is_current for model in found.models.values())


def test_the_same_call_again_asks_nothing_and_trains_nothing(whole: Path) -> None:
    before = published(whole)
    weights = {path: path.stat().st_mtime_ns for path in whole.glob("models/*/model.safetensors")}
    done = Command(whole.parent)("run", "--run", "r", "--json", timeout=300)
    report = json.loads(done.stdout)
    assert (report["exit_code"], report["counts"]["work"]["replies"]) == (0, 0)
    assert {"phase2/generate", "phase2/rank", "train-sft", "train-rm", "train-dpo"} <= report["counts"].keys()
    assert {"models/sft", "models/rm", "models/dpo", "datasets/preference"} <= report["outputs"].keys()
    assert published(whole) == before
    assert {path: path.stat().st_mtime_ns for path in weights} == weights


def test_the_commands_one_by_one_give_the_files_of_a_run(whole: Path, cai: Command) -> None:
    common = arguments(whole.parent)
    for call in (
        ("generate", *common),
        ("critique-revise",),
        ("rank",),
        ("export",),
        ("train-sft",),
        ("generate", "--phase", "2"),
        ("rank", "--phase", "2"),
        ("export",),
        ("train-dpo",),
        ("train-rm",),
        ("train-ppo",),
    ):
        done = cai(call[0], "--run", "r", *call[1:], timeout=120)
        assert done.returncode == 0, done.stderr
    assert published(cai.folder / "r") == published(whole)
    for name in ("sft", "dpo", "rm", "ppo"):
        one, other = (run / "models" / name / "model.safetensors" for run in (cai.folder / "r", whole))
        assert one.read_bytes() == other.read_bytes()


def test_new_settings_of_sft_sample_and_train_again(whole: Path, cai: Command) -> None:
    shutil.copytree(whole, cai.folder / "r")
    assert cai("train-sft", "--run", "r", "--set", "train_sft.epochs=1", timeout=120).returncode == 0
    found = standing(RunFolder(cai.folder / "r"))
    num = sum(line != "" for line in (whole.parent / "p.jsonl").read_text().splitlines())
    again = [f"phase2/{name}: {num} of {num} prompts" for name in ("generate", "rank")]
    assert found.to_do == [*again, "export", "train-rm", "train-dpo", "train-ppo"]
    assert not found.models["dpo"].is_current


def test_another_reward_model_and_other_data_leave_their_models_behind(whole: Path, cai: Command) -> None:
    shutil.copytree(whole, cai.folder / "r")
    assert cai("train-rm", "--run", "r", "--set", "train_rm.epochs=2", timeout=120).returncode == 0
    found = standing(RunFolder(cai.folder / "r"))
    assert {name for name, model in found.models.items() if not model.is_current} == {"ppo"}
    assert cai("export", "--run", "r", "--set", "export.margin=0.4").returncode == 0
    found = standing(RunFolder(cai.folder / "r"))
    assert {name for name, model in found.models.items() if not model.is_current} == {"ppo", "rm", "dpo"}


def test_a_dry_run_counts_both_phases_and_the_trainings(whole: Path, cai: Command) -> None:
    told = json.loads(cai("run", "--run", "d", *arguments(whole.parent), "--dry-run", "--json").stdout)["counts"]
    sampled = list(RunFolder(whole, phase=2).read("generate"))
    assert told["requests"]["phase2/draft"] == 2 * len(sampled)
    assert told["requests"]["phase2/comparison"] == 2 * len(sampled)
    logs = {path.parent.name: path.read_text().splitlines() for path in whole.glob("models/*/metrics.jsonl")}
    done = {name: json.loads(lines[-1])["step"] for name, lines in logs.items()}
    assert told["steps"].keys() == done.keys()
    assert all(told["steps"][name] >= steps for name, steps in done.items())
    assert told["steps"]["sft"] == done["sft"]
    assert not (cai.folder / "d").exists()


@pytest.mark.parametrize(
    ("trainers", "reward", "message"),
    [
        ("sft, ppo", "model", "no models/rm here"),
        ("sft, rm, ppo", "policy", "`cai run` cannot"),
        ("sft, ppo", "no.py:score", "train_ppo.reward: no.py: no such file"),
    ],
)
def test_a_run_that_ppo_cannot_end_does_not_begin(trainers: str, reward: str, message: str, cai: Command) -> None:
    (cai.folder / "p.jsonl").write_text('{"prompt": "Hello."}\n')
    settings = (f"recipe.trainers=[{trainers}]", f"train_ppo.reward={reward}")
    assignments = [part for each in settings for part in ("--set", each)]
    failed = cai("run", "--run", "r", "--model", "nano", "--prompts", "p.jsonl", *assignments)
    assert failed.returncode == 2
    assert message in failed.stderr.splitlines()[-1]
    assert not list(cai.folder.glob("r/prompts/*"))


def test_a_run_stopped_while_it_trains_goes_on_there(whole: Path, cai: Command) -> None:
    shutil.copytree(whole, cai.folder / "r")
    process = cai.start("run", "--run", "r", "--set", "train_dpo.epochs=2000")
    log = cai.folder / "r" / "models" / ".dpo.training" / "metrics.jsonl"
    wait_for(lambda: log.exists() and log.read_bytes().count(b"\n") >= 2, 120)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    assert standing(RunFolder(cai.folder / "r")).holder is None
    num_lines = log.read_bytes().count(b"\n")
    process = cai.start("run", "--run", "r", "--set", "train_dpo.epochs=2000")
    wait_for(lambda: log.read_bytes().count(b"\n") > num_lines, 120)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    steps_taken = [json.loads(line)["step"] for line in log.read_text().splitlines()]
    assert steps_taken == list(range(1, len(steps_taken) + 1))
