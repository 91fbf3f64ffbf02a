"""Training rows in every layout. Expected rows are written by hand, or cut from the files another way."""

from __future__ import annotations

import gzip
import json
import warnings
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import UsageError
from pipeline.train.layouts import Example, read_example
from pipeline.train.rows import Row, Tally
from tests.pipeline.train.row_files import Fields, assistant, jsonl, parquet, rows_of, user

DATA = Path(__file__).parents[4] / "shared" / "data"

TALK = [user("One?"), assistant("Ja.\n\nSo it is."), user("Two?")]
TEXT = "\n\nHuman: One?\n\nAssistant: Ja.\n\nSo it is.\n\nHuman: Two?"
ALPACA = {"instruction": "Sort.", "input": "b a", "output": "a b"}
SFT = [
    ({"prompt": "Hi\n", "completion": " Hello. "}, [user("Hi\n")], " Hello. "),
    ({"prompt": "Hi", "completion": [assistant("Hello.")]}, [user("Hi")], "Hello."),
    ({"prompt": TALK, "completion": "Good."}, TALK, "Good."),
    ({"prompt": TALK, "completion": [assistant("Good.")]}, TALK, "Good."),
    ({"prompt": f"{TEXT}\n\nAssistant:", "completion": " Good."}, TALK, "Good."),
    (
        {"prompt": f"Be brief.{TEXT}\n\nAssistant:", "completion": " Good."},
        [{"role": "system", "content": "Be brief."}, *TALK],
        "Good.",
    ),
    ({"messages": [*TALK, assistant("Good.")]}, TALK, "Good."),
    ({"messages": [*TALK, assistant("Good.")], "prompt": "One?", "completion": None}, TALK, "Good."),
    ({"messages": [user("a"), user("b"), assistant("c"), assistant("d")]}, [user("a\n\nb")], "c\n\nd"),
    ({"text": f"{TEXT}\n\nAssistant: Good."}, TALK, "Good."),
    ({"transcript": f"{TEXT}\n\nAssistant: Good."}, TALK, "Good."),
    ({"chosen": f"{TEXT}\n\nAssistant: Good.", "rejected": f"{TEXT}\n\nAssistant: Bad."}, TALK, "Good."),
    ({"prompt": "Hi", "chosen": "Hello.", "rejected": "Go."}, [user("Hi")], "Hello."),
    (ALPACA, [user("Sort.\n\nb a")], "a b"),
    ({**ALPACA, "input": ""}, [user("Sort.")], "a b"),
    ({"input": "Hi", "output": "Hello."}, [user("Hi")], "Hello."),
    ({"input": f"{TEXT}\n\nAssistant:", "output": " Good."}, TALK, "Good."),
    ({"instruction": "Sort.", "instances": [{"input": "b a", "output": "a b"}]}, [user("Sort.\n\nb a")], "a b"),
]
PAIRS = [
    ({"prompt": "Hi", "chosen": "Hello.", "rejected": "Go."}, [user("Hi")]),
    ({"prompt": [user("Hi")], "chosen": [assistant("Hello.")], "rejected": [assistant("Go.")]}, [user("Hi")]),
    ({"prompt": TALK, "chosen": "Hello.", "rejected": "Go."}, TALK),
    (
        {"prompt": "Hi", "chosen": [user("Hi"), assistant("Hello.")], "rejected": [user("Hi"), assistant("Go.")]},
        [user("Hi")],
    ),
    ({"chosen": [*TALK, assistant("Hello.")], "rejected": [*TALK, assistant("Go.")]}, TALK),
    ({"chosen": f"{TEXT}\n\nAssistant: Hello.", "rejected": f"{TEXT}\n\nAssistant: Go."}, TALK),
    ({"prompt": f"{TEXT}\n\nAssistant:", "chosen": " Hello.", "rejected": " Go."}, TALK),
    ({"prompt": TEXT, "chosen": "\n\nAssistant: Hello.", "rejected": "\n\nAssistant: Go."}, TALK),
    (
        {"prompt": TEXT, "chosen": f"{TEXT}\n\nAssistant: Hello.", "rejected": f"{TEXT}\n\nAssistant: Go."},
        TALK,
    ),
]
RANKED = [
    {"prompt": "Hi", "completions": ["Hello.", "Go.", "Hm."], "scores": [1, -0.5, 0.25]},
    {
        "prompt": [user("Hi")],
        "completions": [[assistant("Hello.")], [assistant("Go.")], [assistant("Hm.")]],
        "scores": [1.0, -0.5, 0.25],
    },
    {"prompt": "\n\nHuman: Hi\n\nAssistant:", "completions": [" Hello.", " Go.", " Hm."], "scores": [1, -0.5, 0.25]},
]


