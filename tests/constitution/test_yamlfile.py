"""Files that must be refused, each with its line and its cure, at once."""

import time

import pytest

from constitution.principles import Constitution
from constitution.yamlfile import MAX_BYTES, ConstitutionError

GOOD = "principles:\n  - id: a\n    about: harm\n    critique_request: x\n    revision_request: y\n    comparison: z\n"
BOMB = "a: &a [x, x]\n" + "".join(f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip("abcdefghij", "bcdefghijk", strict=True))

BAD = {
    "an empty file": ("", 1, "empty"),
    "only a comment": ("# nothing\n", 1, "empty"),
    "no principles": ("wording: {}\n", 1, "no 'principles'"),
    "an empty list": ("principles: []\n", 1, "principles is empty"),
    "a list at the top": ("- a\n", 1, "not a mapping"),
    "a sentence for a principle": ("principles:\n  - be good\n", 2, "not a mapping"),
    "a duplicate key": (GOOD + "    about: tone\n", 7, "duplicate key 'about', first on line 3"),
    "a duplicate id": (GOOD + GOOD[12:], 7, "duplicate id 'a', first on line 2"),
    "an unknown key": (GOOD + "    wieght: 2\n", 7, "did you mean 'weight'?"),
    "an unknown top key": (GOOD + "wordings: {}\n", 7, "did you mean 'wording'?"),
    "a missing text": (GOOD.replace("    comparison: z\n", ""), 2, "no 'comparison'"),
    "an empty text": (GOOD.replace(": x", ": '  '"), 4, "critique_request is empty"),
    "a null": (GOOD.replace(": y", ":"), 5, "revision_request is empty"),
    "a list for a text": (GOOD.replace(": z", ": [z]"), 6, "comparison is not a text"),
    "an anchor": (GOOD.replace(": x", ": &a x"), 4, "anchors and aliases"),
    "an alias": (GOOD.replace(": x", ": &a x").replace(": y", ": *a"), 4, "anchors and aliases"),
    "an alias bomb": (BOMB, 1, "anchors and aliases"),
    "a merge key": (GOOD + "    <<: {weight: 2}\n", 7, "unknown key '<<'"),
    "a python tag": (GOOD.replace(": x", ": !!python/object/apply:os.system [ls]"), 4, "python/object"),
    "a harmless tag": (GOOD.replace(": x", ": !!str x"), 4, "is not allowed"),
    "a weight of zero": (GOOD + "    weight: 0\n", 7, "weight is not a number above 0"),
    "a negative weight": (GOOD + "    weight: -1\n", 7, "weight is not a number above 0"),
    "a weight that is no number": (GOOD + "    weight: .nan\n", 7, "weight is not a number above 0"),
    "a weight nan": (GOOD + "    weight: nan\n", 7, "weight is not a number above 0"),
    "an infinite weight": (GOOD + "    weight: inf\n", 7, "weight is not a number above 0"),
    "a weight in words": (GOOD + "    weight: much\n", 7, "weight is not a number above 0"),
    "an id with a space": (GOOD.replace("id: a", "id: A b"), 2, "lower-case"),
    "a second document": (GOOD + "---\n" + GOOD, 7, "second document"),
    "bad indentation": (GOOD + "   weight: 1\n", 7, "not YAML"),
    "an open bracket": ("principles: [\n", 2, "not YAML"),
    "a NUL": (GOOD.replace(": z", ": \0"), 6, "does not allow"),
    "a lone surrogate": (GOOD.replace(": x", ": \ud800"), 4, "does not allow"),
    "an escape sequence": (GOOD.replace(": x", ': "\\e[31m"'), 4, "U+001B"),
    "brackets without end": ("[" * 500_000, 1, "nested too deep"),
    "a list without end": ("- a\n" * 250_000, 49_999, "too many"),
}


@pytest.mark.parametrize("name", BAD)
def test_it_is_refused_with_line_and_cure(name):
    text, line, what = BAD[name]
    start = time.perf_counter()
    with pytest.raises(ConstitutionError) as caught:
        Constitution.parse(text, "f.yaml")
    assert time.perf_counter() - start < 0.9
    message = str(caught.value)
    assert message.startswith(f"f.yaml:{line}: ")
    assert what in message
    assert "; " in message
    assert "\n" not in message


def test_a_file_that_is_too_long_is_refused_before_it_is_parsed(tmp_path):
    path = tmp_path / "long.yaml"
    path.write_text(GOOD + "#" * MAX_BYTES)
    with pytest.raises(ConstitutionError, match=r"long.yaml:1: longer than 1,048,576 bytes"):
        Constitution.load(path)


def test_bytes_that_are_not_utf8_are_refused_with_their_line(tmp_path):
    path = tmp_path / "latin.yaml"
    path.write_bytes(GOOD.replace(": z", ": caf\xe9").encode("latin-1"))
    with pytest.raises(ConstitutionError, match=r"latin.yaml:6: byte \d+ is not UTF-8; save the file as UTF-8"):
        Constitution.load(path)


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ConstitutionError, match=r"none.yaml:1: cannot be read \(No such file or directory\)"):
        Constitution.load(tmp_path / "none.yaml")


def test_a_byte_order_mark_and_windows_line_ends_are_fine(tmp_path):
    path = tmp_path / "windows.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + GOOD.replace("\n", "\r\n").encode())
    assert Constitution.load(path).digest == Constitution.parse(GOOD).digest


def test_words_that_yaml_reads_as_other_types_stay_text():
    constitution = Constitution.parse(GOOD.replace(": x", ": No").replace("id: a", "id: 1").replace(": z", ": 2024"))
    (only,) = constitution
    assert (only.id, only.critique_request, only.comparison, only.weight) == ("1", "No", "2024", 1.0)
