"""The networks of PPO: the policy, its start as the reference, and a value function beside the policy or on it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from pipeline.config.settings import TrainPpoSettings
from pipeline.errors import UsageError
from pipeline.lm.forward import (
    Group,
    completion_states,
    entropies_from_states,
    logps_from_states,
    prepare,
)
from pipeline.lm.load import load, pick_device
from pipeline.train import shards
from pipeline.train.abreast import abreast
from pipeline.train.loop import autocast, compute_dtype, silence_dropout
from pipeline.train.lora import attach

Parameters = dict[str, Tensor]


class Predictions(NamedTuple):
    """Of every token of every completion, one after the other. logps, in nats, values and entropies: (M,).

    values: of the states in which the tokens are drawn; None without a value function. entropies: if asked for.
    """

    logps: Tensor
    values: Tensor | None
    entropies: Tensor | None

    def cut_off(self) -> Predictions:
        """The same numbers, at which gradients end."""
        logps, values, entropies = (None if each is None else each.detach().requires_grad_() for each in self)
        return Predictions(logps, values, entropies)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Networks:
    """value_model: a reward model that is trained on; value_head: (H,) -> () on the policy's last states. One or none.

    adapted: peft's view of a policy with adapters; the reference then has the same weights below them, and the value
    model those of the reward model. attention: the policy's implementation for decoding; `lm.forward.prepare` has
    chosen another one for packed rows. skeleton: of a policy that is divided over several processes, as the others are.
    """

    policy: Any
    adapted: Any | None
    reference: Any
    value_model: Any | None
    value_head: torch.nn.Linear | None
    attention: str
    settings: TrainPpoSettings
    skeleton: Any | None = None

    @property
    def parameters(self) -> dict[str, Parameters]:
        """What is trained: `policy`, with a value head as its part, and `value`."""
        found = {"policy": _trained(self.policy)}
        if self.value_head is not None:
            found["policy"] |= {f"value_head.{name}": p for name, p in self.value_head.named_parameters()}
        if self.value_model is not None:
            found["value"] = _trained(self.value_model)
        return found

    @torch.no_grad()
    def restart(self) -> None:
        """Puts the policy back to its start; adapters then have no effect."""
        start = dict(self.reference.named_parameters())
        for name, parameter in _trained(self.policy).items():
            if name in start:
                parameter.copy_(start[name])
            else:
                parameter.zero_()

    def gathered(self) -> Any:
        """The policy, for decoding; if it is divided a copy, whole in every process, in the dtype it computes in."""
        if self.skeleton is None:
            return self.policy
        return shards.assemble(self.skeleton, self.policy, compute_dtype(self.settings, self.policy.device.type))

    def predict(self, groups: Sequence[Group], *, with_entropies: bool = False) -> Predictions:
        """One pass through the policy, one through a value model of its own."""
        of_policy = partial(self._of_policy, groups, with_entropies=with_entropies)
        if self.value_model is None:
            return of_policy()
        of_value = partial(self._of_value_model, groups)
        found, values = abreast(of_policy, of_value) if self._are_apart else (of_policy(), of_value())
        return found._replace(values=values)

    def backward(self, found: Predictions, ends: Predictions) -> None:
        """Adds to the gradients of the weights. found: by `predict`; ends: the same cut off, with gradients."""

        def act(names: Sequence[str]) -> None:
            both = [(getattr(found, name), getattr(ends, name)) for name in names]
            outputs, leaves = zip(*(pair for pair in both if pair[0] is not None), strict=True)
            torch.autograd.backward(outputs, [leaf.grad for leaf in leaves])

        if self._are_apart:
            abreast(partial(act, ["logps", "entropies"]), partial(act, ["values"]))
        else:
            act(Predictions._fields)

    @property
    def _are_apart(self) -> bool:
        """Policy and value model have nothing to wait for but each other; checkpointing restores a common state."""
        on_cpu = self.policy.device.type == "cpu" and self.skeleton is None
        return on_cpu and self.value_model is not None and not self.settings.gradient_checkpointing

    def _of_policy(self, groups: Sequence[Group], *, with_entropies: bool) -> Predictions:
        temperature = self.settings.temperature

        def read() -> tuple[Tensor, Tensor, Tensor | None]:
            states = completion_states(self.policy, groups)
            logps = logps_from_states(self.policy, states, groups, temperature=temperature).tokens
            entropies = entropies_from_states(self.policy, states, temperature=temperature) if with_entropies else None
            return states, logps, entropies

        with autocast(self.policy, self.settings):
            states, logps, entropies = shards.compute(self.policy, read)
        if (head := self.value_head) is None:
            return Predictions(logps, None, entropies)
        values = shards.compute(head, lambda: linear(states.float(), head.weight, head.bias))
        return Predictions(logps, values[:, 0].float(), entropies)

    def _of_value_model(self, groups: Sequence[Group]) -> Tensor:
        model: Any = self.value_model
        with autocast(model, self.settings):
            values = shards.compute(model, lambda: model.score(completion_states(model, groups)))
        found: Tensor = values[:, 0].float()
        return found

    @torch.no_grad()
    def reference_logps(self, groups: Sequence[Group]) -> Tensor:
        """(M,) log-probabilities under the starting model, at the same temperature."""

        def read() -> Tensor:
            states = completion_states(self.reference, groups)
            return logps_from_states(self.reference, states, groups, temperature=self.settings.temperature).tokens

        with autocast(self.reference, self.settings):
            return shards.compute(self.reference, read)


def open_networks(
    policy: Any,
    start: str,
    reward_model: Any | None,
    settings: TrainPpoSettings,
    *,
    device: str,
    seed: int = 0,
    divides: bool = False,
) -> Networks:
    """policy: just loaded from `start`, in fp32 but for weights that stay frozen. seed: of adapters.

    reward_model: what the value function begins as; with value_start zero, or without one, it begins as the policy
    with a head of zeros. divides: all but the reward model, over the processes; the policy is then on the CPU.
    """
    attention, dtype = policy.config._attn_implementation, policy.dtype
    prepare(policy)
    reference = _copy(policy, settings, divides=divides).requires_grad_(False)
    adapted = attach(policy, settings.lora, head="language", seed=seed) if settings.lora else None
    silence_dropout(policy, settings)
    value_model = value_head = None
    start_as = reward_model if settings.value_start == "reward" else None
    if settings.advantages == "gae" and settings.value == "joint":
        value_head = _joint_head(policy, start_as)
    elif settings.advantages == "gae":
        if start_as is None:
            value_model = _blank_value_model(start, "cpu" if divides else device, dtype)
        else:
            value_model = _copy(start_as, settings, divides=divides)
        _open_for_training(value_model.float() if divides else value_model, settings, seed)
    networks = Networks(policy, adapted, reference, value_model, value_head, attention, settings)
    return _divided(networks, pick_device(device)) if divides else networks


def _copy(model: Any, settings: TrainPpoSettings, *, divides: bool) -> Any:
    """A model like it; with adapters its weights never change, and both have the same."""
    if divides:
        return shards.twin(model, "cpu")
    return copy.deepcopy(model, {id(weight): weight for weight in model.parameters()} if settings.lora else {})


def _divided(networks: Networks, device: torch.device) -> Networks:
    networks = replace(networks, skeleton=shards.skeleton(networks.policy))
    dtype, mesh = compute_dtype(networks.settings, device.type), shards.make_mesh(device)
    for model in (networks.policy, networks.reference, networks.value_model):
        if model is not None:
            shards.shard(model, device, dtype, mesh)
    if networks.value_head is not None:
        shards.shard(networks.value_head, device, torch.float32, mesh)
    return networks


def _open_for_training(model: Any, settings: TrainPpoSettings, seed: int) -> None:
    if settings.lora:
        attach(model, settings.lora, head="score", seed=seed)
    else:
        model.float().requires_grad_(True)
    silence_dropout(model, settings)


def _blank_value_model(start: str, device: str, dtype: torch.dtype) -> Any:
    model = load(start, dtype=str(dtype).removeprefix("torch."), device=device, head="score").model
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
