from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from pipeline.config.load import differences, dump, read_file, read_layers
from pipeline.config.settings import EngineSettings, Settings
from pipeline.errors import UsageError


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("OPENAI_BASE_URL", "CAI_RUN_SEED"):
        monkeypatch.delenv(name, raising=False)


def read(*assignments: str, run: str = "", config: str = "", flags: dict[str, Any] | None = None) -> Settings:
    for name, text in (("run.yaml", run), ("given.yaml", config)):
        Path(name).write_text(text)
    return read_layers(
        Path("run.yaml") if run else None, Path("given.yaml") if config else None, assignments, flags or {}
    )


def test_the_defaults_are_those_of_the_design() -> None:
    settings = Settings()
    assert (settings.generate.samples, settings.generate.temperature, settings.generate.top_p) == (2, 1.0, 1.0)
    assert (settings.critique_revise.rounds, settings.critique_revise.verify) == (2, True)
    assert (settings.critique_revise.direct, settings.critique_revise.early_stop) == (False, False)
    assert (settings.rank.mode, settings.rank.order, settings.rank.principles) == ("pairwise", "average", 1)
    assert settings.rank.candidates == "ends"
    assert (settings.export.split.sft, settings.export.split.preference, settings.export.split.test) == (
        0.45,
        0.45,
        0.1,
    )
    assert settings.run.max_failed_share == 0.01


def test_a_flag_beats_an_assignment_beats_the_environment_beats_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    config = "run: {seed: 2}\n"
    assert read(config=config).run.seed == 2
    monkeypatch.setenv("CAI_RUN_SEED", "3")
    assert read(config=config).run.seed == 3
    assert read("run.seed=4", config=config).run.seed == 4
    assert read("run.seed=4", config=config, flags={"run": {"seed": 5}}).run.seed == 5


def test_one_file_is_read_the_given_one_or_cai_yaml_or_that_of_the_last_call() -> None:
    run = "run: {seed: 1}\ngenerate: {samples: 7}\n"
    assert (read(run=run).run.seed, read(run=run).generate.samples) == (1, 7)
    Path("cai.yaml").write_text("run: {seed: 8}\n")
    assert (read(run=run).run.seed, read(run=run).generate.samples) == (8, 2)
    settings = read(run=run, config="generate: {samples: 3}\n")
    assert (settings.run.seed, settings.generate.samples) == (0, 3)


def test_environment_names_are_section_and_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAI_CRITIQUE_REVISE_ROUNDS", "5")
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    settings = read()
    assert settings.critique_revise.rounds == 5
    assert settings.engine.base_urls == ("http://127.0.0.1:9/v1",)
    monkeypatch.setenv("CAI_NOTHING_HERE", "5")
    with pytest.raises(UsageError, match="CAI_NOTHING_HERE: no section of that name"):
        read()


def test_a_list_replaces_a_list() -> None:
    run = "prompts: {sources: [{path: a.jsonl, limit: 3}, {path: b.jsonl}]}\n"
    settings = read(run=run, flags={"prompts": {"sources": [{"path": "c.jsonl"}]}})
    assert [(source.path, source.limit) for source in settings.prompts.sources] == [("c.jsonl", None)]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("generat:\n  samples: 2\n", "given.yaml:1: unknown key 'generat'; did you mean 'generate'?"),
        ("run:\n  seed: 1\nrank:\n  ordr: single\n", "given.yaml:4: unknown key 'rank.ordr'; did you mean 'order'?"),
        ("rank:\n  xyzzy: 1\n", "given.yaml:2: unknown key 'rank.xyzzy'; known keys: mode, order"),
        ("judge:\n  modle: x\n", "given.yaml:2: unknown key 'judge.modle'; did you mean 'model'?"),
        ("critic:\n  - {}\n  - modle: x\n", "given.yaml:3: unknown key 'critic.1.modle'; did you mean 'model'?"),
        (
            "critic: carl\n",
            "given.yaml:1: critic: write a section, such as {model: NAME}, or a list of them, not 'carl'",
        ),
        ("generate:\n  samples: 0\n", "given.yaml:2: generate.samples: "),
        ("generate:\n  samples: many\n", "given.yaml:2: generate.samples: "),
        ("prompts:\n  sources:\n    - {path: a}\n    - {pth: b}\n", "given.yaml:4: "),
        ("export: {split: {sft: 0.5, preference: 0.5, test: 0.5}}\n", "the shares add up to 1.5"),
        ("rank: {tie_band: 0.5}\n", "rank.tie_band"),
        ("- a\n", "given.yaml:1: not a mapping of sections"),
        ("engine: {base_urls: [http://a/v1, http://a/v1/]}\n", "base_urls twice"),
    ],
)
def test_a_mistake_is_reported_at_its_place_with_a_cure(config: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        read(config=config)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_mistake_in_an_assignment_names_the_assignment() -> None:
    with pytest.raises(UsageError, match=r"--set rank: not section\.key=value"):
        read("rank")
    with pytest.raises(UsageError, match="the value is not YAML"):
        read("rank.order=[")


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("rank.ordr=single", "--set rank.ordr: unknown key; did you mean 'order'?"),
        ("rank={ordr: single}", "--set rank: unknown key 'rank.ordr'; did you mean 'order'?"),
        ("generate.samples=0", "--set generate.samples: input should be greater than or equal to 1, not 0"),
        ("engine.base_urls=http://a/v1", "--set engine.base_urls: write a list, such as [ONE, TWO]"),
        ("recipe.trainers=ppo", "--set recipe.trainers: write a list, such as [ONE, TWO]"),
        ("engine.base_urls=[foo]", "--set engine.base_urls: 'foo' is no http(s) address; write it like http://"),
        ("judge.base_urls=[foo]", "--set judge.base_urls: 'foo' is no http(s) address; write it like http://"),
        ("engine.base_urls=[http://me:pw@h]", "--set engine.base_urls: no password belongs into an address"),
        ("export.split.sft=0.9", "--set export.split.sft: export.split: the shares add up to 1.4"),
    ],
)
def test_a_mistake_in_an_assignment_names_it_once_whatever_else_the_file_says(assignment: str, message: str) -> None:
    config = "run: {seed: 1}\nengine:\n  model: m\nexport:\n  split: {sft: 0.5, preference: 0.4, test: 0.1}\n"
    with pytest.raises(UsageError) as caught:
        read(assignment, config=config)
    assert str(caught.value).startswith(message)


