"""The structure of a decoder, told by the types of its modules and never by a model's name."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn
from transformers.pytorch_utils import Conv1D

from signbit.errors import OptionError, StructureError
from signbit.linear import BinaryLinear, PackedLinear
from signbit.models.report import Decision


@dataclass(frozen=True)
class Target:
    """A linear layer to binarize: its dotted name, block and size."""

    name: str
    block: int
    out_features: int
    in_features: int


@dataclass(frozen=True)
class Structure:
    """The blocks of a model, the linears in them that are binarized, and what was decided on everything else."""

    blocks: str
    block_count: int
    targets: tuple[Target, ...]
    kept: tuple[Decision, ...]
    block_parameters: int


def matches(pattern: str, name: str) -> bool:
    """Whether the dotted parts of `pattern` stand, whole and in a row, in the dotted `name`; * inside a part.

    'layers.1' is in 'model.layers.1.mlp' and not in 'model.layers.10.mlp'; 'mlp.*_proj' is in 'layers.0.mlp.up_proj'.
    """
    wanted, parts = pattern.split("."), name.split(".")
    return any(
        all(fnmatchcase(part, want) for part, want in zip(parts[i:], wanted, strict=False))
        for i in range(len(parts) - len(wanted) + 1)
    )


def _is_linear(module: nn.Module) -> bool:
    return type(module) in (nn.Linear, Conv1D)


def _size(module: nn.Module) -> tuple[int, int]:
    """(out_features, in_features) of a linear; Conv1D stores its weight as [in, out]."""
    rows, columns = module.weight.shape  # type: ignore[misc]
    return (columns, rows) if isinstance(module, Conv1D) else (rows, columns)


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The list of repeated blocks: of all outermost ModuleLists that hold linears, the one with most parameters.

    Raises StructureError if the model has none.
    """
    outermost: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{other}.") for other in outermost)
        if not isinstance(module, nn.ModuleList) or inside:
            continue
        if any(_is_linear(child) or isinstance(child, PackedLinear) for child in module.modules()):
            outermost[name] = module
    if not outermost:
        raise StructureError(
            f"{type(model).__name__} has no repeated block: no ModuleList with linear layers in it. "
            "signbit binarizes decoders whose blocks stand in a torch.nn.ModuleList"
        )
    return max(outermost.items(), key=lambda item: _parameters(item[1]))


def find_structure(model: nn.Module, keep: Iterable[str] = ()) -> Structure:
    """Which linears of `model` are binarized and why the rest is not.

    nn.Linear and Conv1D (GPT-2) inside the repeated block are; everything outside the block (embeddings, head,
    projections around it) and what a pattern of `keep` matches stays. `model` may be on the meta device.

    Raises StructureError for a model without a repeated block, one that is packed already, or one whose experts are
    fused 3-D parameters; OptionError for a `keep` pattern that matches no linear.
    """
    name, blocks = find_blocks(model)
    targets: list[Target] = []
    kept: list[Decision] = []
    patterns = list(keep)
    unused = set(patterns)
    for index, block in enumerate(blocks):
        for child_name, child in block.named_modules(prefix=f"{name}.{index}"):
            if isinstance(child, (PackedLinear, BinaryLinear)):
                raise StructureError(f"{child_name} is binarized already; start from the full-precision model")
            _refuse_fused_experts(child_name, child)
            matched = [pattern for pattern in patterns if matches(pattern, child_name)]
            if _is_linear(child):
                unused.difference_update(matched)
            if _is_linear(child) and not matched:
                targets.append(Target(child_name, index, *_size(child)))
            elif _is_linear(child):
                kept.append(Decision(child_name, "kept", f"--keep {matched[0]}", _parameters(child), asked=True))
            elif isinstance(child, (nn.Linear, nn.modules.conv._ConvNd)):
                reason = f"a {type(child).__name__}, which is no plain linear layer"
                kept.append(Decision(child_name, "kept", reason, _parameters(child)))
    if unused:
        known = sorted({t.name for t in targets} | {d.name for d in kept})
        raise OptionError(
            f"--keep {sorted(unused)[0]} matches no linear layer; a pattern is whole dotted parts of names such as "
            f"{known[0]} (layers.1 is not layers.10, * stands for any letters of one part)"
        )
    outside = [
        Decision(child_name, "kept", "outside the repeated block", _parameters(child))
        for child_name, child in model.named_modules()
        if (_is_linear(child) or isinstance(child, nn.Embedding)) and not child_name.startswith(f"{name}.")
    ]
    return Structure(name, len(blocks), tuple(targets), (*kept, *outside), _parameters(blocks))


def _refuse_fused_experts(name: str, module: nn.Module) -> None:
    for parameter_name, parameter in module.named_parameters(recurse=False):
        if parameter.ndim == 3 and not isinstance(module, nn.modules.conv._ConvNd):
            raise StructureError(
                f"{name}.{parameter_name} holds {parameter.shape[0]} experts in one 3-D parameter "
                f"{list(parameter.shape)}; mixtures of experts are not supported by this version. "
                "Use a dense decoder"
            )
