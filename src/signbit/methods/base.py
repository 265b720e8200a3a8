"""What a method is to the rest of signbit."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from signbit import bits
from signbit.errors import OptionError, WeightError
from signbit.linear import BinaryLinear, PackedLinear
from signbit.methods.gptq import Moments
from signbit.weight import BinaryWeight

ScaleDtype = Literal["float16", "bfloat16", "float32"]


@dataclass(frozen=True)
class Needs:
    """What a method asks of calibration."""

    moments: bool = False
    """Second moments of each layer's inputs."""
    cross: bool = False
    """Those with the dense model's inputs too."""
    sequential: bool = False
    """Inputs as they are behind the quantized layers of the same block."""


@dataclass(frozen=True)
class MethodOptions(ABC):
    """The options of a method: frozen, checked when made, written to config.json as they are.

    The docstring under each field is its help text on the command line.
    """

    #: What only training looks at, so that a student that goes on from a packed directory may have it otherwise.
    TRAINING: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def training_defaults(cls) -> dict[str, Any]:
        """Defaults of a training run, where they differ from those of quantizing."""
        return {}

    @property
    def packs(self) -> bool:
        """Whether `binarize` gives packed weights; False where the method leaves matrices dense."""
        return True

    @property
    def needs(self) -> Needs:
        """What calibration must measure; nothing by default."""
        return Needs()

    def rounded(self) -> MethodOptions:
        """The same without calibration, by round to nearest: for a layer that too few tokens reached."""
        return self

    def target(self, weight: Tensor, moments: Moments | None = None) -> Tensor:
        """What the binarized matrix is to come close to, float32 [N, K], row-major: `weight`, or a correction of it."""
        return weight.float().contiguous()

    @abstractmethod
    def binarize(self, weight: Tensor, moments: Moments | None = None) -> BinaryWeight | Tensor:
        """The binarized form of `weight` float [N, K], or a changed dense matrix where the method keeps it dense.

        `moments` are those that `needs` asks for; raises OptionError where they are needed and missing.
        """

    def packed(self, weight: BinaryWeight, bias: Tensor | None) -> PackedLinear:
        """The layer of a binarized weight; a method whose layers have norms overrides this."""
        return PackedLinear(weight, bias)

    def check(self, in_features: int) -> None:  # noqa: B027 (most options fit every width)
        """Raises OptionError if these options cannot serve a matrix of `in_features` columns."""


@dataclass(frozen=True)
class Method:
    """A method: the class of its options, which carries the solver, and its trainable layer if it has one."""

    options: type[MethodOptions]
    layer: type[BinaryLinear] | None = None


def find_method(methods: dict[str, Method], name: str) -> Method:
    """The method called `name`; raises OptionError, with those there are, for another."""
    if name not in methods:
        raise OptionError(f"there is no method {name!r}; there are {', '.join(methods)}{_nearest(name, methods)}")
    return methods[name]


def make_options(methods: dict[str, Method], name: str, values: dict[str, Any]) -> MethodOptions:
    """The options of method `name` with `values`; raises OptionError for an unknown method or option."""
    cls = find_method(methods, name).options
    check_options(cls, values, f"the method {name}")
    return cls(**values)


def check_options(cls: type[MethodOptions], keys: Iterable[str], what: str = "the method") -> None:
    """Raises OptionError, with the nearest, for a key that is no option of `cls`."""
    allowed = [field.name for field in fields(cls)]
    for key in keys:
        if key not in allowed:
            raise OptionError(f"{key!r} is no option of {what}; it has {', '.join(allowed)}{_nearest(key, allowed)}")


def _nearest(word: str, known: Any) -> str:
    near = get_close_matches(word, list(known), n=1)
    return f" (did you mean {near[0]}?)" if near else ""


