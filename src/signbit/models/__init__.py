"""Finding the repeated blocks and linear layers of any decoder, and putting other layers in their place."""

from signbit.models.experts import Experts, is_fused
from signbit.models.fused import Fused, find_siblings, fuse_
from signbit.models.replace import as_rows, linear_parts, set_module, set_weight
from signbit.models.report import Decision, Report, bits_range, kind_of
from signbit.models.shape import Shape
from signbit.models.structure import (
    Selection,
    Structure,
    Target,
    find_structure,
    is_linear,
    matches,
    split_experts_,
    unknown_pattern,
)

__all__ = [
    "Decision",
    "Experts",
    "Fused",
    "Report",
    "Selection",
    "Shape",
    "Structure",
    "Target",
    "as_rows",
    "bits_range",
    "find_siblings",
    "find_structure",
    "fuse_",
    "is_fused",
    "is_linear",
    "kind_of",
    "linear_parts",
    "matches",
    "set_module",
    "set_weight",
    "split_experts_",
    "unknown_pattern",
]
