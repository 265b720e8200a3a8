"""Quantizing a model in place, layer by layer, and planning it without a weight read."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from signbit.errors import OptionError, SignbitError, WeightError
from signbit.linear import PackedLinear
from signbit.methods.base import MethodOptions
from signbit.models import Decision, Report, find_structure, linear_parts, set_module
from signbit.models.structure import Structure
from signbit.ptq.head import plan_head, with_head
from signbit.weight import BinaryWeight

#: Share of the repeated blocks' parameters below which a result is refused unless --allow-partial is given.
MINIMUM_SHARE = 0.9
LINEAR = "linear layer of a block"
DENSE = "the method leaves its matrix dense"
#: Called after each layer with (layers done, layers in all, its name).
Progress = Callable[[int, int, str], None]


def _binarize(name: str, weight: Tensor, options: MethodOptions) -> BinaryWeight | Tensor:
    try:
        return options.binarize(weight)
    except SignbitError as error:
        raise type(error)(f"{name}: {error}") from error


def _decide(name: str, result: BinaryWeight | Tensor, parameters: int) -> Decision:
    if isinstance(result, BinaryWeight):
        entries = result.out_features * result.in_features
        return Decision(name, "binarized", LINEAR, parameters, result.nbytes, entries)
    return Decision(name, "kept", DENSE, parameters)


def _find(model: nn.Module, options: MethodOptions, keep: Iterable[str], allow_partial: bool) -> Structure:
    """The structure of `model`, after every check that needs no weight."""
    structure = find_structure(model, keep)
    decisions = list(structure.kept)
    for target in structure.targets:
        try:
            options.check(target.in_features)
        except OptionError as error:
            raise OptionError(f"{target.name}: {error}") from error
        entries = target.out_features * target.in_features
        if options.packs:
            decisions.append(Decision(target.name, "binarized", LINEAR, entries, weights=entries))
        else:
            decisions.append(Decision(target.name, "kept", DENSE, entries))
    Report(tuple(decisions), structure.block_parameters).require(MINIMUM_SHARE, allow_partial)
    return structure


@torch.no_grad()
def quantize_(
    model: nn.Module,
    options: MethodOptions,
    keep: Iterable[str] = (),
    allow_partial: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Replaces each linear of the repeated blocks by a PackedLinear, in place; returns what was done and why.

    A layer's dense weight is freed as its packed form is made. `options` is a method's; `keep` are patterns of names
    that stay as they are (`models.matches`). Raises, before anything is changed, StructureError (no block, or under
    90 % of its parameters binarized without `allow_partial`), OptionError (a group that does not divide a width) and
    WeightError (NaN, infinity), with the layer's name; a WeightError for a scale outside its dtype comes at its layer.
    """
    structure = _find(model, options, keep, allow_partial)
    for name, parameter in model.named_parameters():
        if bad := int((~torch.isfinite(parameter)).sum()):
            raise WeightError(
                f"{name.removesuffix('.weight')}: {bad} of its {parameter.numel()} weights are NaN or infinite; "
                "repair the source model"
            )
    decisions: list[Decision] = []
    for done, target in enumerate(structure.targets, start=1):
        linear = model.get_submodule(target.name)
        weight, bias = linear_parts(linear)
        result = _binarize(target.name, weight, options)
        parameters = weight.numel() + (0 if bias is None else bias.numel())
        decisions.append(_decide(target.name, result, parameters))
        if isinstance(result, BinaryWeight):
            set_module(model, target.name, PackedLinear(result, bias))
        else:
            weight.copy_(result)
        if progress is not None:
            progress(done, len(structure.targets), target.name)
    return Report((*decisions, *structure.kept), structure.block_parameters)


@torch.no_grad()
def plan(
    model: nn.Module,
    options: MethodOptions,
    keep: Iterable[str] = (),
    allow_partial: bool = False,
    int8_head: bool = False,
) -> Report:
    """What `quantize_` would do to `model`, which may be on the meta device: sizes and true bits without its weights.

    The bytes are those of random normal matrices of the same shapes, quantized once a shape: exact where a method's
    size follows from the shape, within the variation of salient positions elsewhere. Raises as `quantize_` does,
    NaN apart.
    """
    structure = _find(model, options, keep, allow_partial)
    by_shape: dict[tuple[int, int], Decision] = {}
    decisions = []
    for target in structure.targets:
        shape = (target.out_features, target.in_features)
        linear = model.get_submodule(target.name)
        if shape not in by_shape:
            random = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.02
            by_shape[shape] = _decide("", options.binarize(random), 0)
        parameters = sum(parameter.numel() for parameter in linear.parameters())
        decisions.append(replace(by_shape[shape], name=target.name, parameters=parameters))
    report = Report((*decisions, *structure.kept), structure.block_parameters)
    return with_head(report, plan_head(model)) if int8_head else report


@dataclass(frozen=True)
class Memory:
    """What quantizing takes: bytes of the weights before and after, and the expected peak."""

    dense_bytes: int
    packed_bytes: int
    peak_bytes: int


#: Bytes of float32 and index copies per entry of the layer in work, measured on the hungriest method (pbllm).
WORKING_BYTES = 44


def memory(model: nn.Module, report: Report) -> Memory:
    """The memory that quantizing `model` (it may be on meta) as planned in `report` takes; an estimate."""
    dense = sum(p.numel() * p.element_size() for p in model.parameters())
    changed = [d for d in report.decisions if d.action in ("binarized", "int8")]
    item = next(model.parameters()).element_size()
    packed = dense - sum(d.parameters * item for d in changed) + sum(d.nbytes for d in changed)
    largest = max((d.parameters for d in changed), default=0)
    return Memory(dense, packed, dense + packed + WORKING_BYTES * largest)
