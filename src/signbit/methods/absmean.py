"""absmean: the sign of each weight times the mean magnitude of its group or row; the baseline of all methods."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from signbit.errors import OptionError
from signbit.linear import BinaryLinear, PackedLinear
from signbit.methods.base import (
    MethodOptions,
    ScaleDtype,
    check_choice,
    check_group,
    check_whole,
    computed_scale,
    group_count,
    is_plain,
    latent_of,
    only_weight,
    store,
    straight_through,
)
from signbit.methods.gptq import Moments
from signbit.weight import BinaryWeight


@dataclass(frozen=True)
class AbsmeanOptions(MethodOptions):
    """Ŵ = s ∘ sign(W), s = mean |W| over each group: the scale of least squared error for fixed signs.

    Source: XNOR-Net (arXiv 1603.05279), eq. 6, per group of a row.
    """

    group: int = -1
    """Columns that share a scale; it must divide the layer's input width. -1: one scale a row."""
    scale_dtype: ScaleDtype = "float16"
    """Dtype in which scales are stored."""

    def __post_init__(self) -> None:
        check_whole("group", self.group)
        check_choice("scale_dtype", self.scale_dtype, ("float16", "bfloat16", "float32"))

    def check(self, in_features: int) -> None:
        check_group(self.group, in_features)

    def binarize(self, weight: Tensor, moments: Moments | None = None) -> BinaryWeight:
        """`weight` float [N, K] → signs and scale [1, N, G]; sign(0) = +1."""
        self.check(weight.shape[1])
        grouped = weight.float().reshape(weight.shape[0], group_count(self.group, weight.shape[1]), -1)
        return BinaryWeight.from_signs(weight, store(grouped.abs().mean(dim=-1), self.scale_dtype)[None])


class AbsmeanLinear(BinaryLinear):
    """The trainable form: y = x · (s ∘ sign(W))ᵀ + bias, s = mean |W| over each group of a row.

    sign is straight-through: with G = dL/dŴ, dWᵢⱼ = sᵢ·Gᵢⱼ + sgn(Wᵢⱼ)·mean over the group of Gᵢ·sign(Wᵢ), where
    sgn(0) = 0 (|W| has no slope there). Source: XNOR-Net (arXiv 1603.05279), its backward without the clipping.
    `weight` is float [N, K]; raises OptionError for a group that does not divide K.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None, group: int = -1) -> None:
        super().__init__()
        check_group(group, weight.shape[1])
        self.weight = nn.Parameter(weight.detach().clone())
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())
        self.group = group

    @classmethod
    def start(cls, weight: Tensor, bias: Tensor | None, options: MethodOptions) -> AbsmeanLinear:
        assert isinstance(options, AbsmeanOptions)
        return cls(weight.float(), bias, options.group)

    @classmethod
    def from_packed(cls, packed: PackedLinear, weight: Tensor | None, options: MethodOptions) -> AbsmeanLinear:
        """Latents are sign·scale, whose mean magnitude is the scale again."""
        assert isinstance(options, AbsmeanOptions)
        computed_scale(weight)
        w = only_weight(packed)
        if not is_plain(w, groups=group_count(options.group, w.in_features)):
            raise OptionError("the packed layer is not of signs and one scale a group, as absmean's is")
        return cls(latent_of(w, w.to_dense().abs()), packed.bias, options.group)

    def _scale(self) -> Tensor:
        groups = group_count(self.group, self.weight.shape[1])
        return self.weight.reshape(self.weight.shape[0], groups, -1).abs().mean(dim=-1)

    def effective_weight(self) -> Tensor:
        """s ∘ sign(W), [N, K]."""
        scale = self._scale()
        signs = torch.where(self.weight >= 0, 1.0, -1.0).to(self.weight.dtype)
        through = straight_through(signs, self.weight)
        return (scale[:, :, None] * through.reshape(*scale.shape, -1)).reshape(self.weight.shape)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.effective_weight(), self.bias)

    @torch.no_grad()
    def binary(self) -> BinaryWeight:
        return BinaryWeight.from_signs(self.weight, self._scale()[None])
