"""Multiplication by packed bits: the ops (schema, fakes, gradients) and which backend runs them."""

from signbit.ops.cpu import better_dense
from signbit.ops.dispatch import ACTIVATION_MODES, BACKENDS, Choice, Multiplication, explain, multiplication, prepare
from signbit.ops.native import FLOATS as KERNEL_FLOATS
from signbit.ops.prepared import Prepared
from signbit.ops.schema import binary_linear, int8_linear, prepared_linear

__all__ = [
    "ACTIVATION_MODES",
    "BACKENDS",
    "KERNEL_FLOATS",
    "Choice",
    "Multiplication",
    "Prepared",
    "better_dense",
    "binary_linear",
    "explain",
    "int8_linear",
    "multiplication",
    "prepare",
    "prepared_linear",
]
