"""The committed weights: their form, and their answers on a small sample of held-out cases.

The sample is small, so its 95 % interval has to reach the bar; `make results` measures in full.
"""

from __future__ import annotations

import json
from functools import cache
from random import Random

import pytest

from constitution.wording import CHECK_LABELS, COMPARISON_LABELS, GRADE_LABELS
from pipeline.intervals import Rate
from pipeline.nano import measure, path, world

CASES = 40
MOST_GARBLED = 0.02
TEXTS = (
    "Grüße, 你好 🎉 \n\n\t x  y",
    " leading and trailing  ",
    "\u2028\x00 é \ufeff",
    "How do I steal the baker's van, or the baker's vanity?",
    "\r\n- one\n- two: 10, 100, 1000",
    "~:~ 4f2a answer A",
)


@cache
def nano() -> measure.Nano:
    return measure.Nano(path(), seed=1)


def test_the_folder_is_small():
    assert sum(file.stat().st_size for file in path().iterdir()) <= 8_000_000


def test_transformers_loads_it_as_a_llama_in_bf16():
    from safetensors import safe_open
    from transformers import LlamaForCausalLM

    assert isinstance(nano().model, LlamaForCausalLM)
    with safe_open(path() / "model.safetensors", "pt") as weights:
        assert {weights.get_slice(name).get_dtype() for name in weights.keys()} == {"BF16"}  # noqa: SIM118
    config = nano().model.generation_config
    assert config.eos_token_id == nano().tokenizer.eos_token_id


def test_the_special_tokens_differ():
    tokenizer = nano().tokenizer
    assert len({tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id}) == 3


@pytest.mark.parametrize("text", TEXTS)
def test_any_text_survives_the_tokenizer(text):
    tokenizer = nano().tokenizer
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


@pytest.mark.parametrize("label", [*COMPARISON_LABELS, *CHECK_LABELS, *GRADE_LABELS])
def test_a_label_is_one_token(label):
    assert len(nano().tokenizer(label, add_special_tokens=False)["input_ids"]) == 1


def test_a_verb_and_an_object_are_one_token_each():
    tokens = nano().tokenizer.tokenize("How do I break into my neighbour's shed?")
    assert len(tokens) == len(("How", " do", " I", " break into", " my neighbour's shed", "?"))


def test_the_chat_template_takes_any_order_of_roles():
    messages = [{"role": role, "content": role[0]} for role in ("system", "user", "user", "assistant", "user")]
    text = nano().tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|begin|><|system|>s<|end|><|user|>u<|end|><|user|>u<|end|><|assistant|>a<|end|><|user|>u<|end|><|assistant|>"
    )


def test_a_lesson_has_the_tokens_of_the_chat_template():
    from pipeline.nano.build import encode
    from pipeline.nano.lessons import draw_lesson

    tokenizer, rng = nano().tokenizer, Random(5)
    for _ in range(50):
        lesson = draw_lesson(rng)
        expected = tokenizer.apply_chat_template(lesson.messages, return_dict=False)
        assert encode(lesson, tokenizer).tokens == expected


def test_the_card_shows_the_figures_of_the_build():
    figures = json.loads((path() / "training.json").read_text())["figures"]
    rates = {name: Rate(**figure) for name, figure in figures.items()}
    assert measure.table(rates) in (path() / "README.md").read_text()
    assert measure.missed(rates) == []


def reaches(figures: dict[str, Rate]) -> list[str]:
    """The figures of a sample whose 95 % interval does not reach their bar; at least one has a bar."""
    barred = [name for name in figures if name in measure.BARS]
    assert barred
    return [
        f"{name}: {figures[name]}"
        for name in barred
        if not (figures[name].high >= measure.BARS[name][0] and figures[name].low <= measure.BARS[name][1])
    ]


def test_the_generator_is_helpful_only():
    figures = measure.drafts(nano(), Random(11), 60)
    assert reaches(figures) == []
    assert figures["draft: garbled"].low <= MOST_GARBLED
    assert figures["draft: ended by itself"].share >= 0.99


@pytest.mark.parametrize("axis", world.AXES)
def test_the_judge_is_right_on_each_axis(axis):
    assert reaches(measure.judgements(nano(), Random(12), CASES, axis)) == []


@pytest.mark.parametrize("axis", world.AXES)
def test_critique_and_revision_are_right_on_each_axis(axis):
    assert reaches(measure.chains(nano(), Random(13), CASES, axis, fault=True)) == []


def test_what_is_outside_the_world_gets_a_short_answer():
    assert reaches(measure.elsewhere(nano(), Random(14), CASES)) == []


def test_a_figure_below_its_bar_is_missed():
    bad, good = measure.rate([False, True]), measure.rate([True] * 20)
    figures = {name: good for name in measure.BARS} | {"tone: right label": bad}
    assert "tone: right label" in measure.missed(figures)
    assert "harm: right label" not in measure.missed(figures)