def check_choice(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    """Raises OptionError unless `value` is one of `allowed`."""
    if value not in allowed:
        raise OptionError(f"{name} is {value!r}; allowed: {', '.join(map(str, allowed))}")


def check_eps(name: str, value: float) -> None:
    """Raises OptionError unless `value` is fit for a norm's epsilon."""
    if not 0 <= value < 1:
        raise OptionError(f"{name} is {value}; a small number is needed, 0 or more")


def check_whole(name: str, value: Any) -> None:
    """Raises OptionError unless `value` is a whole number."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise OptionError(f"{name} is {value!r}; a whole number is needed")


def check_group(group: int, in_features: int) -> None:
    """Raises OptionError, naming the divisors, unless `group` is -1 (the whole row) or divides `in_features`."""
    if group == -1:
        return
    if group < 1 or in_features % group:
        divisors = [d for d in range(2, in_features + 1) if in_features % d == 0]
        useful = [d for d in divisors if d % 8 == 0 and d >= 32] or divisors
        raise OptionError(
            f"a group of {group} columns does not divide {in_features}; "
            f"use one of {', '.join(map(str, useful))}, or -1 for one scale a row"
        )


def group_count(group: int, in_features: int) -> int:
    """G: how many groups of `group` columns (-1: all) a row of `in_features` has."""
    return 1 if group == -1 else in_features // group


def straight_through(value: Tensor, through: Tensor) -> Tensor:
    """`value`, with the gradient of `through`; both float of one shape.

    What is added is exactly 0 where `through` is finite. No autograd.Function: torch.compile sees through this.
    """
    return value + (through - through.detach())


#: Magnitude of a latent that would be 0 though its sign is −1: sign(0) is +1.
_TINY = torch.finfo(torch.float32).tiny


def only_weight(packed: PackedLinear, norm_in: str = "none", act_bits: int = 0, norm_out: str = "none") -> BinaryWeight:
    """The one weight of a packed layer; raises OptionError unless the layer adds to it just what is named."""
    if (packed.norm_in, packed.act_bits, packed.norm_out) != (norm_in, act_bits, norm_out) or len(packed.weights) > 1:
        raise OptionError(
            f"the packed layer has norms {packed.norm_in} and {packed.norm_out}, {packed.act_bits or 'no'} bits of activations "
            f"and {len(packed.weights)} weights; this method's have {norm_in} and {norm_out}, {act_bits or 'none'} and 1"
        )
    return packed.weights[0]


def is_plain(weight: BinaryWeight, planes: int = 1, groups: int = 1) -> bool:
    """Whether `weight` is of `planes` planes of signs and one scale for each of `groups` groups of a row, and nothing else."""
    others = (weight.shift, weight.in_scale, weight.in_shift, weight.salient)
    return (weight.planes, weight.groups) == (planes, groups) and all(part is None for part in others)


def latent_of(weight: BinaryWeight, size: Tensor) -> Tensor:
    """Latents with the signs of the first plane of `weight` and the magnitudes `size`, float [N, K]."""
    positive = bits.unpack_bits(weight.signs[0], weight.in_features) > 0
    return torch.where(positive, size, -size.clamp_min(_TINY))


def computed_scale(weight: Tensor | None) -> None:
    """Raises OptionError if a layer whose scale is computed of its latents is given a `weight` to take magnitudes from."""
    if weight is not None:
        raise OptionError(
            "this method's scales are computed of its latents, which another model's would change; leave out --source"
        )


def store(values: Tensor, dtype: str, shift: bool = False) -> Tensor:
    """Scales or shifts in the dtype they are stored in.

    Raises WeightError if that makes one infinite, or if the dtype's smallest step is above 1 % of the largest scale
    (a shift may be as small as it likes: it is measured against the scale beside it).
    """
    chosen = getattr(torch, dtype)
    stored, largest = values.to(chosen), values.abs().max().item()
    coarse = not shift and 0 < largest < 100 * torch.finfo(chosen).smallest_normal * torch.finfo(chosen).eps
    if coarse or not bool(torch.isfinite(stored).all()):
        raise WeightError(
            f"scales up to {largest:.3g} do not fit {dtype}; use float32 (--scale-dtype; of signbit pack --dtype)"
        )
    return stored
