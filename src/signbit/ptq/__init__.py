"""Post-training quantization: a model's linears, one after another, become packed layers."""

from signbit.ptq.head import plan_head, quantize_head_, tie_int8, with_head
from signbit.ptq.quantize import MINIMUM_SHARE, Memory, memory, plan, quantize_

__all__ = [
    "MINIMUM_SHARE",
    "Memory",
    "memory",
    "plan",
    "plan_head",
    "quantize_",
    "quantize_head_",
    "tie_int8",
    "with_head",
]
