"""The walk: a model's blocks one after another, each calibrated, solved, packed and left behind."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from signbit.errors import OptionError, SignbitError, WeightError
from signbit.methods import Moments
from signbit.methods.base import MethodOptions, Needs
from signbit.methods.gptq import output_error
from signbit.methods.rules import Rules, check_rules, with_rules
from signbit.models import (
    Decision,
    Experts,
    Report,
    Selection,
    Structure,
    Target,
    as_rows,
    find_structure,
    linear_parts,
    matches,
    set_module,
    set_weight,
    split_experts_,
    unknown_pattern,
)
from signbit.ptq.head import plan_head, with_head
from signbit.ptq.moments import Meter, find_groups
from signbit.ptq.streams import Stream, Where
from signbit.weight import BinaryWeight

#: Share of the repeated blocks' parameters below which a result is refused unless --allow-partial is given.
MINIMUM_SHARE = 0.9
LINEAR = "linear layer of a block"
DENSE = "the method leaves its matrix dense"
#: Called after each layer with (layers done, layers in all, its name).
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Plan:
    """What is to be done: the options of a method, those of single layers, and which layers are left out."""

    options: MethodOptions
    selection: Selection = field(default_factory=Selection)
    rules: Rules = field(default_factory=dict)
    allow_partial: bool = False

    def needs(self, names: Iterable[str]) -> Needs:
        """What calibration must measure for the layers `names`, the hungriest of them deciding."""
        layers = [self.options_of(name).needs for name in names]
        return Needs(any(n.moments for n in layers), any(n.cross for n in layers), any(n.sequential for n in layers))

    def options_of(self, name: str) -> MethodOptions:
        """The options of the layer `name`."""
        return with_rules(self.options, [values for pattern, values in self.rules.items() if matches(pattern, name)])


def find_targets(model: nn.Module, plan: Plan) -> Structure:
    """The structure of `model`, whose experts are split, after every check that needs no weight.

    Raises StructureError, or OptionError with the layer's name or the pattern that matches none.
    """
    structure = find_structure(model, plan.selection)
    check_rules(plan.options, plan.rules)
    names = [target.name for target in structure.targets]
    for pattern in plan.rules:
        if not any(matches(pattern, name) for name in names):
            raise unknown_pattern("--rule", pattern, names)
    decisions = list(structure.kept)
    for target in structure.targets:
        options = plan.options_of(target.name)
        try:
            options.check(target.in_features)
        except OptionError as error:
            raise OptionError(f"{target.name}: {error}") from error
        entries = target.out_features * target.in_features
        if options.packs:
            decisions.append(Decision(target.name, "binarized", LINEAR, entries, weights=entries))
        else:
            decisions.append(Decision(target.name, "kept", DENSE, entries))
    Report(tuple(decisions), structure.block_parameters).require(MINIMUM_SHARE, plan.allow_partial)
    return structure


class Blocks:
    """The blocks of a model that is in memory; a subclass may hold one at a time (hub/stream.py)."""

    def __init__(self, model: nn.Module, structure: Structure, plan: Plan, device: str = "cpu") -> None:
        self.model, self.structure, self.plan, self.device = model, structure, plan, device
        self.modules: nn.ModuleList = model.get_submodule(structure.blocks)  # type: ignore[assignment]

    def load(self, index: int) -> None:
        """Makes the weights of block `index` real, as stored; its experts are linears after it."""

    def finished(self, index: int) -> tuple[list[Decision], dict[str, BinaryWeight | Tensor]] | None:
        """Decisions and results of a block that an earlier run finished; None if this one has to."""
        return None

    def skip(self, index: int) -> None:
        """Puts empty packed layers into a finished block through which nothing has to go."""

    def leave(self, index: int, decisions: list[Decision]) -> None:
        """Takes note that block `index` holds its packed layers."""

    @contextmanager
    def outside(self) -> Iterator[None]:
        """While open, what stands outside of the blocks computes in float32."""
        parts = [
            part for name, part in self.model.named_modules() if not f"{name}.".startswith(f"{self.structure.blocks}.")
        ]
        with ExitStack() as stack:
            for part in parts:
                stack.enter_context(_in_float32(part, recurse=False))
            yield


@contextmanager
def _in_float32(module: nn.Module, recurse: bool = True) -> Iterator[None]:
    """While open, parameters of `module` are float32 copies; afterwards they are what they were."""
    stored = {p: p.data for p in module.parameters(recurse) if p.is_floating_point() and not p.is_meta}
    for parameter, data in stored.items():
        parameter.data = data.float()
    try:
        yield
    finally:
        for parameter, data in stored.items():
            parameter.data = data


def _named(name: str, error: SignbitError) -> SignbitError:
    return type(error)(f"{name}: {error}")


@dataclass
class _Result:
    value: BinaryWeight | Tensor
    decision: Decision

    def dense(self, device: str) -> Tensor:
        value = self.value
        return value.to_dense().to(device) if isinstance(value, BinaryWeight) else value.to(device)


def _solve(
    target: Target, layer: nn.Module, options: MethodOptions, moments: Moments | None, tokens: int, dtype: torch.dtype
) -> _Result:
    """Binarizes one layer, whose weight is as stored or float32; a dense result is rounded to the stored `dtype`."""
    weight, bias = linear_parts(layer)
    parameters = weight.numel() + (0 if bias is None else bias.numel())
    why = LINEAR
    needed = min(target.in_features, tokens)
    seen = 0 if moments is None else moments.tokens
    if options.needs.moments and seen < needed:
        options, moments = options.rounded(), None
        why = f"too few calibration tokens ({seen} of at least {needed}): rounded to nearest"
    try:
        value = options.binarize(weight, moments)
        if isinstance(value, Tensor):
            value = value.to(dtype).float()  # what is saved is what the blocks behind it see
        dense = value.to_dense() if isinstance(value, BinaryWeight) else value.float()
        error = output_error(options.target(weight, moments), dense, None if moments is None else moments.hessian)
    except SignbitError as problem:
        raise _named(target.name, problem) from problem
    if isinstance(value, BinaryWeight):
        entries = value.out_features * value.in_features
        return _Result(value, Decision(target.name, "binarized", why, parameters, value.nbytes, entries, error=error))
    return _Result(value, Decision(target.name, "kept", DENSE, parameters, error=error))


class Walk:
    """Quantizes `blocks` in order; with calibration windows, each on the inputs that those before it give."""

    def __init__(
        self,
        blocks: Blocks,
        windows: Tensor | None,
        progress: Progress | None = None,
        inputs_on: Where = "cpu",
        folder: Path | None = None,
    ) -> None:
        self.blocks, self.plan, self.progress = blocks, blocks.plan, progress
        self.done, self.needs = 0, blocks.plan.needs(target.name for target in blocks.structure.targets)
        self.tokens = 0 if windows is None else windows.numel()
        self.quantized = self.dense = None
        if self.needs.moments:
            if windows is None:
                raise OptionError(
                    "this method measures the layers' inputs: give calibration text (--calibration "
                    "c4|wikitext2|ptb|FILE|self), or options that need none (for pbllm --no-gptq --saliency magnitude)"
                )

            def stream(name: str) -> Stream:
                place = folder / name if folder is not None and inputs_on == "disk" else None
                return Stream(blocks.model, blocks.modules, windows, blocks.device, inputs_on, place)

            self.quantized = stream("quantized")
            self.dense = stream("dense") if self.needs.cross else None

    @torch.no_grad()
    def run(self) -> list[Decision]:
        """All decisions on layers, in order."""
        decisions: list[Decision] = []
        model = self.blocks.model
        with ExitStack() as stack:
            stack.callback(model.train, model.training)
            model.eval()  # dropout would be measured
            if self.quantized is not None:
                stack.enter_context(self.blocks.outside())
            for index in range(self.blocks.structure.block_count):
                decisions += self._block(index)
        return decisions

    def _block(self, index: int) -> list[Decision]:
        blocks = self.blocks
        targets = [target for target in blocks.structure.targets if target.block == index]
        before = blocks.finished(index)
        last = index == blocks.structure.block_count - 1
        if before is not None and (self.quantized is None or last):
            blocks.skip(index)
            self._step(len(targets), f"block {index}, from before")
            return before[0]
        blocks.load(index)
        block = blocks.modules[index]
        layers = {target.name: blocks.model.get_submodule(target.name) for target in targets}
        results: dict[str, _Result] = {}
        try:
            dtypes = {name: linear_parts(layer)[0].dtype for name, layer in layers.items()}
            if self.quantized is None:
                for target in targets:
                    layer, name = layers[target.name], target.name
                    results[name] = _solve(target, layer, self.plan.options_of(name), None, 0, dtypes[name])
                    self._replace(target, layer, results[name])
                    self._step(1, name)
            else:
                with _in_float32(block):
                    if before is not None:
                        results = {d.name: _Result(_as_rows(layers[d.name], before[1][d.name]), d) for d in before[0]}
                        self._step(len(targets), f"block {index}, from before")
                    else:
                        results = self._calibrate(index, targets, layers, dtypes)
                    if not last:
                        self._advance(index, layers, results)
                for target in targets:
                    self._replace(target, layers[target.name], results[target.name])
        except SignbitError as error:
            name = f"{blocks.structure.blocks}.{index}"
            raise (error if name in str(error) else _named(name, error)) from error
        decisions = [results[target.name].decision for target in targets] if before is None else before[0]
        blocks.leave(index, decisions)
        return decisions

    def _calibrate(
        self, index: int, targets: list[Target], layers: dict[str, nn.Module], dtypes: dict[str, torch.dtype]
    ) -> dict[str, _Result]:
        """Measures and solves the layers of one block, group by group; they hold Q while the next are measured.

        `dtypes` are those in which the weights are stored.
        """
        quantized, dense = self.quantized, self.dense
        assert quantized is not None
        if not layers:
            return {}
        by_name = {target.name: target for target in targets}
        original = {name: linear_parts(layer)[0].data for name, layer in layers.items()}
        current = dict(original)
        paired = [name for name in layers if self._pairs(name)] if dense is not None else []
        results: dict[str, _Result] = {}
        for group in find_groups(quantized, index, layers, self.needs.sequential):
            meter = Meter(layers, group, paired)
            for batch in range(len(quantized)):
                if dense is not None and meter.pairs:
                    _hold(layers, original)
                    with ExitStack() as stack:
                        meter.listen(stack, dense=True, stop=True)
                        dense.run(index, batch)
                    _hold(layers, current)
                with ExitStack() as stack:
                    meter.listen(stack, dense=False, stop=True)
                    quantized.run(index, batch)
            for name in group.names:
                options = self.plan.options_of(name)
                moments = meter.moments(name)
                results[name] = _solve(by_name[name], layers[name], options, moments, self.tokens, dtypes[name])
                current[name] = results[name].dense(self.blocks.device)
                self._step(1, name)
            _hold(layers, current)
        _hold(layers, original)
        return results

    def _pairs(self, name: str) -> bool:
        """Whether the dense inputs of a layer stand beside the quantized ones, token by token; not in an expert."""
        parts = name.split(".")
        parents = (".".join(parts[:i]) for i in range(1, len(parts)))
        inside = any(isinstance(self.blocks.model.get_submodule(parent), Experts) for parent in parents)
        return self.plan.options_of(name).needs.cross and not inside

    def _advance(self, index: int, layers: dict[str, nn.Module], results: dict[str, _Result]) -> None:
        """Sends both streams through a solved block whose layers hold their dense weights."""
        assert self.quantized is not None
        if self.dense is not None:
            for batch in range(len(self.dense)):
                self.dense.run(index, batch, keep=True)
        _hold(layers, {name: result.dense(self.blocks.device) for name, result in results.items()})
        for batch in range(len(self.quantized)):
            self.quantized.run(index, batch, keep=True)

    def _replace(self, target: Target, layer: nn.Module, result: _Result) -> None:
        bias = linear_parts(layer)[1]
        if isinstance(result.value, BinaryWeight):
            packed = self.plan.options_of(target.name).packed(result.value, bias)
            set_module(self.blocks.model, target.name, packed)
        else:
            weight = linear_parts(layer)[0]
            set_weight(layer, result.value.to(weight.dtype))

    def _step(self, layers: int, name: str) -> None:
        self.done += layers
        if self.progress is not None:
            self.progress(self.done, len(self.blocks.structure.targets), name)


def _as_rows(layer: nn.Module, value: BinaryWeight | Tensor) -> BinaryWeight | Tensor:
    """A result of an earlier run; a dense one, which is as its layer stores it, as float32 [N, K]."""
    return value if isinstance(value, BinaryWeight) else as_rows(layer, value).float()


def _hold(layers: dict[str, nn.Module], weights: dict[str, Tensor]) -> None:
    for name, layer in layers.items():
        set_weight(layer, weights[name])


def quantize_(
    model: nn.Module,
    plan: Plan,
    windows: Tensor | None = None,
    progress: Progress | None = None,
) -> Report:
    """Replaces each linear of the repeated blocks by a PackedLinear, in place; returns what was done and why.

    `windows` int64 [samples, T] is calibration text, for options that need it. A block's dense weights are freed as it
    is left. Raises, before any layer is packed, StructureError (no block, or under 90 % of its parameters binarized
    without `allow_partial`), OptionError (a group that does not divide a width, a pattern that matches nothing) and
    WeightError (NaN, infinity), with the layer's name; a WeightError for a scale outside its dtype, activations that
    overflow or a Hessian that is not positive definite comes at its layer.
    """
    split_experts_(model, plan.selection)
    structure = find_targets(model, plan)
    for name, parameter in model.named_parameters():
        check_finite(name, parameter)
    if windows is not None and not plan.needs(target.name for target in structure.targets).moments:
        raise OptionError("calibration windows were given, but the method with these options measures no inputs")
    device = str(next(model.parameters()).device)
    decisions = Walk(Blocks(model, structure, plan, device), windows, progress).run()
    return Report((*decisions, *structure.kept), structure.block_parameters)


def check_finite(name: str, parameter: Tensor) -> None:
    """Raises WeightError, with the layer's name, if `parameter` holds NaN or infinity."""
    if parameter.is_floating_point() and (bad := int((~torch.isfinite(parameter)).sum())):
        raise WeightError(
            f"{name.removesuffix('.weight')}: {bad} of its {parameter.numel()} weights are NaN or infinite; "
            "repair the source model"
        )


