"""The lessons: what is held out stays out, what is given is not learned, labels follow the faults."""

from random import Random

import pytest

from constitution.principles import Constitution
from constitution.wording import COMPARISON_LABELS
from pipeline.nano import lessons, words, world
from pipeline.nano.lessons import Candidate


def candidate(*faults: str, broken: bool = False) -> Candidate:
    return Candidate("", frozenset(faults), broken)


def test_no_lesson_asks_for_a_held_out_combination_or_in_a_held_out_way():
    rng = Random(1)
    last_words = [way.split("{o}")[1] for way in words.WAYS[-words.NUM_HELD_OUT :]]
    for _ in range(1500):
        request = lessons.draw_scene(rng).request
        assert not world.held_out(request.verb, request.object) or request.object not in (
            words.HARMFUL_OBJECTS if request.harmful else words.BENIGN_OBJECTS
        )
        text = " ".join(message["content"] for message in lessons.draw_lesson(rng).messages)
        assert not any(end in text for end in last_words if len(end) > 2)


def test_only_the_last_turns_of_the_assistant_are_learned():
    """A draft, its critique and its revision at most."""
    rng = Random(2)
    for _ in range(500):
        lesson = lessons.draw_lesson(rng)
        learned = [m["role"] for m, weight in zip(lesson.messages, lesson.weights, strict=True) if weight]
        assert 1 <= len(learned) <= 3
        assert set(learned) == {"assistant"}
        assert not any(lesson.weights[:-6])
        assert lesson.weights[-1] > 0


@pytest.mark.parametrize(
    ("axis", "a", "b", "expected"),
    [
        ("harm", candidate("harm"), candidate("tone"), "B"),
        ("tone", candidate("harm"), candidate("tone"), "A"),
        ("evasion", candidate(), candidate("evasion"), "A"),
        ("honesty", candidate("evasion", "tone"), candidate("tone"), "B"),
        ("honesty", candidate(), candidate("tone"), "A"),
        ("harm", candidate(broken=True), candidate("harm"), "B"),
    ],
)
def test_the_label_is_the_answer_with_less_of_the_principles_fault(axis, a, b, expected):
    principle = Constitution.default().in_group(axis)[0]
    assert {lessons._better(Random(seed), principle, a, b) for seed in range(20)} == {expected}


def test_equal_answers_get_both_labels():
    principle = Constitution.default().in_group("harm")[0]
    drawn = [lessons._better(Random(seed), principle, candidate("harm"), candidate("harm")) for seed in range(400)]
    assert set(drawn) == set(COMPARISON_LABELS)
    assert 150 < drawn.count("A") < 250


def test_the_weighing_says_what_is_wrong_with_each():
    assert lessons.weighing("harm", candidate("harm"), candidate()) == (
        "Answer A would harm somebody. Answer B would harm nobody."
    )
    assert lessons.weighing("", candidate("harm"), candidate("harm", "tone")) == (
        "Answer A has no more faults. Answer B has more faults."
    )
    assert lessons.weighing("tone", candidate(broken=True), candidate("tone")) == (
        "Answer A makes no sense. Answer B is rude."
    )


def test_a_drawn_answer_has_the_faults_that_the_world_finds():
    rng = Random(3)
    for i in range(500):
        request = world.draw_request(rng, harmful=i % 2 == 0)
        conversation = world.ask(rng, request)
        drawn = lessons.draw_candidate(rng, request, fault=(None, *world.AXES)[i % 4])
        assert drawn.faults == world.faults(conversation, drawn.text)


def test_an_edited_principle_is_the_same_principle_in_fewer_words():
    principle = Constitution.default().in_group("tone")[0]
    edited = lessons.edit_principle(Random(1), principle)
    assert (edited.id, edited.about) == (principle.id, principle.about)
    assert 0 < len(principle.comparison.split()) - len(edited.comparison.split()) <= 3
