"""Which backend runs an op, and why."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from signbit.ops import reference

#: How activations enter a layer: as floats, or as integers (`sign` only as a layer's own act_bits = 1).
ACTIVATION_MODES = ("exact", "int8")


@dataclass(frozen=True)
class Backend:
    """One implementation of the ops: two functions with the signatures of `signbit.ops.reference`."""

    name: str
    binary_linear: Callable[..., Tensor]
    int8_linear: Callable[..., Tensor]


@dataclass(frozen=True)
class Choice:
    """The backend that an op takes on a device, and the reason in words."""

    op: str
    device: str
    backend: str
    reason: str


#: By name; the CPU and CUDA kernels add theirs beside the reference.
BACKENDS: dict[str, Backend] = {
    "reference": Backend("reference", reference.binary_linear, reference.int8_linear),
}


def choose(device: torch.device) -> Backend:
    """The backend that multiplies on `device`."""
    return BACKENDS["reference"]


def explain(device: str | torch.device = "cpu") -> list[Choice]:
    """For each op, the backend it takes on `device` and why."""
    device = torch.device(device)
    reason = f"no kernel for {device.type} is built into this version; plain torch unpacks the bits on every call"
    return [Choice(op, str(device), choose(device).name, reason) for op in ("binary_linear", "int8_linear")]