def test_values_of_assignments_are_yaml() -> None:
    settings = read("rank.clamp=[0.3, 0.7]", "critique_revise.direct=true", "run.max_time=null", "rank.principles=all")
    assert settings.rank.clamp == (0.3, 0.7)
    assert settings.critique_revise.direct is True
    assert settings.run.max_time is None
    assert settings.rank.principles == "all"


def test_what_is_dumped_reads_back_as_the_same_settings(tmp_path: Path) -> None:
    settings = read(
        "judge.model=other", "rank.clamp=[0.3, 0.7]", "engine.model='é: #1'", "generate.models=[{model: a}, {model: b}]"
    )
    path = tmp_path / "config.yaml"
    path.write_bytes(dump(settings))
    assert read_file(path) == settings
    assert dump(read_file(path)) == dump(settings)


def test_differences_name_every_setting_that_changed() -> None:
    before, after = read(), read("run.seed=3", "judge.model=other", "rank.clamp=[0.4, 0.6]")
    assert differences(before, before) == []
    assert differences(before, after) == [
        "judge.model: None -> other", "rank.clamp: None -> [0.4, 0.6]", "run.seed: 0 -> 3",
    ]  # fmt: skip


def test_judge_and_critic_say_only_what_differs_from_the_engine() -> None:
    settings = read("engine.model=big", "engine.timeout_s=5", "judge.model=small")
    judge = settings.engine_for(settings.judge)
    assert (judge.model, judge.timeout_s) == ("small", 5.0)
    assert list(settings.engines) == ["engine", "judge"]
    assert read("engine.model=big", "critic.model=small").critics["critic"].model == "small"


def test_critics_are_one_section_or_a_list() -> None:
    critics = read("engine.model=big", "critic=[{model: a}, {}]").critics
    assert {place: critic.model for place, critic in critics.items()} == {"critic[0]": "a", "critic[1]": "big"}
    run = "critic: [{model: a}]\n"
    assert read("critic.model=b", run=run).critic == {"model": "b"}
    assert read("critic=[{model: b}]", run="critic: {model: a}\n").critic == ({"model": "b"},)
    assert read("critic={}", run=run).critics == {}


def test_settings_cannot_be_changed_behind_a_runs_back() -> None:
    with pytest.raises(ValidationError):
        EngineSettings().concurrency = 3  # type: ignore[misc]


def test_an_endpoint_from_a_higher_layer_does_not_get_the_key_that_the_file_named_for_its_own(tmp_path, monkeypatch):
    file = tmp_path / "c.yaml"
    file.write_text("engine:\n  base_urls: [http://one:1/v1]\n  api_key_env: KEY_OF_ONE\n")
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    assert read_layers(None, file, (), {}).engine.api_key_env == "KEY_OF_ONE"
    monkeypatch.setenv("OPENAI_BASE_URL", "http://one:1/other")
    assert read_layers(None, file, (), {}).engine.api_key_env == "KEY_OF_ONE"
    monkeypatch.setenv("OPENAI_BASE_URL", "http://two:1/v1")
    assert read_layers(None, file, (), {}).engine.api_key_env == "OPENAI_API_KEY"


def test_a_password_in_an_address_is_refused():
    with pytest.raises(UsageError, match="no password belongs into an address"):
        read_layers(None, None, ["engine.base_urls=[http://me:secret@host/v1]"], {})