@torch.no_grad()
def estimate(model: nn.Module, plan: Plan, int8_head: bool = False) -> Report:
    """What quantizing `model`, which may be on the meta device, would do: sizes and true bits without its weights.

    The bytes are those of random normal matrices of the same shapes, rounded to nearest once a shape: exact where a
    method's size follows from the shape, within the variation of salient positions elsewhere. Raises as `quantize_`
    does, NaN apart.
    """
    split_experts_(model, plan.selection)
    structure = find_targets(model, plan)
    by_shape: dict[Any, Decision] = {}
    decisions = []
    for target in structure.targets:
        options = plan.options_of(target.name).rounded()
        key = (target.out_features, target.in_features, options)
        if key not in by_shape:
            layer = nn.Linear(target.in_features, target.out_features, bias=False)
            torch.nn.init.normal_(layer.weight, std=0.02, generator=torch.Generator().manual_seed(0))
            by_shape[key] = _solve(target, layer, options, None, 0, torch.float32).decision
        linear = model.get_submodule(target.name)
        parameters = sum(parameter.numel() for parameter in linear.parameters())
        decisions.append(replace(by_shape[key], name=target.name, parameters=parameters, error=None))
    report = Report((*decisions, *structure.kept), structure.block_parameters)
    return with_head(report, plan_head(model)) if int8_head else report


