"""A model in which the linears of the blocks are being trained to be binary."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from signbit import ptq
from signbit.errors import OptionError, SignbitError, StructureError, WeightError
from signbit.linear import BinaryLinear, PackedLinear
from signbit.methods.base import Method, store
from signbit.models import Decision, Report, find_structure, linear_parts, set_module, split_experts_
from signbit.models.structure import find_blocks


@dataclass(frozen=True)
class Trained:
    """What is trained beside the binary layers; everything else is frozen."""

    train_norms: bool = True
    """Also train the weights of norms (and what else stands in the blocks)."""
    train_embeddings: bool = False
    """Also train the embeddings, and the output head if it is another tensor."""


@dataclass(frozen=True)
class Lora:
    """Adapters that are trained beside packed layers, and nothing else: y = packed(x) + (α/r)·B(A(x)).

    Source: LoRA, arXiv 2106.09685. Raises OptionError for numbers that no adapter has.
    """

    lora_rank: int = 16
    """r, the inner width of an adapter."""
    lora_alpha: float = 32.0
    """α: an adapter's output is multiplied by α/r."""
    lora_dropout: float = 0.0
    """Share of an adapter's inputs that is left out in each step."""

    def __post_init__(self) -> None:
        if self.lora_rank < 1:
            raise OptionError(f"--lora-rank is {self.lora_rank}; at least 1 is needed")
        if not 0 < self.lora_alpha < math.inf:
            raise OptionError(f"--lora-alpha is {self.lora_alpha}; a positive number is needed (twice the rank)")
        if not 0 <= self.lora_dropout < 1:
            raise OptionError(f"--lora-dropout is {self.lora_dropout}; it is a share, from 0 to below 1")


@dataclass(frozen=True)
class Before:
    """Packed layers by name, and what a student's layers take of them."""

    layers: Mapping[str, PackedLinear]
    weight: Callable[[str], Tensor] | None = None
    """The matrix [N, K] of which a layer was binarized, from which latents have their magnitudes; None: |scale|."""
    masks_alone: bool = False
    """Take only which weights are salient, and everything else of the model itself."""

    def layer(
        self, name: str, kind: type[BinaryLinear], weight: Tensor, bias: Tensor | None, options: Any
    ) -> BinaryLinear:
        """The trainable layer `name`, in the place of a linear of `weight` [N, K]; raises OptionError if there is none."""
        packed = self.layers.get(name)
        if packed is None:
            raise OptionError("it is not packed in the directory that is gone on from; keep it with --keep")
        if tuple(weight.shape) != (packed.out_features, packed.in_features):
            raise OptionError(
                f"it is {list(weight.shape)}, and {packed.out_features} × {packed.in_features} in the packed directory, which "
                "is of another model"
            )
        if not self.masks_alone:
            return kind.from_packed(packed, None if self.weight is None else self.weight(name), options)
        salient = packed.weights[0].salient
        if salient is None:
            raise OptionError("it has no salient weights in the directory of --masks; give one of pbllm or pb-gptq")
        return kind.with_salient(weight, bias, salient.unpack(*weight.shape)[0], options)


def start_training_(
    model: nn.Module,
    method: Method,
    plan: ptq.Plan,
    trained: Trained,
    blank: bool = False,
    before: Before | None = None,
    head: bool = False,
) -> Report:
    """Puts the method's trainable layer in the place of each linear of the blocks, in place; returns what was done.

    Latents are float32 whatever the model's dtype. `blank` leaves the layers to be filled by a checkpoint; the model may
    then be on the meta device. `before` holds packed layers that they go on from; the weights of `model` in their places
    may then be on the meta device. `head` makes the output head such a layer too, and cuts its tie to the embedding.
    Raises StructureError and OptionError as `quantize_` does, and OptionError for a method that has no trainable layer.
    """
    if method.layer is None:
        raise OptionError("this method has no layer that is trained; it is calibrated, see signbit quantize")
    split_experts_(model, plan.selection)
    structure = ptq.find_targets(model, plan)
    if not blank:
        for name, parameter in model.named_parameters():
            if not parameter.is_meta:
                ptq.check_finite(name, parameter)
    make = method.layer.blank if blank else method.layer.start
    decisions = []
    parameters = structure.block_parameters
    names = {target.name: ptq.LINEAR for target in structure.targets}
    if head:
        names[name := _untie_head_(model)] = "output head"
        parameters += linear_parts(model.get_submodule(name))[0].numel()
    for name, why in names.items():
        weight, bias = linear_parts(model.get_submodule(name))
        options = plan.options_of(name)
        try:
            if before is not None:
                layer = before.layer(name, method.layer, weight.detach(), bias, options)
            else:
                layer = make(weight.detach().float(), bias, options)
        except SignbitError as error:
            raise type(error)(f"{name}: {error}") from error
        set_module(model, name, layer)
        decisions.append(Decision(name, "binarized", why, weight.numel(), weights=weight.numel()))
    train_parts_(model, trained)
    return Report((*decisions, *structure.kept), parameters)


