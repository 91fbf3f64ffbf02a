"""Command lines of the modules that are called with `python -m`: their errors in one line, as those of `cai`."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from pipeline.errors import CaiError


class Arguments(argparse.ArgumentParser):
    """The parser of `python -m MODULE`. doc: the module's docstring, whose first line describes it."""

    def __init__(self, module: str, doc: str | None) -> None:
        super().__init__(prog=f"python -m {module}", description=(doc or "").split("\n")[0])

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see `{self.prog} --help`\n")


def count(text: str) -> int:
    """A whole number from 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1")
    return int(text)


def minutes(text: str) -> float:
    """A finite time above 0."""
    try:
        found = float(text)
    except ValueError:
        found = math.nan
    if not 0 < found < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of minutes above 0")
    return found


@contextmanager
def one_line() -> Iterator[None]:
    """Ends the process with the message and the exit code of a CaiError."""
    try:
        yield
    except CaiError as error:
        print(f"cai: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
