"""Files of rows for tests, and what is read from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config.settings import SplitSettings
from pipeline.errors import CaiError
from pipeline.train.rows import Row, Source, read

ALL = SplitSettings(sft=0.5, preference=0.5, test=0.0)
Fields = dict[str, Any]


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def jsonl(path: Path, *rows: Fields) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def parquet(path: Path, *rows: Fields) -> Path:
    pq.write_table(pa.Table.from_pylist(list(rows)), path)
    return path


def rows_of(
    path: Path | str, kind: str = "sft", split: str = "train", weight: float = 1.0, **options: Any
) -> list[Row]:
    return list(read([Source(str(path), weight)], kind=kind, split=split, **{"shares": ALL, **options}))  # type: ignore[arg-type]


def refusal(error: type[CaiError], path: Path | str, kind: str = "sft", **options: Any) -> str:
    with pytest.raises(error) as caught:
        rows_of(path, kind, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)
