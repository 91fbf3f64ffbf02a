"""The wording: filled in one pass, overridden by a constitution, refused where it cannot work."""

import pytest

from constitution.principles import Constitution
from constitution.prompts import comparison_prompt, critique_prompt, grade_prompt
from constitution.wording import default_wording, fill
from constitution.yamlfile import ConstitutionError

GOOD = "principles:\n  - {id: a, about: harm, critique_request: x, revision_request: y, comparison: z}\n"
TALK = [{"role": "user", "content": "Hello"}]


def test_a_value_is_never_a_template():
    assert fill("{a} and {b}", a="{b}", b="{a}") == "{b} and {a}"
    assert fill("{a}{c}{ a }{{a}}", a="1") == "1{c}{ a }{1}"
    assert fill("{a}", a="\\1 \\g<0> $0 %s") == "\\1 \\g<0> $0 %s"


def test_a_constitution_overrides_one_template_and_keeps_the_others():
    constitution = Constitution.parse(GOOD + 'wording:\n  critique: "Kritik: {critique_request}"\n')
    (*_, last) = critique_prompt(TALK, "Hi", constitution["a"], wording=constitution.wording)
    assert last["content"] == "Kritik: x"
    assert constitution.wording.revision == default_wording().revision
    assert constitution.wording.grades == default_wording().grades
    assert constitution.digest != Constitution.parse(GOOD).digest


def test_a_constitution_overrides_section_names_one_by_one():
    constitution = Constitution.parse(GOOD + "wording:\n  sections:\n    answer_a: first\n")
    (message,) = comparison_prompt(TALK, "1", "2", constitution["a"], wording=constitution.wording)
    assert " first\n1\n" in message["content"]
    assert " answer B\n2\n" in message["content"]


def test_a_constitution_overrides_a_whole_list_of_examples():
    constitution = Constitution.parse(
        GOOD
        + "wording:\n  examples:\n    grades:\n"
        + "      - {conversation: [{user: Hi}], answer: Ho, comparison: Better?, label: 7}\n"
    )
    text = grade_prompt(TALK, "Hey", constitution["a"], wording=constitution.wording, style="few-shot")
    assert text.count(" label\n") == 2
    assert " answer\nHo\n" in text


BAD = {
    "an unknown template": ('  critic: "x"\n', 4, "did you mean 'critique'?"),
    "a template without its placeholder": ('  critique: "x"\n', 4, "has no {critique_request}"),
    "a misspelt placeholder": ('  critique: "{critique_reqest}"\n', 4, "usable here: {critique_request}"),
    "a placeholder where there is none": ('  verdict: "{comparison}"\n', 4, "usable here: none"),
    "an unknown section": ("  sections: {answer_c: x}\n", 4, "did you mean 'answer_"),
    "two sections of one name": ("  sections: {answer_a: answer B}\n", 4, "same name"),
    "a name of two lines": ('  sections: {task: "a\\nb"}\n', 4, "several lines"),
    "no examples": ("  examples: {grades: []}\n", 4, "grades is empty"),
    "an unknown role": (
        "  examples:\n    grades:\n      - {conversation: [{human: Hi}], answer: a, comparison: b, label: 7}\n",
        6,
        "unknown key 'human'",
    ),
    "an impossible label": (
        "  examples:\n    grades:\n      - {conversation: [{user: Hi}], answer: a, comparison: b, label: 11}\n",
        6,
        "label '11'",
    ),
    "an assistant's last word": (
        "  examples:\n    grades:\n      - {conversation: [{assistant: Hi}], answer: a, comparison: b, label: 1}\n",
        6,
        "does not end with the user's turn",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_it_is_refused_with_its_line(name):
    text, line, what = BAD[name]
    with pytest.raises(ConstitutionError) as caught:
        Constitution.parse(GOOD + "wording:\n" + text, "f.yaml")
    assert str(caught.value).startswith(f"f.yaml:{line}: ")
    assert what in str(caught.value)
