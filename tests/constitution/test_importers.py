"""Constitutions in other layouts."""

import json
import time
from pathlib import Path

import pytest

from constitution.importers import import_constitution
from constitution.principles import Constitution
from constitution.yamlfile import ConstitutionError


def imported(tmp_path: Path, content: object) -> Constitution:
    source = tmp_path / "source.json"
    source.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    target = tmp_path / "out.yaml"
    target.write_text(import_constitution(source), encoding="utf-8")
    return Constitution.load(target)


def test_the_published_layout_of_critiques_and_revisions(tmp_path):
    constitution = imported(
        tmp_path,
        {
            "harmful0": {
                "prompt": ["\n\nCritiqueRequest: Say what is rude: all of it.\n\nCritique:"],
                "edit_request": "\n\nRevisionRequest: Make it polite.\n\nRevision:",
            },
            "harmful1": {
                "prompt": "CritiqueRequest: Say what is wrong.",
                "edit_request": ["RevisionRequest: Make", "it right."],
            },
        },
    )
    first, second = constitution
    assert (first.id, first.about) == ("harmful0", "harmful")
    assert first.critique_request == "Say what is rude: all of it."
    assert first.revision_request == "Make it polite."
    assert "Say what is rude: all of it." in first.comparison
    assert (second.critique_request, second.revision_request) == ("Say what is wrong.", "Make it right.")
    assert (second.weight, second.about) == (1.0, "harmful")


def test_a_missing_half_is_derived(tmp_path):
    constitution = imported(
        tmp_path,
        {"a": {"prompt": ["CritiqueRequest: Find X."]}, "b": {"edit_request": "RevisionRequest: Remove X."}},
    )
    assert "Find X." in constitution["a"].revision_request
    assert "Remove X." in constitution["b"].critique_request
    assert "Remove X." in constitution["b"].comparison


def test_a_list_of_comparison_instructions(tmp_path):
    (only,) = imported(tmp_path, ["\nChoose the kinder answer. Options:"])
    assert only.comparison == "Choose the kinder answer."
    assert '"Choose the kinder answer."' in only.critique_request
    assert (only.id, only.about) == ("principle-01", "imported")


def test_a_json_list_and_a_text_file_of_sentences_say_the_same(tmp_path):
    listed = imported(tmp_path, ["Be kind.", "Be true: always.", "漢字 {comparison} 'x' \"y\""])
    text = "# Rules\n\n- Be kind.\n2. Be true: always.\n* 漢字 {comparison} 'x' \"y\"\n"
    assert imported(tmp_path, text).digest == listed.digest
    assert "{comparison} 'x' \"y\"" in listed["principle-03"].comparison


def test_names_become_ids_that_differ(tmp_path):
    constitution = imported(tmp_path, {n: {"prompt": "X"} for n in ("Be Kind!", "be kind", "be-kind", "漢", "x" * 99)})
    ids = [p.id for p in constitution]
    assert ids[:4] == ["be-kind", "be-kind-2", "be-kind-3", "principle"]
    assert len(ids[4]) <= 64


BAD = {
    "broken JSON": ('{"a":\n oops}', 2, "not JSON"),
    "a name without its texts": ('{"a": {"prompt": "x"},\n "b": {}}', 2, 'no "prompt" and no "edit_request"'),
    "a name without an object": ('{\n"a": "x"}', 2, "'a' is not an object"),
    "a number for a text": ('{"a": {"prompt": [1]}}', 1, "not a text"),
    "a duplicate name": ('{"a": {"prompt": "x"}, "a": {"prompt": "y"}}', 1, "duplicate key 'a'"),
    "a number in a list": ('["x", 1]', 1, "entry 2"),
    "an empty sentence": ('["x", " "]', 1, "entry 2"),
    "an empty list": ("[]", 1, "no principle found"),
    "an empty file": ("", 1, "no principle found"),
    "brackets without end": ("[" * 500_000, 1, "nested too deep"),
    "lines without end": ("a\n" * 400_000, 1, "400,000 principles"),
}


@pytest.mark.parametrize("name", BAD)
def test_it_is_refused_with_its_line(name, tmp_path):
    text, line, what = BAD[name]
    path = tmp_path / "source"
    path.write_text(text)
    start = time.perf_counter()
    with pytest.raises(ConstitutionError) as caught:
        import_constitution(path)
    assert time.perf_counter() - start < 2.0
    assert str(caught.value).startswith(f"{path}:{line}: ")
    assert what in str(caught.value)


def test_a_surrogate_or_a_control_character_in_the_source_is_refused(tmp_path):
    for text in ('["\\ud800"]', '["\\u001b[31m"]'):
        path = tmp_path / "source.json"
        path.write_text(text)
        with pytest.raises(ConstitutionError, match=r"source.json as YAML:\d+: "):
            import_constitution(path)
