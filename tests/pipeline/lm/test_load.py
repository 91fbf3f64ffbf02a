"""Loading model folders, and what identifies them."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from pipeline.errors import EngineRefused
from pipeline.lm.check import check_decoding
from pipeline.lm.load import hash_weights, identify, load
from tests.pipeline.lm.tiny import save_tiny, tiny_llama


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "tiny")


def test_a_copy_of_a_folder_has_the_same_fingerprint(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    first, second = load(str(folder)).fingerprint, load(str(tmp_path / "copy")).fingerprint
    assert first == second
    assert str(tmp_path) not in str(first)
    assert first["dtype"] == "float32"


def test_weights_tokens_settings_and_dtype_change_it(folder: Path) -> None:
    first = load(str(folder)).fingerprint
    assert load(str(folder), dtype="bf16").fingerprint == {**first, "dtype": "bfloat16"}
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] += 1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    second = load(str(folder)).fingerprint
    assert {key for key in first if first[key] != second[key]} == {"weights", "tokenizer"}


def test_the_tokens_that_end_a_reply_change_it(folder: Path) -> None:
    first = load(str(folder)).fingerprint
    generation = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps({**generation, "eos_token_id": [2, 5]}))
    assert load(str(folder)).fingerprint == {**first, "eos": "[2, 5]"}


def test_revisions_without_a_known_commit_are_told_apart_by_their_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    cached = tmp_path / "models--owner--tiny"
    (cached / "refs").mkdir(parents=True)
    for seed, name in enumerate(("old", "new")):
        save_tiny(cached / "snapshots" / f"copy-{name}", seed=seed)
        (cached / "refs" / name).write_text(f"copy-{name}")
    old, new = (load("owner/tiny", revision=name).fingerprint for name in ("old", "new"))
    assert {key for key in old if old[key] != new[key]} == {"weights"}
    assert new["weights"] == hash_weights(cached / "snapshots" / "copy-new")


def test_loading_says_nothing(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    load(str(folder))
    assert capfd.readouterr() == ("", "")


def test_weights_are_hashed_by_name_and_content(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"x" * 10)
    (tmp_path / "notes.txt").write_text("not weights")
    inner = hashlib.sha256(b"x" * 10).hexdigest()
    assert hash_weights(tmp_path) == hashlib.sha256(f"a.safetensors {inner}\n".encode()).hexdigest()


def test_an_unknown_model_is_refused_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in ("no-such-owner/no-such-model", str(tmp_path / "absent")):
        with pytest.raises(EngineRefused, match=r"check its name") as caught:
            load(name)
        assert "\n" not in str(caught.value)
        assert caught.value.exit_code == 2


def test_a_folder_without_a_model_or_with_pickled_weights_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(EngineRefused, match=r"no config\.json"):
        load(str(tmp_path))
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    with pytest.raises(EngineRefused, match="safetensors"):
        load(str(folder))


def test_a_reward_model_is_no_language_model(folder: Path, tmp_path: Path) -> None:
    """Its folder has no head that says anything, and transformers would make one up."""
    AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1).save_pretrained(tmp_path / "rm")
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "rm")
    assert load(str(tmp_path / "rm"), head="score").model.score.weight.shape[0] == 1
    with pytest.raises(EngineRefused, match="rm: a reward model, which says nothing; give the language model"):
        load(str(tmp_path / "rm"))


def test_a_broken_weight_file_is_refused(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:1000])
    for look_at in (load, identify):
        with pytest.raises(EngineRefused, match="cannot be loaded"):
            look_at(str(folder))


def test_unknown_devices_and_dtypes_are_refused(folder: Path) -> None:
    with pytest.raises(EngineRefused, match=r"engine\.device: warp"):
        load(str(folder), device="warp")
    with pytest.raises(EngineRefused, match=r"engine\.dtype: fp4"):
        load(str(folder), dtype="fp4")


def test_a_model_that_the_loop_would_decode_wrongly_is_refused() -> None:
    model = tiny_llama()
    check_decoding(model)
    attention = model.model.layers[0].self_attn
    forward = attention.forward
    attention.forward = lambda *args, **given: forward(*args, **{**given, "attention_mask": None})
    with pytest.raises(EngineRefused, match="llama decodes differently"):
        check_decoding(model)


@pytest.mark.parametrize("error", [RuntimeError("mat1 and mat2\n  on two lines"), NotImplementedError(), KeyError("x")])
def test_a_model_that_fails_in_its_own_code_is_refused_in_one_line(error: Exception) -> None:
    model = tiny_llama()

    def fail(*args: object, **given: object) -> None:
        raise error

    model.model.layers[0].self_attn.forward = fail
    with pytest.raises(EngineRefused, match=r"llama cannot be decoded here \(.+\); serve the model") as caught:
        check_decoding(model)
    assert "\n" not in str(caught.value)
