"""Real prompts through the whole recipe with the embedded model: nothing lost, nothing cut, everything loads.

The transcripts and seed tasks lie beside the checkout in `../shared/data` where there is such a folder (as in
continuous integration). Elsewhere the few written below stand in for them, and a warning says so.
"""

from __future__ import annotations

import gzip
import json
import re
import warnings
from itertools import islice, pairwise
from pathlib import Path

import datasets
import pytest

from pipeline.nano import example_prompts
from pipeline.store import RunFolder
from tests.support import Command

SHARED = Path(__file__).parents[2].parent / "shared" / "data"
TRANSCRIPTS = SHARED / "hh-rlhf" / "harmless-base-test.jsonl.gz"
TASKS = SHARED / "self-instruct" / "seed_tasks.jsonl"
NUM_TRANSCRIPTS = 60
COLUMNS = {
    "sft": {"prompt", "completion"},
    "preference": {"prompt", "chosen", "rejected", "chosen_probability", "score_chosen", "score_rejected"},
    "ranked": {"prompt", "completions", "scores"},
    "prompts": {"prompt"},
}
COMMON = {"id", "tags", "principles", "label_source"}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> tuple[Path, Path]:
    """A file of transcripts and a file of seed tasks."""
    folder = tmp_path_factory.mktemp("inputs")
    transcripts, tasks = folder / "transcripts.jsonl", folder / "tasks.jsonl"
    if TRANSCRIPTS.exists():
        with gzip.open(TRANSCRIPTS, "rt", encoding="utf-8") as file:
            transcripts.write_text("".join(islice(file, NUM_TRANSCRIPTS)), encoding="utf-8")
        every_third = TASKS.read_text(encoding="utf-8").splitlines(keepends=True)[::3]
        tasks.write_text("".join(every_third), encoding="utf-8")
    else:
        warnings.warn(f"no {SHARED}: tested on a few prompts written here instead", stacklevel=1)
        asked = [json.loads(line)["messages"][-1]["content"] for line in example_prompts().open()][:NUM_TRANSCRIPTS]
        talk = "\n\nHuman: What is in\n\na pot?\n\nAssistant: Soup.\n\nIt is hot.\n\nHuman: {}\n\nAssistant: {}"
        lines = [{"chosen": talk.format(text, "Tea."), "rejected": talk.format(text, "Mud.")} for text in asked]
        transcripts.write_text("".join(json.dumps(line) + "\n" for line in lines))
        task = {"id": "seed_0", "instruction": "Add the numbers.", "instances": [{"input": "1 2", "output": "3"}]}
        tasks.write_text(json.dumps(task) + "\n")
    return transcripts, tasks


@pytest.fixture(scope="module")
def run(inputs, tmp_path_factory) -> RunFolder:
    folder = tmp_path_factory.mktemp("real")
    sources = [argument for path in inputs for argument in ("--prompts", path)]
    ended = Command(folder)("run", "--run", "r", "--model", "nano", "-q", *sources, timeout=480)
    assert ended.returncode == 0, ended.stderr
    return RunFolder(folder / "r")


def test_every_prompt_is_in_one_terminal_state_and_the_sums_are_right(run, inputs):
    [reading] = run.manifest("prompts").extra["readings"]
    num_lines = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in inputs)
    assert reading["lines"] == num_lines == reading["known"] + reading["new"] + reading["duplicates"]
    alive = {line["id"] for line in run.read("prompts")}
    for stage in ("generate", "critique-revise", "rank"):
        counts = run.manifest(stage).counts
        ok = {line["id"] for line in run.read(stage)}
        lost = {line["id"] for state in ("failed", "filtered") for line in run.losses(state, stage)} - ok
        assert counts["in"] == len(alive) == counts["ok"] + counts["failed"] + counts["filtered"]
        assert ok | lost == alive
        alive = ok


def transcript_turns(text: str) -> list[str]:
    """The turns up to the last human one, by the markers alone."""
    turns = re.split(r"\n\n(?:Human|Assistant):", text)[1:]
    speakers = re.findall(r"\n\n(Human|Assistant):", text)
    last = max(n for n, speaker in enumerate(speakers) if speaker == "Human")
    return [turn.strip() for turn in turns[: last + 1]]


def test_no_conversation_is_cut_or_flattened(run, inputs):
    read = {"\n\n".join(m["content"] for m in line["messages"]): line["messages"] for line in run.read("prompts")}
    several = 0
    for line in inputs[0].read_text(encoding="utf-8").splitlines():
        turns = transcript_turns(json.loads(line)["chosen"])
        messages = read["\n\n".join(turns)]
        several += len(messages) > 1
        assert messages[-1]["role"] == "user"
        assert all(a["role"] != b["role"] for a, b in pairwise(messages))
    assert several > 0


@pytest.mark.parametrize("name", COLUMNS)
def test_the_datasets_load_with_the_columns_of_the_contract(run, name, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    loaded = datasets.load_dataset(str(run.path / "datasets" / name), split="train", cache_dir=str(tmp_path))
    assert set(loaded.column_names) == COLUMNS[name] | COMMON
    assert loaded.num_rows > 0
    if name == "preference":
        assert min(loaded["chosen_probability"]) > 0.5
