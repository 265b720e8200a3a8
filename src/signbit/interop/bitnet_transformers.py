"""BitNet-Transformers' checkpoints: fixed signs in int8 and an output that is brought to 128."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from signbit.interop.checkpoint import Layer
from signbit.interop.form import Form, count_zeros, require
from signbit.linear import PackedLinear
from signbit.weight import BinaryWeight


def layer(parts: Mapping[str, Tensor], values: Mapping[str, Any]) -> Layer:
    """y = clamp(128·z/(max|z| + ε)) with z = Ŵx, Ŵ = sign(V − mean V), V = m·q, m = mean q; ε = 1e-5.

    `quantized_weights` q is int8 [N, K] of ±1: reading its weight scales it by its mean, and the forward takes signs again,
    so Ŵ is q or −q. A q of 0 becomes sign(−m²) = −1; where m is 0 the layer gives 0, and so does the packed one, whose
    scale is then 0. A `weight` beside q is a copy that its own loader ignores. Source:
    github.com/beomi/BitNet-Transformers, bitnet_llama/module.py (BitLinearOptimized). Raises FormatError for other values,
    and for a bias, which it adds before the largest output is taken.
    """
    q = parts["quantized_weights"]
    require(
        q.dtype is torch.int8 and q.ndim == 2 and bool((q.abs() <= 1).all()),
        f"quantized_weights is {q.dtype} {list(q.shape)}; int8 [N, K] of −1 and 1 is expected",
    )
    require(
        "bias" not in parts, "a bias, which this form adds before it takes the largest output; no packed layer does"
    )
    mean = q.double().mean()
    values_ = mean * q - mean.square()
    scale = torch.full((1, 1, 1), float(bool(values_.any())))
    return Layer(PackedLinear(BinaryWeight.from_signs(values_, scale), norm_out="batch_absmax"), count_zeros(q))


def _notes(tensors: Mapping[str, Tensor]) -> tuple[str, ...]:
    copies = sum(name.replace(".quantized_weights", ".weight") in tensors for name in tensors if _is_q(name))
    text = f"{copies} tensors named weight beside quantized_weights were left out, as its own loader does"
    return (text,) if copies else ()


def _is_q(name: str) -> bool:
    return name.endswith(".quantized_weights")


FORM = Form(
    "BitNet-Transformers",
    marks=frozenset({"quantized_weights"}),
    needs=frozenset({"quantized_weights"}),
    layer=layer,
    may=frozenset({"weight", "bias"}),
    zero="its forward makes them −1, and so they are here",
    notes=_notes,
)
