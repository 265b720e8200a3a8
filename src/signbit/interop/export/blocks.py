"""What a GGUF file holds of a packed matrix, to the byte: Q1_0, TQ2_0, Q8_0, and a LoRA adapter for its shifts."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from signbit.interop.export.bitnet import ternary
from signbit.linear import PackedLinear
from signbit.weight import BinaryWeight

#: Columns of a block, which has one scale.
Q1_0, TQ2_0, Q8_0 = 128, 256, 32
#: Bytes of a block.
BYTES = {"Q1_0": 18, "TQ2_0": 66, "Q8_0": 34}
COLUMNS = {"Q1_0": Q1_0, "TQ2_0": TQ2_0, "Q8_0": Q8_0}


@dataclass(frozen=True)
class Blocks:
    """A matrix in blocks of `kind`: rows uint8 [N, bytes], and what float16 changes of its scales, relative."""

    kind: str
    rows: np.ndarray
    rounding: float


def kind_of(w: BinaryWeight, wanted: str) -> str:
    """Q1_0 or TQ2_0; `wanted` is auto or one of these in small letters. Weights of two planes are always TQ2_0."""
    return "TQ2_0" if w.planes == 2 or wanted == "tq2_0" else "Q1_0"


def blocks(w: BinaryWeight, kind: str) -> Blocks | str:
    """The signs and scales of `w`, its shifts left out, in blocks of `kind`; or why they do not fit, in words.

    Exact, but for scales that float16 rounds. An `in_scale` fits where it is the same throughout each block.
    """
    width = COLUMNS[kind]
    if not _is_ternary(w):
        return "its planes of signs have different scales, which neither Q1_0 nor TQ2_0 has"
    if w.salient is not None:
        return "it has salient weights of more bits in between, which no GGUF type has"
    if w.in_features % width:
        return f"{kind} has blocks of {width} columns, and K = {w.in_features} is not a multiple of {width}"
    codes, scale = ternary(w)
    columns = w.in_features // w.groups
    d = scale.float().expand(w.out_features, -1).repeat_interleave(columns, dim=1)
    if w.in_scale is not None:
        d = d * w.in_scale[0].float()
    grouped = d.reshape(len(d), -1, width)
    if not bool((grouped == grouped[:, :, :1]).all()):
        if w.in_scale is not None:
            return "a vector multiplies its inputs, which folds into nothing before it"
        return f"{kind} has a scale for {width} columns, and its groups have {columns}"
    exact = grouped[:, :, 0]
    half = exact.half()
    if not bool(half.isfinite().all()) or bool(((half == 0) & (exact != 0)).any()):
        return f"a scale of {float(exact.abs().max()):.3g} is beyond float16, which {kind} has"
    rounding = float(((half.float() - exact).abs() / exact.abs().clamp_min(torch.finfo(torch.float32).tiny)).max())
    pack = _q1_0 if kind == "Q1_0" else _tq2_0
    return Blocks(kind, pack(codes, half).numpy(), rounding)


def _is_ternary(w: BinaryWeight) -> bool:
    one = w.in_scale is None or w.in_scale.shape[0] == 1
    return one and (w.planes == 1 or (w.planes == 2 and torch.equal(w.scale[0], w.scale[1])))


def _bytes(scale: Tensor) -> Tensor:
    """uint8 [N, G, 2] of float16 [N, G]."""
    return scale.contiguous()[..., None].view(torch.uint8)


def _q1_0(codes: Tensor, scale: Tensor) -> Tensor:
    """The inverse of `interop.gguf.q1_0` of codes 0 (−d) and 2 (+d)."""
    bits = np.packbits((codes == 2).reshape(*scale.shape, Q1_0).numpy(), axis=-1, bitorder="little")
    return torch.cat([_bytes(scale), torch.from_numpy(bits)], dim=-1).reshape(len(codes), -1)


def _tq2_0(codes: Tensor, scale: Tensor) -> Tensor:
    """The inverse of `interop.gguf.tq2_0`."""
    parts = codes.reshape(*scale.shape, 2, 4, 32)
    packed = sum(parts[..., i, :] << 2 * i for i in range(4))
    assert isinstance(packed, Tensor)
    return torch.cat([packed.reshape(*scale.shape, -1), _bytes(scale)], dim=-1).reshape(len(codes), -1)


def q8_0(codes: Tensor, scale: Tensor) -> np.ndarray:
    """Q8_0 of scale ∘ codes, int8 [N, K] and float [N]: the codes themselves, and the scales as float16 has them."""
    d = _bytes(scale.half()[:, None].expand(-1, codes.shape[1] // Q8_0))
    return torch.cat([d, codes.reshape(len(codes), -1, Q8_0).view(torch.uint8)], dim=-1).reshape(len(codes), -1).numpy()


def adapter(w: BinaryWeight, factor: Tensor | None = None) -> tuple[Tensor, Tensor] | None:
    """A float32 [r, K] and B float32 [N, r] with B·A the shifts of `w`, exact: one rank a group, one for in_shift.

    `factor` [N] multiplies the rows of in_shift. None if there are no shifts.
    """
    a, b = [], []
    if w.shift is not None:
        a.append(torch.eye(w.groups).repeat_interleave(w.in_features // w.groups, dim=1))
        b.append(w.shift.float())
    if w.in_shift is not None:
        a.append(w.in_shift.float()[None])
        b.append((torch.ones(w.out_features) if factor is None else factor.float())[:, None])
    return (torch.cat(a), torch.cat(b, dim=1)) if a else None


def scaled_rows(layer: PackedLinear, factor: Tensor) -> PackedLinear:
    """diag(factor) · W and factor ∘ bias of a layer that is a matrix, factor float [N]; in_shift is left as it is."""
    w, f = layer.weights[0], factor.float()
    scale = w.scale.float().expand(-1, w.out_features, -1) * f[:, None]
    shift = None if w.shift is None else w.shift.float() * f[:, None]
    bias = None if layer.bias is None else layer.bias.float() * f
    return PackedLinear(replace(w, scale=scale, shift=shift), bias, act_bits=layer.act_bits)
