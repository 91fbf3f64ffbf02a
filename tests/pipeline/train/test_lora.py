"""LoRA and QLoRA: where adapters start, what they train, and the two folders that come out."""

from __future__ import annotations

import json
import math
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from pipeline.config.settings import LoraSettings, TrainDpoSettings
from pipeline.errors import EngineRefused, StoppedError, UsageError
from pipeline.lm.forward import Group, completion_logps, prepare
from pipeline.lm.load import load
from pipeline.lm.packed import PACKED
from pipeline.lm.templates import Chat
from pipeline.train.batches import Data, tokenise
from pipeline.train.loop import silence_dropout
from pipeline.train.lora import adapters_off, attach
from pipeline.train.reference import compute_logps
from pipeline.train.rows import Source, read
from tests.pipeline.lm.tiny import families, save_tiny
from tests.pipeline.train.in_two import train_in_two
from tests.pipeline.train.tiny_jobs import TRAINERS, metrics, run_job

GROUPS = [
    Group(torch.arange(3, 40), (torch.arange(40, 52), torch.arange(7, 10))),
    Group(torch.arange(90, 95), (torch.arange(5, 6), torch.arange(100, 130))),
]
KEYS = {"lora": {"r": 4, "alpha": 8}, "learning_rate": 1e-2, "epochs": 2}
HEADS = {"rm": AutoModelForSequenceClassification}


def stir(model: Any) -> None:
    """Gives adapters an effect."""
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)


def adapted(family: str, **settings: Any) -> Any:
    """A prepared model of the family with adapters of no effect yet."""
    torch.manual_seed(0)
    model = families()[family]().eval()
    prepare(model)
    attach(model, LoraSettings(r=4, alpha=8, **settings), head="language", seed=0)
    return model


def read_on(folder: Path, start: Path, trainer: str) -> Any:
    """The start with the published adapter beside its weights, as peft computes it."""
    auto = HEADS.get(trainer, AutoModelForCausalLM)
    base = auto.from_pretrained(start, **({"num_labels": 1} if trainer in HEADS else {}))
    return PeftModel.from_pretrained(base, folder / "adapter").eval()


def tokens_of(data: Path, loaded: Any) -> Data:
    rows = read([Source(str(data))], kind="pairs", split="train")
    return tokenise(rows, Chat(loaded.tokenizer), max_length=512, too_long="drop")


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "gpt_neox"])
def test_adapters_start_without_effect_and_only_they_get_a_gradient(family: str) -> None:
    torch.manual_seed(0)
    plain = families()[family]().eval()
    prepare(plain)
    model = adapted(family)
    logps = completion_logps(model, GROUPS)
    assert torch.equal(logps.tokens, completion_logps(plain, GROUPS).tokens)
    logps.tokens.sum().backward()
    with_gradient = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert with_gradient == {name for name, _ in model.named_parameters() if "lora_" in name}
    assert all(model.get_parameter(name).grad.any() for name in with_gradient if "lora_B" in name)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt2"])
def test_packed_rows_go_through_adapters_as_plain_rows_do(family: str) -> None:
    model = adapted(family)
    assert model.config._attn_implementation == PACKED
    stir(model)
    with torch.no_grad():
        found = completion_logps(model, GROUPS).tokens
        model.set_attn_implementation("eager")
        plain = []
        for group in GROUPS:
            for completion in group.completions:
                row = torch.cat([group.prompt, completion])[None]
                logps = model(input_ids=row, use_cache=False).logits[0].log_softmax(dim=-1)
                plain.append(logps[len(group.prompt) - 1 : -1].gather(1, completion[:, None])[:, 0])
    assert (found - torch.cat(plain)).abs().max() <= 1e-5


def test_with_adapters_off_a_model_is_its_start(start: Path, data: Path) -> None:
    """So that the reference of DPO needs no second model."""
    plain = load(str(start))
    prepare(plain.model)
    tokens, settings = tokens_of(data, plain), TrainDpoSettings()
    reference = compute_logps(plain.model, tokens, settings)
    attach(plain.model, LoraSettings(), head="language", seed=0)
    stir(plain.model)
    assert torch.equal(compute_logps(plain.model, tokens, settings), reference)
    with torch.no_grad():
        on = completion_logps(plain.model, [tokens.group(0)]).sums
        assert (on - reference[:2]).abs().max() > 0.1
        with adapters_off(plain.model):
            off = completion_logps(plain.model, [tokens.group(0)]).sums
    assert torch.allclose(off, reference[:2], atol=1e-5)
    assert all(p.requires_grad == ("lora_" in name) for name, p in plain.model.named_parameters())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_adapters_have_no_dropout(checkpointing: bool) -> None:
    """Their own one would make policy and reference differ at step 0, as the model's would."""
    model = adapted("llama")
    stir(model)
    silence_dropout(model, TrainDpoSettings(gradient_checkpointing=checkpointing))
    assert model.training == checkpointing
    found = [completion_logps(model, GROUPS).tokens for _ in range(2)]
    assert torch.equal(*found)
    model.eval()
    assert torch.allclose(completion_logps(model, GROUPS).tokens, found[0], atol=1e-5)
    adapters = [module for module in model.modules() if hasattr(module, "lora_dropout")]
    assert adapters
    assert not any(getattr(each, "p", 0.0) for module in adapters for each in module.lora_dropout.values())


