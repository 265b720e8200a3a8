"""PB-LLM's partial binarization (arXiv 2310.00034): a few salient weights keep b bits, the rest become binary."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from signbit.errors import OptionError
from signbit.linear import BinaryLinear, PackedLinear
from signbit.methods.base import (
    MethodOptions,
    Needs,
    ScaleDtype,
    check_choice,
    check_group,
    check_whole,
    group_count,
    latent_of,
    only_weight,
    store,
    straight_through,
)
from signbit.methods.gptq import Factor, Grid, Moments, descend, matched_to_dense, sweep
from signbit.weight import BinaryWeight, Salient

Low = Literal["xnor", "sign", "prune", "2bit", "3bit", "4bit", "no"]
Saliency = Literal["hessian", "hessian-diagonal", "hessian-paper", "magnitude", "quantiles"]
#: What the weights alone tell.
_OF_WEIGHTS = ("magnitude", "quantiles")
_LOW_BITS = {"2bit": 2, "3bit": 3, "4bit": 4}


@dataclass(frozen=True)
class PbllmOptions(MethodOptions):
    """Salient weights as b-bit codes, the rest by a low quantizer, against the second moments of a layer's inputs.

    Source: PB-LLM, arXiv 2310.00034. Differs from the paper in its defaults, which measure better at equal bits
    (docs/results.md): a layer is matched to the dense model (`match`), its inputs are measured behind the quantized
    layers before it (`sequential`), and scales, signs and codes are refined after the sweep (`refine`). The method
    `pb-gptq` has the published defaults.
    """

    salient: float = 0.1
    """Share of the weights that keep `salient_bits` bits, 0 to 1 (the published `low_frac` is 1 minus this)."""
    salient_bits: int = 8
    """Bits of a salient weight, 1 to 8."""
    saliency: Saliency = "hessian-diagonal"
    """What makes a weight salient: hessian-diagonal is w²/[H⁻¹]ⱼⱼ, the error that binarizing it to 0 costs once the others
    make up for it; hessian w²/Uⱼⱼ², U the Cholesky factor of H⁻¹ (the published code); hessian-paper w²/[H⁻¹]ⱼⱼ²;
    magnitude |w|, and quantiles, as many of the least as of the largest w (the published training), need no calibration."""
    low: Low = "xnor"
    """Quantizer of the rest: xnor (mean ± scale), sign ({0, s}), prune (0), 2bit, 3bit (8 levels, published as
    "4bit"), 4bit (16 levels), or no (unchanged: the layer stays dense, which needs --allow-partial)."""
    scale_over: Literal["binarized", "all"] = "all"
    """xnor's first mean and scale are taken over all weights with salient ones as 0 (published), or over the binarized
    ones: less error in the weights, more in the model, unless `refine` fits them anew (docs/results.md)."""
    group: int = -1
    """Columns of one threshold and one scale; it must divide the layer's input width. -1: all columns."""
    gptq: bool = True
    """Compensate the error of each column in those after it (needs calibration text)."""
    block: int = 128
    """Columns that GPTQ compensates one by one before the rest is updated; any number, the result hardly depends on
    it."""
    damping: float = 0.01
    """Added to the diagonal of the Hessian, as a share of its mean."""
    refine: int = 4
    """Rounds after the sweep: xnor's scale and mean are fitted by least squares under the Hessian, then coordinate
    descent chooses signs and codes anew. 0: none (published)."""
    match: Literal["dense", "prefix"] = "dense"
    """What a layer's output is matched to: the dense model's, or that of its own weights on the inputs that the
    quantized layers before it give (prefix, published)."""
    sequential: bool = True
    """Measure a layer's inputs behind the quantized layers of its own block, instead of all of a block at once."""
    scale_dtype: ScaleDtype = "float16"
    """Dtype in which scales and shifts are stored."""
    scale: Literal["row", "matrix", "learned"] = "row"
    """Scale of the binarized weights in training: mean |w| over each row's, or group's (the paper's optimal scale), over
    all (the published code), or learned, with a shift, from their start. A packed start with shifts is learned on."""

    latent_size: float = 0.02
    """Mean magnitude that a layer's latents are brought to where the scale is learned, so that one learning rate suits
    models whose weights differ in size (with row and matrix their size is the scale); 0: as they are."""

    TRAINING: ClassVar[tuple[str, ...]] = ("scale", "latent_size")

    @classmethod
    def training_defaults(cls) -> dict[str, Any]:
        return {"saliency": "magnitude", "gptq": False, "refine": 0}

    def __post_init__(self) -> None:
        for name in ("salient_bits", "group", "block", "refine"):
            check_whole(name, getattr(self, name))
        if not 0 <= self.salient <= 1:
            raise OptionError(f"salient is {self.salient}; it is a share from 0 to 1 (0.1 keeps 10 %)")
        if not 1 <= self.salient_bits <= 8:
            raise OptionError(f"salient_bits is {self.salient_bits}; 1 to 8 are allowed")
        if self.block < 1 or self.refine < 0:
            raise OptionError(f"block is {self.block} and refine {self.refine}; at least 1 and 0 are needed")
        if not 0 <= self.latent_size < math.inf:
            raise OptionError(f"latent_size is {self.latent_size}; a magnitude such as 0.02 is needed, or 0")
        if not 0 < self.damping < 100:
            raise OptionError(f"damping is {self.damping}; a share of the mean diagonal such as 0.01 is needed")
        check_choice("saliency", self.saliency, ("hessian", "hessian-diagonal", "hessian-paper", *_OF_WEIGHTS))
        check_choice("low", self.low, ("xnor", "sign", "prune", *_LOW_BITS, "no"))
        check_choice("scale_over", self.scale_over, ("binarized", "all"))
        check_choice("match", self.match, ("dense", "prefix"))
        check_choice("scale_dtype", self.scale_dtype, ("float16", "bfloat16", "float32"))
        check_choice("scale", self.scale, ("row", "matrix", "learned"))

    @property
    def packs(self) -> bool:
        return self.low != "no"

    @property
    def needs(self) -> Needs:
        moments = self.gptq or self.saliency not in _OF_WEIGHTS
        return Needs(moments, cross=self.gptq and self.match == "dense", sequential=moments and self.sequential)

    def rounded(self) -> PbllmOptions:
        return replace(self, gptq=False, saliency="magnitude")

    def check(self, in_features: int) -> None:
        check_group(self.group, in_features)

    def target(self, weight: Tensor, moments: Moments | None = None) -> Tensor:
        w = super().target(weight, moments)
        if moments is None or not self.needs.moments:
            return w
        factor = moments.factor(self.damping)
        w = torch.where(factor.dead, 0.0, w)  # nothing reaches these columns, so they cost no bits
        return matched_to_dense(w, moments, factor) if self.match == "dense" else w

    def binarize(self, weight: Tensor, moments: Moments | None = None) -> BinaryWeight | Tensor:
        """`weight` float [N, K] → signs, scales, shifts and salient codes; with low="no" a dense matrix."""
        self.check(weight.shape[1])
        if self.needs.moments and moments is None:
            raise OptionError(
                "GPTQ compensation and hessian saliency need calibration text: give --calibration "
                "c4|wikitext2|ptb|FILE|self, or --no-gptq --saliency magnitude for round to nearest"
            )
        w = self.target(weight, moments)
        factor = moments.factor(self.damping) if moments is not None and self.needs.moments else None
        salient = self._salient(w, factor)
        levels = _Levels(self, w, salient)
        if not self.gptq or factor is None:
            return levels.encode(levels.grid.nearest(w, slice(None)))
        q = sweep(w, factor, levels.grid, self.block)
        if self.refine:
            q = levels.fit(w, q, factor.hessian)
        for _ in range(self.refine):
            q = descend(w, q, factor.hessian, levels.grid, self.block)
            q = levels.fit(w, q, factor.hessian)
        return levels.encode(q)

    def _salient(self, w: Tensor, factor: Factor | None) -> Tensor:
        """True for the weights that keep `salient_bits` bits, bool [N, K]."""
        groups = group_count(self.group, w.shape[1])
        if self.saliency == "quantiles":
            return two_sided_mask(w, self.salient, groups)
        if self.saliency == "magnitude" or factor is None:
            scores = w.abs()
        elif self.saliency == "hessian":
            scores = (w / factor.upper.diagonal()).square()
        elif self.saliency == "hessian-diagonal":
            scores = w.square() / factor.inverse_diagonal
        else:
            scores = (w / factor.inverse_diagonal).square()
        return salient_mask(scores, self.salient, groups)

    def salient_of(self, weight: Tensor) -> Tensor:
        """The salient weights of `weight` float [N, K] as itself tells, bool [N, K]; raises OptionError if it cannot."""
        if self.saliency not in _OF_WEIGHTS:
            raise OptionError(
                f"saliency {self.saliency} needs calibration, which training has not: give --masks PTQ_DIR, a directory of "
                "signbit quantize whose salient weights are taken, or start from it, or --saliency magnitude|quantiles"
            )
        return self._salient(weight.float(), None)

    def sized(self, latent: Tensor, salient: Tensor) -> Tensor:
        """`latent` [N, K] times what makes `latent_size` of the mean magnitude of those that are not `salient`."""
        mean = latent.abs()[~salient].mean()
        return latent * (self.latent_size / mean) if self.latent_size and mean > 0 else latent