@pytest.mark.parametrize("write", [jsonl, parquet])
@pytest.mark.parametrize(("fields", "prompt", "answer"), SFT, ids=[str(n) for n in range(len(SFT))])
def test_an_answer_is_read_from_every_layout(
    tmp_path: Path, write: Any, fields: Fields, prompt: Any, answer: str
) -> None:
    (row,) = rows_of(write(tmp_path / f"a.{write.__name__}", fields))
    assert row == Row(row.id, prompt, (answer,), 1.0, (), "given")


@pytest.mark.parametrize("write", [jsonl, parquet])
@pytest.mark.parametrize(("fields", "prompt"), PAIRS, ids=[str(n) for n in range(len(PAIRS))])
def test_a_pair_is_read_from_every_layout(tmp_path: Path, write: Any, fields: Fields, prompt: Any) -> None:
    (row,) = rows_of(write(tmp_path / f"a.{write.__name__}", fields), "pairs")
    assert row == Row(row.id, prompt, ("Hello.", "Go."), 1.0, (), "given")


@pytest.mark.parametrize("write", [jsonl, parquet])
@pytest.mark.parametrize("fields", RANKED, ids=[str(n) for n in range(len(RANKED))])
def test_a_ranking_is_read_from_every_layout(tmp_path: Path, write: Any, fields: Fields) -> None:
    (row,) = rows_of(write(tmp_path / f"a.{write.__name__}", fields), "ranked")
    assert row == Row(row.id, [user("Hi")], ("Hello.", "Go.", "Hm."), 1.0, (1.0, -0.5, 0.25), "given")


def test_human_and_ai_labels_mix_and_keep_source_probability_and_id(tmp_path: Path) -> None:
    pair = {"prompt": "Hi", "chosen": "Hello.", "rejected": "Go."}
    path = jsonl(
        tmp_path / "a.jsonl",
        {**pair, "id": 7, "label_source": "ai", "chosen_probability": 0.8},
        {**pair, "label_source": "human", "chosen_probability": 0.25},
        pair,
    )
    rows = rows_of(path, "pairs")
    assert [(row.label_source, row.probability) for row in rows] == [("ai", 0.8), ("human", 0.25), ("given", 1.0)]
    assert rows[0].id == "7"
    assert rows[1].id == rows[2].id
    assert len(rows[2].id) == 32
    # As a ranking, a pair's better answer is the one that its label says.
    assert [row.scores for row in rows_of(path, "ranked")] == [(0.8, pytest.approx(0.2)), (0.25, 0.75), (1.0, 0.0)]


def by_hand(text: str) -> tuple[str, str]:
    """A transcript up to the answer to its last human turn, and that answer, paragraphs of empty turns left out."""
    at = text.index("\n\nAssistant:", text.rindex("\n\nHuman:"))
    return text[:at], "\n\n".join(part.strip() for part in text[at:].split("\n\nAssistant:") if part.strip())


def said(prompt: list[dict[str, str]]) -> list[str]:
    """The words of a conversation with its speakers, whatever white space stands around a turn."""
    names = {"user": "Human:", "assistant": "Assistant:"}
    return [word for turn in prompt for word in (names[turn["role"]], *turn["content"].split())]


