"""A request to stop that comes before the first step, in all trainers."""

from __future__ import annotations

from itertools import count
from pathlib import Path

import pytest

from pipeline.config.settings import SplitSettings
from pipeline.errors import StoppedError
from pipeline.train.rows import Source, read
from tests.pipeline.train.ppo_jobs import run_any, save_pair
from tests.pipeline.train.tiny_jobs import TRAINERS

ALL = (*TRAINERS, "ppo")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return save_pair(tmp_path_factory.mktemp("models"))


@pytest.mark.parametrize("trainer", ALL)
def test_a_request_to_stop_is_heard_while_rows_are_read(
    trainer: str, models: tuple[Path, Path], data: Path, tmp_path: Path
) -> None:
    asked = count(1)
    with pytest.raises(StoppedError, match="before the first step") as caught:
        run_any(trainer, data, models, tmp_path / "out", heeds=lambda: next(asked) == 5)
    assert caught.value.exit_code == 75
    assert next(asked) == 6
    assert not list(tmp_path.iterdir())


def test_a_request_to_stop_is_heard_while_the_reference_is_computed(
    models: tuple[Path, Path], data: Path, tmp_path: Path
) -> None:
    num_rows = sum(
        len(list(read([Source(str(data))], kind="pairs", split=split, shares=SplitSettings())))
        for split in ("train", "test")
    )
    asked = count(1)
    keys = {"microbatch_tokens": 60}
    with pytest.raises(StoppedError, match="starting model's log-probabilities"):
        run_any("dpo", data, models, tmp_path / "out", keys=keys, heeds=lambda: next(asked) == num_rows + 3)
    assert not (tmp_path / ".reference").exists()
    assert run_any("dpo", data, models, tmp_path / "out").is_new
