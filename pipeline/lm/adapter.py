"""LoRA adapters in folders: whose they are, and how they become part of the weights."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from pipeline.errors import EngineRefused

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def is_adapter(model: str) -> bool:
    """A folder with an adapter, and no model of its own."""
    folder = Path(model)
    return (folder / CONFIG).exists() and not (folder / "config.json").exists()


def base_of(model: str) -> str:
    """The model that a folder's adapter was trained on; anything else is its own base. Raises EngineRefused."""
    if not is_adapter(model):
        return model
    base = _read(Path(model)).get("base_model_name_or_path")
    if not base or is_adapter(base):
        raise EngineRefused(f"model {model}: {CONFIG} names no model that the adapter is for; give a merged model")
    return str(base)


def adapter_digest(folder: Path) -> str:
    """Identity by content: its settings, without the name of its base, and its weights. Raises EngineRefused."""
    settings = {key: value for key, value in _read(folder).items() if key != "base_model_name_or_path"}
    try:
        weights = (folder / WEIGHTS).read_bytes()
    except OSError as error:
        raise EngineRefused(f"model {folder}: no {WEIGHTS}; give a LoRA folder in safetensors") from error
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode() + b"\n" + weights).hexdigest()


@torch.no_grad()
def merge(model: Any, folder: Path) -> Any:
    """The model with the folder's adapter in its weights: the sum of each in fp32, rounded once to the model's dtype.

    model: the untouched base. An adapter of a reward model brings its head along. Raises EngineRefused.
    """
    from peft import PeftConfig, PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer

    dtype_before = model.dtype
    try:
        config = PeftConfig.from_pretrained(str(folder))
        is_reward, config.task_type = config.task_type == "SEQ_CLS", None  # the model has the head that is wanted
        adapted = PeftModel.from_pretrained(model, str(folder), config=config)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0][:200]
        raise EngineRefused(f"model {folder}: its adapter does not fit its model ({reason})") from error
    for layer in adapted.modules():
        if isinstance(layer, BaseTunerLayer):
            base = layer.get_base_layer()
            dtype = base.weight.dtype
            layer.float()
            layer.merge()
            base.to(dtype)
    merged = adapted.unload()
    if is_reward:
        merged.config.architectures = [type(merged).__name__]
    return merged.to(dtype_before).eval()


def _read(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / CONFIG).read_bytes())
        return found if isinstance(found, dict) else {}
    except (OSError, ValueError) as error:
        raise EngineRefused(f"model {folder}: {CONFIG} cannot be read ({error}); give a LoRA folder") from error
