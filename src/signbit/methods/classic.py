"""The classic binarizers, of convolutional networks first: BNN, XNOR-Net, Bi-Real Net, IR-Net, FDA-BNN and ReCU.

Each is a value for the forward pass, W̃ = scale ∘ sign(values), and a surrogate for the slope of the sign in the backward
pass. Here they stand side by side; docs/binarizers.md has them in one table. Theirs are the weights alone: activations stay
float (Bi-Real's may be signs), and where their networks have a batch norm behind each layer a packed layer has a LayerNorm.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from signbit.errors import OptionError
from signbit.linear import BinaryLinear, PackedLinear
from signbit.methods.base import (
    MethodOptions,
    ScaleDtype,
    check_choice,
    check_whole,
    computed_scale,
    is_plain,
    latent_of,
    only_weight,
    store,
    straight_through,
)
from signbit.methods.gptq import Moments
from signbit.weight import BinaryWeight

_TINY = torch.finfo(torch.float32).tiny


class Form(NamedTuple):
    """What a binarizer makes of a weight [N, K]."""

    values: Tensor
    """Float [N, K] whose signs are kept."""
    scale: Tensor
    """Float [N, 1] or [1, 1], a constant to autograd."""
    through: Tensor
    """Float [N, K] that the gradient for W̃ passes to unchanged; its own slope is the surrogate."""


@dataclass(frozen=True)
class ClassicOptions(MethodOptions):
    """What the classic binarizers have in common: W̃ = scale ∘ sign(values), sign(0) = +1."""

    norm: Literal["none", "layer"] = "none"
    """What stands behind the product: nothing, or LayerNorm without affine part, in the place of the published batch norm."""
    norm_eps: float = 1e-5
    """Its epsilon."""

    def __post_init__(self) -> None:
        check_choice("norm", self.norm, ("none", "layer"))
        if not 0 < self.norm_eps < math.inf:
            raise OptionError(f"norm_eps is {self.norm_eps}; a positive number is needed (1e-5)")

    #: Bits of the activations, 0: they stay float.
    act_bits = 0

    @property
    def anneals(self) -> bool:
        """Whether anything changes with the share of the training that is done."""
        return False

    @abstractmethod
    def form(self, weight: Tensor, done: Tensor | None) -> Form:
        """Of latents float [N, K] where a share `done` (scalar of 0 … 1; None: the start) of the training is made."""

    def binary(self, weight: Tensor, done: Tensor | None) -> BinaryWeight:
        """The signs and the scale [1, N or 1, 1] of latents `weight` [N, K]."""
        values, scale, _ = self.form(weight.detach(), done)
        return BinaryWeight.from_signs(values, scale[None])

    def binarize(self, weight: Tensor, moments: Moments | None = None) -> BinaryWeight:
        """`weight` float [N, K] → what training starts with."""
        return self.binary(weight.float(), None)

    def latents(self, packed: BinaryWeight, source: Tensor | None) -> Tensor:
        """Latents float [N, K] with the signs of `packed` and the magnitudes of `source`, or 0.02."""
        size = _filled(packed, 0.02) if source is None else source.float().abs()
        return latent_of(packed, size)

    def packed(self, weight: BinaryWeight, bias: Tensor | None) -> PackedLinear:
        return PackedLinear(
            weight, bias, act_bits=self.act_bits, norm_out=self.norm, norm_out_eps=self.norm_eps
        )  # fmt: skip


@dataclass(frozen=True)
class ScaledOptions(ClassicOptions):
    """Those that have a scale a row."""

    scale_dtype: ScaleDtype = "float16"
    """Dtype in which scales are stored when a model is quantized without training."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("scale_dtype", self.scale_dtype, ("float16", "bfloat16", "float32"))

    def binarize(self, weight: Tensor, moments: Moments | None = None) -> BinaryWeight:
        values, scale, _ = self.form(weight.detach().float(), None)
        return BinaryWeight.from_signs(values, store(scale, self.scale_dtype)[None])

    @property
    def follows(self) -> bool:
        """Whether the scale grows as the latents do, so that it stays near them."""
        return True

    def latents(self, packed: BinaryWeight, source: Tensor | None) -> Tensor:
        """Latents of one size a row: that which has the packed scale. Where the scale does not follow them it is 0.02.

        Raises OptionError for a `source`, which would change the scale.
        """
        computed_scale(source)
        if not self.follows:
            return super().latents(packed, None)
        wanted = packed.scale[0].float()
        # A row of 0 has no part in what is taken of all rows.
        ones = latent_of(packed, _filled(packed, 1.0)) * (wanted != 0)
        return latent_of(packed, _filled(packed, 1.0) * (wanted / self.form(ones, None).scale.clamp_min(_TINY)))


