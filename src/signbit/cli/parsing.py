"""Command lines: a verb's dataclass and those of its parts become flags."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, make_dataclass
from typing import Any, Literal

import tyro

from signbit.errors import OptionError


@dataclass(frozen=True)
class RunOptions:
    """Where and how a model runs."""

    device: str = "cpu"
    """Device of torch: cpu, cuda, cuda:1 …"""
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    """Dtype of activations and unpacked tensors; auto is float32 on a CPU and as stored elsewhere."""
    activations: Literal["exact", "int8"] = "exact"
    """exact: activations stay float. int8: packed layers and an int8 head take 8-bit activations, one scale a token."""


def parse(verb: str, argv: Sequence[str], base: type, defaults: Any = None, **parts: type) -> Any:
    """The options of `base` plus those of the dataclasses `parts`, flat on the command line.

    `defaults` are values that stand where no flag does, those of a part under its name.
    """
    cls = make_dataclass(base.__name__, list(parts.items()), bases=(base,), frozen=True, kw_only=True)
    cls.__doc__ = base.__doc__
    given: dict[str, Any] = {}
    if defaults is not None:
        made = {name: part(**defaults.get(name, {})) for name, part in parts.items()}
        given["default"] = cls(**{name: value for name, value in defaults.items() if name not in parts}, **made)
    return tyro.cli(
        cls,
        **given,
        args=list(argv),
        prog=f"signbit {verb}",
        description=base.__doc__,
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff),
    )


def option_value(argv: Sequence[str], flag: str, default: str) -> str:
    """The value of `flag` before the rest is parsed, because it decides what the rest may be."""
    for index, word in enumerate(argv):
        if word == flag and index + 1 < len(argv):
            return argv[index + 1]
        if word.startswith(f"{flag}="):
            return word.partition("=")[2]
    return default


def flag_of(key: str) -> str:
    """The flag of an option: max_steps → --max-steps."""
    return f"--{key.replace('_', '-')}"


def at_least(least: int, **options: int | None) -> None:
    """Raises OptionError for an option below `least`; None is one that was not given."""
    for key, value in options.items():
        if value is not None and value < least:
            raise OptionError(f"{flag_of(key)} is {value}; at least {least} is needed")
