"""The networks of PPO: the policy, its start as the reference, and a value function beside the policy or on it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pipeline.config.settings import TrainPpoSettings
from pipeline.errors import UsageError
from pipeline.lm.forward import (
    Group,
    completion_states,
    entropies_from_states,
    logps_from_states,
    prepare,
)
from pipeline.lm.load import load
from pipeline.train.loop import autocast, silence_dropout

Parameters = dict[str, Tensor]


class Predictions(NamedTuple):
    """Of every token of every completion, one after the other. logps, in nats, values and entropies: (M,).

    values: of the states in which the tokens are drawn; None without a value function. entropies: if asked for.
    """

    logps: Tensor
    values: Tensor | None
    entropies: Tensor | None


@dataclass(frozen=True)
class Networks:
    """value_model: a reward model that is trained on; value_head: (H,) -> () on the policy's last states. One or none.

    attention: the policy's implementation for decoding; `lm.forward.prepare` has chosen another one for packed rows.
    """

    policy: Any
    reference: Any
    value_model: Any | None
    value_head: torch.nn.Linear | None
    attention: str
    settings: TrainPpoSettings

    @property
    def parameters(self) -> dict[str, Parameters]:
        """What is trained: `policy`, with a value head as its part, and `value`."""
        found = {"policy": _trained(self.policy)}
        if self.value_head is not None:
            found["policy"] |= {f"value_head.{name}": p for name, p in self.value_head.named_parameters()}
        if self.value_model is not None:
            found["value"] = _trained(self.value_model)
        return found

    def predict(self, groups: Sequence[Group], *, with_entropies: bool = False) -> Predictions:
        """One pass through the policy, one through a value model of its own."""
        temperature = self.settings.temperature
        with autocast(self.policy, self.settings):
            states = completion_states(self.policy, groups)
            logps = logps_from_states(self.policy, states, groups, temperature=temperature).tokens
            entropies = entropies_from_states(self.policy, states, temperature=temperature) if with_entropies else None
        return Predictions(logps, self._values(states, groups), entropies)

    def _values(self, states: Tensor, groups: Sequence[Group]) -> Tensor | None:
        if self.value_head is not None:
            return self.value_head(states.float())[:, 0]
        if self.value_model is None:
            return None
        with autocast(self.value_model, self.settings):
            values: Tensor = self.value_model.score(completion_states(self.value_model, groups))[:, 0].float()
        return values

    @torch.no_grad()
    def reference_logps(self, groups: Sequence[Group]) -> Tensor:
        """(M,) log-probabilities under the starting model, at the same temperature."""
        with autocast(self.reference, self.settings):
            states = completion_states(self.reference, groups)
            return logps_from_states(self.reference, states, groups, temperature=self.settings.temperature).tokens


def open_networks(
    policy: Any, start: str, reward_model: Any | None, settings: TrainPpoSettings, *, device: str
) -> Networks:
    """policy: just loaded, in fp32, from `start`. reward_model: what the value function begins as, None: nothing to.

    With value_start zero, or without a reward model, it begins as the policy with a head of zeros.
    """
    attention = policy.config._attn_implementation
    prepare(policy)
    reference = copy.deepcopy(policy).requires_grad_(False)
    silence_dropout(policy, settings)
    value_model = value_head = None
    start_as = reward_model if settings.value_start == "reward" else None
    if settings.advantages == "gae" and settings.value == "joint":
        value_head = _joint_head(policy, start_as)
    elif settings.advantages == "gae":
        value_model = _blank_value_model(start, device) if start_as is None else copy.deepcopy(start_as).float()
        value_model.requires_grad_(True)
        silence_dropout(value_model, settings)
    return Networks(policy, reference, value_model, value_head, attention, settings)


def _blank_value_model(start: str, device: str) -> Any:
    model = load(start, dtype="float32", device=device, head="score").model
    torch.nn.init.zeros_(model.score.weight)
    prepare(model)
    return model


def _joint_head(policy: Any, reward_model: Any | None) -> torch.nn.Linear:
    head = torch.nn.Linear(policy.config.get_text_config().hidden_size, 1, device=policy.device)
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.zeros_(head.bias)
    if reward_model is not None:
        if reward_model.score.weight.shape != head.weight.shape:
            raise UsageError("train_ppo.value: joint: the reward model is of another width; set value_start: zero")
        with torch.no_grad():
            head.weight.copy_(reward_model.score.weight)
    return head


def _trained(model: Any) -> Parameters:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
