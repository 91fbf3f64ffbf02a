"""What the embedded model is taught: conversations in the constitution's own wording, with the turns it has to say.

Every lesson is drawn afresh. Principles about harm, evasion and tone find their own fault and cure nothing else; under
any other principle an answer has no fault, and of two answers the one with fewer faults is better. Held-out
combinations and held-out ways to ask never occur.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from random import Random
from typing import NamedTuple

from constitution import prompts
from constitution.principles import Constitution, Principle
from constitution.wording import Wording
from pipeline.nano import words, world
from pipeline.records import Message

LABEL_WEIGHT = 4.0


class Lesson(NamedTuple):
    """messages, and for each how much its tokens count in the loss; 0 for what is given."""

    messages: list[Message]
    weights: list[float]


class Candidate(NamedTuple):
    """An answer to be criticised or judged. faults: the axes on which it is at fault. broken: it makes no sense."""

    text: str
    faults: frozenset[str]
    broken: bool


class Scene(NamedTuple):
    """A conversation and what it asks for; request None outside the world."""

    conversation: list[Message]
    request: world.Request | None


@cache
def constitution() -> Constitution:
    return Constitution.default()


def wording_texts() -> list[str]:
    """The fixed texts in which a constitution is asked about: templates cut at their placeholders, and principles."""
    wording = constitution().wording
    templates = [getattr(wording, name) for name in ("critique", "revision", "check", "comparison", "grade")]
    templates += [wording.reasoning, wording.verdict]
    texts = [part for template in templates for part in re.split(r"\{\w+\}", template)]
    for principle in constitution():
        texts += [principle.critique_request, principle.revision_request, principle.comparison]
        texts.append(f" {principle.critique_request}")
    return [*texts, f"{prompts.MARK} ", *wording.sections.values()]


def draw_lesson(rng: Random, *, drafts: bool = True) -> Lesson:
    """A random lesson of a random kind. drafts: also those in which it only answers."""
    scene = draw_elsewhere(rng) if rng.random() < 0.1 else draw_scene(rng)
    first = 0 if drafts else 1
    kind = rng.choices(_KINDS[first:], _SHARES[first:])[0]
    return kind(rng, scene)


def draw_scene(rng: Random) -> Scene:
    """A request of the world, often in loose words; some are about an object that the world does not know."""
    request = world.draw_request(rng, harmful=rng.random() < 0.5, unseen=False)
    if rng.random() < 0.07:
        request = request._replace(object=_strange_object(rng, request))
    if rng.random() < 0.4:
        return Scene(_loose_talk(rng, request), request)
    return Scene(world.ask(rng, request, unseen=False), request)


def _loose_talk(rng: Random, request: world.Request) -> list[Message]:
    """The request among random words: a way to ask counts for nothing but its verb and its object."""

    def among(core: str) -> str:
        before, after = (" ".join(rng.choices(_LOOSE, k=rng.randint(least, 6))) for least in (1, 0))
        stop = rng.choice(("", "", ".", ":", ",", "?"))
        before = (before[0].upper() + before[1:] if rng.random() < 0.8 else before) + rng.choice(("", "", "", ",", ":"))
        return f"{before} {core}{stop if after else ''} {after}".rstrip() + rng.choice("..??!")

    form = rng.random()
    if form < 0.65:
        turns = [among(f"{request.verb} {request.object}")]
    elif form < 0.85:
        turns = [among(request.object), among("").strip(), among(f"{request.verb} it")]
    else:
        turns = [among(f"{request.verb} something"), among("").strip(), among(request.object)]
    if rng.random() < 0.2:
        turns = [among(""), among(""), *turns]
    return [Message(role=("user", "assistant")[i % 2], content=turn) for i, turn in enumerate(turns)]


def _strange_object(rng: Random, request: world.Request) -> str:
    if rng.random() < 0.3:
        return rng.choice(words.BENIGN_OBJECTS if request.harmful else words.HARMFUL_OBJECTS)
    return " ".join([rng.choice(("a", "the", "my", "some")), *(salad_word(rng) for _ in range(rng.randint(1, 3)))])


def salad_word(rng: Random) -> str:
    """A common word, or now and then letters, digits or characters of another alphabet."""
    if rng.random() < 0.75:
        return rng.choice(_COMMON)
    if rng.random() < 0.8:
        return "".join(rng.choice("aeioubcdfghklmnprstvwyaeiou") for _ in range(rng.randint(2, 9)))
    return rng.choice(
        (str(rng.randrange(5000)), "".join(chr(rng.randrange(0xC0, 0x2FF)) for _ in range(4)), "😀", "\n")
    )


def salad(rng: Random, num_words: int) -> str:
    """Text about nothing."""
    text = " ".join(salad_word(rng) + rng.choice(("", "", "", "", "", ",", ".")) for _ in range(num_words))
    return (text[0].upper() + text[1:] if rng.random() < 0.7 else text) + rng.choice(("?", ".", "!", ""))


def draw_elsewhere(rng: Random) -> Scene:
    """A conversation outside the world: word salad of one to five turns, few of them long."""
    conversation, longest = [], rng.choices((3, 5, 7), (20, 9, 1))[0]
    for i in range(rng.choice((1, 1, 1, 1, 3, 3, 5))):
        num_words = int(3 * 2 ** (rng.random() * longest))
        conversation.append(Message(role=("user", "assistant")[i % 2], content=salad(rng, num_words)))
    last = conversation[-1]
    if rng.random() < 0.15:
        last["content"] = f"Tell me about {rng.choice(words.HARMFUL_OBJECTS + words.BENIGN_OBJECTS)}."
    if rng.random() < 0.1:
        conversation.insert(0, Message(role="system", content=salad(rng, 8)))
    return Scene(conversation, None)


def draw_candidate(
    rng: Random, request: world.Request | None, *, fault: str | None = None, draft: bool = False
) -> Candidate:
    """An answer of any kind, at fault on this axis if one is named and the request allows it; or a draft."""
    if request is None:
        text = rng.choice(words.ELSEWHERE) if rng.random() < 0.6 else salad(rng, rng.randint(3, 30))
        return Candidate(text, frozenset(), broken=False)
    kind = rng.choice(("help", "refuse"))
    if fault in ("harm", "evasion"):
        kind = "help" if fault == "harm" else "refuse"
    rude = rng.random() < (1.0 if fault == "tone" else 0.4)
    if draft:
        kind, rude = world.draw_kind(rng, request)
    text = world.draw_answer(rng, request, kind=kind, rude=rude)
    wrong = "harm" if kind == "help" and request.harmful else "evasion"
    faults = {wrong} if (kind == "help") == request.harmful else set()
    return Candidate(text, frozenset(faults | ({"tone"} if rude else set())), broken=False)


def break_candidate(rng: Random, candidate: Candidate) -> Candidate:
    """The same answer cut short, shuffled or about something else."""
    parts = candidate.text.split(" ")
    way = rng.randrange(3)
    if way == 0:
        text = " ".join(parts[: rng.randint(1, len(parts) - 3)])
    elif way == 1:
        rng.shuffle(parts)
        text = " ".join(parts)
    else:
        other = world.draw_request(rng, harmful=rng.random() < 0.5, unseen=False)
        text = draw_candidate(rng, other).text
    return Candidate(text, candidate.faults, broken=True)


def draw_principle(rng: Random, request: world.Request | None) -> Principle:
    """A principle, mostly about an axis on which an answer to this request can be at fault; one in five edited."""
    harmful = request is not None and request.harmful
    shares = (0.40, 0.08, 0.34, 0.18) if harmful else (0.08, 0.40, 0.34, 0.18)
    about = rng.choices((*world.AXES, ""), shares)[0]
    of_axis = [p for p in constitution() if p.about == about or (not about and p.about not in world.AXES)]
    principle = rng.choice(of_axis)
    return edit_principle(rng, principle) if rng.random() < 0.2 else principle


def edit_principle(rng: Random, principle: Principle) -> Principle:
    """The principle with a few words of each text left out, as an edited constitution might have it."""

    def edited(text: str) -> str:
        parts = text.split(" ")
        for _ in range(rng.randint(1, 3)):
            parts.pop(rng.randrange(len(parts)))
        return " ".join(parts)

    return replace(
        principle,
        critique_request=edited(principle.critique_request),
        revision_request=edited(principle.revision_request),
        comparison=edited(principle.comparison),
    )


def axis_of(principle: Principle) -> str:
    """The world's axis that a principle is about, "" for any other."""
    return principle.about if principle.about in world.AXES else ""


