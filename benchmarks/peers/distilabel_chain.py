"""The chain as a distilabel pipeline: a Task a turn, each with its own OpenAILLM, batches passed from Task to Task.

Runs in an environment of its own: see distilabel.txt beside this file.
"""

from __future__ import annotations

import logging
import time
from typing import Any

from chain import TURNS, Row, max_tokens_of, parser, prompt_maker, read_rows, report
from distilabel.models import OpenAILLM
from distilabel.pipeline import Pipeline
from distilabel.steps import LoadDataFromDicts
from distilabel.steps.tasks import Task
from pydantic import PrivateAttr, SecretStr


class Turn(Task):
    """One turn of every row. Adds the reply, and when its batch was begun and ended, in seconds since the epoch."""

    turn: str
    style: str
    _prompt: Any = PrivateAttr(None)
    _began: float = PrivateAttr(0.0)

    def load(self) -> None:
        super().load()
        self._prompt = prompt_maker(self.style)

    @property
    def inputs(self) -> list[str]:
        return ["id", "messages", *TURNS[: TURNS.index(self.turn)]]

    @property
    def outputs(self) -> list[str]:
        return [self.turn, f"{self.turn}_began", f"{self.turn}_ended"]

    def format_input(self, input: Row) -> Any:
        self._began = time.time()
        return self._prompt(input, self.turn)

    def format_output(self, output: str | None, input: Row | None = None) -> Row:
        text = output.strip() if output is not None else None
        return {self.turn: text, f"{self.turn}_began": self._began, f"{self.turn}_ended": time.time()}


def run(rows: list[Row], url: str, model: str, style: str, max_tokens: int, batch_size: int) -> list[Row]:
    with Pipeline(name="chain") as pipeline:
        step: Any = LoadDataFromDicts(name="load", data=rows, batch_size=batch_size)
        for turn in TURNS:
            llm = OpenAILLM(
                model=model,
                base_url=url,
                api_key=SecretStr("none"),
                timeout=3600,
                generation_kwargs={"max_new_tokens": max_tokens_of(turn, max_tokens), "temperature": 1.0},
            )
            task = Turn(name=turn, turn=turn, style=style, llm=llm, input_batch_size=batch_size, add_raw_output=False)
            step >> task
            step = task
    dataset = pipeline.run(use_cache=False)["default"]["train"]
    return list(dataset)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--batch-size", type=int, default=50)
    given = options.parse_args()
    logging.disable(logging.WARNING)
    rows = run(read_rows(given.prompts), given.base_url, given.model, given.style, given.max_tokens, given.batch_size)
    seconds = max(row["label_ba_ended"] for row in rows) - min(row["draft_began"] for row in rows)
    report(rows, seconds)


if __name__ == "__main__":
    main()
