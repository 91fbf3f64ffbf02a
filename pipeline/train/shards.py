"""A model whose weights, gradients and optimiser state are divided over the processes: FSDP2, layer by layer.

Everything else sees whole tensors: checkpoints and the model's folder are the same for any number of processes.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from pipeline.train import ranks

T = TypeVar("T")


def make_mesh(device: torch.device) -> DeviceMesh:
    """All processes. An optimiser takes the parameters of one mesh only."""
    # DTensor's caches keep a mesh's group, and with it its threads, beyond the end of Python; with a group of its own
    # they are idle by then, while those of the default group, which speaks to the end, end with it.
    return DeviceMesh.from_group(dist.new_group(), device.type)


def shard(model: Any, device: torch.device, dtype: torch.dtype, mesh: DeviceMesh | None = None) -> None:
    """Divides the model, in place. device: where it goes; until then it may lie on the CPU.

    dtype: of the weights that a layer is computed with; the shards, gradients and sums of gradients stay in fp32.
    """
    mesh = mesh or make_mesh(device)
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    names = getattr(model, "_no_split_modules", None) or ()
    layers = [module for module in model.modules() if type(module).__name__ in names]
    for module in (*layers, model):
        fully_shard(module, mesh=mesh, mp_policy=policy)
        module.set_gradient_divide_factor(1.0)  # a sum, and no mean
        module.set_force_sum_reduction_for_comms(True)
    model.call = _call
    register_fsdp_forward_method(model, "call")


def _call(function: Callable[[], T]) -> T:
    return function()


def is_sharded(model: Any) -> bool:
    return isinstance(model, FSDPModule)


def compute(model: Any, function: Callable[[], T]) -> T:
    """What a function finds that uses the model, its parts or their weights, in whatever way."""
    if not is_sharded(model):
        return function()
    found: T = model.call(function)
    if not torch.is_grad_enabled():
        model.reshard()  # else the weights outside the layers would stay, and miss the next update
    return found


def by_itself(model: Any, action: Callable[[], T]) -> T:
    """Where processes compute without one another they can tell of an error; in FSDP the others wait inside."""
    if not is_sharded(model):
        return ranks.together(action)
    with ranks.lost_peers():
        return action()


def undivided(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors undivided, in the first process, and there on the CPU if they were divided; none in the others."""
    found = {}
    for name, tensor in tensors.items():
        complete = undivided(tensor.detach())
        if ranks.rank() == 0:
            found[name] = complete.cpu() if isinstance(tensor, DTensor) else complete
    return found


def like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor, divided as the parameter is."""
    tensor = tensor.to(parameter.device)
    if isinstance(parameter, DTensor) and tensor.shape == parameter.shape:
        return distribute_tensor(tensor, parameter.device_mesh, parameter.placements, src_data_rank=None)
    return tensor


def skeleton(model: Any) -> Any:
    """A copy of a model that is not divided yet, without its weights; they stay on the meta device."""
    return twin(model, "meta")


def twin(model: Any, device: str) -> Any:
    """A copy of a model that is not divided yet. Weights that are on the device already are shared until it is."""
    weights = {
        id(parameter): torch.nn.Parameter(parameter.detach().to(device), requires_grad=parameter.requires_grad)
        for parameter in model.parameters()
    }
    return deepcopy(model, weights)


def fill(bare: Any, model: Any) -> None:
    """Gives a skeleton the weights of its model, in the first process and on the CPU."""
    weights = whole(dict(model.named_parameters(remove_duplicate=False)))
    bare.load_state_dict(weights, strict=False, assign=True)
    if weights:
        bare.tie_weights()


def assemble(bare: Any, model: Any, dtype: torch.dtype) -> Any:
    """A copy of the model that every process has all weights of, as they are now. bare: its skeleton, left as it is."""
    with ranks.lost_peers():
        weights = {
            name: undivided(parameter.detach()).to(dtype)
            for name, parameter in model.named_parameters(remove_duplicate=False)
        }
    copy = deepcopy(bare)
    copy.load_state_dict(weights, strict=False, assign=True)
    copy.tie_weights()
    return copy.to(model.device)  # its buffers
