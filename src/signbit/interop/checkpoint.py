"""What every importer makes of a foreign checkpoint: a config, layers that are packed when asked for, and the rest."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from signbit.linear import PackedLinear


@dataclass(frozen=True)
class Layer:
    """One imported layer, and how many of its stored weights are exactly 0, whose sign here may not be the original's."""

    packed: PackedLinear
    zeros: int = 0


@dataclass(frozen=True)
class Checkpoint:
    """A foreign checkpoint, understood: nothing of its layers is read before it is asked for."""

    form: str
    """What it is, for the report and the card."""
    config: Any
    """transformers' configuration of the model that it becomes."""
    layers: Mapping[str, Callable[[], Layer]]
    """The binarized layers by dotted name."""
    rest: Mapping[str, Tensor]
    """All other tensors, under transformers' names."""
    tokenizer: Mapping[str, str]
    """Arguments of AutoTokenizer.from_pretrained that load the tokenizer beside it."""
    may_be_dense: Callable[[str], bool] = lambda name: False
    """Whether a linear of the blocks may be missing in `layers`; in most forms each is binarized."""
    zero: str = ""
    """Of stored weights that are exactly 0: what they were there, and are here."""
    notes: tuple[str, ...] = ()
    """Lines for the user."""