def _filled(weight: BinaryWeight, value: float) -> Tensor:
    return torch.full((weight.out_features, weight.in_features), value, device=weight.signs.device)


class ClassicLinear(BinaryLinear):
    """y = norm(x · W̃ᵀ) + bias with the W̃ of its options, whose docstring has equation, gradient and source.

    `weight` float [N, K]; x float [..., K], y float [..., N]. `progress` is the share of the training that is done, a float
    scalar in a buffer that the trainer raises in place: compiled code and CUDA graphs read it there, and a checkpoint keeps
    it, so that what is packed is what was trained and what goes on does not anneal anew. Methods that do not anneal have none.
    """

    progress: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None, options: ClassicOptions) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach().clone())
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())
        self.options = options
        start = torch.zeros((), dtype=torch.float32, device=weight.device) if options.anneals else None
        self.register_buffer("progress", start)

    @classmethod
    def start(cls, weight: Tensor, bias: Tensor | None, options: MethodOptions) -> ClassicLinear:
        assert isinstance(options, ClassicOptions)
        return cls(weight.float(), bias, options)

    @classmethod
    def from_packed(cls, packed: PackedLinear, weight: Tensor | None, options: MethodOptions) -> ClassicLinear:
        """Signs and scales are the packed layer's, and latents those of `ClassicOptions.latents`; what anneals begins anew."""
        assert isinstance(options, ClassicOptions)
        w = only_weight(packed, act_bits=options.act_bits, norm_out=options.norm)
        if not is_plain(w):
            raise OptionError("the packed layer is not of signs and at most one scale a row, as this method's is")
        layer = cls(options.latents(w, weight), packed.bias, options)
        off = ~torch.isclose(layer.binary().to_dense(), w.to_dense(), rtol=1e-4, atol=0).all(dim=1)
        if off.any():
            raise OptionError(
                f"{int(off.sum())} of the packed layer's {w.out_features} rows have a scale that this method computes of "
                "latents as they were, and of none with one size a row; go on from the run itself (signbit finetune RUN), or "
                "start from the model that was quantized"
            )
        return layer

    def set_progress(self, done: float) -> None:
        if self.progress is not None:
            self.progress.clamp_min_(done)  # a finished run that goes on does not anneal anew

    def effective_weight(self) -> Tensor:
        """W̃ float [N, K], in the dtype of the latents."""
        values, scale, through = self.options.form(self.weight, self.progress)
        return straight_through(_sign(values) * scale, through)

    def forward(self, x: Tensor) -> Tensor:
        if self.options.norm == "none":
            return F.linear(x, self.effective_weight(), self.bias)
        return self._normed(F.linear(x, self.effective_weight()))

    def _normed(self, y: Tensor) -> Tensor:
        if self.options.norm == "layer":
            y = F.layer_norm(y, (self.weight.shape[0],), eps=self.options.norm_eps)
        return y if self.bias is None else y + self.bias

    @torch.no_grad()
    def binary(self) -> BinaryWeight:
        return self.options.binary(self.weight, self.progress)

    def pack(self) -> PackedLinear:
        return self.options.packed(self.binary(), self.bias)


def _sign(values: Tensor) -> Tensor:
    return torch.where(values >= 0, 1.0, -1.0).to(values.dtype)


def _sloped(values: Tensor, slope: Tensor) -> Tensor:
    """A tensor whose gradient for `values` is `slope`."""
    return values * slope.detach()


