"""Post-training quantization: a model's blocks, one after another, become packed layers."""

from signbit.ptq.head import plan_head, quantize_head_, tie_int8, with_head
from signbit.ptq.quantize import (
    LINEAR,
    MINIMUM_SHARE,
    Blocks,
    Memory,
    Plan,
    Progress,
    Walk,
    check_finite,
    estimate,
    find_targets,
    memory,
    quantize_,
)
from signbit.ptq.streams import Stream, Where

__all__ = [
    "LINEAR",
    "MINIMUM_SHARE",
    "Blocks",
    "Memory",
    "Plan",
    "Progress",
    "Stream",
    "Walk",
    "Where",
    "check_finite",
    "estimate",
    "find_targets",
    "memory",
    "plan_head",
    "quantize_",
    "quantize_head_",
    "tie_int8",
    "with_head",
]
