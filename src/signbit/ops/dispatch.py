"""Which backend runs an op, and why."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from signbit.bits import Operands
from signbit.ops import cpu, cuda, native, reference
from signbit.ops.prepared import Prepared

#: How activations enter a layer: as floats, or as integers (`sign` only as a layer's own act_bits = 1).
ACTIVATION_MODES = ("exact", "int8")


Multiplication = cpu.Multiplication | cuda.Multiplication


@dataclass(frozen=True)
class Backend:
    """One implementation of the ops: two functions with the signatures of `signbit.ops.reference`.

    `device` is the type of device that it multiplies on, or "any".
    """

    name: str
    binary_linear: Callable[..., Tensor]
    int8_linear: Callable[..., Tensor]
    device: str = "any"


@dataclass(frozen=True)
class Choice:
    """The backend that an op takes on a device, and the reason in words."""

    op: str
    device: str
    backend: str
    reason: str


def _backends() -> dict[str, Backend]:
    found = {
        "reference": Backend("reference", reference.binary_linear, reference.int8_linear),
        "cuda": Backend("cuda", cuda.binary_linear, cuda.int8_linear, "cuda"),
    }
    library = native.library()
    for isa in () if isinstance(library, str) else library.runs:
        found[isa] = Backend(
            isa, functools.partial(cpu.binary_linear, isa=isa), functools.partial(cpu.int8_linear, isa=isa), "cpu"
        )
    return found


#: By name: the reference, the CUDA kernels, and the CPU kernels of each instruction set that this processor runs.
BACKENDS: dict[str, Backend] = _backends()


def choose(device: torch.device) -> Backend:
    """The backend that multiplies on `device`."""
    name = _selected(device)[0]
    return BACKENDS[name or "reference"]


def _selected(device: torch.device) -> tuple[str | None, str]:
    if device.type == "cpu":
        return cpu.selected()
    if device.type == "cuda":
        return cuda.selected(torch.cuda.current_device() if device.index is None else device.index)
    return None, f"no kernel for {device.type} is built into this version; plain torch unpacks the bits on every call"


def prepare(w: Operands, device: torch.device) -> Prepared | str:
    """`w` in the order of the kernels that multiply on `device`, or why the reference does."""
    name, reason = _selected(device)
    if name is None:
        return reason
    if device.type == "cuda":
        return cuda.unsupported(w) or cuda.prepare(w)
    return cpu.unsupported(w) or cpu.prepare(w)


def multiplication(w: Prepared, bias: Tensor | None = None, *norms: str | float) -> Multiplication:
    """What multiplies by a prepared matrix on its device; on a GPU norms are left to torch."""
    if w.signs.is_cuda:
        assert not norms
        return cuda.Multiplication(w, bias)
    return cpu.Multiplication(w, bias, *norms)  # type: ignore[arg-type]


def explain(device: str | torch.device = "cpu") -> list[Choice]:
    """For each op, the backend it takes on `device` and why."""
    device = torch.device(device)
    name, reason = _selected(device)
    return [Choice(op, str(device), name or "reference", reason) for op in ("binary_linear", "int8_linear")]
