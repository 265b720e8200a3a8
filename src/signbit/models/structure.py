"""The structure of a decoder, told by the types of its modules and never by a model's name."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from difflib import SequenceMatcher
from fnmatch import fnmatchcase

from torch import nn
from transformers.pytorch_utils import Conv1D

from signbit.errors import OptionError, StructureError
from signbit.linear import BinaryLinear, Int8Head, PackedLinear
from signbit.models.experts import Experts, expert_names, fused_experts
from signbit.models.replace import set_module
from signbit.models.report import Decision, kind_of


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


def nearest_names(pattern: str, names: Iterable[str], count: int = 3) -> list[str]:
    """The names in which the dotted parts of `pattern` are most nearly found, one of each kind."""
    length = len(pattern.split("."))

    def likeness(name: str) -> float:
        parts = name.split(".")
        windows = [".".join(parts[i : i + length]) for i in range(max(1, len(parts) - length + 1))]
        return max(SequenceMatcher(None, pattern, window).ratio() for window in windows)

    first_of_kind: dict[str, str] = {}
    for name in names:
        first_of_kind.setdefault(kind_of(name), name)
    return sorted(first_of_kind.values(), key=lambda name: (-likeness(name), name))[:count]


def unknown_pattern(flag: str, pattern: str, names: Iterable[str]) -> OptionError:
    """The error for a pattern that matches none of `names`."""
    return OptionError(
        f"{flag} {pattern} matches no linear layer; the nearest are {', '.join(nearest_names(pattern, names))} "
        "(a pattern is whole dotted parts of a name: layers.1 is not layers.10, * stands for any letters of one part)"
    )


@dataclass(frozen=True)
class Selection:
    """Which linear layers of the repeated blocks are binarized; the rest stays as it is and is reported as kept."""

    keep: tuple[str, ...] = ()
    """Patterns of names that stay."""
    min_layer: int = 0
    """First block that is binarized."""
    max_layer: int | None = None
    """Block before which binarizing ends; None: after the last."""
    only: tuple[str, ...] = ()
    """Patterns of names outside of which everything stays."""
    invert: bool = False
    """Binarize what `min_layer`, `max_layer` and `only` leave out, instead of what they select."""

    def __post_init__(self) -> None:
        if self.min_layer < 0 or (self.max_layer is not None and self.max_layer <= self.min_layer):
            raise OptionError(
                f"blocks from {self.min_layer} up to (not including) {self.max_layer} are none; give --min-layer at "
                "least 0 and --max-layer above it"
            )

    def kept_by(self, name: str, block: int) -> str | None:
        """Why the layer `name` of block number `block` stays, or None if it is binarized."""
        for pattern in self.keep:
            if matches(pattern, name):
                return f"--keep {pattern}"
        inside = self.min_layer <= block and (self.max_layer is None or block < self.max_layer)
        inside = inside and (not self.only or any(matches(pattern, name) for pattern in self.only))
        return None if inside != self.invert else "not selected"

    def check(self, names: Iterable[str], blocks: int) -> None:
        """Raises OptionError for a pattern that matches none of `names`, or a block that is not there."""
        known = list(names)
        for flag, patterns in (("--keep", self.keep), ("--only", self.only)):
            for pattern in patterns:
                if not any(matches(pattern, name) for name in known):
                    raise unknown_pattern(flag, pattern, known)
        if self.min_layer >= blocks:
            raise OptionError(f"--min-layer is {self.min_layer}, but the model has {blocks} blocks, 0 to {blocks - 1}")


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a plain linear layer, nn.Linear or Conv1D itself and no other class made of one."""
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
        if any(
            is_linear(child) or isinstance(child, (PackedLinear, BinaryLinear, Int8Head)) for child in module.modules()
        ):
            outermost[name] = module
    if not outermost:
        raise StructureError(
            f"{type(model).__name__} has no repeated block: no ModuleList with linear layers in it. "
            "signbit binarizes decoders whose blocks stand in a torch.nn.ModuleList"
        )
    return max(outermost.items(), key=lambda item: _parameters(item[1]))


def find_structure(model: nn.Module, selection: Selection | None = None) -> Structure:
    """Which linears of `model` are binarized and why the rest is not.

    nn.Linear and Conv1D (GPT-2) inside the repeated block are, unless `selection` says otherwise; everything outside
    the block (embeddings, head, projections around it) stays. `model` may be on the meta device. The experts of a
    mixture count as linears once `split_experts_` has taken them apart.

    Raises StructureError for a model without a repeated block, or one that is packed already; OptionError for a
    pattern that matches no linear.
    """
    chosen = selection or Selection()
    name, blocks = find_blocks(model)
    targets: list[Target] = []
    kept: list[Decision] = []
    for index, block in enumerate(blocks):
        for child_name, child in block.named_modules(prefix=f"{name}.{index}"):
            if isinstance(child, (PackedLinear, BinaryLinear)):
                raise StructureError(f"{child_name} is binarized already; start from the full-precision model")
            if is_linear(child):
                why = chosen.kept_by(child_name, index)
                if why is None:
                    targets.append(Target(child_name, index, *_size(child)))
                else:
                    kept.append(Decision(child_name, "kept", why, _parameters(child), asked=True))
            elif fused_experts(child):
                kept.append(Decision(child_name, "kept", "all experts kept", _parameters(child), asked=True))
            elif isinstance(child, (nn.Linear, nn.modules.conv._ConvNd)):
                reason = f"a {type(child).__name__}, which is no plain linear layer"
                kept.append(Decision(child_name, "kept", reason, _parameters(child)))
    fused = [n for m_name, m in model.named_modules() if fused_experts(m) for n in expert_names(m_name, m)]
    chosen.check([*(t.name for t in targets), *(d.name for d in kept), *fused], len(blocks))
    outside = [
        Decision(child_name, "kept", "outside the repeated block", _parameters(child))
        for child_name, child in model.named_modules()
        if (is_linear(child) or isinstance(child, nn.Embedding)) and not child_name.startswith(f"{name}.")
    ]
    return Structure(name, len(blocks), tuple(targets), (*kept, *outside), _parameters(blocks))


def split_experts_(model: nn.Module, selection: Selection | None = None, prefix: str = "", block: int = 0) -> None:
    """Puts `Experts` in the place of the fused modules of `model` of which an expert is binarized, in place.

    `model` may be one block: `prefix` is then its name and `block` its number. The values stay; each matrix becomes a
    view of its expert's part. Raises as `Experts` does.
    """
    chosen = selection or Selection()
    for name, module in list(model.named_modules()):
        if not fused_experts(module):
            continue
        full = f"{prefix}.{name}" if prefix else name
        number = block if prefix else next((int(part) for part in full.split(".") if part.isdigit()), 0)
        if any(chosen.kept_by(expert, number) is None for expert in expert_names(full, module)):
            set_module(model, name, Experts(full, module))
