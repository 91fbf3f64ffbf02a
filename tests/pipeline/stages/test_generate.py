from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest

from constitution.wording import default_wording
from pipeline.config.settings import GenerateSettings
from pipeline.engines.base import Reply, Request
from pipeline.errors import RequestFailed
from pipeline.records import Outcome, Record
from pipeline.stages.asking import Sampling, Voice
from pipeline.stages.generate import generate, tally
from tests.support import Told, run_stage

RECORD = Record("r1", [{"role": "user", "content": "Why?"}], 0)


def seed(i: int, attempt: int = 0, *, run_seed: int = 5) -> int:
    """DESIGN section 3: (H(run seed, record id, stage, turn, attempt) + i) mod 2**63."""
    place = f"{run_seed}\0r1\0generate\0{0}\0{attempt}"
    return (int.from_bytes(hashlib.sha256(place.encode()).digest()[:8], "big") + i) % 2**63


def drafts(folder: Path, *engines: Told, style: Any = "chat", record: Record = RECORD, **settings: Any) -> Outcome:
    voices = [Voice(engine, default_wording(), style, 50) for engine in engines]
    options = {"models": voices, "settings": GenerateSettings(**settings), "seed": 5}
    return run_stage(folder, generate, record, **options)


def echo(request: Request) -> str:
    return f"answer {request.seed}"


def test_k_samples_of_several_models_are_numbered_through(tmp_path: Path) -> None:
    one, two = Told(echo, name="one"), Told(echo, name="two")
    outcome = drafts(tmp_path, one, two, samples=3)
    assert outcome.line
    assert [(c["sample"], c["model"], c["text"]) for c in outcome.line["completions"]] == [
        (n, "one" if n < 3 else "two", f"answer {seed(n)}") for n in range(6)
    ]
    assert outcome.failures == ()
    assert tally(outcome) == {"samples": 6, "lost_samples": 0, "completions": 6, "completions_cut": 0}


def test_one_call_for_k_samples_and_k_single_calls_share_their_keys(tmp_path: Path) -> None:
    engine = Told(echo)
    for samples in (1, 2, 4, 3):
        drafts(tmp_path, engine, samples=samples)
    assert [request.seed for request in engine.requests] == [seed(n) for n in range(4)]


def test_the_seed_stays_below_2_to_the_63() -> None:
    place = next(n for n in range(10_000) if _hash(n) > 2**64 - 2**52)
    big = Sampling(1.0, 1.0, (place,), 7).seed(0)
    assert big == (_hash(place) + 7) % 2**63


def _hash(n: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{n}\0{0}".encode()).digest()[:8], "big")


def test_the_request_is_the_conversation_with_the_settings(tmp_path: Path) -> None:
    engine = Told(echo)
    turns = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
    ]
    record = Record("r2", [*turns, {"role": "user", "content": "c"}], 0)
    drafts(tmp_path, engine, record=record, samples=1, temperature=0.7, top_p=0.9)
    (request,) = engine.requests
    assert request.prompt == record.messages
    assert (request.kind, request.max_tokens, request.temperature, request.top_p) == ("draft", 50, 0.7, 0.9)
    assert request.labels == request.stop == ()


def test_greedy_samples_have_no_seed_and_are_asked_once(tmp_path: Path) -> None:
    engine = Told(echo)
    outcome = drafts(tmp_path, engine, samples=3, temperature=0.0)
    assert [request.seed for request in engine.requests] == [None]
    assert outcome.line
    assert [c["text"] for c in outcome.line["completions"]] == ["answer None"] * 3


def test_a_base_model_is_asked_with_worked_examples_and_stopped_at_the_next_section(tmp_path: Path) -> None:
    engine = Told(echo)
    drafts(tmp_path, engine, style="few-shot", samples=1)
    (request,) = engine.requests
    assert isinstance(request.prompt, str)
    assert request.stop == ("~:~",)
    assert "Why?" in request.prompt


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (Reply("", "stop"), "empty"),
        (Reply(" \n\t", "stop"), "empty"),
        (Reply("", "length", reasoning="hm"), "reasoning_only"),
        (Reply("", "content_filter"), "content_filter"),
        (Reply("half an ans", "content_filter"), "content_filter"),
    ],
)
def test_an_unusable_reply_is_asked_again_under_new_seeds_then_lost(tmp_path: Path, reply: Reply, reason: str) -> None:
    engine = Told(lambda request: reply)
    outcome = drafts(tmp_path, engine, samples=1)
    assert outcome.line is None
    (failure,) = outcome.filtered if reason == "content_filter" else outcome.failures
    assert len(outcome.failures) + len(outcome.filtered) == 1
    assert failure[:4] == (0, 0, "draft", reason)
    assert failure.attempts == 3
    assert [(request.attempt, request.seed) for request in engine.requests] == [(n, seed(0, n)) for n in range(3)]


def test_a_second_attempt_that_works_is_taken_and_kept(tmp_path: Path) -> None:
    engine = Told(lambda request: "fine" if request.attempt else "")
    for _ in range(2):
        outcome = drafts(tmp_path, engine, samples=1)
        assert outcome.failures == ()
        assert outcome.line
        assert outcome.line["completions"][0]["text"] == "fine"
    assert len(engine.requests) == 2


def test_a_lost_sample_is_a_failure_and_the_record_lives(tmp_path: Path) -> None:
    def say(request: Request) -> str:
        if request.seed == seed(1):
            raise RequestFailed("too_long", "2001 tokens, 2000 fit")
        return "fine"

    outcome = drafts(tmp_path, Told(say), samples=3)
    assert outcome.line
    assert [c["sample"] for c in outcome.line["completions"]] == [0, 2]
    assert tally(outcome) == {"samples": 3, "lost_samples": 1, "completions": 2, "completions_cut": 0}
    (failure,) = outcome.failures
    assert failure == (1, 0, "draft", "too_long", "2001 tokens, 2000 fit", 1)
    assert failure.line("r1", "generate")["reason"] == "too_long"


def test_a_cut_answer_stays_and_is_counted_as_cut(tmp_path: Path) -> None:
    outcome = drafts(tmp_path, Told(lambda request: Reply("half an ans", "length")), samples=2)
    assert outcome.line
    assert {c["finish_reason"] for c in outcome.line["completions"]} == {"length"}
    assert tally(outcome) == {"samples": 2, "lost_samples": 0, "completions": 2, "completions_cut": 2}


def test_white_space_around_an_answer_goes_and_inside_stays(tmp_path: Path) -> None:
    outcome = drafts(tmp_path, Told(lambda request: "\n a\n\n  b \u2028 \n"), samples=1)
    assert outcome.line
    assert outcome.line["completions"][0]["text"] == "a\n\n  b"
