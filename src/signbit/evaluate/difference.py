"""Where two models differ: signs and values of each matrix, and whatever else they hold."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from signbit.errors import StructureError
from signbit.linear import BinaryLinear, Int8Embedding, Int8Head, PackedLinear
from signbit.models import is_linear, linear_parts, split_experts_

#: Called with (layers compared, layers in all, its name).
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class LayerDifference:
    """One matrix W of a model beside the matrix V of the same name in the other."""

    name: str
    form: str
    """What holds it in each: "packed and dense"."""
    weights: int
    sign_agreement: float
    """Share of the weights that have one sign in both, sign(0) = +1."""
    error: float
    """‖W − V‖² / ‖V‖², the share of the other's energy that is error; 0 where both are zero."""
    equal: bool
    """Whether every value is."""

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class Difference:
    """All matrices of both models in order, and the names of those, and of other tensors, that only one has."""

    layers: tuple[LayerDifference, ...]
    only: tuple[tuple[str, ...], tuple[str, ...]]

    @property
    def differing(self) -> list[LayerDifference]:
        """The matrices that are not equal."""
        return [layer for layer in self.layers if not layer.equal]

    @property
    def sign_agreement(self) -> float:
        """Share of equal signs over all matrices."""
        weights = sum(layer.weights for layer in self.layers)
        return sum(layer.sign_agreement * layer.weights for layer in self.layers) / max(1, weights)


def _form(module: nn.Module) -> tuple[str, Callable[[], Tensor]] | None:
    """What holds a module's matrix, and how to get it; None for a module without one."""
    if isinstance(module, PackedLinear):
        return "packed", lambda: _product(module)
    if isinstance(module, BinaryLinear):
        return "latent", lambda: module.binary().to_dense()
    if isinstance(module, (Int8Head, Int8Embedding)):
        return "int8", module.to_dense
    if isinstance(module, nn.Embedding):
        return "dense", lambda: module.weight.detach().float()
    if is_linear(module):
        return "dense", lambda: linear_parts(module)[0].detach().float()
    return None


def _product(layer: PackedLinear) -> Tensor:
    first, *others = (weight.to_dense() for weight in layer.weights)
    for weight in others:
        first = weight @ first
    return first


def matrices(model: nn.Module) -> dict[str, tuple[str, Callable[[], Tensor]]]:
    """Each linear and embedding of a model by name: what holds it, and its matrix float32 [N, K] when it is asked for.

    Fused experts are taken apart in place. A tensor that two modules share stands under its first name.
    """
    split_experts_(model)
    found: dict[str, tuple[str, Callable[[], Tensor]]] = {}
    seen: set[int] = set()
    for name, module in model.named_modules():
        form = _form(module)
        weight = getattr(module, "weight", None)
        if form is None or (form[0] in ("dense", "int8") and id(weight) in seen):
            continue
        seen.add(id(weight))
        found[name] = form
    return found


def _rest(model: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """Parameters that stand in no matrix: norms, biases, single vectors."""
    own = set(names)
    return {
        name: parameter.detach().float()
        for name, parameter in model.named_parameters()
        if name.rpartition(".")[0] not in own or name.endswith(".bias")
    }


@torch.no_grad()
def compared(mine: Tensor, its: Tensor) -> tuple[float, float, bool]:
    """Sign agreement, relative squared error and equality of two matrices; on float64 sums."""
    its = its.to(mine.device)
    agree = ((mine >= 0) == (its >= 0)).float().mean().item()
    wrong = (mine - its).double().square().sum().item()
    energy = its.double().square().sum().item()
    return agree, wrong / energy if energy else float(wrong > 0), bool(torch.equal(mine, its))


def differences(a: nn.Module, b: nn.Module, progress: Progress = lambda done, total, name: None) -> Difference:
    """`a` beside `b`, matrix by matrix; norms of a packed layer and other parameters count by their own names.

    Raises StructureError if no matrix of `a` has a counterpart of its name and shape in `b`.
    """
    mine, its = matrices(a), matrices(b)
    shared = [name for name in mine if name in its]
    rest_a, rest_b = _rest(a, mine), _rest(b, its)
    vectors = [name for name in rest_a if name in rest_b]
    layers = []
    for done, name in enumerate(shared, start=1):
        w, v = mine[name][1](), its[name][1]()
        if w.shape != v.shape:
            raise StructureError(
                f"{name} is {list(w.shape)} in one model and {list(v.shape)} in the other; compare models of one shape"
            )
        layers.append(LayerDifference(name, f"{mine[name][0]} and {its[name][0]}", w.numel(), *compared(w, v)))
        progress(done, len(shared), name)
    if not shared:
        raise StructureError("the models have no linear layer of one name; compare models of one architecture")
    layers += [
        LayerDifference(name, "vector", rest_a[name].numel(), *compared(rest_a[name], rest_b[name])) for name in vectors
    ]
    only = tuple(
        tuple(name for name in (*all_mine, *rest) if name not in all_its and name not in other)
        for all_mine, rest, all_its, other in ((mine, rest_a, its, rest_b), (its, rest_b, mine, rest_a))
    )
    return Difference(tuple(layers), (only[0], only[1]))
