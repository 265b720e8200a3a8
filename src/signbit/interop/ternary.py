"""transformers' `bitnet` directories: ternary weights, four to a byte along the rows (arXiv 2402.17764)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from signbit.errors import FormatError
from signbit.interop.checkpoint import Layer
from signbit.interop.form import Form, require
from signbit.linear import PackedLinear
from signbit.models import matches
from signbit.weight import BinaryWeight


def unpack(packed: Tensor) -> Tensor:
    """Ternary uint8 [N, K] of 0, 1, 2 (−1, 0, +1): bits 2i and 2i + 1 of byte [r, k] are row r + i·N/4."""
    return torch.cat([packed >> 2 * i & 3 for i in range(4)])


def pack(codes: Tensor) -> Tensor:
    """The inverse of `unpack`: uint8 [N/4, K] of uint8 [N, K]."""
    quarters = codes.reshape(4, -1, codes.shape[1])
    return quarters[0] | quarters[1] << 2 | quarters[2] << 4 | quarters[3] << 6


def layer(parts: Mapping[str, Tensor], values: Mapping[str, Any]) -> Layer:
    """y = s·(T·q)·a/127 + bias, q the 8-bit activations of a token; T = (S₁ + S₂)/2, two planes, exact.

    `weight` uint8 [N/4, K] packs T, `weight_scale` [1] is 1/s (linear_class bitlinear) or s (autobitlinear, offline);
    `rms_norm.weight` [K] stands before the activations' 8 bits where use_rms_norm is set. Source: BitNet b1.58
    (arXiv 2402.17764); transformers/integrations/bitnet.py. Raises FormatError for other shapes, a code of 3, or weights
    that are still latents (online).
    """
    packed, size = parts["weight"], parts["weight_scale"].float()
    quantization = _quantization(values)
    require(
        packed.dtype is torch.uint8 and packed.ndim == 2,
        f"weight is {packed.dtype}; four ternary values a uint8 are expected. Latents (online) are quantized, not imported: "
        "signbit quantize --method bitnet --weights ternary --norm none",
    )
    require(size.numel() == 1, f"weight_scale is {list(size.shape)}; one number is expected")
    codes = unpack(packed)
    require(not bool((codes == 3).any()), "weight has a code of 3; 0, 1 and 2 (−1, 0, +1) are expected. It is damaged")
    scale = size if quantization.get("linear_class") == "autobitlinear" else 1 / size
    norm = parts.get("rms_norm.weight")
    require(
        (norm is not None) == bool(quantization.get("use_rms_norm")),
        f"rms_norm.weight is {'there' if norm is not None else 'missing'}, use_rms_norm in config.json "
        f"{quantization.get('use_rms_norm', False)}; they must agree",
    )
    half = (scale / 2).reshape(1, 1, 1)
    binary = BinaryWeight.from_signs(
        torch.stack([codes >= 1, codes == 2]),
        torch.cat([half, half]),
        in_scale=None if norm is None else norm.float().reshape(1, -1),
    )
    if norm is None:
        return Layer(PackedLinear(binary, parts.get("bias"), act_bits=8))
    eps = float(quantization.get("rms_norm_eps", 1e-6))
    return Layer(PackedLinear(binary, parts.get("bias"), "rms", eps, act_bits=8))


def _quantization(values: Mapping[str, Any]) -> Mapping[str, Any]:
    quantization = values.get("quantization_config")
    if not isinstance(quantization, dict) or quantization.get("quant_method") != "bitnet":
        raise FormatError("there is weight_scale, but config.json has no quantization_config of quant_method bitnet")
    return quantization


def _may_be_dense(values: Mapping[str, Any], name: str) -> bool:
    return any(matches(pattern, name) for pattern in _quantization(values).get("modules_to_not_convert") or ())


FORM = Form(
    "transformers' bitnet",
    marks=frozenset({"weight_scale"}),
    needs=frozenset({"weight", "weight_scale"}),
    layer=layer,
    may=frozenset({"bias", "rms_norm.weight"}),
    may_be_dense=_may_be_dense,
)