def badness(candidate: Candidate, axis: str) -> int:
    """How bad an answer is under a principle of this axis; without one all faults count."""
    if candidate.broken:
        return 9
    return int(axis in candidate.faults) if axis else len(candidate.faults)


def _lesson(asked: prompts.Prompt, reply: str, weight: float = 1.0) -> Lesson:
    assert not isinstance(asked, str)
    messages = [Message(role=m["role"], content=m["content"]) for m in asked]
    return Lesson([*messages, Message(role="assistant", content=reply)], [0.0] * len(messages) + [weight])


def _draft(rng: Random, scene: Scene) -> Lesson:
    text = world.draw_draft(rng, scene.request) if scene.request else rng.choice(words.ELSEWHERE)
    return _lesson(prompts.answer_prompt(scene.conversation, wording=_wording()), text)


def _chain(rng: Random, scene: Scene) -> Lesson:
    """A critique and its revision; one in eight a revision without a critique. One in three says the draft too."""
    principle = draw_principle(rng, scene.request)
    axis = axis_of(principle)
    draft = scene.request is not None and rng.random() < 0.33
    candidate = draw_candidate(rng, scene.request, fault=axis if rng.random() < 0.5 else None, draft=draft)
    fault = axis if axis in candidate.faults else ""
    revision = world.draw_revision(rng, scene.request, candidate.text, fault)
    if scene.request is None and candidate.text not in words.ELSEWHERE:
        revision = rng.choice(words.ELSEWHERE)
    critique = None if rng.random() < 0.12 else world.critique(scene.request, candidate.text, fault)
    asked = prompts.revision_prompt(scene.conversation, candidate.text, critique, principle, wording=_wording())
    lesson = _lesson(asked, revision)
    if critique is not None:
        lesson.weights[-3] = 1.0
    if draft:
        lesson.weights[len(scene.conversation)] = 1.0
    return lesson


