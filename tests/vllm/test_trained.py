"""A trained folder and the adapter in it, in vLLM."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline import nano
from pipeline.engines.base import Request
from pipeline.engines.transformers import TransformersEngine
from pipeline.engines.vllm import VllmEngine
from tests.pipeline.train.tiny_jobs import run_job, write_rows
from tests.vllm.conftest import Asked
from tests.vllm.test_replies import CLOSE, LABELS, check_greedy, comparisons, drafts, together


def test_a_merged_folder_and_its_adapter_answer_as_in_transformers(local: Asked, tmp_path: Path) -> None:
    start, out = tmp_path / "start", tmp_path / "sft"
    AutoModelForCausalLM.from_pretrained(nano.path(), dtype=torch.float32).save_pretrained(start)
    AutoTokenizer.from_pretrained(nano.path()).save_pretrained(start)
    keys = {"lora": {"r": 4}, "learning_rate": 3e-3}
    run_job("sft", write_rows(tmp_path / "rows.jsonl"), start, out, keys=keys, device="cpu")
    requests = [*drafts(8), *(Request(prompt, "comparison", labels=LABELS) for prompt in comparisons(4))]
    reference = TransformersEngine(str(out), dtype="float32", device="cpu")
    (expected,) = local.run(together([reference], requests))
    before = local(*requests)
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    for engine in (VllmEngine(str(out)), VllmEngine(str(start), adapter=str(out / "adapter"))):
        local.run(engine.start())
        (found,) = local.run(together([engine], requests))
        local.run(engine.close())
        check_greedy(model, reference.chat, requests[:8], [reply.text for reply in found[:8]], expected[:8])
        for reply, label in zip(found[8:], expected[8:], strict=True):
            assert reply.logprobs == pytest.approx(label.logprobs, abs=CLOSE)
        assert [reply.text for reply in found] != [reply.text for reply in before]
