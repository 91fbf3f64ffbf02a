import gzip
import json
import time
import warnings
from pathlib import Path

import pytest

from pipeline.config.settings import FILTERS
from pipeline.stages.filters import ALWAYS, OPTIONAL, why_not

DATA = Path(__file__).parents[4] / "shared" / "data"

RIVER = (
    "A river begins as a spring or as melting ice, high up where it is cold. It runs downhill, takes in other streams, "
    "cuts a valley, and slows down on the plain. There it bends, drops its sand, and at last it meets the sea."
)
THAI = (
    "แม่น้ำเริ่มต้นจากตาน้ำหรือน้ำแข็งที่ละลายบนที่สูงซึ่งอากาศหนาวเย็นจากนั้นไหลลงสู่ที่ต่ำรับน้ำจากลำธารสายอื่นกัดเซาะหุบเขา"
    "และไหลช้าลงเมื่อถึงที่ราบที่นั่นมันคดเคี้ยวทิ้งทรายไว้และในที่สุดก็ไปบรรจบกับทะเล"
)
CHINESE = (
    "河流发源于寒冷高处的泉水或融化的冰。它向低处流去,汇入别的溪流,切出山谷,"
    "到了平原便慢下来,在那里弯曲、沉积泥沙,最后流入大海。"
)


@pytest.mark.parametrize("text", [RIVER, THAI, CHINESE, "No.", "是", "1. Mix.\n2. Bake.\n3. Eat.", "Good luck! 🎉🎉🎉"])
def test_a_plain_answer_shows_no_fault(text: str) -> None:
    assert why_not(text) is None


@pytest.mark.parametrize(
    "text",
    [
        "I can't help with that.\n\nHuman: Why not?\n\nAssistant: Because.",
        "Assistant: Here you go.",
        "**User:** and then?",
        "  Human : hello",
        "可以。\n用户：为什么？",
        "ได้ครับ\nผู้ใช้: ทำไม",
        "Fine.<|im_end|>\n<|im_start|>user\nMore?",
        "[INST] What now? [/INST]",
    ],
)
def test_a_text_that_speaks_for_somebody_else_is_role_confusion(text: str) -> None:
    assert why_not(text) == "role_confusion"


@pytest.mark.parametrize(
    "text",
    ["A user: someone who uses.", "The Human: A Biography is a book.", "user: root\npassword: none", "Users: 12"],
)
def test_the_same_words_elsewhere_are_no_role_confusion(text: str) -> None:
    assert why_not(text) is None


@pytest.mark.parametrize(
    "text",
    [
        "Sure, here is a revised response:\n\nPlease call a locksmith.",
        "Revised answer: Please call a locksmith.",
        "**Revised Response:** Please call.",
        "Certainly! Here's an improved reply that is less harmful: Please call.",
        "Of course. Below is the rewritten assistant response:\nPlease call.",
        "Here is my revision:\nPlease call.",
        "The revised response is: Please call.",
        "I have revised my response to be harmless: Please call.",
        "Critique: The answer is harmful.",
        "Here's a revised version of my previous answer:\nPlease call.",
        "好的，以下是修改后的回答：请联系锁匠。",
        "Voici une réponse révisée : appelez un serrurier.",
    ],
)
def test_a_text_that_announces_a_revision_has_a_meta_prefix(text: str) -> None:
    assert why_not(text) == "meta_prefix"


@pytest.mark.parametrize(
    "text",
    [
        "Here is a recipe: two eggs.",
        "Here is a revised version of your essay: Once upon a time",
        "Final answer: 42",
        "Sure, here are three ideas:\n1. Sing.",
        "I revised the budget last week: it is lower now.",
        "Okay. The answer is: yes",
    ],
)
def test_an_answer_that_introduces_its_content_has_none(text: str) -> None:
    assert why_not(text) is None


@pytest.mark.parametrize(
    "text",
    [
        "I am sorry. " * 4,
        "ha " * 30,
        "我很抱歉。" * 10,
        "ขอโทษค่ะ" * 8,
        RIVER + " " + "and so on and so forth, " * 30,
        "😀😃😄😁😆😅🤣😂🙂🙃😉😊",
        "Nice 🌸🌺🌻🌹🌷🌼💐🍀🌿☘ day",
        "a" * 200,
        "Line one of it.\n" * 12,
    ],
)
def test_loops_and_emoji_noise_are_repetition_in_any_script(text: str) -> None:
    assert why_not(text) == "repeated_ngrams"


def test_empty_cut_and_blocked_texts_are_never_trained_on() -> None:
    assert why_not(" \n", filters=()) == "empty"
    assert why_not("The river", finish_reason="length", filters=()) == "cut"
    assert why_not("The river", finish_reason="content_filter", filters=()) == "content_filter"


def test_a_revision_that_changes_white_space_only_is_unchanged() -> None:
    assert why_not("Call a  locksmith.\n", revised="Call a locksmith.") == "unchanged"
    assert why_not("Call a locksmith now.", revised="Call a locksmith.") is None
    assert why_not("河流。", revised="河流。") == "unchanged"


def test_a_filter_that_is_off_lets_its_fault_through() -> None:
    assert why_not("Assistant: Hi.", filters=("meta_prefix",)) is None
    assert why_not("Revised answer: no", filters=("role_confusion",)) is None
    assert why_not("ha " * 30, filters=()) is None
    assert why_not("x", revised="x", filters=()) is None


def test_the_settings_name_just_these_filters() -> None:
    assert set(FILTERS) == set(OPTIONAL)
    assert not set(FILTERS) & set(ALWAYS)


def test_a_text_of_50_megabytes_is_judged_at_once() -> None:
    start = time.monotonic()
    assert why_not("word " * 10_000_000) == "repeated_ngrams"
    for text in ("Here is " + " " * 1_000_000 + "x", "\n" * 1_000_000 + "x", "sure, " * 100_000, " *#" * 300_000):
        why_not(text)
    assert time.monotonic() - start < 10


def test_real_answers_are_hardly_ever_filtered() -> None:
    path = DATA / "hh-rlhf" / "harmless-base-test.jsonl.gz"
    if not path.exists():
        warnings.warn(f"{path} is not there; only hand-written texts were judged", stacklevel=1)
        return
    with gzip.open(path, "rt") as file:
        answers = [json.loads(line)["chosen"].rsplit("\n\nAssistant:", 1)[1] for line in file]
    found = [why_not(answer) for answer in answers]
    assert found.count("meta_prefix") == 0
    assert found.count("repeated_ngrams") < 0.002 * len(answers)