def test_real_transcripts_become_pairs(tmp_path: Path) -> None:
    path = DATA / "hh-rlhf" / "harmless-base-test.jsonl.gz"
    if not path.exists():
        warnings.warn(f"{path} is not there; a few transcripts written here were read instead", stacklevel=1)
        talk = "\n\nHuman: Q{0}?\n\nAssistant: So:\n\n1. Wait.\n\nHuman: And {0}?\n\nAssistant:{1}"
        path = tmp_path / "few.jsonl.gz"
        lines = [{"chosen": talk.format(n, " Tea."), "rejected": talk.format(n, " Mud.\n\nNo.")} for n in range(50)]
        lines[9]["chosen"] = talk.format(9, "")
        path.write_bytes(gzip.compress("\n".join(json.dumps(line) for line in lines).encode()))
    tallies: list[Tally] = []
    rows = rows_of(path, "pairs", tallies=tallies)
    with gzip.open(path, "rt", encoding="utf-8") as file:
        raw = [json.loads(line) for line in file]
    expected = [(by_hand(line["chosen"]), by_hand(line["rejected"])) for line in raw]
    kept = [(chosen, rejected) for chosen, rejected in expected if chosen[1] and rejected[1]]
    assert len(raw) - len(kept) == (4 if len(raw) == 2312 else 1)
    assert tallies[0].left_out == {"empty": len(raw) - len(kept)}
    assert [row.completions for row in rows] == [(chosen[1], rejected[1]) for chosen, rejected in kept]
    # A marker twice in a row is one turn of both.
    doubled = [n for n, ((prompt, _), _) in enumerate(kept) if said(rows[n].prompt) != prompt.split()]
    assert len(doubled) <= len(raw) // 200
    for n in doubled:
        assert [word for word in said(rows[n].prompt) if word not in ("Human:", "Assistant:")] == [
            word for word in kept[n][0][0].split() if word not in ("Human:", "Assistant:")
        ]
    assert all(row.prompt[-1]["role"] == "user" for row in rows)


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": "Hi"},
        {"prompt": [{"role": "user", "content": "Hi"}], "completion": "Hello."},
        {"instruction": "Hi"},
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]},
        {"chosen": "\n\nHuman: Hi\n\nAssistant: Hello.", "rejected": "\n\nHuman: Hi\n\nAssistant: Go away."},
    ],
)
def test_a_prompt_is_what_stands_before_the_last_answer(fields: dict[str, Any]) -> None:
    found = read_example(fields, "here", "prompts")
    assert isinstance(found, Example)
    assert (found.prompt, found.completions) == ([{"role": "user", "content": "Hi"}], ())


def test_a_text_is_learned_whole_where_language_is_what_counts() -> None:
    text = " It begins.\n\nHuman: that is how it goes on.\n"
    assert read_example({"text": text, "url": "x", "prompt": None}, "here", "language") == Example([], (text,))
    assert read_example({"text": " \n"}, "here", "language") == "empty"
    with pytest.raises(UsageError, match=r'here: "text" is no transcript'):
        read_example({"text": text}, "here", "sft")


@pytest.mark.parametrize(
    "fields",
    [
        {"text": "\n\nHuman: Hi\n\nAssistant: Hello."},
        {"text": "A page.", "prompt": "Hi", "completion": "Hello."},
        {"transcript": "\n\nHuman: Hi\n\nAssistant: Hello."},
    ],
)
def test_conversations_are_what_they_are_for_sft_where_language_is_what_counts(fields: dict[str, Any]) -> None:
    assert read_example(fields, "here", "language") == Example([{"role": "user", "content": "Hi"}], ("Hello.",))


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"text": 5}, 'here: "text" is int, not text'),
        ({"text": "a\0b"}, "here: NUL at character 1"),
        ({"body": "A page."}, "here: no \"completion\"; columns found: 'body'"),
        ({"text": "A page.", "instruction": "Hi", "output": "Hello."}, 'here: "text" is no transcript'),
    ],
)
def test_what_is_neither_a_text_nor_a_conversation_is_refused(fields: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint):
        read_example(fields, "here", "language")


def test_a_row_without_a_prompt_is_named_or_left_out() -> None:
    with pytest.raises(UsageError, match=r'here: no "prompt"; columns found: \'answer\''):
        read_example({"answer": "Hello."}, "here", "prompts")
    assert read_example({"prompt": "  "}, "here", "prompts") == "no_prompt"
