"""Second moments of the inputs of linear layers, measured while calibration windows pass a block."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from signbit.errors import StructureError, WeightError
from signbit.methods import Moments
from signbit.models import kind_of
from signbit.ptq.streams import Stop, Stream


@dataclass(frozen=True)
class Group:
    """Layers of a block that are measured in one pass: `inputs` names, for each, the layer that has the same input."""

    names: tuple[str, ...]
    inputs: dict[str, str]


def find_groups(stream: Stream, index: int, layers: dict[str, nn.Module], sequential: bool) -> list[Group]:
    """Layers of block `index` in the order in which they run; those of one input, and all experts, together.

    Found by running the first batch: layers are handed the same tensor, or they are not. Without `sequential` it is
    one group. A layer that this batch does not reach (an expert) stands with its kind, or last.
    """
    seen: dict[str, Tensor] = {}

    def note(name: str) -> None:
        def hook(_module: nn.Module, args: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
            seen.setdefault(name, _input(args, named))

        stack.callback(layers[name].register_forward_pre_hook(hook, with_kwargs=True).remove)

    with ExitStack() as stack:
        for name in layers:
            note(name)
        stream.run(index, 0)
    order = [*seen, *(name for name in layers if name not in seen)]
    inputs: dict[str, str] = {}
    for name in order:
        same = (other for other in inputs if name in seen and other in seen and seen[other] is seen[name])
        inputs[name] = inputs[first] if (first := next(same, None)) else name
    keys: dict[str, list[str]] = {}
    for name in order:
        key = kind_of(inputs[name]) if sequential else ""
        keys.setdefault(key, []).append(name)
    return [Group(tuple(names), {name: inputs[name] for name in names}) for names in keys.values()]


def _input(args: tuple[Tensor, ...], named: dict[str, Tensor]) -> Tensor:
    """The one input of a linear layer, however the model hands it over."""
    return args[0] if args else next(iter(named.values()))


@dataclass
class _Sum:
    hessian: Tensor
    cross: Tensor | None = None
    tokens: int = 0
    dense: Tensor | None = field(default=None, repr=False)
    """The dense model's input in the batch at hand."""


class Meter:
    """Sums xᵀx, and (x° − x)ᵀx, at the inputs of the layers of one group."""

    def __init__(self, layers: dict[str, nn.Module], group: Group, paired: Sequence[str]) -> None:
        self._layers, self._group = layers, group
        self._names = sorted(set(group.inputs.values()))
        self._paired = {group.inputs[name] for name in paired if name in group.inputs}
        self._sums: dict[str, _Sum] = {}
        self._moments: dict[str, Moments] = {}

    @property
    def pairs(self) -> bool:
        """Whether a layer here wants the dense model's inputs too."""
        return bool(self._paired)

    def listen(self, stack: ExitStack, dense: bool, stop: bool) -> None:
        """Hooks the layers until `stack` closes; `stop` ends the pass once the last of them has its input."""
        wanted = sorted(self._paired) if dense else self._names
        left = set(wanted)

        def hook_of(name: str) -> None:
            def hook(_module: nn.Module, args: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
                x = _input(args, named)
                self._add(name, x.reshape(-1, x.shape[-1]), dense)
                left.discard(name)
                if stop and not left:
                    raise Stop

            stack.callback(self._layers[name].register_forward_pre_hook(hook, with_kwargs=True).remove)

        for name in wanted:
            hook_of(name)

    def _add(self, name: str, x: Tensor, dense: bool) -> None:
        columns = x.shape[1]
        total = self._sums.get(name)
        if total is None:
            zeros = torch.zeros(columns, columns, dtype=torch.float32, device=x.device)
            total = self._sums[name] = _Sum(zeros, zeros.clone() if name in self._paired else None)
        x = x.float()
        if dense:
            total.dense = x
            return
        total.hessian.addmm_(x.T, x)
        total.tokens += len(x)
        if total.cross is not None:
            if total.dense is None or total.dense.shape != x.shape:
                raise StructureError(
                    f"{name} is not reached by the same tokens in the dense and in the quantized model, so that it cannot "
                    f"be matched; give --rule '{name}: match=prefix'"
                )
            total.cross.addmm_((total.dense - x).T, x)
            total.dense = None

    def moments(self, name: str) -> Moments | None:
        """Those of layer `name`, or None if no token reached it; raises WeightError if they are not finite."""
        source = self._group.inputs[name]
        if source not in self._moments:
            total = self._sums.get(source)
            if total is None or not total.tokens:
                return None
            cross = None if total.cross is None else total.cross / total.tokens
            moments = Moments(total.hessian / total.tokens, total.tokens, cross)
            if not bool(moments.hessian.isfinite().all()) or (cross is not None and not bool(cross.isfinite().all())):
                raise WeightError(
                    f"{name}: its inputs overflow or are NaN on the calibration text, so that they have no second "
                    "moments; look at the layers before it, or calibrate on other text"
                )
            self._moments[source] = moments
            del self._sums[source]
        return self._moments[source]