def _mean_size(values: Tensor) -> Tensor:
    """mean |values| of each row, [N, 1], without a gradient."""
    return values.detach().abs().mean(dim=1, keepdim=True)


def _standardised(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(W − μ)/σ of each row, differentiable, and σ [N, 1] without a gradient; a constant row becomes 0.

    σ is the sample's, N − 1 in its denominator, as IR-Net's and ReCU's codes have it.
    """
    centred = weight - weight.mean(dim=1, keepdim=True)
    variance = weight.var(dim=1, keepdim=True, correction=min(1, weight.shape[1] - 1))
    # Not a constant added to the variance, as ReCU's code has: a language model's is often smaller than that one.
    deviation = variance.clamp_min(_TINY).sqrt()
    return centred / deviation, deviation.detach()


def _share(weight: Tensor, done: Tensor | None) -> Tensor:
    return weight.new_zeros(()) if done is None else done


def _check_between(name: str, value: float, low: float, high: float) -> None:
    if not low < value < high:
        raise OptionError(f"{name} is {value}; a number above {low:g} and below {high:g} is needed")


# BNN.


@dataclass(frozen=True)
class BnnOptions(ClassicOptions):
    """W̃ = sign(W), without a scale; dW = G ∘ 1[|W| ≤ 1] with G = dL/dW̃.

    Source: Binarized Neural Networks (arXiv 1602.02830), eq. 1 and 4. Differs from the paper: latents are not cut back to
    −1 … 1 after a step, for an engine may keep its own copy of them; one that has passed beyond gets no gradient of its own
    any more (a language model's start near 0.02). Raises OptionError for options outside of what is allowed.
    """

    norm: Literal["none", "layer"] = "layer"
    """What stands behind the product: LayerNorm without affine part, in the place of the published batch norm, or nothing:
    then outputs are √K times as large as inputs."""
    ste: Literal["clipped", "identity"] = "clipped"
    """Slope of sign: 1 within −1 … 1 and 0 beyond as published, or 1 everywhere (PB-LLM's code)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("ste", self.ste, ("clipped", "identity"))

    def form(self, weight: Tensor, done: Tensor | None) -> Form:
        through = weight if self.ste == "identity" else _sloped(weight, (weight.abs() <= 1).to(weight.dtype))
        return Form(weight, weight.new_ones(1, 1), through)


# XNOR-Net.


@dataclass(frozen=True)
class XnorOptions(ScaledOptions):
    """W̃ = α ∘ sign(W), α = mean |W| of a row; dW = G ∘ (1/K + α·1[|W| ≤ 1]) with G = dL/dW̃.

    Source: XNOR-Net (arXiv 1603.05279), eq. 6 and the backward pass of section 3.1; its binary-weight network, whose
    activations are float. The 1/K is the paper's for the slope of α, entry by entry: the whole one, with the sum over the
    row, is `absmean`'s. Raises OptionError for options outside of what is allowed.
    """

    center: bool = False
    """Take each row's mean away first, W − μ for W, and G's with it, as the authors' code and PB-LLM's do."""
    ste: Literal["paper", "detached"] = "paper"
    """Gradient: the paper's, or α ∘ G, without 1/K and nothing cut off (PB-LLM's code)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("ste", self.ste, ("paper", "detached"))

    def form(self, weight: Tensor, done: Tensor | None) -> Form:
        values = weight - weight.mean(dim=1, keepdim=True) if self.center else weight
        scale = _mean_size(values)
        if self.ste == "detached":
            return Form(values, scale, values * scale)
        return Form(values, scale, _sloped(values, 1 / weight.shape[1] + scale * (values.abs() <= 1)))


# Bi-Real Net.


@dataclass(frozen=True)
class BirealOptions(ScaledOptions):
    """W̃ = α ∘ sign(W), α = mean |W| of a row; dW = α ∘ G ∘ 1[|W| < 1] with G = dL/dW̃, and x or sign(x).

    Of sign(x), which is ±1: dx = dL/dsign(x) ∘ max(0, 2 − 2|x|), the slope of its piecewise quadratic. Source: Bi-Real Net
    (arXiv 1808.00278), magnitude-aware gradient and derivative of the activations' sign in its training algorithm; its
    shortcut around each layer is the model's affair. Raises OptionError for options outside of what is allowed.
    """

    act_bits: Literal[0, 1] = 0
    """0: activations stay float. 1: they are ±1, as published; a packed layer of this kind has no fast kernel."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("act_bits", self.act_bits, (0, 1))

    def form(self, weight: Tensor, done: Tensor | None) -> Form:
        scale = _mean_size(weight)
        return Form(weight, scale, _sloped(weight, scale * (weight.abs() < 1)))


class BirealLinear(ClassicLinear):
    """y = norm(α ∘ (sign(W) · q)) + bias, where q is x or sign(x); source and gradients: `BirealOptions`.

    Signs meet signs and α acts on their sums, as in the packed layer. `weight` float [N, K]; x float [..., K], y [..., N] in
    its dtype.
    """

    options: BirealOptions

    def forward(self, x: Tensor) -> Tensor:
        if not self.options.act_bits:
            return super().forward(x)
        q = straight_through(_sign(x), _sloped(x, (2 - 2 * x.abs()).clamp_min(0)))
        inside = (self.weight.abs() < 1).to(self.weight.dtype)
        signs = straight_through(_sign(self.weight), _sloped(self.weight, inside))
        return self._normed((F.linear(q, signs) * _mean_size(self.weight)[:, 0]).to(x.dtype))


# IR-Net.


@dataclass(frozen=True)
class IrnetOptions(ScaledOptions):
    """W̃ = 2ˢ ∘ sign(Z), Z = (W − μ)/σ by rows; dL/dZ = 2ˢ ∘ G ∘ k·t·(1 − tanh²(t·Z)) with G = dL/dW̃, and on to W.

    Over the training t rises from `t_min` to `t_max` evenly in its logarithm, and k = max(1/t, 1): from the identity to the
    sign (error decay estimator). Source: IR-Net (arXiv 1909.10788), Libra parameter binarization and EDE; that the gradient
    goes through μ and σ, as its code has it. Raises OptionError for options outside of what is allowed.
    """

    scale: Literal["latent", "standardised"] = "latent"
    """Whose mean magnitude 2ˢ is nearest to (in logarithms): that of W − μ, so that W̃ stays near W, or that of Z, as
    published, which is 1 for nearly all and wants a norm behind it (--norm layer)."""
    t_min: float = 0.1
    """t at the start."""
    t_max: float = 10.0
    """t at the end."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("scale", self.scale, ("latent", "standardised"))
        if not 0 < self.t_min <= self.t_max < math.inf:
            raise OptionError(f"t_min is {self.t_min} and t_max {self.t_max}; t rises, from a positive number on")

    @property
    def follows(self) -> bool:
        return self.scale == "latent"

    @property
    def anneals(self) -> bool:
        return True

    def estimator(self, done: Tensor) -> tuple[Tensor, Tensor]:
        """k and t, scalars, where a share `done` of the training is made."""
        t = self.t_min * (self.t_max / self.t_min) ** done
        return (1 / t).clamp_min(1), t

    def form(self, weight: Tensor, done: Tensor | None) -> Form:
        z, deviation = _standardised(weight)
        size = _mean_size(z) * (deviation if self.scale == "latent" else 1)
        scale = size.log2().round().exp2()
        k, t = self.estimator(_share(weight, done))
        return Form(z, scale, _sloped(z, scale * k * t * (1 - (t * z).tanh().square())))


# FDA-BNN.


@dataclass(frozen=True)
class FdaOptions(ClassicOptions):
    """W̃ = sign(W), without a scale; dW = G ∘ (4ω/π)·Σᵢ₌₀ⁿ cos((2i + 1)·ω·W) within |W| ≤ 1, G = dL/dW̃: a Fourier series.

    n rises evenly over the training from `n_start` to `n_end`. Source: FDA-BNN (arXiv 2103.00841), eq. 10, and its ablation
    for n. Differs from the paper: without the noise adaptation module (two layers beside each weight, for training alone);
    ω and the cut at |W| = 1, of which it does not say more, are those of PB-LLM's code. Raises OptionError for options
    outside of what is allowed.
    """

    norm: Literal["none", "layer"] = "layer"
    """What stands behind the product: LayerNorm without affine part, in the place of the published batch norm, or nothing:
    then outputs are √K times as large as inputs."""
    omega: float = 0.1
    """Frequency ω of the series' first term; the sign is that of half a period, which must reach beyond |W| = 1: below 3."""
    n_start: int = 9
    """Terms of the series behind the first one at the start."""
    n_end: int = 18
    """And at the end."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_between("omega", self.omega, 0, 3)
        for name in ("n_start", "n_end"):
            check_whole(name, getattr(self, name))
        if not 0 <= self.n_start <= self.n_end:
            raise OptionError(f"n_start is {self.n_start} and n_end {self.n_end}; n rises, from 0 or more on")

    @property
    def anneals(self) -> bool:
        return True

    def terms(self, done: Tensor) -> Tensor:
        """n, a scalar that is whole, where a share `done` of the training is made."""
        return (self.n_start + (self.n_end - self.n_start) * done).round()

    def form(self, weight: Tensor, done: Tensor | None) -> Form:
        angle = self.omega * weight.detach().clamp(-1, 1)
        count = self.terms(_share(weight, done)) + 1
        # The sum in closed form: two sines, however many terms, and n may be a tensor.
        near_zero = angle.abs() < 1e-6
        below = torch.where(near_zero, 1.0, 2 * angle.sin())
        series = torch.where(near_zero, count, (2 * count * angle).sin() / below)
        slope = (4 * self.omega / math.pi) * series * (weight.abs() <= 1)
        return Form(weight, weight.new_ones(1, 1), _sloped(weight, slope))


# ReCU.


@dataclass(frozen=True)
class RecuOptions(ScaledOptions):
    """W̃ = α ∘ sign(C), C = min(max(Z, −Q), Q), Z = (W − μ)/σ by rows, α = mean |C| of a row; dL/dC = α ∘ G, and on to W.

    Q = −b·ln(2 − 2τ) with b = mean |Z| is the τ-quantile of the matrix, were it Laplace's; entries beyond, which would
    hardly ever flip, pass no gradient of their own. Over the training τ rises from `tau_start` to `tau_end` as the
    exponential function does: τ = A·eᵖ + B, p from 0 to 1. Source: ReCU (arXiv 2103.12369); that the gradient goes through
    μ, σ and the clamp, as its code has it, whose α is learned. Raises OptionError for options outside of what is allowed.
    """

    scale: Literal["latent", "standardised"] = "latent"
    """Whose size α has: that of W − μ, so that W̃ stays near W (α·σ), or that of C, as published, which wants a norm behind
    it (--norm layer)."""
    tau_start: float = 0.85
    """τ at the start."""
    tau_end: float = 0.99
    """τ at the end."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("scale", self.scale, ("latent", "standardised"))
        for name in ("tau_start", "tau_end"):
            _check_between(name, getattr(self, name), 0.5, 1)
        if self.tau_start > self.tau_end:
            raise OptionError(f"tau_start is {self.tau_start} and tau_end {self.tau_end}; τ rises")

    @property
    def follows(self) -> bool:
        return self.scale == "latent"

    @property
    def anneals(self) -> bool:
        return True

    def quantile(self, done: Tensor) -> Tensor:
        """τ, a scalar, where a share `done` of the training is made."""
        return self.tau_start + (self.tau_end - self.tau_start) * done.expm1() / math.expm1(1)

    def form(self, weight: Tensor, done: Tensor | None) -> Form:
        z, deviation = _standardised(weight)
        limit = -z.detach().abs().mean() * (2 - 2 * self.quantile(_share(weight, done))).log()
        clamped = z.clamp(-limit, limit)
        scale = _mean_size(clamped) * (deviation if self.scale == "latent" else 1)
        return Form(clamped, scale, clamped * scale)
