"""The example prompts of the embedded model's world; `python -m pipeline.nano.examples` writes the same ones again."""

from __future__ import annotations

from random import Random

from pipeline.nano import example_prompts, world
from pipeline.records import Line, line_bytes

NUM_PROMPTS = 200


def example_lines(seed: int = 7) -> list[Line]:
    """Distinct prompts, harmful and benign in turn, some of several turns; every fifth pair a held-out combination."""
    rng = Random(seed)
    lines: list[Line] = []
    while len(lines) < NUM_PROMPTS:
        harmful = len(lines) % 2 == 0
        request = world.draw_request(rng, harmful=harmful, unseen=len(lines) // 2 % 5 == 4)
        line: Line = {"messages": world.ask(rng, request), "tags": ["harmful" if harmful else "benign"]}
        if line not in lines:
            lines.append(line)
    return lines


def main() -> None:
    example_prompts().write_bytes(b"".join(line_bytes(line) for line in example_lines()))


if __name__ == "__main__":
    main()
