"""What `--dry-run` says a training needs, against what the same training took."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.settings import LoraSettings, Settings, TrainSettings
from pipeline.lm.load import load_tokenizer
from pipeline.lm.templates import Chat
from pipeline.train.batches import Data, tokenise
from pipeline.train.memory import Memory, advise, free_system_bytes, measure
from pipeline.train.rows import Source, read
from tests.pipeline.lm.tiny import save_tiny
from tests.pipeline.train.tiny_jobs import write_rows

MIB = 1 << 20
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536"}
"""Has freed tensors leave the process at once, so that its peak is of what it held at one time."""
PEAK = """
import json, sys
from pathlib import Path
from tests.pipeline.train.tiny_jobs import run_job
import peft, transformers.models.llama.modeling_llama

def peak():  # getrusage's would begin with the parent's
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))

before = peak()
trainer, data, start, out, keys = json.loads(sys.argv[1])

class Enough(Exception):
    pass

def stop(progress):
    if progress.step == 2:
        raise Enough

try:
    run_job(trainer, Path(data), Path(start), Path(out), keys=keys, watch=stop)
except Enough:
    print(peak() - before)
"""


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """93 million parameters, beside which the libraries' own memory is small."""
    return save_tiny(tmp_path_factory.mktemp("start"), hidden=1024, layers=8)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl", 16, num_test=0)


def estimate(trainer: str, data: Path, start: Path, keys: dict[str, Any]) -> Memory:
    kind = {"sft": "sft", "dpo": "pairs", "rm": "pairs"}[trainer]
    settings = getattr(Settings.model_validate({f"train_{trainer}": keys}), f"train_{trainer}")
    tokens = tokens_of(data, start, kind)
    return measure(str(start), tokens, settings, "cpu", "score" if trainer == "rm" else "language")


def tokens_of(data: Path, start: Path, kind: Any = "sft") -> Data:
    rows = read([Source(str(data))], kind=kind, split="train")
    return tokenise(rows, Chat(load_tokenizer(str(start))), max_length=512, too_long="drop")


@pytest.mark.parametrize(
    ("trainer", "keys"),
    [
        ("sft", {}),
        ("dpo", {"gradient_checkpointing": True}),
        ("dpo", {"lora": {"r": 8}}),
        ("rm", {"lora": {"r": 8}, "precision": "bfloat16"}),
    ],
    ids=["sft", "dpo with checkpointing", "dpo with LoRA", "reward model with LoRA in bf16"],
)
def test_the_estimate_is_near_what_a_training_takes(
    trainer: str, keys: dict[str, Any], data: Path, start: Path, tmp_path: Path
) -> None:
    keys = {"batch_size": 8, "microbatch_tokens": 1024, **keys}
    expected = estimate(trainer, data, start, keys).total
    call = json.dumps([trainer, str(data), str(start), str(tmp_path / "out"), keys])
    environment = os.environ | GIVE_BACK
    done = subprocess.run(
        [sys.executable, "-c", PEAK, call], capture_output=True, text=True, check=True, env=environment
    )
    measured = int(done.stdout.splitlines()[-1])
    print(f"{trainer} {keys}: estimate {expected / MIB:.0f} MiB, measured {measured / MIB:.0f} MiB")
    assert 0.75 * measured <= expected <= 1.25 * measured


def test_what_is_trained_costs_sixteen_bytes_and_what_is_frozen_its_own_size(data: Path, start: Path) -> None:
    full = estimate("sft", data, start, {})
    numbers = full.weights // 4
    assert (full.gradients, full.optimizer) == (4 * numbers, 8 * numbers)
    lora = estimate("sft", data, start, {"lora": {"r": 8}})
    trained = lora.gradients // 4
    # r·(in + out) of each of the 7 matrices of 8 layers: 1024 wide, keys and values 512, the inner layer 2728
    assert trained == 8 * 8 * (2 * (1024 + 1024) + 2 * (1024 + 512) + 3 * (1024 + 2728))
    assert lora.weights == 4 * (numbers + trained)
    four = estimate("sft", data, start, {"lora": {"r": 8, "quantize": "4bit"}})
    layers = 8 * (2 * 1024 * 1024 + 2 * 1024 * 512 + 3 * 1024 * 2728)
    assert four.weights == pytest.approx(4 * trained + 4 * (numbers - layers) + (0.5 + 0.127 / 8) * layers, abs=100)


def test_free_memory_is_what_can_be_had_with_the_page_cache_and_no_more_than_a_container_allows(tmp_path: Path) -> None:
    outer, inner = tmp_path / "sys/fs/cgroup/pod", tmp_path / "sys/fs/cgroup/pod/job"
    inner.mkdir(parents=True)
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("4:memory:/old\n0::/pod/job\n")
    meminfo = "MemTotal: 9000 kB\nMemFree: 100 kB\nMemAvailable: 8000 kB\nHugePages_Total: 0\n"
    (tmp_path / "proc/meminfo").write_text(meminfo)
    assert free_system_bytes(tmp_path) == 8000 * 1024
    for folder, limit in ((outer, "max"), (inner, "5000")):
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text("4000\n")
        (folder / "memory.stat").write_text("anon 1000\ninactive_file 2500\n")
    assert free_system_bytes(tmp_path) == 5000 - 4000 + 2500
    (outer / "memory.max").write_text("4500\n")
    assert free_system_bytes(tmp_path) == 4500 - 4000 + 2500


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="Linux alone says what is available")
def test_free_memory_is_measured_here() -> None:
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < free_system_bytes() < total


def test_the_advice_names_settings_that_fit_with_what_they_need(data: Path, start: Path) -> None:
    tokens, settings = tokens_of(data, start), TrainSettings(microbatch_tokens=1024)
    need = (str(start), tokens, settings, "cpu", "language")
    memory = measure(*need)
    assert advise(memory._replace(free=2 * memory.total), *need) == ""
    tight = memory._replace(free=int((memory.total - 0.5 * memory.activations) / 0.9))
    advice = advise(tight, *need)
    for part in ("microbatch_tokens: ", "gradient_checkpointing: true (", "lora: {r: 16} (", "quantize: 4bit} ("):
        assert part in advice
    lora = measure(str(start), tokens, settings.model_copy(update={"lora": LoraSettings()}), "cpu", "language")
    assert f"lora: {{r: 16}} ({lora.total / MIB:,.0f} MiB)" in advice
    only_lora = advise(memory._replace(free=int(1.2 * lora.total)), *need)
    assert "gradient_checkpointing: true (" not in only_lora.partition("lora")[0]
    assert advise(memory._replace(free=MIB), *need).startswith("does not fit, and no setting makes it fit")
