"""Multiplication by packed bits: the ops (schema, fakes, gradients) and which backend runs them."""

from signbit.ops.dispatch import ACTIVATION_MODES, BACKENDS, Choice, explain
from signbit.ops.schema import binary_linear, int8_linear

__all__ = ["ACTIVATION_MODES", "BACKENDS", "Choice", "binary_linear", "explain", "int8_linear"]
