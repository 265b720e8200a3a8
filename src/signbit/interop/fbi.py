"""FBI-LLM's checkpoints: float latents with a learned scale and shift (arXiv 2407.07093)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from signbit.interop.checkpoint import Layer
from signbit.interop.form import Form, count_zeros, one_dtype, require
from signbit.linear import PackedLinear
from signbit.methods.fbi import FbiOptions, Pattern


def layer(parts: Mapping[str, Tensor], values: Mapping[str, Any]) -> Layer:
    """W̃ = α ∘ sign(W) + β with `weight` W float [N, K], `wscale` α and `wbias` β.

    α and β are [1, K] (column, as published), [N, 1] (row) or one number (single); the shape tells. Source: FBI-LLM
    (arXiv 2407.07093), eq. 2, and its code's qat/learnable_binarizer.py. Raises FormatError for other shapes.
    """
    weight, (scale, shift) = parts["weight"], one_dtype(parts["wscale"], parts["wbias"])
    require(weight.is_floating_point() and weight.ndim == 2, f"weight is {weight.dtype}, not latents float [N, K]")
    rows, columns = weight.shape
    patterns: dict[tuple[int, ...], Pattern] = {
        (1, columns): "column", (rows, 1): "row", (): "single", (1,): "single", (1, 1): "single",
    }  # fmt: skip
    pattern = patterns.get(tuple(scale.shape))
    require(
        pattern is not None and scale.shape == shift.shape,
        f"wscale is {list(scale.shape)} and wbias {list(shift.shape)}; both are [1, {columns}] (column), [{rows}, 1] (row) "
        "or a single number",
    )
    assert pattern is not None
    if pattern == "single":
        scale, shift = scale.reshape(1, 1), shift.reshape(1, 1)
    binary = FbiOptions(pattern).binary(weight, scale, shift)
    return Layer(PackedLinear(binary, parts.get("bias")), count_zeros(weight))


FORM = Form(
    "FBI-LLM",
    marks=frozenset({"wscale", "wbias"}),
    needs=frozenset({"weight", "wscale", "wbias"}),
    layer=layer,
    zero="their sign was 0 there, so that such a weight was β alone, and is +1 here",
)
