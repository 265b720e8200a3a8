"""FBI-LLM: a sign matrix with a learned scale and a learned shift, trained from scratch (arXiv 2407.07093)."""

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
    latent_of,
    only_weight,
    store,
    straight_through,
)
from signbit.methods.gptq import Moments
from signbit.weight import BinaryWeight

Pattern = Literal["column", "row", "single"]


@dataclass(frozen=True)
class FbiOptions(MethodOptions):
    """W̃ = α ∘ sign(W) + β, α and β one number a column (as published), a row, or a matrix; both are learned.

    They start as XNOR-Net has them: β = mean W, α = mean |W − β|, over what shares one number. The sign is that of W, not
    of W − β. Source: FBI-LLM (arXiv 2407.07093), eq. 2 to 4, and its code's qat/learnable_binarizer.py.
    """

    pattern: Pattern = "column"
    """What has a scale and a shift of its own: each input column (published), each output row, or the matrix."""
    scale_dtype: ScaleDtype = "float16"
    """Dtype in which both are stored when a model is quantized without training."""

    def __post_init__(self) -> None:
        check_choice("pattern", self.pattern, ("column", "row", "single"))
        check_choice("scale_dtype", self.scale_dtype, ("float16", "bfloat16", "float32"))

    def start(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """α and β float32 of `weight` [N, K]: [1, K], [N, 1] or [1, 1], whichever `pattern` asks for."""
        weight = weight.detach().float()
        over = {"column": (0,), "row": (1,), "single": (0, 1)}[self.pattern]
        shift = weight.mean(dim=over, keepdim=True)
        return (weight - shift).abs().mean(dim=over, keepdim=True), shift

    def binary(self, weight: Tensor, scale: Tensor, shift: Tensor) -> BinaryWeight:
        """The signs of `weight` with α and β, which broadcast to it, in the places that the one format has for them."""
        if self.pattern == "column":
            one = torch.ones(1, 1, 1, dtype=scale.dtype, device=scale.device)
            return BinaryWeight.from_signs(weight, one, in_scale=scale.clone(), in_shift=shift[0].clone())
        rows = shift.expand(weight.shape[0], 1).clone()
        return BinaryWeight.from_signs(weight, scale[None].clone(), shift=rows)

    def binarize(self, weight: Tensor, moments: Moments | None = None) -> BinaryWeight:
        """`weight` float [N, K] → the start, without training; sign(0) = +1."""
        scale, shift = self.start(weight)
        return self.binary(weight, store(scale, self.scale_dtype), store(shift, self.scale_dtype, shift=True))


class FbiLinear(BinaryLinear):
    """y = x · W̃ᵀ + bias with W̃ = α ∘ sign(W) + β; sign is straight-through, without clipping.

    With G = dL/dW̃: dW = α ∘ G, dα = Σ G ∘ sign(W), dβ = Σ G, the sums over what shares one number. Source: FBI-LLM
    (arXiv 2407.07093). `weight` float [N, K]; `scale` (α) and `shift` (β) float [1, K], [N, 1] or [1, 1]; x float [..., K],
    y float [..., N]. Differs from the published code: sign(0) = +1, where it has 0.
    """

    def __init__(self, weight: Tensor, scale: Tensor, shift: Tensor, bias: Tensor | None, options: FbiOptions) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach().clone())
        self.scale = nn.Parameter(scale.detach().clone())
        self.shift = nn.Parameter(shift.detach().clone())
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())
        self.options = options

    @classmethod
    def start(cls, weight: Tensor, bias: Tensor | None, options: MethodOptions) -> FbiLinear:
        assert isinstance(options, FbiOptions)
        return cls(weight.float(), *options.start(weight), bias, options)

    @classmethod
    def from_packed(cls, packed: PackedLinear, weight: Tensor | None, options: MethodOptions) -> FbiLinear:
        """Signs, α and β are the packed layer's; latents have the magnitudes of `weight`, or |α|."""
        assert isinstance(options, FbiOptions)
        w = only_weight(packed)
        by_column = options.pattern == "column"
        found = w.in_scale is not None and w.in_shift is not None if by_column else w.shift is not None
        if not found or w.planes != 1 or w.groups != 1 or w.salient is not None:
            raise OptionError(f"the packed layer has not one scale and one shift a {options.pattern}, as fbi's has")
        if by_column:
            assert w.in_scale is not None and w.in_shift is not None
            scale, shift = w.scale[0].float() * w.in_scale.float(), w.in_shift.float()[None]
        else:
            assert w.shift is not None
            rows = slice(None) if options.pattern == "row" else slice(1)
            scale, shift = w.scale[0].float(), w.shift.float()[rows]
        size = scale.expand(w.out_features, w.in_features) if weight is None else weight.float()
        return cls(latent_of(w, size.abs()), scale, shift, packed.bias, options)

    def effective_weight(self) -> Tensor:
        """W̃ float [N, K], in the dtype of the latents."""
        signs = torch.where(self.weight >= 0, 1.0, -1.0).to(self.weight.dtype)
        return straight_through(signs, self.weight) * self.scale + self.shift

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.effective_weight(), self.bias)

    @torch.no_grad()
    def binary(self) -> BinaryWeight:
        return self.options.binary(self.weight, self.scale.detach(), self.shift.detach())
