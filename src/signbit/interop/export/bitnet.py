"""transformers' `bitnet` directories (arXiv 2402.17764), which it loads without signbit."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from signbit import format as packed_format
from signbit.bits import unpack_signs
from signbit.errors import ExportError
from signbit.interop.export.request import ExportRequest, Progress
from signbit.interop.export.source import Made, Packed, float_dtype
from signbit.interop.ternary import pack
from signbit.linear import PackedLinear
from signbit.weight import BinaryWeight


def write(
    packed: Packed, out: Path, request: ExportRequest, overwrite: bool, progress: Progress, note: Callable[[str], None]
) -> Path:
    """Writes T = (S₁ + S₂)/2, two bits a weight, and one scale a tensor (linear_class autobitlinear, offline).

    A sign matrix with one scale is written too, as a T without zeros. Raises ExportError, with the layer, for anything else.
    """
    specs = packed.description.layers
    linears = {name for name, module in packed.skeleton.named_modules() if isinstance(module, torch.nn.Linear)}
    if strange := sorted(set(specs) - linears):
        raise ExportError(f"{strange[0]} is packed, and transformers' bitnet has no such layer; {_OTHERWISE}")
    for name in packed.names:
        if (reason := _unfit(packed.layer(name))) is not None:
            raise ExportError(f"{name} is no layer of transformers' bitnet: {reason}. {_OTHERWISE}")
    norms = {(spec.norm_in, spec.norm_in_eps) for spec in specs.values() if spec.norm_in != "none"}
    if len({spec.norm_in for spec in specs.values()}) > 1 or len(norms) > 1:
        raise ExportError(f"some layers have a norm before them and others not; transformers' bitnet has it in all or none. "
                          f"{_OTHERWISE}")  # fmt: skip
    dtype = float_dtype(packed.values) if request.dtype == "auto" else getattr(torch, request.dtype)
    made, rounded = _tensors(packed, dtype, progress)
    quantization: dict[str, Any] = {
        "quant_method": "bitnet",
        "linear_class": "autobitlinear",
        "quantization_mode": "offline",
        "modules_to_not_convert": sorted(linears - set(specs)),  # transformers would make a bitnet layer of each
    }
    if norms:
        quantization |= {"use_rms_norm": True, "rms_norm_eps": norms.pop()[1]}
    values = {
        **packed.plain_values,
        "dtype": str(dtype).removeprefix("torch."),
        "quantization_config": quantization,
    }
    files = {**packed.files, "config.json": (json.dumps(values, indent=2) + "\n").encode(), "README.md": _card(packed)}
    path = packed_format.write(out, made, files, overwrite)
    if rounded:
        note(f"{dtype} rounds the scale of {len(rounded)} of {len(specs)} layers; --dtype float32 rounds none")
    return path


_OTHERWISE = "--format dense writes matrices of 16 bits instead, where the layers are no more than that"


def _unfit(layer: PackedLinear) -> str | None:
    """Why transformers' AutoBitLinear cannot compute what `layer` does; None if it does."""
    w = layer.weights[0]
    norm = layer.norm_in != "none"
    reasons = (
        (len(layer.weights) > 1, "it is a product of matrices"),
        (layer.norm_out != "none", f"a norm ({layer.norm_out}) stands behind its product"),
        (layer.norm_in not in ("none", "rms"), f"the norm before its product is {layer.norm_in}, not rms"),
        (layer.act_bits != 8, f"its activations are {'float' if not layer.act_bits else 'signs'}, not 8 bits"),
        (w.scale.shape[1:] != (1, 1) and not _equal(w.scale), "it has a scale a row or group, not one a tensor"),
        (w.planes > 2, f"it has {w.planes} planes of signs, not two"),
        (w.planes == 2 and not torch.equal(w.scale[0], w.scale[1]), "its two planes have different scales: not ternary"),
        (w.shift is not None or w.in_shift is not None, "a shift is added to its weights"),
        (w.salient is not None, "it has salient weights of more bits"),
        (w.in_scale is not None and (not norm or w.in_scale.shape[0] > 1), "a vector multiplies its inputs"),
        (w.out_features % 4 != 0, f"it has {w.out_features} rows, not a multiple of 4"),
    )  # fmt: skip
    return next((reason for holds, reason in reasons if holds), None)


def _equal(scale: Tensor) -> bool:
    return bool((scale == scale[:, :1, :1]).all())


def ternary(w: BinaryWeight) -> tuple[Tensor, Tensor]:
    """T + 1 as uint8 [N, K] of 0, 1, 2, and the scale of T float [N or 1, G], of two planes of one scale or of one plane."""
    signs = unpack_signs(w.signs, w.in_features) > 0
    if w.planes == 1:
        return 2 * signs[0].to(torch.uint8), w.scale[0]
    codes = signs.to(torch.uint8).expand(2, -1, -1).sum(dim=0, dtype=torch.uint8)
    return codes, 2 * w.scale[0]


def _tensors(packed: Packed, dtype: torch.dtype, progress: Progress) -> tuple[Made, list[str]]:
    made, rounded = Made(), []
    layers = packed.description.layers
    for done, name in enumerate(packed.names):
        w = packed.layer(name).weights[0]
        made.add(f"{name}.weight", torch.uint8, (w.out_features // 4, w.in_features), partial(_codes, packed, name))
        _, scale = ternary(w)
        scale = scale.reshape(-1)[:1]
        if float(scale.to(dtype)) != float(scale):
            rounded.append(name)
        made.add(f"{name}.weight_scale", dtype, (1,), scale.clone)
        if layers[name].norm_in == "rms":
            norm = torch.ones(w.in_features) if w.in_scale is None else w.in_scale[0]
            made.add(f"{name}.rms_norm.weight", dtype, (w.in_features,), norm.clone)
        progress("packing", done + 1, len(layers), name)
    for name, spec in packed.description.int8.items():
        if spec.tied_to is None:
            made.add(f"{name}.weight", dtype, (spec.rows, spec.columns), partial(packed.int8_dense, name))
    whole = {f"{name}.{part}" for name in packed.names for part in ("weight", "scale", "in_scale")}
    int8 = {f"{name}.{part}" for name in packed.description.int8 for part in ("weight", "scale")}
    for name in packed.tensors:
        if name not in whole and name not in int8:
            empty = packed.tensors.empty(name)
            made.add(name, dtype, tuple(empty.shape), partial(packed.tensors.__getitem__, name))
    return made, rounded


def _codes(packed: Packed, name: str) -> Tensor:
    return pack(ternary(packed.layer(name).weights[0])[0])


def _card(packed: Packed) -> bytes:
    return (
        f"# {packed.folder.resolve().name}, as transformers' bitnet\n\nTernary weights, two bits each, of a model that signbit "
        "packed. transformers loads it; `signbit import` packs it again.\n"
    ).encode()
