"""What a training will need in memory, from a model without weights and its longest microbatch."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from pipeline.config.settings import LoraSettings, TrainSettings
from pipeline.lm.forward import Group, completion_ends, completion_logps
from pipeline.lm.load import Head, load_config, pick_device, pick_dtype, stored_dtype
from pipeline.lm.packed import PACKED
from pipeline.train import ranks
from pipeline.train.batches import Data, longest_microbatch
from pipeline.train.loop import compute_dtype, silence_dropout
from pipeline.train.lora import attach

_SHARE = 0.9  # of the free memory that may be used
_NF4_BYTES = 0.5 + 0.127 / 8  # of a weight, with its nested scales: Dettmers et al. 2023, section 3


class Memory(NamedTuple):
    """All in bytes. activations: of the longest microbatch, `tokens` long, with the casts of weights they need."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    tokens: int
    free: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations

    @property
    def room(self) -> int:
        return int(self.free * _SHARE)

    @property
    def fits(self) -> bool:
        return self.total <= self.room


def measure(start: str, data: Data, settings: TrainSettings, device: str, head: Head, beside: int = 0) -> Memory:
    """Weights, a gradient and two moments of what is trained, and activations as a forward pass keeps them.

    Where the model is divided over several processes it is the share of one. beside: bytes of other models.
    """
    shares = ranks.size() if settings.parallel == "fsdp" else 1
    kind = pick_device(device).type
    model = _hollow(start, settings, head)
    sizes = _sizes(model, start, settings, kind)
    is_half = compute_dtype(settings, kind) == torch.bfloat16
    casts = sum(2 * weight.numel() for weight in _linear_weights(model) if is_half and sizes[weight] == 4)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    weights = sum(int(parameter.numel() * size) for parameter, size in sizes.items())
    if is_half:
        model.to(torch.bfloat16)
    longest = longest_microbatch(data, batch_size=settings.batch_size, max_tokens=settings.microbatch_tokens)
    return Memory(
        weights=weights // shares + beside,
        gradients=4 * trained // shares,
        optimizer=8 * trained // shares,
        activations=_activations(model, [data.group(row) for row in longest], settings) + casts,
        tokens=sum(map(data.num_tokens, longest)),
        free=_free_bytes(pick_device(device)),
    )


def weight_bytes(model: str, device: str, head: Head) -> int:
    """Of a model that is only read, as it is loaded."""
    dtype = pick_dtype("auto", pick_device(device), load_config(model))
    hollow = _hollow(model, TrainSettings(), head)
    return sum(parameter.numel() for parameter in hollow.parameters()) * dtype.itemsize


def advise(
    memory: Memory, start: str, data: Data, settings: TrainSettings, device: str, head: Head, beside: int = 0
) -> str:
    """What would fit and what it needs, '' if this does."""
    if memory.fits:
        return ""
    found = []
    for update in _smaller(memory, data, settings):
        tried = measure(start, data, settings.model_copy(update=update), device, head, beside)
        if tried.total <= memory.room:
            words = ", ".join(f"{name}: {_words(value)}" for name, value in update.items())
            found.append(f"{words} ({tried.total / 2**20:,.0f} MiB)")
    if not found:
        return "does not fit, and no setting makes it fit; take a smaller model or a larger machine"
    return f"does not fit into {memory.room / 2**20:,.0f} MiB; this would: {'; or '.join(found)}"


def _smaller(memory: Memory, data: Data, settings: TrainSettings) -> list[dict[str, Any]]:
    """Changes that need less memory, the mildest first."""
    updates: list[dict[str, Any]] = []
    longest = max(map(data.num_tokens, range(len(data))))
    left = memory.room - (memory.total - memory.activations)
    fitting = int(memory.tokens * left / memory.activations)
    if fitting >= longest:
        updates.append({"microbatch_tokens": fitting})
    spared = {} if settings.gradient_checkpointing else {"gradient_checkpointing": True}
    loras = [] if settings.lora else [LoraSettings()]
    if not (settings.lora and settings.lora.quantize):
        loras.append((settings.lora or LoraSettings()).model_copy(update={"quantize": "4bit"}))
    updates += [spared] if spared else []
    for lora in loras:
        updates += [{"lora": lora}, {"lora": lora, **spared, "microbatch_tokens": longest}]
    return updates


