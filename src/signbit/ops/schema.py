"""The custom ops: schema, fake and gradient. Matrices as stored, for every backend; prepared ones for the kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from signbit import bits
from signbit.bits import Operands
from signbit.errors import OptionError, ShapeError
from signbit.ops import dispatch
from signbit.ops.prepared import Prepared


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


_PREPARED = ", ".join(
    (
        *(f"Tensor {name}" for name in ("signs", "scale")),
        *(f"Tensor? {name}" for name in Prepared._fields[2:-1]),
        "SymInt[] shape",
    )
)


@torch.library.custom_op(
    "signbit::prepared_linear",
    mutates_args=(),
    schema=f"(Tensor x, {_PREPARED}, str activations, Tensor? bias, str norm_in, float norm_in_eps, "
    "str norm_out, float norm_out_eps) -> Tensor",
)
def _prepared_linear(x: Tensor, *arguments: Any) -> Tensor:
    count = len(Prepared._fields)
    activations, bias, *norms = arguments[count:]
    w = Prepared(*arguments[:count])
    return dispatch.multiplication(w, bias, *([] if w.signs.is_cuda else norms))(x, activations)


@_prepared_linear.register_fake
def _(x: Tensor, *arguments: Any) -> Tensor:
    rows = arguments[len(Prepared._fields) - 1][0]
    return x.new_empty(*x.shape[:-1], rows)


@torch.library.custom_op(
    "signbit::prepared_linear_input_grad", mutates_args=(), schema=f"(Tensor grad, {_PREPARED}) -> Tensor"
)
def _prepared_linear_input_grad(grad: Tensor, *arguments: Any) -> Tensor:
    with torch.autocast(grad.device.type, enabled=False):
        return (grad @ bits.dense(Prepared(*arguments).stored()).to(grad.dtype)).contiguous()


@_prepared_linear_input_grad.register_fake
def _(grad: Tensor, *arguments: Any) -> Tensor:
    return grad.new_empty(*grad.shape[:-1], arguments[-1][1])


def _save_prepared(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, *tensors, shape, _, bias, norm_in, _, norm_out, _ = inputs
    ctx.plain = bias is None and norm_in == norm_out == "none"
    ctx.present = [tensor is not None for tensor in tensors]
    ctx.shape = shape
    ctx.save_for_backward(*(tensor for tensor in tensors if tensor is not None))


def _prepared_linear_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    assert ctx.plain, "norms and bias have gradients of their own: a layer that needs them leaves them to torch"
    saved = iter(ctx.saved_tensors)
    tensors = [next(saved) if present else None for present in ctx.present]
    input_grad = torch.ops.signbit.prepared_linear_input_grad(grad, *tensors, ctx.shape)
    return input_grad, *(None,) * (len(Prepared._fields) + 6)


_prepared_linear.register_autograd(_prepared_linear_backward, setup_context=_save_prepared)


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
    if not x.dtype.is_floating_point:  # the matrix would be cut to integers
        raise ShapeError(f"the input is {x.dtype}; this layer takes floats")


def _check_mode(activations: str, *allowed: str) -> None:
    if activations not in allowed:
        raise OptionError(f"activations are {activations!r}; allowed: {', '.join(allowed)}")


def binary_linear(x: Tensor, w: Operands, activations: str = "exact") -> Tensor:
    """y = x · Wᵀ for the binarized matrix W that `w` holds.

    `x` is floating [..., K]; the result has its dtype, [..., N]. `activations` is "exact" (floats; equals
    `bits.dense` to rounding), "int8" (per-token abs-max codes, the reference's; a GPU may sum their products with scales of
    groups, shifts and salient values in float32, all else sums integers) or "sign".
    The gradient is that of the input alone, dx = dy · W, straight through any activation quantization.
    Raises ShapeError if x does not end in K columns, OptionError for another mode.
    """
    _check_columns(x, w.in_features)
    _check_mode(activations, *dispatch.ACTIVATION_MODES, "sign")
    if w.signs.device != x.device:
        raise ShapeError(f"the input is on {x.device}, the matrix on {w.signs.device}")
    result: Tensor = torch.ops.signbit.binary_linear(x, *w, activations)
    return result


def int8_linear(x: Tensor, codes: Tensor, scale: Tensor, activations: str = "exact") -> Tensor:
    """y = x · diag(scale)·codesᵀ for `codes` int8 [N, K] and `scale` float [N]; dtypes, modes and errors as above."""
    _check_columns(x, codes.shape[1])
    _check_mode(activations, *dispatch.ACTIVATION_MODES)
    if codes.dtype is not torch.int8 or list(scale.shape) != [codes.shape[0]] or codes.device != x.device:
        raise ShapeError(
            f"an int8 matrix has int8 codes [N, K] and a scale [N] on the input's device, not {codes.dtype} "
            f"{list(codes.shape)} and {list(scale.shape)} on {codes.device}"
        )
    result: Tensor = torch.ops.signbit.int8_linear(x, codes, scale, activations)
    return result


def prepared_linear(
    x: Tensor,
    w: Prepared,
    activations: str = "exact",
    bias: Tensor | None = None,
    norm_in: str = "none",
    norm_in_eps: float = 0.0,
    norm_out: str = "none",
    norm_out_eps: float = 0.0,
) -> Tensor:
    """norm_out(W · norm_in(x)) + bias for a prepared matrix, as an op that torch.compile sees; norms on the CPU only.

    `x` is float32, bfloat16 or float16 [..., K]; the result has its dtype, [..., N]. Without norms and bias it has the
    gradient of `binary_linear`. Raises ShapeError if x does not end in K columns or has another dtype, OptionError for a mode
    other than "exact" and "int8".
    """
    _check_columns(x, w.shape[1])
    _check_mode(activations, *dispatch.ACTIVATION_MODES)
    result: Tensor = torch.ops.signbit.prepared_linear(
        x, *w, activations, bias, norm_in, norm_in_eps, norm_out, norm_out_eps
    )
    return result
