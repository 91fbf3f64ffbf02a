"""Networks, prompts and settings of one PPO step that both we and TRL take up, and what came of it there.

benchmarks/agreement_ppo.py has run TRL. Numbers drawn here come from numpy's RandomState, whose streams do not change
between versions.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from pipeline.config.settings import Settings, TrainPpoSettings
from pipeline.train.advantages import kl_estimates
from pipeline.train.batches import Data
from pipeline.train.rollouts import Rollouts
from tests.pipeline.train.agreed import END, PAD, VOCABULARY, make_model

FILE = Path(__file__).parent / "data/trl_ppo.safetensors"
BATCH_SIZE, MINIBATCH_SIZE = 16, 8
COMMON: dict[str, Any] = {
    "kl_coef": 0.2,
    "cliprange": 0.2,
    "cliprange_value": 0.2,
    "vf_coef": 0.1,
    "learning_rate": 5e-3,
    "gamma": 1.0,
    "lam": 0.95,
    "kl_estimator": "k1",
    "whiten_rewards": False,
    "temperature": 1.0,
    "missing_eos_penalty": 0.0,
}
"""What both call by the same names."""
CASES: dict[str, dict[str, Any]] = {
    "k1": {},
    "k3": {"kl_estimator": "k3", "lam": 1.0, "temperature": 0.7, "missing_eos_penalty": 0.5},
    "whitened": {"whiten_rewards": True, "gamma": 0.9},
}
MAX_TOKENS, NUM_INNER_EPOCHS = 10, 2
ADAM_EPS = 1e-5
"""Ours is fixed; TRL's default is another one."""


def settings_of(case: str) -> TrainPpoSettings:
    """Without a bound of the gradient's norm, which TRL's PPO does not heed."""
    keys = {"batch_size": BATCH_SIZE, "minibatch_size": MINIBATCH_SIZE, "max_tokens": MAX_TOKENS}
    keys |= {"num_inner_epochs": NUM_INNER_EPOCHS, "precision": "float32", "warmup": 0.0, "max_grad_norm": 1e9}
    return Settings.model_validate({"train_ppo": {**keys, **COMMON, **CASES[case]}}).train_ppo


def make_networks() -> dict[str, Any]:
    """policy, reference, value_model and reward_model; all four differ."""
    found = {"policy": make_model(), "reference": make_model()}
    found |= {"value_model": make_model("score"), "reward_model": make_model("score")}
    for seed, model in enumerate(found.values(), start=2):
        draw = np.random.RandomState(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.add_(torch.from_numpy(0.03 * draw.standard_normal(parameter.shape)).float())
    for name in ("policy", "reference"):
        _set_odds(found[name])
    return found


@torch.no_grad()
def _set_odds(model: Any) -> None:
    """Padding is never drawn, an end now and then: one feature of all embeddings is a constant that these two read."""
    model.get_input_embeddings().weight[:, 0] = 0.5
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight[0] = layer.mlp.down_proj.weight[0] = 0.0
    head = model.get_output_embeddings().weight
    head[:, 0] = 0.0
    head[PAD, 0], head[END, 0] = -40.0, 5.5


def make_prompts() -> list[list[int]]:
    """Of unequal length, without padding."""
    draw = np.random.RandomState(1)
    return [draw.randint(2, VOCABULARY, size=draw.randint(3, 15)).tolist() for _ in range(BATCH_SIZE)]


class Minibatch(NamedTuple):
    """What TRL had in the pass before an update, and, (M, ...) each, what the step had of the same responses."""

    found: dict[str, Tensor]
    of_step: dict[str, Tensor]
    mask: Tensor
    longer: Tensor
    epoch: int
    number: int

    def stat(self, step: Step, name: str) -> float:
        """What TRL has measured in this pass."""
        return step[f"{name}_stats"][self.epoch, self.number, 0].item()


class Step:
    """One step of TRL's. mask: of the responses' tokens. longer: the same with one more where there is room."""

    def __init__(self, case: str) -> None:
        with safe_open(FILE, "pt") as file:
            self.metrics: dict[str, float] = json.loads(file.metadata()["metrics"])[case]
        self.tensors = _beginning(f"{case}/", load_file(FILE))
        self.settings: TrainPpoSettings = settings_of(case)
        lengths = 1 + torch.tensor([self.length(row.tolist()) for row in self["responses"]])
        columns = torch.arange(self["responses"].shape[1])
        self.mask, self.longer = columns < lengths[:, None] - 1, columns < lengths[:, None]
        self.ended_early = ~self.mask[:, -1]

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    @staticmethod
    def length(response: list[int]) -> int:
        """Up to its end, which is a part of it."""
        return response.index(END) + 1 if END in response else len(response)

    @property
    def kl(self) -> Tensor:
        """As we have it."""
        found = kl_estimates(self["logprobs"], self["ref_logprobs"], estimator=self.settings.kl_estimator)
        return found.masked_fill(~self.mask, 0.0)

    @property
    def rollouts(self) -> Rollouts:
        """Ours, of TRL's numbers."""
        logps, ref_logps, values = (
            self[name].masked_fill(~self.mask, 0.0) for name in ("logprobs", "ref_logprobs", "values")
        )
        has_ended = (self["responses"] == END).any(dim=1)
        return Rollouts(self.data, [], [], has_ended, self.mask, logps, logps, ref_logps, values)

    @property
    def data(self) -> Data:
        data = Data()
        for query, response, mask in zip(self["queries"], self["responses"], self.mask, strict=True):
            data.add_tokens(str(len(data)), query[query != PAD].tolist(), [response[mask].tolist()])
        return data

    @property
    def minibatches(self) -> list[Minibatch]:
        found = []
        for epoch in range(NUM_INNER_EPOCHS):
            for number in range(BATCH_SIZE // MINIBATCH_SIZE):
                own = _beginning(f"{len(found)}/", self.tensors)
                rows = own["rows"]
                of_step = {name: self[name][rows] for name in ("logprobs", "values", "advantages", "returns")}
                found.append(Minibatch(own, of_step, self.mask[rows], self.longer[rows], epoch, number))
        return found


def _beginning(start: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(start): value for name, value in tensors.items() if name.startswith(start)}
