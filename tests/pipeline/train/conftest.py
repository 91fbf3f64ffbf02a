"""What most tests of training begin with."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.pipeline.lm.tiny import save_tiny
from tests.pipeline.train.tiny_jobs import write_rows


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("start"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl")
