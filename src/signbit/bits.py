"""How signs and codes lie in bytes, and the dense matrix that the bytes mean.

Everything below works on plain tensors, so that `weight` (the value) and `ops` (the multiplication) share one
definition without knowing each other. Dims: N out features, K in features, P planes, G groups along K.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from signbit.errors import ShapeError

#: Columns that one offset byte of a salient position addresses.
SALIENT_BLOCK = 256


class Operands(NamedTuple):
    """The tensors of one binarized matrix, in the order in which the custom ops take them (see `dense`)."""

    signs: Tensor  # uint8 [P or 1, N, ceil(K/8)]
    scale: Tensor  # float [P, N or 1, G]
    shift: Tensor | None  # float [N, G]
    in_scale: Tensor | None  # float [P or 1, K]
    in_shift: Tensor | None  # float [K]
    salient_codes: Tensor | None  # uint8 [ceil(count*bits/8)]
    salient_positions: Tensor | None  # uint8 bitmap [N, ceil(K/8)], or uint8 offsets [count]
    salient_counts: Tensor | None  # uint8 [N, ceil(K/256)], with offsets only
    salient_scale: Tensor | None  # float [N]
    salient_zero: Tensor | None  # uint8 [N]
    salient_bits: int
    in_features: int


def pack_signs(values: Tensor) -> Tensor:
    """Signs as bytes: bit k%8 of byte k//8 is 1 where values[..., k] >= 0, least significant bit first, pad bits 0.

    sign(0) = +1, and so is sign(-0.0). `values` is float, int or bool [..., K] (bool: True is +1);
    the result is uint8 [..., ceil(K/8)].
    """
    positive = values if values.dtype is torch.bool else values >= 0
    pad = -positive.shape[-1] % 8
    positive = F.pad(positive, (0, pad)) if pad else positive
    grouped = positive.reshape(*positive.shape[:-1], -1, 8).to(torch.uint8)
    powers = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=values.device)
    return (grouped * powers).sum(dim=-1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, length: int, low: float = 0.0, dtype: torch.dtype = torch.float32) -> Tensor:
    """The inverse of `pack_signs`: 1 for a set bit and `low` for a clear one, of the first `length` bits of each row.

    `packed` is uint8 [..., ceil(length/8)]; the result is `dtype` [..., length]. One table row a byte: eight values
    are copied at once, several times faster than shifting bit by bit.
    """
    if packed.shape[-1] != (length + 7) // 8:
        raise ShapeError(f"{length} bits lie in {(length + 7) // 8} bytes, not in {packed.shape[-1]}")
    byte = torch.arange(256, device=packed.device)[:, None]
    bit = byte >> torch.arange(8, device=packed.device) & 1
    table = torch.where(bit == 1, 1.0, low).to(dtype)
    rows = F.embedding(packed.to(torch.int32), table)
    return rows.reshape(*packed.shape[:-1], -1)[..., :length]


def unpack_signs(packed: Tensor, in_features: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Signs as +1 and -1: `dtype` [..., K] from uint8 [..., ceil(K/8)]."""
    return unpack_bits(packed, in_features, low=-1.0, dtype=dtype)


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """A stream of b-bit codes, least significant bit first, code i at bits [i*b, (i+1)*b) of the stream.

    `codes` is an integer tensor [count] with values in [0, 2**bits); the result is uint8 [ceil(count*bits/8)].
    """
    if bits == 8:
        return codes.to(torch.uint8)
    shifts = torch.arange(bits, device=codes.device)
    stream = (codes.to(torch.int32)[:, None] >> shifts & 1).bool()
    return pack_signs(stream.reshape(-1))


def unpack_codes(packed: Tensor, count: int, bits: int) -> Tensor:
    """The inverse of `pack_codes`: int32 [count]."""
    if bits == 8:
        return packed[:count].to(torch.int32)
    stream = unpack_bits(packed, packed.shape[0] * 8, dtype=torch.int32)[: count * bits].reshape(count, bits)
    return (stream << torch.arange(bits, dtype=torch.int32, device=packed.device)).sum(dim=-1, dtype=torch.int32)


