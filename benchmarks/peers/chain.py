"""The chain that every peer asks for: the very prompts that the pipeline makes of a record, turn by turn.

Both peers use the project's own wording and draws, so that all that differs is who asks when. A row holds `id`,
`messages` and the texts so far under the names of TURNS; `label_ab` and `label_ba` are the judge's replies.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from constitution.principles import Constitution
from constitution.prompts import Prompt, answer_prompt, comparison_prompt, critique_prompt, revision_prompt

Row = dict[str, Any]
TURNS = ("draft", "critique", "revision", "label_ab", "label_ba")
SEED = 0


def prompt_maker(style: Any) -> Callable[[Row, str], Prompt]:
    """A function from a row and the name of its next turn to the prompt of that turn."""
    constitution = Constitution.default()
    how: dict[str, Any] = {"wording": constitution.wording, "style": style}

    def prompt(row: Row, turn: str) -> Prompt:
        asked = row["messages"]
        if turn == "draft":
            return answer_prompt(asked, **how)
        if turn in ("critique", "revision"):
            principle = constitution.draw(SEED, row["id"], 0, 0)
            if turn == "critique":
                return critique_prompt(asked, row["draft"], principle, **how)
            return revision_prompt(asked, row["draft"], row["critique"], principle, **how)
        texts = (row["draft"], row["revision"])
        first, second = texts if turn == "label_ab" else texts[::-1]
        return comparison_prompt(asked, first, second, constitution.draw_many(SEED, row["id"], 1)[0], **how)

    return prompt


def max_tokens_of(turn: str, max_tokens: int) -> int:
    return 1 if turn.startswith("label") else max_tokens


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options that both peers take."""
    found = argparse.ArgumentParser(description=description)
    found.add_argument("--base-url", required=True)
    found.add_argument("--model", required=True)
    found.add_argument("--prompts", type=Path, required=True)
    found.add_argument("--style", choices=("chat", "few-shot"), default="chat")
    found.add_argument("--max-tokens", type=int, required=True)
    return found


def read_rows(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def report(rows: list[Row], seconds: float) -> None:
    """Prints what a run came to. seconds: from the first request to the last reply. answers: rows with all five."""
    answers = sum(all(row.get(turn) for turn in TURNS) for row in rows)
    print(json.dumps({"seconds": seconds, "rows": len(rows), "answers": answers}))