@dataclass(frozen=True)
class PbGptqOptions(PbllmOptions):
    """PB-GPTQ as PB-LLM's authors published it: one sweep, scales diluted by the salient entries, inputs a block.

    Source: PB-LLM, arXiv 2310.00034, and its code (gptq_pb/). All options of pbllm, with the published defaults.
    Differs from the published code: scales are rounded to float16, as they are stored; each row of 2bit and 4bit codes
    has its own zero point; any block size fits any group.
    """

    saliency: Saliency = "hessian"
    """What makes a weight salient; the published code has hessian, w²/Uⱼⱼ², and magnitude."""
    refine: int = 0
    """Rounds of refinement after the sweep; the published code has none."""
    match: Literal["dense", "prefix"] = "prefix"
    """What a layer's output is matched to; published: its own weights on the inputs of the quantized prefix."""
    sequential: bool = False
    """Measure a layer's inputs behind the quantized layers of its own block; published: all of a block at once."""


class _Levels:
    """The grid of a matrix, how it is chosen, and the packed form of a matrix on it.

    Scale and shift [N, G] are the values as they are stored, so that rounding costs nothing after the choice.
    """

    def __init__(self, options: PbllmOptions, w: Tensor, salient: Tensor) -> None:
        self.options = options
        self.groups = group_count(options.group, w.shape[1])
        self.width = w.shape[1] // self.groups
        step, zero = row_codes(w, options.salient_bits, options.scale_dtype)
        self.scale, self.shift, low_zero = self._first(w, salient)
        kinds: dict[str, Any] = {"xnor": "two", "sign": "above", "prune": "zero", "no": "free"}
        self.grid = Grid(
            salient, step, zero, 2**options.salient_bits - 1, kinds.get(options.low, "codes"), self._over(self.scale),
            self._over(torch.zeros_like(self.scale) if self.shift is None else self.shift),
            None if low_zero is None else self._over(low_zero), 2 ** _LOW_BITS.get(options.low, 0) - 1,
        )  # fmt: skip

    def _first(self, w: Tensor, salient: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Scale, shift and zero point [N, G] of the entries that are not salient, by the low quantizer's formula."""
        options = self.options
        grouped, inside = w.reshape(w.shape[0], self.groups, -1), ~salient.reshape(w.shape[0], self.groups, -1)
        masked = torch.where(inside, grouped, 0.0)
        if options.low in _LOW_BITS:
            # Differs from the published code: each row has its own zero point, where that takes row g's for group g.
            top = 2 ** _LOW_BITS[options.low] - 1
            least, most = masked.amin(dim=-1).clamp_max(0), masked.amax(dim=-1).clamp_min(0)
            scale = self._store((most - least) / top)
            return scale, None, (-least / torch.where(scale == 0, 1.0, scale)).round().clamp(0, top)
        if options.low == "sign":
            # {0, s} is s/2 ± s/2.
            half = self._store(masked.clamp_min(0).mean(dim=-1) / 2)
            return half, half, None
        if options.low == "xnor":
            count = inside.sum(dim=-1).clamp_min(1) if options.scale_over == "binarized" else grouped.shape[-1]
            shift = self._store(masked.sum(dim=-1) / count, shift=True)
            # Published: entries outside the mask count as 0, so they add |0 − mean| each.
            offset = masked - shift[:, :, None]
            counted = offset if options.scale_over == "all" else torch.where(inside, offset, 0.0)
            return self._store(counted.abs().sum(dim=-1) / count), shift, None
        return torch.zeros(masked.shape[:2], device=w.device), None, None

    def _store(self, values: Tensor, shift: bool = False) -> Tensor:
        return store(values, self.options.scale_dtype, shift).float()

    def _over(self, values: Tensor) -> Tensor:
        """[N, G] → [N, 1] or [N, K]."""
        return values if self.groups == 1 else values.repeat_interleave(self.width, dim=1)

    def fit(self, w: Tensor, q: Tensor, hessian: Tensor) -> Tensor:
        """Fits scale and shift of xnor to fixed signs and codes; returns Q with them. Other quantizers stay.

        Least squares under the Hessian, per row: with R = W − salient part, and for each group g the columns
        B_g = signs and M_g = ones of its binarized entries, (s, μ) solves [B M]ᵀ H [B M] (s, μ) = [B M]ᵀ H R.
        """
        if self.options.low != "xnor":
            return q
        salient = self.grid.salient
        inside = (~salient).float()
        signs = torch.where(self.grid.positive(q), inside, -inside)
        rest = (w - torch.where(salient, q, 0.0)) @ hessian
        solved = torch.cat(
            [
                self._least_squares(some, ones, right, hessian)
                for some, ones, right in zip(signs.split(1024), inside.split(1024), rest.split(1024), strict=True)
            ]
        )
        scale, shift = self._store(solved[:, 0]), self._store(solved[:, 1], shift=True)
        fitted = torch.where(salient, q, self._over(shift) + self._over(scale) * signs)
        self.scale, self.shift = scale.abs(), shift  # a scale below 0 turns the signs over
        self.grid = replace(self.grid, scale=self._over(self.scale), shift=self._over(self.shift))
        return fitted

    def _least_squares(self, signs: Tensor, inside: Tensor, rest: Tensor, hessian: Tensor) -> Tensor:
        """Scale and shift float32 [n, 2, G] of n rows; `rest` is R·H."""
        rows, groups = len(signs), self.groups

        def by_group(values: Tensor) -> Tensor:
            return values.reshape(rows, groups, -1).sum(dim=-1)

        normal = torch.empty(rows, 2 * groups, 2 * groups, dtype=torch.float64, device=signs.device)
        for group in range(groups):
            columns = slice(group * self.width, (group + 1) * self.width)
            for place, part in ((group, signs), (groups + group, inside)):
                image = part[:, columns] @ hessian[columns]
                normal[:, place, :groups] = by_group(image * signs)
                normal[:, place, groups:] = by_group(image * inside)
        right = torch.cat([by_group(rest * signs), by_group(rest * inside)], dim=1).double()
        diagonal = normal.diagonal(dim1=1, dim2=2)
        # A ridge far below float32's step: it keeps a group with equal signs, or without binarized entries, solvable.
        diagonal += 1e-9 * diagonal.mean(dim=1, keepdim=True)
        diagonal += (diagonal == 0).double()
        solved: Tensor = torch.linalg.solve(normal, right)
        return solved.float().reshape(rows, 2, groups)

    def encode(self, q: Tensor) -> BinaryWeight | Tensor:
        """The packed form of Q, whose entries are values of this grid; the dense Q where low is "no"."""
        options, grid = self.options, self.grid
        if options.low == "no":
            return q
        codes = (q / grid.code_step).round() + grid.code_zero
        salient = None
        if bool(grid.salient.any()):
            step, zero = grid.code_step[:, 0].to(getattr(torch, options.scale_dtype)), grid.code_zero[:, 0]
            salient = Salient.from_mask(grid.salient, codes.to(torch.int32), step, zero, options.salient_bits)
        scale, shift = self.scale, self.shift
        if options.low in _LOW_BITS:
            # A uniform code s·(q − z) is b planes of scale s·2ⁱ/2 and a shift s·((2ᵇ − 1)/2 − z): exact in float32,
            # and but for the rounding of the shift (under 0.1 % of s) in float16.
            assert grid.zero is not None
            divisor = torch.where(grid.scale == 0, 1.0, grid.scale)
            number = ((q / divisor).round() + grid.zero).clamp(0, grid.low_top).to(torch.int32)
            planes = torch.stack([number >> i & 1 == 1 for i in range(_LOW_BITS[options.low])])
            zero = grid.zero.reshape(q.shape[0], self.groups, -1)[:, :, 0]
            shift = scale * (grid.low_top / 2 - zero)
            scale = torch.stack([scale * 2**i / 2 for i in range(len(planes))])
        else:
            planes, scale = grid.positive(q)[None], scale[None]
        return BinaryWeight.from_signs(
            planes,
            store(scale, options.scale_dtype),
            shift=None if shift is None else store(shift, options.scale_dtype, shift=True),
            salient=salient,
        )


def salient_mask(scores: Tensor, share: float, groups: int) -> Tensor:
    """True where a score lies above its block's threshold, the entry at rank floor(n·(1 − share)) of its n scores.

    A block is all rows × one group of columns; the threshold itself is binarized, as published: for distinct scores
    n − floor(n·(1 − share)) − 1 entries are salient. A share of 0 leaves none and a share of 1 takes all. `scores` is
    float [N, K], at least 0; the result is bool [N, K].
    """
    if share in (0, 1):
        return torch.full_like(scores, bool(share), dtype=torch.bool)
    blocks = scores.reshape(scores.shape[0], groups, -1)
    mask = torch.zeros_like(blocks, dtype=torch.bool)
    for group in range(groups):
        block = blocks[:, group]
        # float: 1 − 0.1 is 0.9 and a hair, so a rank can reach n only through rounding.
        rank = min(int(block.numel() * (1 - share)), block.numel() - 1)
        mask[:, group] = block > block.flatten().kthvalue(rank + 1).values
    return mask.reshape(scores.shape)


def two_sided_mask(weight: Tensor, share: float, groups: int) -> Tensor:
    """True for the floor(n·share/2) least and as many largest of a block's n entries, by their signed values.

    A block is all rows × one group of columns. Source: PB-LLM (arXiv 2310.00034), its code's quant/outlier_quantizer.py.
    `weight` is float [N, K], the result bool [N, K]. Differs from the published code: both ends have as many entries, and
    a share that rounds to none takes none, where that fails.
    """
    if share in (0, 1):
        return torch.full_like(weight, bool(share), dtype=torch.bool)
    blocks = weight.reshape(weight.shape[0], groups, -1)
    mask = torch.zeros_like(blocks, dtype=torch.bool)
    for group in range(groups):
        block = blocks[:, group]
        count = int(block.numel() * share / 2)
        if count:
            low, high = (block.flatten().kthvalue(rank).values for rank in (count + 1, block.numel() - count))
            mask[:, group] = (block < low) | (block > high)
    return mask.reshape(weight.shape)


def row_codes(w: Tensor, code_bits: int, dtype: str) -> tuple[Tensor, Tensor]:
    """Step and zero point [N, 1] of asymmetric min/max codes of each row, its range including 0: w ≈ step·(code − zero).

    step = (max − min)/(2ᵇ − 1) as stored in `dtype` (1 for a row of zeros), zero = clamp(round(−min/step), 0, 2ᵇ − 1).
    """
    top = 2**code_bits - 1
    low, high = w.amin(dim=1, keepdim=True).clamp_max(0), w.amax(dim=1, keepdim=True).clamp_min(0)
    stored = store((high - low) / top, dtype).float()
    step = torch.where(stored == 0, 1.0, stored)
    return step, (-low / step).round().clamp(0, top)


class PbllmLinear(BinaryLinear):
    """y = x · W̃ᵀ + bias; W̃ᵢⱼ is stepᵢ·(code − zeroᵢ) where it is salient, which nothing changes, else s·sign(Wᵢⱼ) + μ.

    s is mean |W| over the binarized weights of a row's group or of the matrix, a constant to autograd, and μ is 0; or both
    are parameters (`scale` learned). With G = dL/dW̃: dW = s ∘ G where binarized, 0 where salient; ds = Σ G ∘ sign(W) and
    dμ = Σ G over the binarized weights of a group. Source: PB-LLM (arXiv 2310.00034), section 3.4, and its code's
    quant/outlier_quantizer.py. `weight` float [N, K]; `salient` bool and `codes` uint8 [N, K], `step` float32 and `zero`
    uint8 [N]; `scale` and `shift` float [N, G], None unless learned; x float [..., K], y float [..., N].
    Differs from the published code: salient codes flip no sign (its 8-bit function wraps negative numbers round), only
    they are rounded and not the latents too, and a scale is that of the latents in evaluation as well.
    """

    salient: Tensor
    codes: Tensor
    step: Tensor
    zero: Tensor
    scale: nn.Parameter | None
    shift: nn.Parameter | None

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        options: PbllmOptions,
        salient: Tensor,
        codes: Tensor,
        step: Tensor,
        zero: Tensor,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach().clone())
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())
        self.register_parameter("scale", None if scale is None else nn.Parameter(scale.detach().clone()))
        self.register_parameter("shift", None if shift is None else nn.Parameter(shift.detach().clone()))
        for name, part in (("salient", salient), ("codes", codes), ("step", step), ("zero", zero)):
            self.register_buffer(name, part)
        self.groups = group_count(options.group, weight.shape[1])
        self.options = options

    @classmethod
    def start(cls, weight: Tensor, bias: Tensor | None, options: MethodOptions) -> PbllmLinear:
        assert isinstance(options, PbllmOptions)
        options.check(weight.shape[1])
        return cls.with_salient(weight, bias, options.salient_of(weight), options)

    @classmethod
    def with_salient(cls, weight: Tensor, bias: Tensor | None, salient: Tensor, options: MethodOptions) -> PbllmLinear:
        assert isinstance(options, PbllmOptions)
        if options.low != "xnor":
            raise OptionError(
                f"low {options.low} is not trained; the weights that are not salient are binary: --low xnor"
            )
        options.check(weight.shape[1])
        w = weight.detach().float()
        step, zero = row_codes(w, options.salient_bits, options.scale_dtype)
        codes = ((w / step).round() + zero).clamp(0, 2**options.salient_bits - 1)
        codes = torch.where(salient, codes, 0.0).to(torch.uint8)
        parts = (salient, codes, step[:, 0], zero[:, 0].to(torch.uint8))
        if options.scale != "learned":
            return cls(w, bias, options, *parts)
        grouped = w.reshape(w.shape[0], group_count(options.group, w.shape[1]), -1)
        inside = (~salient).reshape(grouped.shape).float()
        count = inside.sum(dim=-1).clamp_min(1)
        shift = (grouped * inside).sum(dim=-1) / count
        centred = grouped - shift[:, :, None]
        scale = (centred.abs() * inside).sum(dim=-1) / count
        return cls(options.sized(centred.reshape(w.shape), salient), bias, options, *parts, scale, shift)

    @classmethod
    def blank(cls, weight: Tensor, bias: Tensor | None, options: MethodOptions) -> PbllmLinear:
        """As many salient weights as there will be, spread over each row; no number is looked at."""
        assert isinstance(options, PbllmOptions)
        rows, columns = weight.shape
        places = (torch.arange(columns + 1, device=weight.device) * options.salient).floor()
        salient = (places.diff() > 0).expand(rows, columns).clone()
        codes = torch.zeros_like(salient, dtype=torch.uint8)
        step = weight.new_ones(rows, dtype=torch.float32)
        sizes = (rows, group_count(options.group, columns))
        learned = [weight.new_ones(sizes, dtype=torch.float32) for _ in range(2)] if options.scale == "learned" else []
        return cls(
            weight.float(), bias, options, salient, codes, step, torch.zeros_like(step, dtype=torch.uint8), *learned
        )

    @classmethod
    def from_packed(cls, packed: PackedLinear, weight: Tensor | None, options: MethodOptions) -> PbllmLinear:
        """Salient weights, codes, signs, scales and shifts are the packed layer's; a latent is c·sign·|w − shift|.

        Without `weight` it is c·sign·|scale|; c makes their mean magnitude `latent_size`. With `scale` row or matrix c is 1,
        and the packed layer must have no shift and `weight` must be None: the scale is then computed of latents that all
        have its size.
        """
        assert isinstance(options, PbllmOptions)
        w = only_weight(packed)
        rows, columns, groups = w.out_features, w.in_features, group_count(options.group, w.in_features)
        if w.planes != 1 or w.in_scale is not None or w.in_shift is not None:
            raise OptionError(
                "the packed layer is not of salient weights and signs with one scale; pbllm cannot hold it"
            )
        if w.groups != groups:
            raise OptionError(
                f"the packed layer has {w.groups} groups a row and --group {options.group} gives {groups}"
            )
        if w.shift is None and not bool(w.scale.any()):
            raise OptionError(
                "the weights of the packed layer that are not salient are 0 (low prune); there are no signs"
            )
        learned = options.scale == "learned"
        if not learned and (w.shift is not None or weight is not None):
            raise OptionError(
                "a packed layer with shifts, or one whose latents take another model's magnitudes, goes on with a scale "
                "that is learned: --scale learned"
            )
        scale = w.scale[0].float().expand(rows, groups)
        if options.scale == "matrix" and not bool((scale == scale[:1]).all()):
            raise OptionError("the packed layer has a scale a row, not one a matrix; go on with --scale row or learned")
        shift = torch.zeros_like(scale) if w.shift is None else w.shift.float()
        wide = columns // groups
        size = scale.abs().repeat_interleave(wide, dim=1)
        if weight is not None:
            size = (weight.float() - shift.repeat_interleave(wide, dim=1)).abs()
        if w.salient is None:
            codes = torch.zeros(rows, columns, dtype=torch.uint8, device=w.signs.device)
            salient = codes.bool()
            step, zero = torch.ones_like(scale[:, 0]), torch.zeros_like(codes[:, 0])
        else:
            if w.salient.bits != options.salient_bits:
                raise OptionError(
                    f"the packed layer has salient codes of {w.salient.bits} bits, and --salient-bits is "
                    f"{options.salient_bits}; leave it out"
                )
            salient, codes = w.salient.unpack(rows, columns)
            step, zero = w.salient.scale.float(), w.salient.zero.clone()
        if learned:
            size = options.sized(size, salient)
        return cls(
            latent_of(w, size), packed.bias, options, salient, codes, step, zero, *((scale, shift) if learned else ())
        )

    def _scale(self) -> Tensor:
        """s [N or 1, G]."""
        if self.scale is not None:
            return self.scale
        binarized = ~self.salient.reshape(self.weight.shape[0], self.groups, -1)
        sizes = torch.where(binarized, self.weight.detach().abs().reshape(binarized.shape), 0.0)
        over = (2,) if self.options.scale == "row" else (0, 2)
        scale = sizes.sum(dim=over) / binarized.sum(dim=over).clamp_min(1)
        return scale if scale.ndim == 2 else scale[None]

    def effective_weight(self) -> Tensor:
        """W̃ float [N, K], in the dtype of the latents."""
        rows, columns = self.weight.shape
        signs = torch.where(self.weight >= 0, 1.0, -1.0).to(self.weight.dtype)
        through = straight_through(signs, self.weight).reshape(rows, self.groups, -1)
        binary = through * self._scale()[:, :, None]
        if self.shift is not None:
            binary = binary + self.shift[:, :, None]
        integers = self.codes.to(self.weight.dtype) - self.zero.to(self.weight.dtype)[:, None]
        return torch.where(self.salient, self.step[:, None] * integers, binary.reshape(rows, columns))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.effective_weight(), self.bias)

    @torch.no_grad()
    def binary(self) -> BinaryWeight:
        salient = None
        if bool(self.salient.any()):
            salient = Salient.from_mask(
                self.salient, self.codes, self.step.clone(), self.zero, self.options.salient_bits
            )
        shift = None if self.shift is None else self.shift.detach().clone()
        return BinaryWeight.from_signs(self.weight, self._scale().detach().clone()[None], shift=shift, salient=salient)