def pack_positions(mask: Tensor) -> tuple[Tensor, Tensor | None]:
    """Salient positions in the smaller of two forms, in row-major order.

    `mask` is bool [N, K]. Returns (bitmap uint8 [N, ceil(K/8)], None), or (offsets uint8 [count],
    counts uint8 [N, ceil(K/256)]): the column inside its block of 256, and how many each block of each row has.
    A block that is salient throughout does not fit a uint8 count, so such a matrix has a bitmap.
    """
    rows, columns = mask.shape
    counts = _blocks(mask).sum(dim=-1)
    total = int(counts.sum())
    if total + counts.numel() < rows * -(-columns // 8) and int(counts.max()) < SALIENT_BLOCK:
        return as_offsets(mask)
    return as_bitmap(mask)


def as_offsets(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Offsets and counts of `pack_positions`."""
    blocks = _blocks(mask)
    offsets = blocks.reshape(-1, SALIENT_BLOCK).nonzero()[:, 1]
    return offsets.to(torch.uint8), blocks.sum(dim=-1).to(torch.uint8)


def as_bitmap(mask: Tensor) -> tuple[Tensor, None]:
    """Bitmap of `pack_positions`, and no counts."""
    return pack_signs(mask), None


def _blocks(mask: Tensor) -> Tensor:
    rows, columns = mask.shape
    blocks = -(-columns // SALIENT_BLOCK)
    return F.pad(mask, (0, blocks * SALIENT_BLOCK - columns)).reshape(rows, blocks, SALIENT_BLOCK)


def unpack_positions(positions: Tensor, counts: Tensor | None, rows: int, columns: int) -> Tensor:
    """The inverse of `pack_positions`: int64 [count], ascending indices into the flattened [N, K] matrix."""
    if counts is None:
        return unpack_bits(positions, columns, dtype=torch.uint8).reshape(-1).nonzero()[:, 0]
    blocks = counts.shape[1]
    block = torch.arange(rows * blocks, device=counts.device).repeat_interleave(
        counts.reshape(-1).long(), output_size=positions.shape[0]
    )
    return block // blocks * columns + block % blocks * SALIENT_BLOCK + positions


def salient_integers(w: Operands) -> tuple[Tensor, Tensor, Tensor]:
    """Salient positions and values before scaling: flat index int64, row int64, code - zero int32, each [count]."""
    assert w.salient_codes is not None and w.salient_positions is not None and w.salient_zero is not None
    index = unpack_positions(w.salient_positions, w.salient_counts, w.signs.shape[1], w.in_features)
    row = index // w.in_features
    codes = unpack_codes(w.salient_codes, index.shape[0], w.salient_bits)
    return index, row, codes - w.salient_zero.to(torch.int32)[row]


def dense(w: Operands, dtype: torch.dtype = torch.float32) -> Tensor:
    """The matrix that the bytes mean: `dtype` [N, K].

    W = Σₚ signₚ ∘ expand(scaleₚ) · diag(in_scaleₚ) + expand(shift) + 1·in_shiftᵀ, added in this order and in `dtype`;
    then the salient values salient_scaleᵢ·(code − zeroᵢ) take the place of what stands at their positions.
    """
    rows, columns = w.signs.shape[1], w.in_features
    groups = w.scale.shape[2]
    total: Tensor | None = None
    for plane in range(w.scale.shape[0]):
        signs = unpack_signs(w.signs[min(plane, w.signs.shape[0] - 1)], columns, dtype)
        term = (signs.reshape(rows, groups, -1) * w.scale[plane].to(dtype)[:, :, None]).reshape(rows, columns)
        if w.in_scale is not None:
            term = term * w.in_scale[min(plane, w.in_scale.shape[0] - 1)].to(dtype)
        total = term if total is None else total + term
    assert total is not None
    if w.shift is not None:
        total = (total.reshape(rows, groups, -1) + w.shift.to(dtype)[:, :, None]).reshape(rows, columns)
    if w.in_shift is not None:
        total = total + w.in_shift.to(dtype)
    if w.salient_codes is not None:
        assert w.salient_scale is not None
        index, row, integers = salient_integers(w)
        values = w.salient_scale.to(dtype)[row] * integers.to(dtype)
        total = total.contiguous().view(-1).index_put((index,), values).view(rows, columns)
    return total
