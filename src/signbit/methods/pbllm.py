"""PB-LLM's partial binarization (arXiv 2310.00034): a few salient weights keep b bits, the rest become binary."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from signbit.errors import OptionError
from signbit.methods.base import (
    MethodOptions,
    ScaleDtype,
    check_choice,
    check_group,
    check_whole,
    group_count,
    store,
)
from signbit.weight import BinaryWeight, Salient

Low = Literal["xnor", "sign", "prune", "2bit", "3bit", "4bit", "no"]
_LOW_BITS = {"2bit": 2, "3bit": 3, "4bit": 4}


@dataclass(frozen=True)
class PbllmOptions(MethodOptions):
    """Salient weights as b-bit codes, the rest by a low quantizer, per row and group of columns.

    Source: PB-LLM, arXiv 2310.00034. Here in its round-to-nearest form: no compensation of the error.
    """

    salient: float = 0.1
    """Share of the weights that keep `salient_bits` bits, 0 to 1 (the published `low_frac` is 1 minus this)."""
    salient_bits: int = 8
    """Bits of a salient weight, 1 to 8."""
    saliency: Literal["hessian", "magnitude"] = "hessian"
    """What makes a weight salient. hessian needs calibration text; magnitude is |w|."""
    low: Low = "xnor"
    """Quantizer of the rest: xnor (mean ± scale), sign ({0, s}), prune (0), 2bit, 3bit (8 levels, published as
    "4bit"), 4bit (16 levels), or no (unchanged: the layer stays dense, which needs --allow-partial)."""
    scale_over: Literal["binarized", "all"] = "all"
    """xnor's mean and scale are taken over all weights with salient ones as 0 (published), or over the binarized ones:
    less error in the weights, yet a far higher perplexity at 50 % salient (docs/results.md)."""
    group: int = -1
    """Columns of one threshold and one scale; it must divide the layer's input width. -1: all columns."""
    gptq: bool = True
    """Compensate the error of each column in those after it (needs calibration text)."""
    scale_dtype: ScaleDtype = "float16"
    """Dtype in which scales and shifts are stored."""

    def __post_init__(self) -> None:
        check_whole("salient_bits", self.salient_bits)
        check_whole("group", self.group)
        if not 0 <= self.salient <= 1:
            raise OptionError(f"salient is {self.salient}; it is a share from 0 to 1 (0.1 keeps 10 %)")
        if not 1 <= self.salient_bits <= 8:
            raise OptionError(f"salient_bits is {self.salient_bits}; 1 to 8 are allowed")
        check_choice("saliency", self.saliency, ("hessian", "magnitude"))
        check_choice("low", self.low, ("xnor", "sign", "prune", *_LOW_BITS, "no"))
        check_choice("scale_over", self.scale_over, ("binarized", "all"))
        check_choice("scale_dtype", self.scale_dtype, ("float16", "bfloat16", "float32"))
        if self.gptq or self.saliency == "hessian":
            raise OptionError(
                "GPTQ compensation and hessian saliency need calibration text, which this version does not take; "
                "use --no-gptq --saliency magnitude (in Python gptq=False, saliency='magnitude')"
            )

    @property
    def packs(self) -> bool:
        return self.low != "no"

    def check(self, in_features: int) -> None:
        check_group(self.group, in_features)

    def binarize(self, weight: Tensor) -> BinaryWeight | Tensor:
        """`weight` float [N, K] → signs, scales, shifts and salient codes; with low="no" a dense matrix."""
        self.check(weight.shape[1])
        w = weight.float()
        salient = salient_mask(w, self.salient, group_count(self.group, w.shape[1]))
        scale, zero, codes = quantize_rows(w, self.salient_bits, self.scale_dtype)
        if self.low == "no":
            kept = scale.float()[:, None] * (codes - zero[:, None])
            return torch.where(salient, kept, w).to(weight.dtype)
        part = Salient.from_mask(salient, codes, scale, zero, self.salient_bits) if bool(salient.any()) else None
        signs, low_scale, shift = self._low(w, ~salient)
        return BinaryWeight.from_signs(
            signs,
            store(low_scale, self.scale_dtype),
            shift=None if shift is None else store(shift, self.scale_dtype, shift=True),
            salient=part,
        )

    def _low(self, w: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Signs [P, N, K] (bool: True is +1), scale [P, N, G] and shift [N, G] of the entries in `mask`."""
        shape = (w.shape[0], group_count(self.group, w.shape[1]), -1)
        grouped, inside = w.reshape(shape), mask.reshape(shape)
        masked = torch.where(inside, grouped, 0.0)
        if self.low == "prune":
            return w[None] >= 0, torch.zeros(1, *shape[:2]), None
        if self.low == "sign":
            # {0, s} is s/2 ± s/2.
            half = masked.clamp_min(0).mean(dim=-1) / 2
            return w[None] > 0, half[None], half
        if self.low == "xnor":
            count = inside.sum(dim=-1).clamp_min(1) if self.scale_over == "binarized" else grouped.shape[-1]
            # The shift that is stored decides the signs and the scale, so that rounding it costs nothing further.
            shift = store(masked.sum(dim=-1) / count, self.scale_dtype, shift=True).float()
            offset = grouped - shift[:, :, None]
            # Published: entries outside the mask count as 0, so they add |0 − mean| each.
            counted = masked - shift[:, :, None] if self.scale_over == "all" else torch.where(inside, offset, 0.0)
            scale = counted.abs().sum(dim=-1) / count
            return (offset >= 0).reshape(1, *w.shape), scale[None], shift
        # A uniform code s·(q − z) is b planes of scale s·2ⁱ/2 and a shift s·((2ᵇ − 1)/2 − z): exact in float32, and
        # but for the rounding of the shift (under 0.1 % of s) in float16.
        # Differs from the published code: each row has its own zero point, where that takes row g's for group g.
        code_bits = _LOW_BITS[self.low]
        top = 2**code_bits - 1
        low, high = masked.amin(dim=-1).clamp_max(0), masked.amax(dim=-1).clamp_min(0)
        step = store((high - low) / top, self.scale_dtype).float()
        divisor = torch.where(step == 0, 1.0, step)
        zero = (-low / divisor).round().clamp(0, top)
        q = ((grouped / divisor[:, :, None]).round() + zero[:, :, None]).clamp(0, top).to(torch.int32)
        planes = torch.stack([q >> i & 1 == 1 for i in range(code_bits)]).reshape(code_bits, *w.shape)
        scales = torch.stack([step * 2**i / 2 for i in range(code_bits)])
        return planes, scales, step * (top / 2 - zero)


def salient_mask(w: Tensor, share: float, groups: int) -> Tensor:
    """True where |w| lies above the block's threshold, the entry at rank floor(n·(1 − share)) of its n magnitudes.

    A block is all rows × one group of columns; the threshold itself is binarized, as published: for distinct values
    n − floor(n·(1 − share)) − 1 entries are salient. A share of 0 leaves none and a share of 1 takes all.
    `w` is float [N, K]; the result is bool [N, K].
    """
    blocks = w.abs().reshape(w.shape[0], groups, -1)
    rank = int(blocks[:, 0].numel() * (1 - share))
    if share in (0, 1):
        return torch.full_like(w, bool(share), dtype=torch.bool)
    mask = torch.zeros_like(blocks, dtype=torch.bool)
    for group in range(groups):
        block = blocks[:, group]
        # float: 1 − 0.1 is 0.9 and a hair, so a rank can reach n only through rounding.
        threshold = block.flatten().kthvalue(min(rank, block.numel() - 1) + 1).values
        mask[:, group] = block > threshold
    return mask.reshape(w.shape)


def quantize_rows(w: Tensor, code_bits: int, dtype: str) -> tuple[Tensor, Tensor, Tensor]:
    """Asymmetric min/max codes of each row, its range including 0: w ≈ scale·(code − zero).

    scale = (max − min)/(2ᵇ − 1), zero = round(−min/scale), code = clamp(round(w/scale) + zero, 0, 2ᵇ − 1).
    `w` float [N, K]; returns scale [N] in `dtype`, zero int32 [N], codes int32 [N, K] for the scale as stored.
    """
    top = 2**code_bits - 1
    low, high = w.amin(dim=1).clamp_max(0), w.amax(dim=1).clamp_min(0)
    stored = store((high - low) / top, dtype)
    step = torch.where(stored == 0, 1.0, stored.float())
    zero = (-low / step).round().clamp(0, top)
    codes = ((w / step[:, None]).round() + zero[:, None]).clamp(0, top)
    return stored, zero.to(torch.int32), codes.to(torch.int32)
