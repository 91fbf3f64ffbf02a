import gzip
import itertools
import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from pipeline.errors import UsageError
from pipeline.records import message_id
from pipeline.sources import Counts, Row, Spec, mix, read, source_digest

DATA = Path(__file__).parents[3] / "shared" / "data"


def rows_of(path: Path | str, **options: object) -> list[Row]:
    return list(read(Spec(str(path), **options)))  # type: ignore[arg-type]


def jsonl(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def refusal(path: Path | str, **options: object) -> str:
    with pytest.raises(UsageError) as caught:
        rows_of(path, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_messages_prompts_and_message_lists_are_read_from_json_lines(tmp_path: Path) -> None:
    path = jsonl(
        tmp_path / "p.jsonl",
        {"messages": [{"role": "system", "content": "Be brief."}, user("Hi")], "id": 7, "tags": ["a"]},
        {"prompt": "How do I  pick a lock?\n", "completions": ["I won't say.", "Ask a locksmith."]},
        {"prompt": [user("a"), assistant("b"), user("c")], "messages": None},
    )
    first, second, third = rows_of(path, tags=("t", "a"))
    assert first.id == "7"
    assert first.messages == [{"role": "system", "content": "Be brief."}, user("Hi")]
    assert first.tags == ["t", "a"]
    assert first.source == "p.jsonl"
    assert second.messages == [user("How do I  pick a lock?\n")]
    assert second.given == ["I won't say.", "Ask a locksmith."]
    assert second.id == message_id(second.messages)
    assert third.messages == [user("a"), assistant("b"), user("c")]


def test_a_transcript_stays_multi_turn_and_ends_with_the_last_human_turn(tmp_path: Path) -> None:
    start = (
        "\n\nHuman: One?\n\nAnd a second paragraph.\n\nAssistant: Say: Human: nothing.\nHuman: no turn\n\nHuman: Two?"
    )
    row = {"chosen": start + "\n\nAssistant: Good answer.", "rejected": start + "\n\nAssistant: Bad answer."}
    (chosen,) = rows_of(jsonl(tmp_path / "p.jsonl", row))
    assert chosen.messages == [
        user("One?\n\nAnd a second paragraph."),
        assistant("Say: Human: nothing.\nHuman: no turn"),
        user("Two?"),
    ]
    assert chosen.answer == "Good answer."
    for name in ("rejected", "transcript", "text", "prompt"):
        (other,) = rows_of(jsonl(tmp_path / f"{name}.jsonl", {name: row["rejected"]}))
        assert other.messages == chosen.messages


def test_turns_of_one_role_in_a_row_are_merged_and_counted(tmp_path: Path) -> None:
    text = "\n\nHuman: a\n\nHuman: b\n\nAssistant: c\n\nAssistant: d\n\nHuman: e\n\nAssistant: f\n\nAssistant: g"
    counts = Counts()
    path = jsonl(tmp_path / "p.jsonl", {"text": text}, {"messages": [user("x"), user("y")]})
    first, second = read(Spec(str(path)), counts)
    assert first.messages == [user("a\n\nb"), assistant("c\n\nd"), user("e")]
    assert first.answer == "f\n\ng"
    assert second.messages == [user("x\n\ny")]
    assert counts == Counts(rows={"p.jsonl": 2}, merged_turns=3, answers_cut=1)


def test_a_prompt_that_merely_begins_with_the_word_human_is_one_prompt(tmp_path: Path) -> None:
    (row,) = rows_of(jsonl(tmp_path / "p.jsonl", {"prompt": "Human: what does that word mean?"}))
    assert row.messages == [user("Human: what does that word mean?")]


def test_seed_tasks_join_instruction_and_input_and_keep_their_id(tmp_path: Path) -> None:
    path = jsonl(
        tmp_path / "p.jsonl",
        {"id": "s1", "instruction": "Sort.", "instances": [{"input": "b a", "output": "a b"}]},
        {"id": "s2", "instruction": "Tell a joke.", "instances": [{"input": "", "output": "Ha."}]},
    )
    first, second = rows_of(path)
    assert (first.id, first.messages, first.answer) == ("s1", [user("Sort.\n\nb a")], "a b")
    assert (second.id, second.messages, second.answer) == ("s2", [user("Tell a joke.")], "Ha.")


def test_prompt_and_completion_give_prompt_and_answer(tmp_path: Path) -> None:
    path = jsonl(
        tmp_path / "p.jsonl",
        {"prompt": "Hi", "completion": "Hello."},
        {"prompt": [user("Hi")], "completion": [assistant("Hello.")]},
        {"messages": [user("Hi"), assistant("Hello.")]},
    )
    assert {(row.id, row.answer) for row in rows_of(path)} == {(message_id([user("Hi")]), "Hello.")}


def test_plain_text_is_one_prompt_a_line(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_bytes("\ufeffOne\r\n\r\n  \nTwo\u2028still two\x85and here\n".encode())
    assert [row.messages for row in rows_of(path)] == [[user("One")], [user("Two\u2028still two\x85and here")]]
    packed = tmp_path / "q.txt.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert [row.id for row in rows_of(packed)] == [row.id for row in rows_of(path)]


def test_byte_order_mark_crlf_and_line_separators_survive_in_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes('\ufeff{"prompt": "a\u2028b\\r\\nc \ufeff\U0001f600"}\r\n\r\n{"prompt": "d"}'.encode())
    assert [row.messages for row in rows_of(path)] == [[user("a\u2028b\r\nc \ufeff\U0001f600")], [user("d")]]


def test_a_local_folder_is_read_through_datasets(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = tmp_path / "set"
    folder.mkdir()
    pq.write_table(pa.table({"prompt": ["x"] * 3, "q": ["one", "two", "three"]}), folder / "train.parquet")
    rows = rows_of(f"hf:{folder}?column=q", limit=2)
    assert [row.messages for row in rows] == [[user("one")], [user("two")]]
    assert rows[0].source == "hf:set"
    message = refusal(f"hf:{folder}?column=nope")
    assert "'prompt', 'q'" in message
    assert 'no "nope"' in message
    assert "no test split" in refusal(f"hf:{folder}?split=test")
    assert "unknown colour" in refusal(f"hf:{folder}?colour=red")
    chats = tmp_path / "chats"
    chats.mkdir()
    jsonl(chats / "train.jsonl", {"messages": [user("a"), assistant("b"), user("c")]})
    assert rows_of(f"hf:{chats}")[0].messages == [user("a"), assistant("b"), user("c")]


def test_prompts_are_read_from_parquet_and_a_damaged_file_is_refused(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "p.parquet"
    pq.write_table(pa.table({"prompt": [f"p{n}" for n in range(600)]}), path)
    assert [row.messages for row in rows_of(path)] == [[user(f"p{n}")] for n in range(600)]
    path.write_bytes(path.read_bytes()[:-8])
    assert "p.parquet: not readable as Parquet" in refusal(path)


def test_a_missing_data_set_is_refused_with_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "no-such-folder" in refusal("hf:./no-such-folder")


def test_sources_are_interleaved_by_weight_and_all_rows_are_used(tmp_path: Path) -> None:
    a = jsonl(tmp_path / "a.jsonl", *({"prompt": f"a{i}"} for i in range(30)))
    b = jsonl(tmp_path / "b.jsonl", *({"prompt": f"b{i}"} for i in range(30)))
    specs = [Spec(str(a), weight=3), Spec(str(b), limit=8)]
    texts = [row.messages[0]["content"] for row in mix(specs)]
    assert [sum(text.startswith("a") for text in texts[:n]) for n in (4, 8, 12, 32)] == [3, 6, 9, 24]
    assert [text for text in texts if text[0] == "a"] == [f"a{i}" for i in range(30)]
    assert [text for text in texts if text[0] == "b"] == [f"b{i}" for i in range(8)]
    with pytest.raises(UsageError, match="weight 0"):
        next(mix([Spec(str(a), weight=0)]))
    assert rows_of(a, limit=0) == []


def test_reading_is_lazy(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "one"}\nnot json\n')
    assert next(read(Spec(str(path)))).messages == [user("one")]


@pytest.mark.parametrize(
    ("content", "line", "says"),
    [
        (b'{"prompt": "a"}\nnot json\n', 2, "not a JSON object (Expecting value, column 1)"),
        (b'{"prompt": "a"}\n["a"]\n', 2, "not a JSON object"),
        (b'{"prompt": "a", "x": NaN}\n', 1, "NaN"),
        (b"[" * 200_000 + b"\n", 1, "not a JSON object"),
        (b'{"prompt": "  \\n"}\n', 1, "empty prompt"),
        (b'{"text_en": "a", "n": 1}\n', 1, "columns found: 'text_en', 'n'; see docs/prompts.md"),
        (b'{"prompt": 3}\n', 1, '"prompt" is int'),
        (b'{"text": "a"}\n', 1, 'has no "\\n\\nHuman:"'),
        (b'{"messages": [{"role": "tool", "content": "a"}]}\n', 1, "unknown role 'tool'"),
        (b'{"messages": [{"role": "user", "text": "a"}]}\n', 1, '"role" and "content"'),
        (b'{"messages": [{"role": "assistant", "content": "a"}]}\n', 1, "no user turn"),
        (b'{"prompt": "a"}\n{"prompt": "caf\xe9"}\n', 2, "not UTF-8 at byte offset 31"),
        (b'{"prompt": "a"}\n{"prompt": "\0"}\n', 2, "NUL at byte offset 28"),
        (b'{"prompt": "ab\\u0000"}\n', 1, 'NUL at character 2 of "prompt"'),
        (b'{"prompt": "a\\ud800b"}\n', 1, 'lone surrogate \\ud800 at character 1 of "prompt"'),
        (b'{"prompt": "a", "completions": ["b", "\\udfff"]}\n', 1, "lone surrogate \\udfff"),
        (b'{"prompt": "a", "completions": [""]}\n', 1, "empty text"),
        (b'{"prompt": "a", "tags": "b"}\n', 1, "not a list"),
        (b'{"prompt": "a", "id": ""}\n', 1, '"id"'),
        (b'{"prompt": "a", "id": "x\\u001b[2J"}\n', 1, '"id"'),
    ],
)
def test_a_bad_line_is_refused_with_file_and_line(tmp_path: Path, content: bytes, line: int, says: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    message = refusal(path)
    assert message.startswith(f"{path}:{line}: ")
    assert says in message


def test_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    assert "no such file" in refusal(tmp_path / "none.jsonl")
    folder = tmp_path / "d.jsonl"
    folder.mkdir()
    assert "a directory" in refusal(folder)
    loop = tmp_path / "loop.jsonl"
    loop.symlink_to(loop)
    assert "cannot be read" in refusal(loop)
    assert "unknown kind" in refusal(jsonl(tmp_path / "p.csv", {"prompt": "a"}))
    torn = tmp_path / "torn.jsonl.gz"
    torn.write_bytes(gzip.compress(b'{"prompt": "a"}\n' * 1000)[:-20])
    assert "unreadable from here" in refusal(torn)
    plain = tmp_path / "plain.jsonl.gz"
    plain.write_bytes(b'{"prompt": "a"}\n')
    assert f"{plain}:1: unreadable from here" in refusal(plain)


def test_the_digest_follows_contents_and_specs_but_not_the_folder(tmp_path: Path) -> None:
    paths = []
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
        paths.append(str(jsonl(tmp_path / name / "p.jsonl", {"prompt": "a"})))
    first = source_digest([Spec(paths[0])])
    assert first == source_digest([Spec(paths[1])])
    assert first != source_digest([Spec(paths[1], limit=1)])
    jsonl(Path(paths[1]), {"prompt": "b"})
    assert first != source_digest([Spec(paths[1])])
    folder = source_digest([Spec(f"hf:{tmp_path / 'x'}")])
    jsonl(Path(paths[0]), {"prompt": "b"})
    assert folder != source_digest([Spec(f"hf:{tmp_path / 'x'}")])
    with pytest.raises(UsageError, match="no such file"):
        source_digest([Spec(str(tmp_path / "none.jsonl"))])


def test_a_line_of_50_megabytes_costs_a_small_multiple_of_its_size(tmp_path: Path) -> None:
    path = tmp_path / "big.jsonl"
    with path.open("w") as file:
        file.write('{"prompt": "' + "word " * 10_000_000 + '"}\n{"prompt": "next"}\n')
    program = (
        "import resource, sys\nfrom pipeline.sources import Spec, read\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "print([len(row.messages[0]['content']) for row in read(Spec(sys.argv[1]))])\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, text=True, check=True)
    lengths, kilobytes = done.stdout.splitlines()
    assert lengths == "[50000000, 4]"
    assert int(kilobytes) < 8 * 50_000


def test_real_transcripts_and_seed_tasks_are_read_whole() -> None:
    if not DATA.exists():
        warnings.warn(f"{DATA} is not there; only hand-written rows were read", stacklevel=1)
        return
    counts = Counts()
    transcripts = Spec(str(DATA / "hh-rlhf" / "harmless-base-test.jsonl.gz"))
    seeds = Spec(str(DATA / "self-instruct" / "seed_tasks.jsonl"))
    rows = list(mix([transcripts, seeds], counts))
    assert counts.rows == {"harmless-base-test.jsonl.gz": 2312, "seed_tasks.jsonl": 175}
    assert counts.merged_turns == 4
    assert len({row.id for row in rows if row.source.startswith("harmless")}) == 2310
    assert all(row.messages[-1]["role"] == "user" for row in rows)
    assert all(left["role"] != right["role"] for row in rows for left, right in itertools.pairwise(row.messages))
    with gzip.open(transcripts.path, "rt") as file:
        for row, line in zip(read(transcripts), file, strict=True):
            whole = json.loads(line)["chosen"]
            assert all(part in whole for turn in row.messages for part in turn["content"].split("\n\n"))
            assert whole.count("\n\nHuman:") == sum(turn["role"] == "user" for turn in row.messages)
