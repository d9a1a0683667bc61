"""Training a model that is too large for one device with its gradients and its optimizer: PyTorch's FSDP2.

While a stage trains, each rank keeps a share of every weight, gradient and moment. Between the stages every rank has
the whole model again.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from hhbench.hosts import slots


def sharded_copy(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """A copy of a host whose ranks hold a share each: one group for every block of a stack, one for the rest."""
    shared = copy.deepcopy(model)
    hosted = {id(slot.attention) for slot in slots(shared).values()}
    shard: Any = fully_shard
    for stack in (module for module in shared.modules() if isinstance(module, nn.ModuleList | nn.Sequential)):
        for block in stack:
            if any(id(inner) in hosted for inner in block.modules()):
                shard(block, mesh=mesh)
    shard(shared, mesh=mesh)
    return shared


def gather(sharded: nn.Module, model: nn.Module) -> None:
    """Give a model the weights of its sharded copy, on every rank."""
    own = model.state_dict()
    for name, tensor in sharded.state_dict().items():  # one by one: a device may have no room for all of them
        own[name].copy_(whole(tensor))


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that ranks may hold shares of."""
    with torch.no_grad():
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
