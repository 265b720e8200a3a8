"""Parameters that an engine divides over devices: FSDP2's are DTensors, DeepSpeed's ZeRO-3 leaves an empty shell."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn


def is_divided(parameter: Any) -> bool:
    """Whether this process holds a part of the parameter only."""
    return hasattr(parameter, "placements") or hasattr(parameter, "ds_tensor")


def local(parameter: Any) -> Tensor:
    """A parameter's data; of one that is divided this process's own part (ZeRO-3's is flat, and filled up with zeros)."""
    data = getattr(parameter, "ds_tensor", parameter).detach()
    return data.to_local() if hasattr(data, "to_local") else data  # type: ignore[no-any-return]


def whole(parameter: Any) -> Any:
    """All of a parameter that is divided; others, and None, as they are. All processes call it together."""
    if hasattr(parameter, "full_tensor"):
        return parameter.full_tensor()
    if hasattr(parameter, "ds_tensor"):
        with import_module("deepspeed").zero.GatheredParameters([parameter]):
            return parameter.detach().clone()
    return parameter


def divide_(blocks: Iterable[nn.Module]) -> None:
    """Leaves each process a part of the blocks' parameters (FSDP2); a block is whole while it computes, and then again not.

    For a model that is not trained: what is trained is divided by the engine. All processes call it together.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    blocks = list(blocks)
    kind = next(blocks[0].parameters()).device.type
    mesh = init_device_mesh(kind, (torch.distributed.get_world_size(),))
    for block in blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
