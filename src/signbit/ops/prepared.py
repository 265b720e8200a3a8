"""A matrix in the order that the kernels of its device stream, from which the stored form can be had again."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from signbit import bits
from signbit.bits import Operands
from signbit.ops import layout
from signbit.ops.native import FLOATS


class Prepared(NamedTuple):
    """One matrix in the kernels' order; `stored` gives its operands back.

    `signs`, `scale` and `shift` as in `layout`. Salient values on the CPU: the stored tensors, and `salient_starts` int32
    [N + 1], how many lie before each row; on a GPU packets in `salient_codes`, `salient_starts` counting them, and no
    positions. The other tensors are the stored ones.
    """

    signs: Tensor
    scale: Tensor
    shift: Tensor | None
    in_scale: Tensor | None
    in_shift: Tensor | None
    salient_codes: Tensor | None
    salient_positions: Tensor | None
    salient_counts: Tensor | None
    salient_scale: Tensor | None
    salient_zero: Tensor | None
    salient_starts: Tensor | None
    # rows, columns, groups, planes, sign planes, scale rows, in_scale planes, salient bits, whether their positions are
    # offsets, and the power of two that no input scale exceeds (on a GPU)
    shape: list[int]

    @classmethod
    def of(cls, w: Operands, signs: Tensor, packets: tuple[Tensor, Tensor] | None = None) -> Prepared:
        """`w` with its signs (and salient values in packets) already in the kernels' order, the rest brought into it here."""
        sign_planes, rows, _ = w.signs.shape
        planes, scale_rows, groups = w.scale.shape
        # One row may share its scale with all: only a matrix of one row can be read both ways, and they are the same.
        per_row = scale_rows == rows
        return cls(
            signs, layout.lay_rows(w.scale) if per_row else w.scale.contiguous(),
            None if w.shift is None else layout.lay_rows(w.shift), _contiguous(w.in_scale), _contiguous(w.in_shift),
            packets[0] if packets else _contiguous(w.salient_codes),
            None if packets else _contiguous(w.salient_positions), None if packets else _contiguous(w.salient_counts),
            _contiguous(w.salient_scale), _contiguous(w.salient_zero),
            packets[1] if packets else None if w.salient_positions is None else _starts(w),
            [rows, w.in_features, groups, planes, sign_planes, int(per_row),
             0 if w.in_scale is None else len(w.in_scale), w.salient_bits, int(w.salient_counts is not None), 0],
        )  # fmt: skip

    def stored(self) -> Operands:
        """The operands that `prepare` took, equal but for sign bits under salient positions, which are 0."""
        rows, columns, _, planes, sign_planes, scale_rows, _, salient_bits, *_ = self.shape
        scale = layout.stored_rows(self.scale, rows) if scale_rows else self.scale
        stored_signs = layout.stored_tiles if self.signs.is_cuda else layout.stored_signs
        return Operands(
            stored_signs(self.signs, sign_planes, rows, columns), scale.reshape(planes, -1, scale.shape[-1]),
            None if self.shift is None else layout.stored_rows(self.shift, rows), self.in_scale, self.in_shift,
            *self._stored_salient(), self.salient_scale, self.salient_zero, salient_bits, columns,
        )  # fmt: skip

    def _stored_salient(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Codes, positions, counts."""
        if self.salient_codes is None or self.salient_starts is None or self.salient_positions is not None:
            return self.salient_codes, self.salient_positions, self.salient_counts
        rows, columns, *_, salient_bits, offsets, _ = self.shape
        index, codes = layout.stored_packets(self.salient_codes, self.salient_starts, columns)
        mask = torch.zeros(rows * columns, dtype=torch.bool, device=index.device)
        mask[index] = True
        positions = bits.as_offsets if offsets else bits.as_bitmap
        return bits.pack_codes(codes, salient_bits), *positions(mask.view(rows, columns))


def unsupported(w: Operands, most_columns: int) -> str | None:
    """Why kernels that take up to `most_columns` do not multiply by `w`, or None if they do."""
    groups = w.scale.shape[2]
    floats = {t.dtype for t in (w.scale, w.shift, w.in_scale, w.in_shift, w.salient_scale) if t is not None}
    if groups > 1 and (w.in_features // groups) % layout.WORD_COLUMNS:
        return f"groups of {w.in_features // groups} columns are no multiple of {layout.WORD_COLUMNS}"
    if len(floats) > 1 or not floats <= FLOATS.keys():
        return f"scales of type {', '.join(sorted(map(str, floats)))}"
    if w.in_features > most_columns:
        return f"{w.in_features} columns are more than {most_columns}"
    return None


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _starts(w: Operands) -> Tensor:
    """How many salient values lie before each row: int32 [N + 1]."""
    assert w.salient_positions is not None
    if w.salient_counts is not None:
        counts = w.salient_counts.sum(dim=1, dtype=torch.int32)
    else:
        byte = torch.arange(256, dtype=torch.uint8, device=w.signs.device)[:, None]
        ones = bits.unpack_bits(byte, 8).sum(dim=1).to(torch.int32)
        counts = ones[w.salient_positions.to(torch.int32)].sum(dim=1, dtype=torch.int32)
    return torch.cat([counts.new_zeros(1), counts.cumsum(0, dtype=torch.int32)])
