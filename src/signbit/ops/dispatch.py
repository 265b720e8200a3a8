"""Which backend runs an op, and why."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from signbit.bits import Operands
from signbit.ops import cpu, native, reference
from signbit.ops.cpu import Prepared

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


def _backends() -> dict[str, Backend]:
    found = {"reference": Backend("reference", reference.binary_linear, reference.int8_linear)}
    library = native.library()
    for isa in () if isinstance(library, str) else library.runs:
        found[isa] = Backend(
            isa, functools.partial(cpu.binary_linear, isa=isa), functools.partial(cpu.int8_linear, isa=isa)
        )
    return found


#: By name: the reference, and the CPU kernels of each instruction set that this processor runs.
BACKENDS: dict[str, Backend] = _backends()


def choose(device: torch.device) -> Backend:
    """The backend that multiplies on `device`."""
    name = _selected(device)[0]
    return BACKENDS[name or "reference"]


def _selected(device: torch.device) -> tuple[str | None, str]:
    if device.type == "cpu":
        return cpu.selected()
    return None, f"no kernel for {device.type} is built into this version; plain torch unpacks the bits on every call"


def prepare(w: Operands, device: torch.device) -> Prepared | str:
    """`w` in the order of the kernels that multiply on `device`, or why the reference does."""
    name, reason = _selected(device)
    if name is None:
        return reason
    return cpu.unsupported(w) or cpu.prepare(w)


def explain(device: str | torch.device = "cpu") -> list[Choice]:
    """For each op, the backend it takes on `device` and why."""
    device = torch.device(device)
    name, reason = _selected(device)
    return [Choice(op, str(device), name or "reference", reason) for op in ("binary_linear", "int8_linear")]