def _untie_head_(model: Any) -> str:
    """The name of the output head, which is the embedding's no longer; raises StructureError for one that is not linear."""
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise StructureError(f"{type(model).__name__} has no plain linear output head; leave out --head binary")
    model.config.tie_word_embeddings = model.config.get_text_config().tie_word_embeddings = False
    model.all_tied_weights_keys = {}
    name: str = next(name for name, module in model.named_modules() if module is head)
    return name


def train_parts_(model: nn.Module, trained: Trained) -> None:
    """Says of a model with trainable layers what is trained."""
    _train_rest_(model, trained)
    for _, layer in binary_layers(model):
        layer.train_parts_()


def start_dense_(model: nn.Module, trained: Trained) -> Report:
    """Makes a full-precision model one that is trained as it is: what a binary one is compared with; nothing is replaced."""
    structure = find_structure(model)
    _train_rest_(model, trained)
    for matrix in matrices(model):
        matrix.requires_grad_(True)
    why = "full precision"
    kept = (Decision(t.name, "kept", why, t.out_features * t.in_features) for t in structure.targets)
    return Report((*kept, *structure.kept), structure.block_parameters)


def _train_rest_(model: nn.Module, trained: Trained) -> None:
    model.requires_grad_(trained.train_norms)
    for embedding in (model.get_input_embeddings(), model.get_output_embeddings()):  # type: ignore[operator]
        if embedding is not None:
            embedding.requires_grad_(trained.train_embeddings)


def start_lora_(model: Any, lora: Lora) -> Report:
    """Puts an adapter beside each packed layer of `model`, in place; returns what there is. Nothing else is trained.

    Raises OptionError without PEFT, or for a model without a packed layer.
    """
    from signbit.models.lora import lora_config

    packed = [(name, m) for name, m in model.named_modules() if isinstance(m, PackedLinear)]
    if Path(model.name_or_path).is_dir():  # the adapter names its model, wherever it is loaded from
        model.name_or_path = str(Path(model.name_or_path).resolve())
    model.add_adapter(lora_config(model, r=lora.lora_rank, lora_alpha=lora.lora_alpha, lora_dropout=lora.lora_dropout))
    sizes = ((name, m.out_features * m.in_features, m.nbytes) for name, m in packed)
    decisions = (Decision(name, "kept", "packed, with an adapter beside it", n, size) for name, n, size in sizes)
    return Report(tuple(decisions), sum(m.out_features * m.in_features for _, m in packed))


def binary_layers(model: nn.Module) -> Iterable[tuple[str, BinaryLinear]]:
    """The trainable layers of `model` by name."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, BinaryLinear))


def latents(model: nn.Module) -> list[nn.Parameter]:
    """The latent matrices of `model`, [N, K] each: those whose signs are what is kept of them."""
    return [layer.weight for _, layer in binary_layers(model)]


def matrices(model: nn.Module) -> list[nn.Parameter]:
    """What Muon is for: the latents, or of a model that has none the matrices of its blocks."""
    if found := latents(model):
        return found
    modules = find_blocks(model)[1].modules()
    return [m.weight for m in modules if isinstance(m, (nn.Linear, Conv1D)) and isinstance(m.weight, nn.Parameter)]


@dataclass(frozen=True)
class Packed:
    """What packing found: the report, and how many latents are exactly 0, whose sign is +1 by definition."""

    report: Report
    zeros: int


@torch.no_grad()
def pack_training_(model: nn.Module, report: Report, dtype: str = "float32") -> Packed:
    """Puts the packed layer in the place of each trainable one, in place; without a loss if scales are stored in float32.

    `dtype` is what they are stored in. Raises WeightError if one does not fit it.
    """
    sizes: dict[str, int] = {}
    zeros = 0
    for name, layer in list(binary_layers(model)):
        zeros += int((layer.weight == 0).sum())
        packed = layer.pack()
        for part, value in list(packed.named_buffers()):
            if value.is_floating_point():
                try:
                    setattr(packed, part, store(value, dtype, shift="shift" in part))
                except WeightError as error:
                    raise WeightError(f"{name}: {error}") from error
        sizes[name] = packed.nbytes
        set_module(model, name, packed)
    decisions = tuple(
        Decision(d.name, d.action, d.why, d.parameters, sizes[d.name], d.weights) if d.name in sizes else d
        for d in report.decisions
    )
    return Packed(Report(decisions, report.block_parameters), zeros)
