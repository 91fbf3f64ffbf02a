"""Prompts of the embedded model's world, none of them held out: `python -m pipeline.nano.examples` writes the example.

With `--num N --seed S -o FILE` others, for a study.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from random import Random

from pipeline.nano import example_prompts, world
from pipeline.records import Line, line_bytes

NUM_PROMPTS = 400
SEED = 7


def example_lines(num: int = NUM_PROMPTS, seed: int = SEED) -> list[Line]:
    """Distinct prompts, harmful and benign in turn, some of several turns; no held-out combination or way to ask."""
    rng = Random(seed)
    lines: list[Line] = []
    while len(lines) < num:
        harmful = len(lines) % 2 == 0
        request = world.draw_request(rng, harmful=harmful, unseen=False)
        messages = world.ask(rng, request, unseen=False)
        line: Line = {"messages": messages, "tags": ["harmful" if harmful else "benign"]}
        if line not in lines:
            lines.append(line)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m pipeline.nano.examples", description=__doc__.split(":")[0])
    parser.add_argument("--num", type=int, default=NUM_PROMPTS)
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("-o", "--out", type=Path, default=example_prompts())
    options = parser.parse_args()
    options.out.write_bytes(b"".join(line_bytes(line) for line in example_lines(options.num, options.seed)))


if __name__ == "__main__":
    main()
