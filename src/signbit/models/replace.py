"""Putting another layer in the place of one."""

from __future__ import annotations

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


def set_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Puts `module` at the dotted `name`, in the training mode of what it replaces."""
    parent_name, _, last = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    module.train(getattr(parent, last).training)
    setattr(parent, last, module)


def linear_parts(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    """The weight [N, K] and bias of an nn.Linear or a Conv1D, whose stored weight is [K, N]."""
    weight, bias = module.weight, module.bias
    assert isinstance(weight, Tensor)
    return as_rows(module, weight), bias  # type: ignore[return-value]


def as_rows(module: nn.Module, stored: Tensor) -> Tensor:
    """The matrix `stored` of an nn.Linear or a Conv1D as [N, K]."""
    return stored.T if isinstance(module, Conv1D) else stored


def set_weight(module: nn.Module, weight: Tensor) -> None:
    """Makes `weight` [N, K] the matrix of an nn.Linear or a Conv1D, without a copy where it need not be turned."""
    parameter: Tensor = module.weight  # type: ignore[assignment]
    parameter.data = weight.T if isinstance(module, Conv1D) else weight
