"""Finding the repeated blocks and linear layers of any decoder, and putting other layers in their place."""

from signbit.models.replace import linear_parts, set_module
from signbit.models.report import Decision, Report, bits_range, kind_of
from signbit.models.structure import Structure, Target, find_structure, matches

__all__ = [
    "Decision",
    "Report",
    "Structure",
    "Target",
    "bits_range",
    "find_structure",
    "kind_of",
    "linear_parts",
    "matches",
    "set_module",
]
