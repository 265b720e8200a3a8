"""The custom ops `signbit::binary_linear` and `signbit::int8_linear`: schema, fake and gradient, for every backend."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from signbit import bits
from signbit.bits import Operands
from signbit.errors import ShapeError
from signbit.ops import dispatch


@torch.library.custom_op("signbit::binary_linear", mutates_args=())
def _binary_linear(
    x: Tensor,
    signs: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    in_scale: Tensor | None,
    in_shift: Tensor | None,
    salient_codes: Tensor | None,
    salient_positions: Tensor | None,
    salient_counts: Tensor | None,
    salient_scale: Tensor | None,
    salient_zero: Tensor | None,
    salient_bits: int,
    in_features: int,
    activations: str,
) -> Tensor:
    w = Operands(
        signs, scale, shift, in_scale, in_shift, salient_codes, salient_positions, salient_counts, salient_scale,
        salient_zero, salient_bits, in_features,
    )  # fmt: skip
    with torch.autocast(x.device.type, enabled=False):  # the result has the dtype of x, also inside an autocast
        return dispatch.choose(x.device).binary_linear(x, w, activations).contiguous()


@_binary_linear.register_fake
def _(x: Tensor, signs: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], signs.shape[1])


@torch.library.custom_op("signbit::binary_linear_input_grad", mutates_args=())
def _binary_linear_input_grad(
    grad: Tensor,
    signs: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    in_scale: Tensor | None,
    in_shift: Tensor | None,
    salient_codes: Tensor | None,
    salient_positions: Tensor | None,
    salient_counts: Tensor | None,
    salient_scale: Tensor | None,
    salient_zero: Tensor | None,
    salient_bits: int,
    in_features: int,
) -> Tensor:
    # An op of its own, because unpacking salient positions has sizes that tracing cannot know.
    w = Operands(
        signs, scale, shift, in_scale, in_shift, salient_codes, salient_positions, salient_counts, salient_scale,
        salient_zero, salient_bits, in_features,
    )  # fmt: skip
    with torch.autocast(grad.device.type, enabled=False):
        return (grad @ bits.dense(w).to(grad.dtype)).contiguous()


@_binary_linear_input_grad.register_fake
def _(grad: Tensor, *operands: Any) -> Tensor:
    return grad.new_empty(*grad.shape[:-1], operands[-1])


def _save_weight(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    tensors = inputs[1:11]
    ctx.present = [tensor is not None for tensor in tensors]
    ctx.integers = inputs[11:13]
    ctx.save_for_backward(*(tensor for tensor in tensors if tensor is not None))


def _binary_linear_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    saved = iter(ctx.saved_tensors)
    tensors = [next(saved) if present else None for present in ctx.present]
    return torch.ops.signbit.binary_linear_input_grad(grad, *tensors, *ctx.integers), *(None,) * 13


_binary_linear.register_autograd(_binary_linear_backward, setup_context=_save_weight)


@torch.library.custom_op("signbit::int8_linear", mutates_args=())
def _int8_linear(x: Tensor, codes: Tensor, scale: Tensor, activations: str) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        return dispatch.choose(x.device).int8_linear(x, codes, scale, activations).contiguous()


@_int8_linear.register_fake
def _(x: Tensor, codes: Tensor, scale: Tensor, activations: str) -> Tensor:
    return x.new_empty(*x.shape[:-1], codes.shape[0])


def _save_codes(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1], inputs[2])


def _int8_linear_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    codes, scale = ctx.saved_tensors
    return (grad * scale.to(grad.dtype)) @ codes.to(grad.dtype), None, None, None


_int8_linear.register_autograd(_int8_linear_backward, setup_context=_save_codes)


def _check_columns(x: Tensor, columns: int) -> None:
    if x.ndim == 0 or x.shape[-1] != columns:
        raise ShapeError(f"the input has shape {list(x.shape)}; this layer takes [..., {columns}]")


def binary_linear(x: Tensor, w: Operands, activations: str = "exact") -> Tensor:
    """y = x · Wᵀ for the binarized matrix W that `w` holds.

    `x` is floating [..., K]; the result has its dtype, [..., N]. `activations` is "exact" (floats; equals
    `bits.dense` to rounding), "int8" (per-token abs-max codes, integer-exact against the reference) or "sign".
    The gradient is that of the input alone, dx = dy · W, straight through any activation quantization.
    Raises ShapeError if x does not end in K columns.
    """
    _check_columns(x, w.in_features)
    result: Tensor = torch.ops.signbit.binary_linear(x, *w, activations)
    return result


def int8_linear(x: Tensor, codes: Tensor, scale: Tensor, activations: str = "exact") -> Tensor:
    """y = x · diag(scale)·codesᵀ for `codes` int8 [N, K] and `scale` float [N]; dtypes, modes and errors as above."""
    _check_columns(x, codes.shape[1])
    result: Tensor = torch.ops.signbit.int8_linear(x, codes, scale, activations)
    return result
