"""What multiplies on this machine and why, whether it does so rightly, and which layers of a model are left out."""

from __future__ import annotations

import os
import platform
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn

from signbit.errors import SignbitError, StructureError
from signbit.linear import PackedLinear
from signbit.models import find_siblings
from signbit.ops import Choice, cpu, cuda, explain, native
from signbit.version import VERSION


@dataclass(frozen=True)
class Machine:
    """The facts that decide which backend multiplies here.

    `devices` maps a device to its name. `library` is the file of the kernels; without one it is None, and `missing`
    says why. `checks` has each instruction set and each GPU that the kernels run on here, with what is wrong or None.
    """

    versions: dict[str, str]
    processor: str
    threads: int
    variable: str | None
    devices: dict[str, str]
    choices: tuple[Choice, ...]
    library: str | None
    missing: str | None
    features: tuple[str, ...]
    compiled: tuple[str, ...]
    checks: dict[str, str | None]

    @property
    def broken(self) -> list[str]:
        """The instruction sets and GPUs that fail their check."""
        return [isa for isa, wrong in self.checks.items() if wrong is not None]


@dataclass(frozen=True)
class Multiplied:
    """The packed layers of a model: how many the kernels multiply, and the names of the others by reason.

    `dense` has the number of those whose many tokens (256 and more, on a CPU) are multiplied by a matrix unpacked for the
    call, by mode: there that is faster. `siblings` are groups of layers that are given the same input and on a GPU share
    a launch if they are alike; `no_siblings` says why none could be found.
    """

    layers: int
    kernels: int
    dense: dict[str, int]
    reference: dict[str, list[str]]
    siblings: list[list[str]]
    no_siblings: str | None


def examine() -> Machine:
    """This machine; every instruction set that runs is checked, not only the chosen one.

    Raises OptionError if SIGNBIT_CPU names an instruction set that is not there, or SIGNBIT_CUDA anything but reference.
    """
    found, name = native.library(), processor()
    gpus = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    devices = {"cpu": name, **{f"cuda:{i}": torch.cuda.get_device_name(i) for i in gpus}}
    missing = found if isinstance(found, str) else None
    library = None if isinstance(found, str) else found
    return Machine(
        versions=versions(),
        processor=name,
        threads=torch.get_num_threads(),
        variable=os.environ.get(cpu.VARIABLE) or None,
        devices=devices,
        choices=tuple(choice for device in devices for choice in explain(device)),
        library=library.path if library else None,
        missing=missing,
        features=library.features if library else (),
        compiled=library.compiled if library else (),
        checks={
            **({isa: _wrong(cpu.check, isa) for isa in library.runs} if library else {}),
            **{f"cuda:{i}": _wrong(cuda.check, i) for i in gpus if cuda.selected(i)[0] is not None},
        },
    )


def multiplied(model: nn.Module) -> Multiplied:
    """Which packed layers of `model` the kernels multiply where they are now; it prepares them."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}
    reference: dict[str, list[str]] = {}
    for name, layer in layers.items():
        if (reason := layer.prepare()) is not None:
            reference.setdefault(reason, []).append(name)
    dense = Counter(mode for layer in layers.values() for mode in layer.better_dense)
    siblings, no_siblings = [], None
    try:
        siblings = find_siblings(model)
    except StructureError as error:
        no_siblings = str(error)
    kernels = len(layers) - sum(map(len, reference.values()))
    return Multiplied(len(layers), kernels, dict(dense), reference, siblings, no_siblings)


def versions() -> dict[str, str]:
    """The versions of what computes here."""
    return {
        "signbit": VERSION,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "transformers": metadata.version("transformers"),
    }


def _wrong(check: Callable[[Any], str | None], where: str | int) -> str | None:
    try:
        return check(where)
    except SignbitError as error:
        return str(error)


def processor() -> str:
    """The processor's name, or at least its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [value.strip() for key, _, value in (line.partition(":") for line in lines) if key.strip() == "model name"]
    return names[0] if names and names[0] else platform.processor() or platform.machine() or "unknown"
