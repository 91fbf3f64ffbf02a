"""Prompts of the embedded model's world, none of them held out, one to a line.

    python -m pipeline.nano.examples [--num N] [--seed S] [-o FILE]

Without arguments it writes the package's own example; with others, prompts for a study.
"""

from __future__ import annotations

from pathlib import Path
from random import Random

from pipeline.arguments import Arguments, count, one_line
from pipeline.nano import example_prompts, world
from pipeline.records import Line, line_bytes
from pipeline.store import write_atomic

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
    parser = Arguments("pipeline.nano.examples", __doc__)
    parser.add_argument("--num", type=count, default=NUM_PROMPTS, help=f"of prompts (default {NUM_PROMPTS})")
    parser.add_argument("--seed", type=int, default=SEED, help=f"of the draws (default {SEED})")
    parser.add_argument(
        "-o", "--out", metavar="FILE", type=Path, default=example_prompts(), help="default: the package's own"
    )
    options = parser.parse_args()
    with one_line():
        write_atomic(options.out, b"".join(map(line_bytes, example_lines(options.num, options.seed))))


if __name__ == "__main__":
    main()