def _words(value: Any) -> str:
    if isinstance(value, LoraSettings):
        return f"{{r: {value.r}{', quantize: 4bit' if value.quantize else ''}}}"
    return str(value).lower()


def _hollow(start: str, settings: TrainSettings, head: Head) -> Any:
    """The model that is trained, on no device."""
    config = load_config(start)
    with torch.device("meta"):
        if head == "score":
            config.num_labels = 1
            model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
        else:
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        if settings.lora:
            attach(model, settings.lora, head=head, seed=0)
    model.set_attn_implementation(PACKED)
    return model.eval()


def _sizes(model: Any, start: str, settings: TrainSettings, kind: str) -> dict[Tensor, float]:
    """Bytes of each number of a parameter."""
    lora = settings.lora
    frozen: float = 4
    if lora and lora.quantize:
        frozen = compute_dtype(settings, kind).itemsize
    elif lora and kind == "cuda" and settings.precision != "float32":
        frozen = stored_dtype(start).itemsize
    sizes = {parameter: 4 if parameter.requires_grad else frozen for parameter in model.parameters()}
    if lora and lora.quantize:
        sizes |= {weight: _NF4_BYTES for weight in _linear_weights(model.base_model) if not weight.requires_grad}
    return sizes


def _linear_weights(model: Any) -> list[Tensor]:
    return [module.weight for module in model.modules() if isinstance(module, torch.nn.Linear)]


def _activations(model: Any, groups: Sequence[Group], settings: TrainSettings) -> int:
    everything = kept_bytes(model, groups)
    if not settings.gradient_checkpointing:
        return everything
    silence_dropout(model, settings)
    return kept_bytes(model, groups) + everything // model.config.get_text_config().num_hidden_layers


def kept_bytes(model: Any, groups: Sequence[Group]) -> int:
    """What automatic differentiation keeps of one forward pass, parameters left out, each storage once."""
    own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        if model.get_output_embeddings() is None:
            model.score(completion_ends(model, groups))
        else:
            completion_logps(model, groups)
    return sum(tensor.untyped_storage().nbytes() for key, tensor in kept.items() if key not in own)


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return free_system_bytes()


def free_system_bytes(root: Path = Path("/")) -> int:
    """What a process may still take: the system's available memory, page cache included, or less in a container."""
    meminfo = root / "proc/meminfo"
    if not meminfo.exists():  # no Linux
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    available = 1024 * _numbers(meminfo.read_text())["MemAvailable:"]
    return min([available, *_free_in_groups(root)])


def _free_in_groups(root: Path) -> list[int]:
    """In the process's control group and those around it, as far as they have a limit (version 2 alone)."""
    own = next((line[3:] for line in (root / "proc/self/cgroup").read_text().splitlines() if line[:3] == "0::"), "/")
    base = root / "sys/fs/cgroup"
    group, found = base / own.strip("/"), list[int]()
    for folder in (group, *group.parents):
        if folder.is_relative_to(base) and (folder / "memory.max").exists():
            limit = (folder / "memory.max").read_text().strip()
            used = int((folder / "memory.current").read_text())
            cache = _numbers((folder / "memory.stat").read_text())["inactive_file"]  # given up when memory is short
            found += [int(limit) - used + cache] if limit != "max" else []
    return found


def _numbers(text: str) -> dict[str, int]:
    """The first number of each line, by the word before it."""
    return {words[0]: int(words[1]) for words in map(str.split, text.splitlines())}
