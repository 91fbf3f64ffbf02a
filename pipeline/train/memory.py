"""What a training will need in memory, from a model without weights and its longest microbatch."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from pipeline.config.settings import TrainSettings
from pipeline.lm.forward import Group, completion_logps
from pipeline.lm.load import pick_device
from pipeline.lm.packed import PACKED
from pipeline.train.batches import Data, microbatches
from pipeline.train.loop import silence_dropout

_SHARE = 0.9  # of the free memory that may be used


class Memory(NamedTuple):
    """All in bytes. activations: of the longest microbatch, `tokens` long."""

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
    def advice(self) -> str:
        """What would fit, '' if this does."""
        fixed, room = self.total - self.activations, int(self.free * _SHARE)
        if self.total <= room:
            return ""
        if fixed >= room:
            return "weights, gradients and optimiser alone do not fit; take a smaller model or a larger machine"
        fitting = int(self.tokens * (room - fixed) / self.activations)
        return f"does not fit; microbatch_tokens: {fitting} would, or gradient_checkpointing: true"


def measure(start: str, data: Data, settings: TrainSettings, device: str) -> Memory:
    """Weights in fp32, one gradient and two moments for each; activations as a forward pass keeps them, all layers."""
    where = pick_device(device)
    config = AutoConfig.from_pretrained(start)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    if settings.precision == "bfloat16" or (settings.precision == "auto" and where.type == "cuda"):
        model.to(torch.bfloat16)
    model.set_attn_implementation(PACKED)
    parts = microbatches(data, range(len(data)), max_tokens=settings.microbatch_tokens)
    longest = max(parts, key=lambda part: sum(map(data.num_tokens, part)))
    groups = [data.group(row) for row in longest]
    activations = kept_bytes(model.eval(), groups)
    if settings.gradient_checkpointing:
        one_layer = activations // config.get_text_config().num_hidden_layers
        silence_dropout(model, settings)
        activations = kept_bytes(model, groups) + one_layer
    return Memory(
        weights=4 * num_parameters,
        gradients=4 * num_parameters,
        optimizer=8 * num_parameters,
        activations=activations,
        tokens=sum(map(data.num_tokens, longest)),
        free=_free_bytes(where),
    )


def kept_bytes(model: Any, groups: Sequence[Group]) -> int:
    """What automatic differentiation keeps of one forward pass, parameters left out, each storage once."""
    own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        completion_logps(model, groups)
    return sum(tensor.untyped_storage().nbytes() for key, tensor in kept.items() if key not in own)


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
