"""OneBit: one sign matrix and two value vectors a layer, started from the teacher by SVID (arXiv 2402.11295)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from signbit.errors import OptionError
from signbit.linear import BinaryLinear, PackedLinear
from signbit.methods.base import (
    MethodOptions,
    ScaleDtype,
    check_choice,
    check_eps,
    check_whole,
    latent_of,
    only_weight,
    store,
    straight_through,
)
from signbit.methods.gptq import Moments
from signbit.weight import BinaryWeight

_ITERATIONS = 100
_TOLERANCE = 1e-6


@dataclass(frozen=True)
class OnebitOptions(MethodOptions):
    """W̃ = sign(W) ∘ Σᵣ hᵣ gᵣᵀ, its vectors the best ones for |W| (SVID).

    Source: OneBit (arXiv 2402.11295), eq. 4 and propositions 1 and 2; several pairs of vectors as its dead code has them.
    Differs from the paper: no LayerNorm behind the product unless asked for, and latents that keep the teacher's
    magnitudes, which trains better (BinaryMoS; the table of docs/training.md names both forms).
    """

    solver: Literal["power", "nmf"] = "power"
    """How the vectors of |W| are found: power iteration (its leading singular pair), or alternating least squares from a
    constant (a non-negative factorization). They agree but for the balance."""
    balance: Literal["even", "rows", "columns", "found"] = "even"
    """Which vector holds the magnitude of the pair: both alike, h (g has mean 1), g (h has mean 1), or as nmf found it."""
    rank: int = 1
    """Pairs of vectors on the one sign matrix."""
    vectors: Literal["both", "rows", "columns"] = "both"
    """Only h (rows) is what formats with one scale a row or block hold without a loss; only g (columns) likewise."""
    norm: Literal["none", "layer"] = "none"
    """LayerNorm without affine part over the layer's output, as published; the scale of the start is lost in it."""
    norm_eps: float = 1e-5
    """Its epsilon."""
    latent: Literal["weights", "signs"] = "weights"
    """Latents at the start of training: the teacher's weights, scaled, or its signs alone, as published."""
    latent_size: float = 0.02
    """Mean magnitude of the latents at the start (published: 0.01, signs alone)."""
    ste: Literal["identity", "tanh"] = "identity"
    """Slope of sign in the backward pass: 1, or 1.001 − tanh²(W) as published."""
    scale_dtype: ScaleDtype = "float16"
    """Dtype in which the vectors are stored when a model is quantized without training."""

    TRAINING: ClassVar[tuple[str, ...]] = ("latent", "latent_size", "ste")

    def __post_init__(self) -> None:
        for name, allowed in (
            ("solver", ("power", "nmf")),
            ("balance", ("even", "rows", "columns", "found")),
            ("vectors", ("both", "rows", "columns")),
            ("norm", ("none", "layer")),
            ("latent", ("weights", "signs")),
            ("ste", ("identity", "tanh")),
            ("scale_dtype", ("float16", "bfloat16", "float32")),
        ):
            check_choice(name, getattr(self, name), allowed)
        check_eps("norm_eps", self.norm_eps)
        check_whole("rank", self.rank)
        if self.rank < 1:
            raise OptionError(f"rank is {self.rank}; at least one pair of vectors is needed")
        if self.rank > 1 and self.vectors != "both":
            raise OptionError(f"rank is {self.rank}, which one vector ({self.vectors}) cannot have; use vectors both")
        if self.balance == "found" and self.solver != "nmf":
            raise OptionError("balance found belongs to the solver nmf; power iteration gives vectors of length 1")
        if not self.latent_size > 0:
            raise OptionError(f"latent_size is {self.latent_size}; a positive number is needed (0.02)")

    def svid(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """h float32 [rank, N] and g float32 [rank, K] of `weight` [N, K]: the best Σᵣ hᵣ gᵣᵀ for |W|.

        Pairs beyond N or K, which no matrix has, are 0.
        """
        size = weight.detach().float().abs()
        if self.vectors == "rows":
            return size.mean(dim=1)[None], torch.ones(1, size.shape[1], device=size.device)
        if self.vectors == "columns":
            return torch.ones(1, size.shape[0], device=size.device), size.mean(dim=0)[None]
        if self.rank > 1:
            u, s, v = torch.svd_lowrank(size, q=min(self.rank + 8, *size.shape), niter=8)
            root = s[: self.rank].sqrt()
            h, g = (u[:, : self.rank] * root).T, (v[:, : self.rank] * root).T
            more = self.rank - len(h)
            h, g = F.pad(h, (0, 0, 0, more)), F.pad(g, (0, 0, 0, more))
            turn = torch.where(g.sum(dim=1) < 0, -1.0, 1.0)[:, None]
            h, g = h * turn, g * turn
        else:
            h, g = (part[None] for part in (_leading(size) if self.solver == "power" else _alternating(size)))
        return _balanced(h.contiguous(), g.contiguous(), self.balance)

    def binarize(self, weight: Tensor, moments: Moments | None = None) -> BinaryWeight:
        h, g = self.svid(weight)
        h, g = store(h, self.scale_dtype), store(g, self.scale_dtype)
        in_scale = None if self.vectors == "rows" else g
        return BinaryWeight.from_signs(weight, h[:, :, None], in_scale=in_scale)

    def packed(self, weight: BinaryWeight, bias: Tensor | None) -> PackedLinear:
        return PackedLinear(weight, bias, norm_out=self.norm, norm_out_eps=self.norm_eps)


def _leading(size: Tensor) -> tuple[Tensor, Tensor]:
    """√σ·u and √σ·v of the leading singular pair of a non-negative matrix, which are non-negative (Perron)."""
    v = torch.full((size.shape[1],), size.shape[1] ** -0.5, device=size.device)
    sigma = before = torch.zeros((), device=size.device)
    u = torch.zeros(size.shape[0], device=size.device)
    for _ in range(_ITERATIONS):
        u = F.normalize(size @ v, dim=0)
        v = size.T @ u
        sigma = v.norm()
        v = F.normalize(v, dim=0)
        if sigma - before <= _TOLERANCE * sigma:
            break
        before = sigma
    return u * sigma.sqrt(), v * sigma.sqrt()


def _alternating(size: Tensor) -> tuple[Tensor, Tensor]:
    """a, b ≥ 0 with a·bᵀ nearest to a non-negative matrix, by least squares of one and the other in turn."""
    b = torch.full((size.shape[1],), float(size.mean().sqrt()), device=size.device)
    a = before = torch.zeros(size.shape[0], device=size.device)
    tiny = torch.finfo(torch.float32).tiny
    for _ in range(_ITERATIONS):
        a = size @ b / b.dot(b).clamp_min(tiny)
        b = size.T @ a / a.dot(a).clamp_min(tiny)
        if (a - before).norm() <= _TOLERANCE * a.norm():
            break
        before = a
    return a, b


def _balanced(h: Tensor, g: Tensor, balance: str) -> tuple[Tensor, Tensor]:
    if balance == "found":
        return h, g
    tiny = torch.finfo(torch.float32).tiny
    rows, columns = h.norm(dim=1, keepdim=True).clamp_min(tiny), g.norm(dim=1, keepdim=True).clamp_min(tiny)
    if balance == "rows":
        factor = g.mean(dim=1, keepdim=True).abs().clamp_min(tiny)
    elif balance == "columns":
        factor = 1 / h.mean(dim=1, keepdim=True).abs().clamp_min(tiny)
    else:
        factor = (columns / rows).sqrt()
    return h * factor, g / factor


def _signs(weight: Tensor, ste: str) -> Tensor:
    """sign(W), sign(0) = +1, with the slope 1 (identity), or 1.001 − tanh²(W) (OneBit): that of 0.001·W + tanh(W)."""
    signs = torch.where(weight >= 0, 1.0, -1.0).to(weight.dtype)
    slope = weight if ste == "identity" else 0.001 * weight + weight.tanh()
    return straight_through(signs, slope)


class OnebitLinear(BinaryLinear):
    """y = norm(x · W̃ᵀ) + bias with W̃ = sign(W) ∘ Σᵣ hᵣ gᵣᵀ; norm is none or a LayerNorm without affine part.

    With G = dL/dW̃ and S = sign(W): dW = G ∘ (Σᵣ hᵣ gᵣᵀ) ∘ slope(W), dhᵣ = Σₖ (G ∘ S)·gᵣ, dgᵣ = Σₙ (G ∘ S)·hᵣ.
    Source: OneBit (arXiv 2402.11295), eq. 1 to 3. `weight` float [N, K], `scale` (h) float [rank, N], `in_scale` (g) float
    [rank, K], absent where `vectors` is rows; x float [..., K], y float [..., N].
    """

    def __init__(self, weight: Tensor, scale: Tensor, in_scale: Tensor, bias: Tensor | None, options: OnebitOptions):
        super().__init__()
        self.weight = nn.Parameter(weight.detach().clone())
        self.scale = nn.Parameter(scale.detach().clone())
        if options.vectors == "rows":
            self.register_parameter("in_scale", None)
        else:
            self.in_scale = nn.Parameter(in_scale.detach().clone())
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())
        self.options = options
        self.train_parts_()

    @classmethod
    def start(cls, weight: Tensor, bias: Tensor | None, options: MethodOptions) -> OnebitLinear:
        assert isinstance(options, OnebitOptions)
        h, g = options.svid(weight)
        size = weight.detach().float()
        if options.latent == "signs":
            latent = options.latent_size * torch.where(size >= 0, 1.0, -1.0)
        else:
            latent = size * (options.latent_size / size.abs().mean().clamp_min(torch.finfo(torch.float32).tiny))
        return cls(latent, h, g, bias, options)

    @classmethod
    def blank(cls, weight: Tensor, bias: Tensor | None, options: MethodOptions) -> OnebitLinear:
        assert isinstance(options, OnebitOptions)
        rows, columns = weight.shape
        h, g = (weight.new_empty(options.rank, size, dtype=torch.float32) for size in (rows, columns))
        return cls(weight.float(), h, g, bias, options)

    @classmethod
    def from_packed(cls, packed: PackedLinear, weight: Tensor | None, options: MethodOptions) -> OnebitLinear:
        """Signs and vectors are the packed layer's; latents have the magnitudes of `weight` or W̃, their mean `latent_size`."""
        assert isinstance(options, OnebitOptions)
        w = only_weight(packed, norm_out=options.norm)
        plain = w.shift is None and w.in_shift is None and w.salient is None and w.groups == 1 and w.signs.shape[0] == 1
        if not plain or w.planes != options.rank or (w.in_scale is None) != (options.vectors == "rows"):
            raise OptionError(
                f"the packed layer is not of one sign matrix and {options.rank} pairs of vectors, as onebit's is"
            )
        size = (packed.to_dense() if weight is None else weight.float()).abs()
        size = torch.ones_like(size) if options.latent == "signs" else size
        size = size * (options.latent_size / size.mean().clamp_min(torch.finfo(torch.float32).tiny))
        h = w.scale[:, :, 0].float().expand(-1, w.out_features)
        g = h.new_ones(1, w.in_features) if w.in_scale is None else w.in_scale.float()
        return cls(latent_of(w, size), h, g.expand(w.planes, -1), packed.bias, options)

    def train_parts_(self) -> None:
        self.requires_grad_(True)
        self.scale.requires_grad_(self.options.vectors != "columns")

    def effective_weight(self) -> Tensor:
        """W̃ float [N, K], in the dtype of the latents."""
        signs = _signs(self.weight, self.options.ste)
        total: Tensor | None = None
        for plane in range(self.scale.shape[0]):
            term = signs * self.scale[plane][:, None]
            if self.in_scale is not None:
                term = term * self.in_scale[plane]
            total = term if total is None else total + term
        assert total is not None
        return total

    def forward(self, x: Tensor) -> Tensor:
        if self.options.norm == "none":
            return F.linear(x, self.effective_weight(), self.bias)
        y = F.layer_norm(F.linear(x, self.effective_weight()), (self.weight.shape[0],), eps=self.options.norm_eps)
        return y if self.bias is None else y + self.bias

    @torch.no_grad()
    def binary(self) -> BinaryWeight:
        scale = self.scale.detach()[:, :, None].clone()
        in_scale = None if self.in_scale is None else self.in_scale.detach().clone()
        return BinaryWeight.from_signs(self.weight, scale, in_scale=in_scale)

    def pack(self) -> PackedLinear:
        return self.options.packed(self.binary(), self.bias)
