"""constitution check, show and import, as the installed command runs them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from constitution.principles import Constitution, default_path
from tests.support import Command

PUBLISHED = {
    "kind0": {
        "prompt": ["CritiqueRequest: Point out what is unkind.\n\nCritique:"],
        "edit_request": "RevisionRequest: Be kind.",
    }
}


def test_check_counts_by_group(cai: Command) -> None:
    done = cai("constitution", "check", default_path(), "--json")
    report = json.loads(done.stdout)
    constitution = Constitution.default()
    assert done.returncode == 0
    assert report["command"] == "constitution check"
    assert report["counts"]["principles"] == len(constitution) == sum(report["counts"]["groups"].values())
    assert report["outputs"]["digest"] == constitution.digest


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "bad.yaml:1: empty"),
        ("principles:\n  - {id: a, about: b, critique_request: c}\n", "bad.yaml:2: a principle has no"),
        ("principles: !!python/object:os.system x\n", "bad.yaml:1: the tag"),
    ],
)
def test_check_says_file_line_and_cure(cai: Command, text: str, message: str) -> None:
    (cai.folder / "bad.yaml").write_text(text)
    done = cai("constitution", "check", "bad.yaml")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"cai: {message}")
    assert done.stderr.count("\n") == 1


def test_check_of_a_file_that_is_not_there_is_an_error(cai: Command) -> None:
    done = cai("constitution", "check", "none.yaml")
    assert (done.returncode, "none.yaml" in done.stderr) == (2, True)


def test_show_prints_one_principle_by_its_id_with_and_without_a_file(cai: Command) -> None:
    first = next(iter(Constitution.default()))
    by_id = cai("constitution", "show", first.id)
    (cai.folder / "mine.yaml").write_bytes(default_path().read_bytes())
    assert by_id.stdout == cai("constitution", "show", "mine.yaml", first.id).stdout
    assert first.comparison in by_id.stdout
    assert len(cai("constitution", "show", "mine.yaml").stdout.splitlines()) == 4 * len(Constitution.default())


@pytest.mark.parametrize("request_", ["critique", "revision", "check", "comparison", "grade"])
@pytest.mark.parametrize("style", ["chat", "few-shot"])
def test_show_renders_every_request_with_the_principles_own_words(cai: Command, request_: str, style: str) -> None:
    principle = Constitution.default()["tone-respect"]
    words = {
        "critique": principle.critique_request,
        "revision": principle.revision_request,
        "check": principle.critique_request,
        "comparison": principle.comparison,
        "grade": principle.comparison,
    }
    done = cai("constitution", "show", principle.id, "--request", request_, "--style", style)
    assert done.returncode == 0
    assert words[request_] in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["show", "tone-respct"],
            "cai: the built-in constitution: no principle 'tone-respct'; did you mean 'tone-respect'?",
        ),
        (["show", "nowhere.yaml"], "cai: nowhere.yaml:1: cannot be read"),
        (["show", "a", "b", "c"], "cai: a b c: too many words"),
        (["import", "nowhere.json", "-o", "out.yaml"], "cai: nowhere.json:1: cannot be read"),
        (["import", "sentences.txt"], "cai: Missing option '-o' / '--output'; see"),
        (["import", "sentences.txt", "-o", "there.yaml"], "cai: there.yaml: exists; choose another -o"),
        (["import", "sentences.txt", "-o", "no/folder/out.yaml"], "cai: no/folder/out.yaml: No such file or directory"),
        (["import", "empty.txt", "-o", "out.yaml"], "cai: empty.txt:1: no principle found"),
        (["import", str(default_path()), "-o", "out.yaml"], f"cai: {default_path()}:17: is YAML of this project"),
    ],
)
def test_a_slip_is_said_in_one_line_and_writes_nothing(cai: Command, arguments: list[str], message: str) -> None:
    (cai.folder / "sentences.txt").write_text("Answers should be kind.\n")
    (cai.folder / "there.yaml").write_text("mine\n")
    (cai.folder / "empty.txt").write_text("")
    done = cai("constitution", *arguments)
    assert done.returncode == 2
    assert done.stderr.startswith(message)
    assert done.stderr.count("\n") == 1
    assert (cai.folder / "there.yaml").read_text() == "mine\n"
    assert not (cai.folder / "out.yaml").exists()


@pytest.mark.parametrize(
    "text", [json.dumps(PUBLISHED), '["Which is kinder?\\nOptions:"]', "- Answers should be kind.\n"]
)
def test_import_makes_a_constitution_that_checks(cai: Command, text: str) -> None:
    source = cai.folder / ("source.txt" if text.startswith("-") else "source.json")
    source.write_text(text)
    done = cai("constitution", "import", source, "-o", "out.yaml")
    assert (done.returncode, done.stdout) == (0, "out.yaml: 1 principles\n")
    assert cai("constitution", "check", Path("out.yaml")).returncode == 0
