"""What comes out of a training, read by others; and that a full disk costs nothing."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, pipeline

from pipeline.errors import ResourceError
from pipeline.store import io_errors
from pipeline.train.checkpoints import save_tensors
from pipeline.train.curves import draw_curves
from pipeline.train.rows import Source, read
from pipeline.train.scorers import open_scorer
from pipeline.train.stage import describe
from pipeline.train.trackers import following
from tests.pipeline.lm.tiny import save_tiny
from tests.pipeline.train.tiny_jobs import metrics, run_job

KEYS = {"epochs": 2, "learning_rate": 1e-2}


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("start"), layers=4)


@pytest.mark.parametrize("lora", [None, {"r": 4}], ids=["whole", "LoRA"])
def test_a_text_classification_pipeline_reads_our_scores_whatever_the_padding(
    lora: dict[str, int] | None, start: Path, data: Path, tmp_path: Path
) -> None:
    """A text ends with the token that ends the answer's turn; its neighbours in the batch do not matter."""
    run_job("rm", data, start, tmp_path / "rm", keys={**KEYS, "lora": lora})
    scorer = open_scorer(str(tmp_path / "rm"), "reward", device="cpu")
    rows = list(read([Source(str(data))], kind="pairs", split="train"))[:8]
    _, scores, _ = scorer.score_rows(rows, max_tokens=1000)
    expected = torch.tensor([score for row in scores for score in row])
    assert expected.std() > 0.01
    texts = []
    for row in rows:
        for completion in row.completions:
            turns = [*row.prompt, {"role": "assistant", "content": completion}]
            texts.append(scorer.chat.tokenizer.apply_chat_template(turns, tokenize=False).removesuffix("\n"))
    for side in ("right", "left"):
        for batch_size in (1, 5, 16):
            tokenizer = AutoTokenizer.from_pretrained(tmp_path / "rm", padding_side=side)
            classify = pipeline("text-classification", model=str(tmp_path / "rm"), tokenizer=tokenizer, device="cpu")
            found = classify(texts, function_to_apply="none", batch_size=batch_size)
            assert torch.allclose(torch.tensor([one["score"] for one in found]), expected, atol=1e-5), (
                side,
                batch_size,
            )


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "small"
    folder.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)], capture_output=True)
    if mount.returncode:
        pytest.skip("a small file system needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize(
    ("lora", "step", "kept"),
    [(None, 2, [1]), ({"r": 4}, 2, [1]), (None, 3, [2, 3])],
    ids=["whole", "LoRA", "evaluated"],
)
def test_a_disk_that_fills_up_loses_nothing(
    lora: dict[str, int] | None,
    step: int,
    kept: list[int],
    start: Path,
    data: Path,
    tmp_path: Path,
    small_disk: Path,
) -> None:
    """In the third step, which is evaluated, the checkpoint is there by then."""
    keys = {**KEYS, "save_every": 1, "lora": lora}
    run_job("sft", data, start, tmp_path / "whole", keys=keys)
    ballast, out = small_disk / "ballast", small_disk / "sft"
    work = small_disk / ".sft.training"

    def fill_up(progress: object) -> None:
        if metrics(work)[-1]["step"] == step:
            ballast.write_bytes(bytes(shutil.disk_usage(small_disk).free))

    with pytest.raises(ResourceError, match=r"free some room and run the same command again$") as caught:
        run_job("sft", data, start, out, keys=keys, watch=fill_up)
    assert caught.value.exit_code == 5
    assert str(small_disk) in str(caught.value)
    found = sorted(path.name for path in (work / "checkpoints").iterdir())
    assert found == [f"step-{number:08d}" for number in kept]
    ballast.unlink()
    run_job("sft", data, start, out, keys=keys)
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()
    assert metrics(out) == metrics(tmp_path / "whole")


@pytest.mark.parametrize("lora", [None, {"r": 4}], ids=["whole", "LoRA"])
def test_a_disk_that_fills_up_at_the_end_loses_nothing(
    lora: dict[str, int] | None,
    start: Path,
    data: Path,
    tmp_path: Path,
    small_disk: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """When the last step has its checkpoint: at every file of the model, whichever library writes it."""
    keys = {**KEYS, "lora": lora}
    run_job("sft", data, start, tmp_path / "whole", keys=keys)
    free, ballast, out = 0, small_disk / "ballast", small_disk / "sft"

    def fill_up(*args: Any, **named: Any) -> dict[str, Any]:
        ballast.write_bytes(bytes(shutil.disk_usage(small_disk).free - free))
        return describe(*args, **named)

    monkeypatch.setattr("pipeline.train.stage.describe", fill_up)
    said = list[str]()
    while not out.exists():
        try:
            run_job("sft", data, start, out, keys=keys)
        except ResourceError as error:
            said.append(str(error))
        ballast.unlink()
        free += 1 << 15
    assert all(message.startswith(f"{small_disk}/") for message in said)
    assert all(message.endswith("free some room and run the same command again") for message in said)
    assert free > (out / "model.safetensors").stat().st_size
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()
    assert metrics(out) == metrics(tmp_path / "whole")


def test_a_disk_that_is_full_is_told_whoever_writes_to_it(start: Path, small_disk: Path) -> None:
    """The libraries in Rust raise errors of their own; a tracker writes in a thread of its own."""
    tokenizer = AutoTokenizer.from_pretrained(start).backend_tokenizer
    (small_disk / "ballast").write_bytes(bytes(shutil.disk_usage(small_disk).free))
    curve = small_disk.parent / "metrics.jsonl"
    curve.write_text('{"step": 1, "loss": 1.0}\n')

    def write_tokenizer() -> None:
        with io_errors(small_disk / "tokenizer.json"):
            tokenizer.save(str(small_disk / "tokenizer.json"))

    def follow() -> None:
        with following(["tensorboard"], small_disk, name="", identity="", settings={}) as step:
            step()

    for write in (
        write_tokenizer,
        follow,
        lambda: save_tensors(small_disk / "x.safetensors", {"x": torch.zeros(9999)}),
        lambda: draw_curves(curve, small_disk / "curves.png"),
    ):
        with pytest.raises(ResourceError, match=f"{small_disk}.*No space left on device; free some room"):
            write()
