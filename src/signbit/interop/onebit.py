"""OneBit's checkpoints, packed for inference or as they were trained (arXiv 2402.11295)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from signbit.interop.checkpoint import Layer
from signbit.interop.form import Form, count_zeros, one_dtype, require
from signbit.linear import PackedLinear
from signbit.weight import BinaryWeight


def layer(parts: Mapping[str, Tensor], values: Mapping[str, Any]) -> Layer:
    """y = LN(((x ∘ g)·sign(W)ᵀ) ∘ h) + bias with `input_factor` g [K] and `weight_scale` h [N]; LN has no affine part.

    `weight` is float [N, K], the latents of training, or int8 [N, K/8]: bit t of byte k is column 8k + t, and a set bit is
    −1, the opposite of signbit's. Source: OneBit (arXiv 2402.11295), eq. 1 to 3; its code's transformers/models/bitnet.py
    and scripts/convert_llama_to_infer_ckpt.py. Raises FormatError for other shapes.
    """
    weight, (h, g) = parts["weight"], one_dtype(parts["weight_scale"], parts["input_factor"])
    rows, columns = h.numel(), g.numel()
    scale, in_scale, zeros = h.reshape(1, rows, 1).clone(), g.reshape(1, columns).clone(), 0
    if weight.dtype is torch.int8:
        require(
            list(weight.shape) == [rows, columns // 8] and columns % 8 == 0,
            f"weight is int8 {list(weight.shape)}; with {rows} weight_scale and {columns} input_factor it is "
            f"[{rows}, {columns}/8]",
        )
        binary = BinaryWeight(~weight.contiguous().view(torch.uint8)[None], scale, columns, in_scale=in_scale)
    else:
        require(
            weight.is_floating_point() and list(weight.shape) == [rows, columns],
            f"weight is {weight.dtype} {list(weight.shape)}; latents float [{rows}, {columns}] or packed int8 are expected",
        )
        binary, zeros = BinaryWeight.from_signs(weight, scale, in_scale=in_scale), count_zeros(weight)
    return Layer(PackedLinear(binary, parts.get("bias"), norm_out="layer"), zeros)


def _config(values: dict[str, Any]) -> dict[str, Any]:
    """BitLlamaConfig is LlamaConfig under another name; its pretraining_tp would only split matrices."""
    if values.get("model_type") == "bitllama":
        values["model_type"] = "llama"
    values.pop("pretraining_tp", None)
    return values


FORM = Form(
    "OneBit",
    marks=frozenset({"input_factor"}),
    needs=frozenset({"weight", "weight_scale", "input_factor"}),
    layer=layer,
    zero="their sign was 0 in its training, +1 in its own packed form, and is +1 here",
    config=_config,
)
