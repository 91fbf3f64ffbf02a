from __future__ import annotations

import time
from random import Random

import pytest

from pipeline.worddiff import Piece, marked, word_diff


def sides(pieces: list[Piece]) -> tuple[str, str]:
    return (
        "".join(piece.text for piece in pieces if piece.state != "new"),
        "".join(piece.text for piece in pieces if piece.state != "cut"),
    )


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ("I will not help you.", "I will help you.", "I will [-not -]help you."),
        ("Take the bus home.", "Take the night train home.", "Take the [-bus-]{+night train+} home."),
        ("Don't go there.", "Do go there.", "[-Don't-]{+Do+} go there."),
        ("我喜欢吃苹果。", "我不喜欢吃香蕉。", "我{+不+}喜欢吃[-苹果-]{+香蕉+}。"),
        ("猫が好きです。", "犬が好きです。", "[-猫-]{+犬+}が好きです。"),
        ("same", "same", "same"),
        ("", "all new", "{+all new+}"),
        ("all gone", "", "[-all gone-]"),
        ("", "", ""),
    ],
)
def test_changes_are_marked_by_words_or_by_characters_where_no_spaces_are(
    before: str, after: str, expected: str
) -> None:
    assert marked(word_diff(before, after)) == expected


def test_words_that_change_in_a_row_are_one_change() -> None:
    assert marked(word_diff("a red old car stops", "a big new car stops")) == "a [-red old-]{+big new+} car stops"


def test_texts_with_a_stray_word_in_common_are_replaced_as_a_whole() -> None:
    before, after = "Pour water into it when he is away.", "Shall we write a friendly note to him?"
    assert all(piece.state != "same" or len(piece.text) < 3 for piece in word_diff(before, after))


def test_both_texts_can_be_read_off_the_pieces_to_the_letter() -> None:
    rng = Random(5)
    for _ in range(300):
        before, after = ("".join(rng.choices("ab \n.日本e\u0301ก👍", k=rng.randrange(30))) for _ in range(2))
        assert sides(word_diff(before, after)) == (before, after)


def test_long_loops_take_no_time() -> None:
    began = time.perf_counter()
    word_diff("ha ha, " * 4000, "ho ha! " * 4000)
    assert time.perf_counter() - began < 2
