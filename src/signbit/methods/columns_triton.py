"""The column loops of GPTQ's sweep and of coordinate descent on CUDA: one launch a block instead of a dozen a column.

Rows do not depend on each other, so a program takes a few rows through all columns of a block. What it computes is
`gptq._columns_by_torch` with `Grid.nearest`, in the same order.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from signbit.methods.gptq import Grid

_ROWS = 4
_KINDS = {"two": 0, "above": 1, "codes": 2, "zero": 3, "free": 4}


@triton.jit
def _round(x):  # type: ignore[no-untyped-def]
    # Half to even, as torch: adding and taking off 1.5·2²³ leaves no fraction. |x| is under 2²² here.
    return (x + 12582912.0) - 12582912.0


@triton.jit  # type: ignore[untyped-decorator]
def _columns(  # type: ignore[no-untyped-def]
    part_ptr, old_ptr, q_ptr, change_ptr, matrix_ptr, salient_ptr, step_ptr, code_zero_ptr, scale_ptr, shift_ptr,
    zero_ptr, rows, part_stride, old_stride, q_stride, matrix_stride, salient_stride, scale_stride,
    scale_column, zero_stride, zero_column, code_top, low_top,
    width: tl.constexpr, KIND: tl.constexpr, DESCEND: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    column = tl.arange(0, WIDTH)
    tile = inside[:, None] & (column < width)[None, :]
    part = tl.load(part_ptr + row[:, None] * part_stride + column[None, :], mask=tile, other=0.0)
    step = tl.load(step_ptr + row, mask=inside, other=1.0)
    code_zero = tl.load(code_zero_ptr + row, mask=inside, other=0.0)
    for j in range(width):
        along = tl.load(matrix_ptr + j * matrix_stride + column, mask=column < width, other=0.0)
        diagonal = tl.load(matrix_ptr + j * matrix_stride + j)
        value = tl.sum(tl.where(column[None, :] == j, part, 0.0), axis=1)
        old = value
        if DESCEND:
            old = tl.load(old_ptr + row * old_stride + j, mask=inside, other=0.0)
            value = old - value / diagonal
        salient = tl.load(salient_ptr + row * salient_stride + j, mask=inside, other=0)
        scale = tl.load(scale_ptr + row * scale_stride + j * scale_column, mask=inside, other=0.0)
        shift = tl.load(shift_ptr + row * scale_stride + j * scale_column, mask=inside, other=0.0)
        number = tl.minimum(tl.maximum(value / step, -1.0 - code_zero), code_top + 1.0 - code_zero)
        number = tl.minimum(tl.maximum(_round(number) + code_zero, 0.0), code_top)
        high = (number - code_zero) * step
        if KIND == 0:
            low = tl.where(value >= shift, shift + scale, shift - scale)
        elif KIND == 1:
            low = tl.where(value > 0.0, shift + scale, shift - scale)
        elif KIND == 2:
            zero = tl.load(zero_ptr + row * zero_stride + j * zero_column, mask=inside, other=0.0)
            divisor = tl.where(scale == 0.0, 1.0, scale)
            number = tl.minimum(tl.maximum(value / divisor, -1.0 - zero), low_top + 1.0 - zero)
            low = (tl.minimum(tl.maximum(_round(number) + zero, 0.0), low_top) - zero) * scale
        elif KIND == 3:
            low = tl.zeros_like(value)
        else:
            low = value
        q = tl.where(salient != 0, high, low)
        if DESCEND:
            change = q - old
            part += change[:, None] * along[None, :]
        else:
            change = (value - q) / diagonal
            part -= change[:, None] * along[None, :]
        tl.store(q_ptr + row * q_stride + j, q, mask=inside)
        tl.store(change_ptr + row * width + j, change, mask=inside)


def columns(part: Tensor, quantized: Tensor, matrix: Tensor, grid: Grid, begin: int, descend: bool) -> Tensor:
    """Takes the columns of `part` [N, n] through a block; writes Q into `quantized` [N, n], returns errors or changes.

    `matrix` [n, n] is the block of U (sweep) or of H (descent); the block begins at column `begin` of `grid`. All have
    a column stride of 1.
    """
    for tensor in (part, quantized, matrix, grid.salient, grid.scale, grid.shift):
        assert tensor.shape[1] == 1 or tensor.stride(1) == 1
    rows, width = part.shape
    changes = torch.empty(rows, width, dtype=torch.float32, device=part.device)
    grouped = grid.scale.shape[1] > 1
    scale, shift = (t[:, begin:] if grouped else t for t in (grid.scale, grid.shift))
    zero = grid.zero if grid.zero is not None else grid.scale
    zero = zero[:, begin:] if zero.shape[1] > 1 else zero
    salient = grid.salient.view(torch.uint8)[:, begin:]
    guard = torch.cuda.device(part.device) if part.is_cuda else nullcontext()  # Triton launches on the current device
    with guard:
        _columns[(triton.cdiv(rows, _ROWS),)](
            part, quantized, quantized, changes, matrix, salient, grid.code_step, grid.code_zero, scale, shift, zero,
            rows, part.stride(0), quantized.stride(0), quantized.stride(0), matrix.stride(0), salient.stride(0),
            scale.stride(0), int(grouped), zero.stride(0), int(zero.shape[1] > 1), float(grid.code_top),
            float(grid.low_top), width=width, KIND=_KINDS[grid.kind], DESCEND=descend, ROWS=_ROWS,
            WIDTH=triton.next_power_of_2(width), num_warps=1,
        )  # fmt: skip
    return changes
