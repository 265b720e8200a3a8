"""BitNet: centred signs or ternary weights, and 8-bit activations behind a norm (arXiv 2310.11453, 2402.17764)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

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


@dataclass(frozen=True)
class BitnetOptions(MethodOptions):
    """W̃ = β·sign(W − α), α = mean W and β = mean |W|; y = W̃ · int8(norm(x)).

    Defaults are the authors' later form ("The Era of 1-bit LLMs: Training Tips, Code and FAQ"); --norm layer --ste sign is
    the paper's (arXiv 2310.11453, eq. 1 to 12). Differs from the paper: sign(0) = +1, where it has −1; activations have one
    scale a token in training too, where it has one a tensor, so that what is trained is what runs; the model's own norms
    stay in front of these.
    """

    weights: Literal["binary", "ternary"] = "binary"
    """binary: β·sign(W − α). ternary: β·clamp(round(W/β), −1, 1), BitNet b1.58 (arXiv 2402.17764), two planes when packed."""
    groups: int = 1
    """Parts of the output rows with an α and a β of their own, so that they can be on several devices."""
    norm: Literal["rms", "layer", "none"] = "rms"
    """Norm without affine part in front of the activations' 8 bits: RMSNorm, the paper's LayerNorm (SubLN), or none."""
    norm_eps: float = 1e-5
    """Its epsilon."""
    act_bits: Literal[8, 0] = 8
    """8: activations are integers of −127 … 127 times a scale a token. 0: they stay float (W1A16)."""
    shifted: bool = False
    """Activations less their smallest, in 0 … 127, as the paper has them before non-linearities; for training alone, no
    packed layer has it. Meant for single layers: --rule 'mlp.gate_proj: shifted=true'."""
    ste: Literal["weight", "sign"] = "weight"
    """What the gradient passes unchanged: all of W ↦ W̃, as the authors' code, or the sign alone, while α and β have the
    gradients of their formulas, as the paper."""
    scale_dtype: ScaleDtype = "float16"
    """Dtype in which β is stored when a model is quantized without training."""

    def __post_init__(self) -> None:
        check_choice("weights", self.weights, ("binary", "ternary"))
        check_choice("norm", self.norm, ("rms", "layer", "none"))
        check_choice("act_bits", self.act_bits, (8, 0))
        check_choice("ste", self.ste, ("weight", "sign"))
        check_choice("scale_dtype", self.scale_dtype, ("float16", "bfloat16", "float32"))
        check_eps("norm_eps", self.norm_eps)
        check_whole("groups", self.groups)
        if self.groups < 1:
            raise OptionError(f"groups is {self.groups}; at least 1 is needed")
        if self.shifted and self.act_bits != 8:
            raise OptionError("shifted activations are 8-bit ones; use act_bits 8")
        if self.ste == "sign" and self.weights == "ternary":
            raise OptionError("ste sign belongs to binary weights; b1.58's gradient passes all of W ↦ W̃ (ste weight)")

    def integers(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of `weight` float [N, K]: S of ±1, or of −1, 0 and 1, [N, K]; what gradients for S pass to, [N, K]; β [N or 1, 1].

        Raises OptionError unless `groups` divides N.
        """
        rows = weight.shape[0]
        self.check_rows(rows)
        parts = weight.reshape(self.groups, -1)
        scale = parts.abs().mean(dim=1, keepdim=True)
        if self.weights == "ternary":
            scale = scale.clamp_min(1e-5)
            values = (parts / scale).round().clamp(-1, 1)
        else:
            centred = parts - parts.mean(dim=1, keepdim=True)
            values = torch.where(centred >= 0, 1.0, -1.0).to(weight.dtype)
        # β is a constant to autograd; its gradient, Σ G ∘ S with G = dL/dW̃, comes through the signs: from the weights'
        # gradient, where that of the product would read every token's output again.
        size, scale = scale, scale.detach()
        unit = scale.clamp_min(_TINY)
        # "weight": all of W ↦ β·values passes; the slope of `values` is 1/β, which the product with β takes back.
        through = centred + values * (size / unit) if self.ste == "sign" else parts / unit
        values, through = values.view_as(weight), through.view_as(weight)
        return values, through, scale if self.groups == 1 else scale.repeat_interleave(rows // self.groups, dim=0)

    def check_rows(self, rows: int) -> None:
        """Raises OptionError unless `groups` divides a matrix of `rows` rows."""
        if rows % self.groups:
            raise OptionError(f"{self.groups} groups do not divide {rows} rows; use a divisor of them")

    def binary(self, weight: Tensor, dtype: str = "float32") -> BinaryWeight:
        """What `weight` [N, K] is quantized to; ternary t as two planes, t = (s₁ + s₂)/2."""
        values, _, scale = self.integers(weight.detach().float())
        scale = store(scale, dtype)[None]
        if self.weights == "binary":
            return BinaryWeight.from_signs(values, scale)
        return BinaryWeight.from_signs(torch.stack([values >= 0, values > 0]), torch.cat([scale, scale]) / 2)

    def binarize(self, weight: Tensor, moments: Moments | None = None) -> BinaryWeight:
        """`weight` float [N, K] → signs and scale [1, N or 1, 1], of ternary weights two planes."""
        return self.binary(weight, self.scale_dtype)

    def packed(self, weight: BinaryWeight, bias: Tensor | None) -> PackedLinear:
        if self.shifted:
            raise OptionError(
                "shifted activations cannot be packed: a packed layer's are symmetric, with one scale a token and no "
                "smallest value to take away. Train without shifted"
            )
        return PackedLinear(weight, bias, self.norm, self.norm_eps, self.act_bits)


class BitnetLinear(BinaryLinear):
    """y = (β·a/127)·(S · q) + bias with S = sign(W − α), u = norm(x), a = max|u| of a token, q = round(127·u/a).

    Integers meet integers, as in the packed layer (they are exact in bfloat16 too), and the scales act on their sums. The
    gradient passes round and clamp unchanged: dx = norm'(x)·W̃ᵀ dy; with G = dL/dW̃, `ste` weight: dW = G; sign:
    dW = β·(G − mean G) + sgn(W)·mean(G ∘ S), sgn(0) = 0, the means over a group. `shifted`: q = clamp(round(127·(u − η)/a),
    0, 127) with η = min u, above a cut off as the paper has it.
    Source: BitNet (arXiv 2310.11453), eq. 1 to 12. `weight` float [N, K]; x float [..., K], y [..., N] in its dtype.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, options: BitnetOptions) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach().clone())
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())
        self.options = options

    @classmethod
    def start(cls, weight: Tensor, bias: Tensor | None, options: MethodOptions) -> BitnetLinear:
        assert isinstance(options, BitnetOptions)
        options.check_rows(weight.shape[0])
        return cls(weight.float(), bias, options)

    @classmethod
    def from_packed(cls, packed: PackedLinear, weight: Tensor | None, options: MethodOptions) -> BitnetLinear:
        """Latents are β·S/mean |S| over each group, S of ±1 or ternary: their mean magnitude is β and their signs are S."""
        assert isinstance(options, BitnetOptions)
        computed_scale(weight)
        w = only_weight(packed, options.norm, options.act_bits)
        planes = 1 if options.weights == "binary" else 2
        if not is_plain(w, planes):
            raise OptionError(f"the packed layer is not of {options.weights} weights and their scale, as bitnet's is")
        dense = w.to_dense()
        parts = dense.reshape(options.groups, -1).abs()
        grown = parts.amax(dim=1) / parts.mean(dim=1).clamp_min(_TINY)
        rows = grown.repeat_interleave(len(dense) // options.groups)
        latent = dense * rows[:, None]
        return cls(latent if planes == 2 else latent_of(w, latent.abs()), packed.bias, options)

    def effective_weight(self) -> Tensor:
        """W̃ float [N, K], in the dtype of the latents."""
        values, through, scale = self.options.integers(self.weight)
        return straight_through(values, through) * scale

    def forward(self, x: Tensor) -> Tensor:
        u = _normed(x, self.options.norm, self.options.norm_eps)
        if not self.options.act_bits:
            return F.linear(u, self.effective_weight(), self.bias)
        q, step = _eight_bits(u.to(self.weight.dtype), self.options.shifted)
        values, through, scale = self.options.integers(self.weight)
        y = F.linear(q, straight_through(values, through)) * (scale[:, 0] * step)
        y = y.to(x.dtype)
        return y if self.bias is None else y + self.bias

    @torch.no_grad()
    def binary(self) -> BinaryWeight:
        return self.options.binary(self.weight)

    def pack(self) -> PackedLinear:
        return self.options.packed(self.binary(), self.bias)


def _normed(x: Tensor, norm: str, eps: float) -> Tensor:
    """As PackedLinear has it."""
    if norm == "rms":
        return (x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)).to(x.dtype)
    return F.layer_norm(x, (x.shape[-1],), eps=eps) if norm == "layer" else x


def _eight_bits(u: Tensor, shifted: bool) -> tuple[Tensor, Tensor]:
    """q and step with u ≈ q·step, as `signbit.ops` has them; the gradient of q·step for u is 1."""
    size = u.detach().abs().amax(dim=-1, keepdim=True).clamp_min(1e-5)
    step = size / 127.0
    if shifted:
        low = u.detach().amin(dim=-1, keepdim=True)
        q = (127.0 * (u.detach() - low) / size).round().clamp(0, 127)
    else:
        q = (127.0 * u.detach() / size).round().clamp(-127, 127)
    return straight_through(q, u / step), step


@dataclass(frozen=True)
class BitnetTransformersOptions(MethodOptions):
    """BitNet-Transformers' layer as it was published, which is not BitNet's: y = 128·(Ŵx)/max|Ŵx|, Ŵ = sign(W − mean W).

    No scale of the weights, no norm, no quantized input; the largest output of the whole batch becomes 128, so that a
    sequence's result depends on those beside it. To load and reproduce its checkpoints; train with `bitnet` instead.
    Source: github.com/beomi/BitNet-Transformers, bitnet_llama/module.py (October 2023). Differs from it: sign(0) = +1,
    where it has 0; its groups are left out, which no recipe of it uses.
    """

    signs: Literal["fixed", "trained"] = "fixed"
    """fixed: random signs that nothing changes, sign(mean S)·S with S = sign(W), as in its models (BitLinearOptimized);
    trained: its other class (BitLinear), whose latents learn."""

    def __post_init__(self) -> None:
        check_choice("signs", self.signs, ("fixed", "trained"))

    def signed(self, weight: Tensor) -> Tensor:
        """Float [N, K] whose signs are those of the layer that `weight` starts."""
        if self.signs == "trained":
            return weight - weight.mean()
        signs = torch.where(weight >= 0, 1.0, -1.0)
        return signs * torch.where(signs.mean() >= 0, 1.0, -1.0)

    def binarize(self, weight: Tensor, moments: Moments | None = None) -> BinaryWeight:
        """`weight` float [N, K] → its signs, and a scale of 1 [1, 1, 1]."""
        one = torch.ones(1, 1, 1, device=weight.device)
        return BinaryWeight.from_signs(self.signed(weight.float()), one)

    def packed(self, weight: BinaryWeight, bias: Tensor | None) -> PackedLinear:
        if bias is not None:
            raise OptionError(
                "a layer with a bias cannot be packed with bitnet-transformers: it adds the bias in front of the largest "
                "output, a packed layer behind it. Use the method bitnet"
            )
        return PackedLinear(weight, norm_out="batch_absmax")


class BitnetTransformersLinear(BinaryLinear):
    """y = clamp(128·z/(γ + ε), −128 + ε, 128 − ε) with z = Ŵx + bias, γ = max|z| over the batch, ε = 1e-5.

    Trained: Ŵ = sign(W − mean W), dW = G − mean G with G = dL/dŴ; fixed: Ŵ = sign(W), and nothing is trained. Source and
    differences: `BitnetTransformersOptions`. `weight` float [N, K]; x float [..., K], y [..., N].
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, options: BitnetTransformersOptions) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach().clone())
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())
        self.options = options
        self.train_parts_()

    @classmethod
    def start(cls, weight: Tensor, bias: Tensor | None, options: MethodOptions) -> BitnetTransformersLinear:
        assert isinstance(options, BitnetTransformersOptions)
        weight = weight.detach().float()
        return cls(options.signed(weight) if options.signs == "fixed" else weight, bias, options)

    def train_parts_(self) -> None:
        self.requires_grad_(self.options.signs == "trained")

    def _signed(self) -> Tensor:
        return self.weight - self.weight.mean() if self.options.signs == "trained" else self.weight

    def effective_weight(self) -> Tensor:
        """Ŵ float [N, K], in the dtype of the latents."""
        signed = self._signed()
        return straight_through(torch.where(signed >= 0, 1.0, -1.0).to(signed.dtype), signed)

    def forward(self, x: Tensor) -> Tensor:
        z = F.linear(x, self.effective_weight(), self.bias)
        limit = 128 - 1e-5
        return (z * (128 / (z.abs().max() + 1e-5))).clamp(-limit, limit)

    @torch.no_grad()
    def binary(self) -> BinaryWeight:
        return BinaryWeight.from_signs(self._signed(), torch.ones(1, 1, 1, device=self.weight.device))

    def pack(self) -> PackedLinear:
        return self.options.packed(self.binary(), self.bias)