@dataclass(frozen=True)
class Memory:
    """What quantizing takes: bytes of the weights before and after, and the expected peak of one block at a time."""

    dense_bytes: int
    packed_bytes: int
    inputs_bytes: int
    """The captured inputs of a block, which may be kept on the disk."""
    peak_bytes: int


#: Bytes per entry of the layer in work: float32 and index copies, measured on the hungriest method (pbllm).
WORKING_BYTES = 44
#: Bytes per entry of a layer's Hessian: float64 and float32 forms of it and of its inverse while it is factorized.
HESSIAN_BYTES = 40


def memory(model: nn.Module, report: Report, needs: Needs, tokens: int) -> Memory:
    """The memory that quantizing a streamed `model` (it may be on meta) as planned in `report` takes; an estimate."""
    dense = sum(p.numel() * p.element_size() for p in model.parameters())
    changed = [d for d in report.decisions if d.action in ("binarized", "int8")]
    first = next(model.parameters())
    item = first.element_size()
    packed = dense - sum(d.parameters * item for d in changed) + sum(d.nbytes for d in changed)
    structure = find_structure(model)
    block = report.block_parameters // structure.block_count
    outside = dense // item - report.block_parameters
    largest = max((d.weights for d in report.binarized), default=0)
    width = max((target.in_features for target in structure.targets), default=0)
    hidden = getattr(getattr(model, "config", None), "hidden_size", width)
    inputs = tokens * hidden * 4 * (1 + needs.cross) if needs.moments else 0
    working = WORKING_BYTES * largest + block * item
    if needs.moments:
        working += block * 8 + outside * 4 + HESSIAN_BYTES * width**2
    return Memory(dense, packed, inputs, outside * item + working + inputs)
