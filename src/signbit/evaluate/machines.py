"""The machines that measured: a record of each, which stays with what was found there."""

from __future__ import annotations

import functools
import json
import os
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from signbit.evaluate.doctor import processor, versions
from signbit.ops import cpu, cuda, explain
from signbit.version import VERSION


def here(device: str = "cpu") -> dict[str, str]:
    """This machine: versions, the commit of a checkout, what multiplies packed layers on `device`, and the device's name.

    Raises OptionError if SIGNBIT_CPU or SIGNBIT_CUDA asks for what is not there.
    """
    checkout = {} if (found := commit()) is None else {"commit": found}
    computes = {"backend": explain(device)[0].backend, "device": device_name(device)}
    return {"signbit": VERSION, **checkout, **versions(), **computes}


def device_name(device: str) -> str:
    """The name of what computes on `device`."""
    return torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else processor()


@functools.cache
def commit() -> str | None:
    """The commit of the checkout that signbit runs from, with "-dirty" where files are changed; None if it runs from none."""
    root = Path(__file__).resolve().parents[3]
    if not (root / ".git").exists():
        return None
    words = ["git", "--no-optional-locks", "-C", str(root), "describe", "--always", "--dirty", "--exclude", "*"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() or None


def forced_kernels() -> dict[str, str]:
    """The variables that choose kernels, where they are set: what other kernels found is no answer for these."""
    return {name: os.environ[name] for name in (cpu.VARIABLE, cuda.VARIABLE) if os.environ.get(name)}


def what(kind: str, found: dict[str, Any]) -> str:
    """The name of a result in a record: its kind, and of a perplexity its protocol."""
    return f"perplexity {found['protocol'].partition(',')[0]}" if kind == "perplexity" else kind


def of_machine(record: dict[str, Any]) -> dict[str, Any]:
    """What a record says of its machine; empty where the machine was not recorded."""
    return {key: value for key, value in record.items() if key != "what"}


def joined(records: Iterable[dict[str, Any]]) -> tuple[dict[str, Any], ...]:
    """Records {"what": [results], …machine}, those of one machine as one."""
    found: dict[str, dict[str, Any]] = {}
    for record in records:
        machine = of_machine(record)
        mine = found.setdefault(json.dumps(machine, sort_keys=True), {"what": [], **machine})["what"]
        mine += [name for name in record["what"] if name not in mine]
    return tuple(record for record in found.values() if record["what"])


def described(machine: dict[str, Any]) -> str:
    """A machine in words."""
    words = [value if key == "device" else f"{key} {value}" for key, value in machine.items()]
    return ", ".join(words) or "not recorded"