@pytest.mark.parametrize("trainer", TRAINERS)
def test_the_merged_folder_is_the_start_with_its_adapter(trainer: str, start: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / trainer
    report = run_job(trainer, data, start, out, keys=KEYS)
    beside = read_on(out, start, trainer)
    merged = HEADS.get(trainer, AutoModelForCausalLM).from_pretrained(out).eval()
    tokens = torch.arange(3, 60)[None]
    with torch.no_grad():
        found, expected = merged(tokens).logits, beside(tokens).logits
        with beside.disable_adapter():
            away = (expected - beside(tokens).logits).abs().max()
    assert (found - expected).abs().max() <= 1e-5
    assert away > 1e-3
    assert report.outcome.metrics["eval/loss"] < metrics(out)[0]["loss"]
    assert not any("lora" in name for name in load_file(out / "model.safetensors"))


@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_training_of_adapters_stopped_at_every_step_gives_the_same_bytes(
    trainer: str, start: Path, data: Path, tmp_path: Path
) -> None:
    keys = {**KEYS, "eval_every": 2}
    run_job(trainer, data, start, tmp_path / "whole", keys=keys)
    asked = count(1)
    for step in range(1, 6):
        with pytest.raises(StoppedError):
            run_job(trainer, data, start, tmp_path / "stopped", keys=keys, should_stop=lambda: bool(next(asked)))
        state = tmp_path / ".stopped.training" / "checkpoints" / f"step-{step:08d}"
        names = set(load_file(state / "weights.safetensors"))
        assert names
        assert all("lora_" in name or name == "score.modules_to_save.default.weight" for name in names)
    run_job(trainer, data, start, tmp_path / "stopped", keys=keys)
    for name in ("model.safetensors", "adapter/adapter_model.safetensors"):
        assert (tmp_path / "stopped" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert metrics(tmp_path / "stopped") == metrics(tmp_path / "whole")


def test_dpo_that_starts_from_an_adapter_has_the_merged_model_as_its_reference(
    start: Path, data: Path, tmp_path: Path
) -> None:
    run_job("sft", data, start, tmp_path / "sft", keys=KEYS)
    firsts = {}
    for name in ("sft", "sft/adapter"):
        out = tmp_path / f"dpo-{name.replace('/', '-')}"
        run_job("dpo", data, tmp_path / name, out, keys=KEYS)
        firsts[name] = metrics(out)[0]
        assert math.isclose(firsts[name]["loss"], math.log(2), abs_tol=1e-6)
    assert math.isclose(firsts["sft"]["logps/chosen"], firsts["sft/adapter"]["logps/chosen"], rel_tol=1e-6)
    both = (AutoModelForCausalLM.from_pretrained(tmp_path / f"dpo-{name}") for name in ("sft", "sft-adapter"))
    for one, other in zip(*(model.parameters() for model in both), strict=True):
        assert torch.allclose(one, other, atol=1e-5)


def test_an_adapter_is_added_in_fp32_and_rounded_once(data: Path, tmp_path: Path) -> None:
    """W + (alpha / r)·BA, whatever the weights are stored in."""
    save_tiny(tmp_path / "start")
    AutoModelForCausalLM.from_pretrained(tmp_path / "start", dtype=torch.bfloat16).save_pretrained(tmp_path / "start")
    run_job("sft", data, tmp_path / "start", tmp_path / "sft", keys=KEYS)
    before = load_file(tmp_path / "start" / "model.safetensors")
    after = load_file(tmp_path / "sft" / "model.safetensors")
    adapter = load_file(tmp_path / "sft" / "adapter" / "adapter_model.safetensors")
    for name, weight in before.items():
        base = f"base_model.model.{name.removesuffix('.weight')}"
        expected = weight
        if f"{base}.lora_A.weight" in adapter:
            delta = adapter[f"{base}.lora_B.weight"] @ adapter[f"{base}.lora_A.weight"]
            assert delta.dtype == torch.float32
            expected = (weight.float() + 8 / 4 * delta).to(torch.bfloat16)
        assert torch.equal(after[name], expected), name
    assert json.loads((tmp_path / "sft" / "config.json").read_text())["dtype"] == "bfloat16"


def test_checkpointing_changes_no_step_of_adapters(start: Path, data: Path, tmp_path: Path) -> None:
    for name, on in (("kept", False), ("again", True)):
        run_job("dpo", data, start, tmp_path / name, keys={**KEYS, "gradient_checkpointing": on})
    for kept, again in zip(metrics(tmp_path / "kept"), metrics(tmp_path / "again"), strict=True):
        assert math.isclose(kept["grad_norm"], again["grad_norm"], rel_tol=1e-5)
    assert kept["grad_norm"] > 0


def test_frozen_weights_in_half_precision_are_packed_and_their_adapters_are_not(start: Path) -> None:
    """What a GPU trains on, in the arithmetic it uses."""
    model = load(str(start), dtype="bfloat16").model
    prepare(model)
    assert model.config._attn_implementation == PACKED
    attach(model, LoraSettings(r=4), head="language", seed=0)
    dtypes = {("lora_" in name, parameter.dtype) for name, parameter in model.named_parameters()}
    assert dtypes == {(True, torch.float32), (False, torch.bfloat16)}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        completion_logps(model, GROUPS).tokens.sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


def test_two_processes_train_the_adapters_of_one(start: Path, data: Path, tmp_path: Path) -> None:
    keys = {**KEYS, "microbatch_tokens": 60}
    jobs = [
        {
            "trainer": trainer,
            "data": data,
            "start": start,
            "out": tmp_path / way / trainer,
            "keys": {**keys, **parallel},
        }
        for trainer in ("dpo", "rm")
        for way, parallel in (("ddp", {}), ("fsdp", {"parallel": "fsdp"}))
    ]
    train_in_two(tmp_path, jobs)
    for trainer in ("dpo", "rm"):
        run_job(trainer, data, start, tmp_path / "alone" / trainer, keys=keys)
        expected = load_file(tmp_path / "alone" / trainer / "model.safetensors")
        for way in ("ddp", "fsdp"):
            found = load_file(tmp_path / way / trainer / "model.safetensors")
            assert found.keys() == expected.keys()
            assert all(torch.allclose(found[name], expected[name], atol=1e-5) for name in expected), (way, trainer)
            assert (tmp_path / way / trainer / "adapter" / "adapter_model.safetensors").exists()


def test_modules_that_are_not_there_are_refused_in_one_line(start: Path, data: Path, tmp_path: Path) -> None:
    keys = {"lora": {"target_modules": ["query_key_value"]}}
    with pytest.raises(UsageError, match=r"^lora.target_modules: .*query_key_value.*not found.*all-linear$"):
        run_job("sft", data, start, tmp_path / "sft", keys=keys)


def test_an_adapter_whose_model_is_gone_is_refused(start: Path, data: Path, tmp_path: Path) -> None:
    run_job("sft", data, start, tmp_path / "sft", keys=KEYS)
    settings = tmp_path / "sft" / "adapter" / "adapter_config.json"
    settings.write_text(settings.read_text().replace(str(start), str(tmp_path / "gone")))
    with pytest.raises(EngineRefused, match=r"gone: no such folder"):
        run_job("dpo", data, tmp_path / "sft" / "adapter", tmp_path / "dpo", keys=KEYS)


def test_four_bits_without_bitsandbytes_name_the_exact_command(
    start: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.lm.load.is_bitsandbytes_available", lambda: False)
    with pytest.raises(EngineRefused, match=r"pip install 'constitutional-pipeline\[qlora\]'"):
        run_job("sft", data, start, tmp_path / "sft", keys={"lora": {"quantize": "4bit"}})


def test_adapters_beside_four_bits_get_the_gradient_of_the_weights_that_these_stand_for(tmp_path: Path) -> None:
    from bitsandbytes.functional import dequantize_4bit

    start = str(save_tiny(tmp_path / "start", hidden=192))
    gradients = {}
    quantised, plain = (load(start, device="cpu", quantize=quantize).model for quantize in ("4bit", None))
    for name, module in quantised.named_modules():
        if state := getattr(getattr(module, "weight", None), "quant_state", None):
            plain.get_submodule(name).weight.data = dequantize_4bit(module.weight.data, state).float()
    for model in (quantised, plain):
        prepare(model)
        attach(model, LoraSettings(r=4), head="language", seed=0)
        stir(model)
        completion_logps(model, GROUPS).tokens.sum().backward()
        gradients[model] = torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])
    assert gradients[plain].norm() > 1
    assert (gradients[quantised] - gradients[plain]).norm() <= 1e-3 * gradients[plain].norm()


@pytest.mark.parametrize("trainer", ["sft", "dpo", "rm"])
def test_four_bits_train_adapters_that_are_added_to_the_whole_weights(trainer: str, data: Path, tmp_path: Path) -> None:
    start = save_tiny(tmp_path / "start", hidden=192)  # the CPU kernels want multiples of 32
    lora = {**KEYS["lora"], "quantize": "4bit"}  # type: ignore[dict-item]
    run_job(trainer, data, start, tmp_path / "out", keys={**KEYS, "lora": lora})
    lines = metrics(tmp_path / "out")
    assert lines[-1]["loss"] < lines[0]["loss"]
    before, after = (load_file(folder / "model.safetensors") for folder in (start, tmp_path / "out"))
    adapter = load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    name = "model.layers.0.self_attn.q_proj"
    parts = [adapter[f"base_model.model.{name}.lora_{part}.weight"] for part in "BA"]
    assert torch.allclose(after[f"{name}.weight"], before[f"{name}.weight"] + 2 * parts[0] @ parts[1], atol=1e-6)
