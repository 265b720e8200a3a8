"""BinaryWeight: what a binarized matrix is."""

from __future__ import annotations

from dataclasses import dataclass
from dataclasses import fields as dataclass_fields

import torch
from torch import Tensor

from signbit import bits
from signbit.errors import ShapeError


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ShapeError(message)


def _tensor_bytes(value: object) -> int:
    parts = (getattr(value, field.name) for field in dataclass_fields(value))  # type: ignore[arg-type]
    return sum(part.numel() * part.element_size() for part in parts if isinstance(part, Tensor))


@dataclass(frozen=True, eq=False)
class Salient:
    """The positions of a matrix that keep b-bit codes, and those codes: Wᵢⱼ = scaleᵢ · (code − zeroᵢ).

    Source: PB-LLM (arXiv 2310.00034). Shapes, with `count` positions in an N × K matrix:
    `codes` uint8 [ceil(count·bits/8)], a stream in row-major order; `positions` uint8, a bitmap [N, ceil(K/8)] or,
    where that is smaller, offsets [count] inside blocks of 256 columns with `counts` uint8 [N, ceil(K/256)];
    `scale` float [N]; `zero` uint8 [N].

    Raises ShapeError if these do not fit together.
    """

    codes: Tensor
    positions: Tensor
    counts: Tensor | None
    scale: Tensor
    zero: Tensor
    bits: int

    @classmethod
    def from_mask(cls, mask: Tensor, codes: Tensor, scale: Tensor, zero: Tensor, bits_: int) -> Salient:
        """Packs the codes (integers [N, K], read where `mask` bool [N, K] is True) and their positions."""
        positions, counts = bits.pack_positions(mask)
        return cls(bits.pack_codes(codes[mask], bits_), positions, counts, scale, zero.to(torch.uint8), bits_)

    def unpack(self, rows: int, columns: int) -> tuple[Tensor, Tensor]:
        """The inverse of `from_mask`: where codes are, bool [N, K], and the codes, uint8 [N, K], 0 elsewhere."""
        index = bits.unpack_positions(self.positions, self.counts, rows, columns)
        mask = torch.zeros(rows * columns, dtype=torch.bool, device=self.positions.device)
        codes = torch.zeros(rows * columns, dtype=torch.uint8, device=self.positions.device)
        mask[index] = True
        codes[index] = bits.unpack_codes(self.codes, index.shape[0], self.bits).to(torch.uint8)
        return mask.view(rows, columns), codes.view(rows, columns)

    def __post_init__(self) -> None:
        _require(1 <= self.bits <= 8, f"salient codes have 1 to 8 bits, not {self.bits}")
        for name in ("codes", "positions", "zero"):
            tensor = getattr(self, name)
            _require(tensor.dtype is torch.uint8, f"salient {name} are uint8, not {tensor.dtype}")
        _require(self.scale.is_floating_point(), f"salient scales are float, not {self.scale.dtype}")
        _require(
            self.scale.shape == self.zero.shape and self.scale.ndim == 1,
            f"salient scale and zero are [N] each, not {list(self.scale.shape)} and {list(self.zero.shape)}",
        )
        if self.counts is None:
            _require(self.positions.ndim == 2, "a salient bitmap has two dimensions [N, ceil(K/8)]")
        else:
            _require(self.counts.dtype is torch.uint8, f"salient counts are uint8, not {self.counts.dtype}")
            _require(self.positions.ndim == 1, "salient offsets have one dimension [count]")

    @property
    def count(self) -> int:
        """How many positions are salient, read from the positions themselves."""
        if self.counts is not None:
            return self.positions.shape[0]
        return int(bits.unpack_bits(self.positions, self.positions.shape[1] * 8, dtype=torch.int32).sum())

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors as they are stored."""
        return _tensor_bytes(self)

    def bitmap(self, rows: int, columns: int) -> Tensor:
        """The positions as uint8 [N, ceil(K/8)] in the layout of the signs, whichever form they are stored in."""
        if self.counts is None:
            return self.positions
        mask = torch.zeros(rows * columns, dtype=torch.bool, device=self.positions.device)
        mask[bits.unpack_positions(self.positions, self.counts, rows, columns)] = True
        return bits.pack_signs(mask.view(rows, columns))

    def check(self, rows: int, columns: int) -> None:
        """Raises ShapeError unless this describes positions of a rows × columns matrix, one code each.

        It reads the positions, so `BinaryWeight.check` calls it once after loading and not at every construction.
        """
        if self.counts is None:
            expected = [rows, -(-columns // 8)]
            _require(list(self.positions.shape) == expected, f"a salient bitmap is {expected} here")
        else:
            expected = [rows, -(-columns // bits.SALIENT_BLOCK)]
            _require(list(self.counts.shape) == expected, f"salient counts are {expected} here")
            _require(
                int(self.counts.sum(dtype=torch.int64)) == self.positions.shape[0],
                f"salient counts add up to {int(self.counts.sum(dtype=torch.int64))}, "
                f"but there are {self.positions.shape[0]} offsets",
            )
        index = bits.unpack_positions(self.positions, self.counts, rows, columns)
        in_order = index.numel() == 0 or bool((index.diff() > 0).all() and index[-1] < rows * columns)
        _require(in_order, "salient positions do not ascend inside the matrix")
        need = -(-index.shape[0] * self.bits // 8)
        _require(
            self.codes.shape[0] == need,
            f"{index.shape[0]} salient codes of {self.bits} bits lie in {need} bytes, not in {self.codes.shape[0]}",
        )


@dataclass(frozen=True, eq=False)
class BinaryWeight:
    """A binarized N × K matrix, immutable: what every method ends in.

    W = Σₚ signₚ ∘ expand(scaleₚ) · diag(in_scaleₚ) + expand(shift) + 1·in_shiftᵀ, salient values put in place
    (`bits.dense` is the definition). One plane is the 1-bit form of FBI-LLM (arXiv 2407.07093), OneBit (2402.11295),
    BitNet (2310.11453) and PB-LLM (2310.00034); two planes make ternary exact, b planes any uniform b-bit code.

    Shapes: `signs` uint8 [P or 1, N, ceil(K/8)] (bit 1 = +1, least significant bit first, pad bits 0);
    `scale` float [P, N or 1, G], always a multiplier; `shift` float [N, G]; `in_scale` float [P or 1, K];
    `in_shift` float [K]; `in_features` is K, which the padded signs do not tell. G divides K.

    Raises ShapeError if the parts do not fit together.
    """

    signs: Tensor
    scale: Tensor
    in_features: int
    shift: Tensor | None = None
    in_scale: Tensor | None = None
    in_shift: Tensor | None = None
    salient: Salient | None = None

    @classmethod
    def from_signs(cls, values: Tensor, scale: Tensor, **parts: Tensor | Salient | None) -> BinaryWeight:
        """Packs the signs of `values` (float or bool [N, K] or [P, N, K]; sign(0) = +1) beside the other parts.

        The bits at salient positions, which mean nothing, are 0: kernels rely on it, and so one weight has one form.
        """
        planes = values if values.ndim == 3 else values[None]
        signs, salient = bits.pack_signs(planes), parts.get("salient")
        if isinstance(salient, Salient):
            signs = signs & ~salient.bitmap(*planes.shape[1:])
        return cls(signs, scale, values.shape[-1], **parts)  # type: ignore[arg-type]

    def __post_init__(self) -> None:
        _require(self.signs.dtype is torch.uint8, f"signs are packed in uint8, not {self.signs.dtype}")
        _require(self.signs.ndim == 3, f"signs are [P or 1, N, ceil(K/8)], not {list(self.signs.shape)}")
        _require(self.scale.ndim == 3, f"scale is [P, N or 1, G], not {list(self.scale.shape)}")
        width = -(-self.in_features // 8)
        _require(
            self.signs.shape[2] == width,
            f"{self.in_features} signs a row lie in {width} bytes, not in {self.signs.shape[2]}",
        )
        planes, rows, groups = self.scale.shape
        _require(self.signs.shape[0] in (1, planes), f"{self.signs.shape[0]} sign planes cannot serve {planes} scales")
        _require(rows in (1, self.out_features), f"scale has {rows} rows: 1 or {self.out_features} are allowed")
        _require(
            groups > 0 and self.in_features % groups == 0,
            f"{groups} groups do not divide {self.in_features} columns",
        )
        expected = {
            "shift": [[self.out_features, groups]],
            "in_scale": [[1, self.in_features], [planes, self.in_features]],
            "in_shift": [[self.in_features]],
        }
        for name in ("scale", *expected):
            tensor: Tensor | None = getattr(self, name)
            if tensor is None:
                continue
            _require(tensor.is_floating_point(), f"{name} is float, not {tensor.dtype}")
            allowed = expected.get(name)
            _require(
                allowed is None or list(tensor.shape) in allowed,
                f"{name} is {list(tensor.shape)}: {' or '.join(map(str, allowed or []))} is allowed",
            )

    @property
    def out_features(self) -> int:
        """N."""
        return self.signs.shape[1]

    @property
    def planes(self) -> int:
        """P, the number of scale planes."""
        return self.scale.shape[0]

    @property
    def groups(self) -> int:
        """G, the number of groups along K; 1 is one scale a row."""
        return self.scale.shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors as they are stored: signs with their padding, scales, shifts, salient parts."""
        return _tensor_bytes(self) + (self.salient.nbytes if self.salient is not None else 0)

    @property
    def bits_per_weight(self) -> float:
        """8 · nbytes / (N·K): true bits, counted from bytes and not by formula."""
        return 8 * self.nbytes / (self.out_features * self.in_features)

    def check(self) -> None:
        """Raises ShapeError if values (not only shapes) are impossible: set pad bits, salient positions out of place."""
        used = self.in_features % 8
        if used:
            _require(not bool((self.signs[..., -1] >> used).any()), "pad bits after the last column are not 0")
        if self.salient is not None:
            self.salient.check(self.out_features, self.in_features)

    def operands(self) -> bits.Operands:
        """The tensors in the order in which `signbit.ops` takes them."""
        plain = (self.signs, self.scale, self.shift, self.in_scale, self.in_shift)
        s = self.salient
        if s is None:
            return bits.Operands(*plain, None, None, None, None, None, 0, self.in_features)
        return bits.Operands(*plain, s.codes, s.positions, s.counts, s.scale, s.zero, s.bits, self.in_features)

    def to_dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrix this stands for: `dtype` [N, K], computed in `dtype` by `bits.dense`."""
        return bits.dense(self.operands(), dtype)