def _draw_pair(rng: Random, scene: Scene) -> tuple[Principle, Candidate, Candidate]:
    principle = draw_principle(rng, scene.request)
    axis = axis_of(principle)
    one, other = draw_candidate(rng, scene.request, fault=axis), draw_candidate(rng, scene.request)
    while rng.random() < 0.5 and badness(one, axis) == badness(other, axis):
        other = draw_candidate(rng, scene.request)
    if scene.request and rng.random() < 0.1:
        other = break_candidate(rng, other)
    return (principle, one, other) if rng.random() < 0.5 else (principle, other, one)


def _better(rng: Random, principle: Principle, a: Candidate, b: Candidate) -> str:
    """The label of the better answer; either if they are equal."""
    difference = badness(a, axis_of(principle)) - badness(b, axis_of(principle))
    return rng.choice(("A", "B")) if difference == 0 else "AB"[difference > 0]


def _comparison(rng: Random, scene: Scene) -> Lesson:
    principle, a, b = _draw_pair(rng, scene)
    asked = prompts.comparison_prompt(scene.conversation, a.text, b.text, principle, wording=_wording())
    return _lesson(asked, _better(rng, principle, a, b), LABEL_WEIGHT)


def weighing(axis: str, a: Candidate, b: Candidate) -> str:
    """The reasoning that comes before a verdict."""

    def said(one: Candidate, other: Candidate) -> str:
        bad = badness(one, axis) > (0 if axis else badness(other, axis))
        return words.BROKEN if one.broken else words.WEIGHED[axis][0 if bad else 1]

    return words.WEIGHING.format(a=said(a, b), b=said(b, a))


def _reasoning(rng: Random, scene: Scene) -> Lesson:
    principle, a, b = _draw_pair(rng, scene)
    reasoning = weighing(axis_of(principle), a, b)
    asked = prompts.verdict_prompt(scene.conversation, a.text, b.text, principle, reasoning, wording=_wording())
    lesson = _lesson(asked, _better(rng, principle, a, b), LABEL_WEIGHT)
    lesson.weights[-3] = 1.0
    return lesson


def _grade(rng: Random, scene: Scene) -> Lesson:
    principle = draw_principle(rng, scene.request)
    candidate = draw_candidate(rng, scene.request)
    label = "5" if scene.request is None else ("9", "3", "2")[badness(candidate, axis_of(principle))]
    asked = prompts.grade_prompt(scene.conversation, candidate.text, principle, wording=_wording())
    return _lesson(asked, label, LABEL_WEIGHT)


def _check(rng: Random, scene: Scene) -> Lesson:
    principle = draw_principle(rng, scene.request)
    axis = axis_of(principle)
    candidate = draw_candidate(rng, scene.request, fault=axis if rng.random() < 0.3 else None)
    group = constitution().in_group(principle.about) if rng.random() < 0.8 else (principle,)
    label = prompts.FAULT if axis in candidate.faults else prompts.NO_FAULT
    asked = prompts.check_prompt(scene.conversation, candidate.text, group, wording=_wording())
    return _lesson(asked, label, LABEL_WEIGHT)


def _wording() -> Wording:
    return constitution().wording


_COMMON = words.COMMON.split()
_VERBS = {verb.split(" ")[0] for verb in words.HARMFUL_VERBS + words.BENIGN_VERBS}
_LOOSE = [word for word in _COMMON if word not in _VERBS]
_KINDS: tuple[Callable[[Random, Scene], Lesson], ...] = (_draft, _chain, _comparison, _reasoning, _grade, _check)
_SHARES = (0.14, 0.46, 0.20, 0.08, 0.06, 0.06)
