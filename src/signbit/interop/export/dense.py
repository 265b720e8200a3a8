"""An ordinary Hugging Face directory in full precision."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from signbit import format as packed_format
from signbit.errors import ExportError
from signbit.interop.export.request import ExportRequest, Progress
from signbit.interop.export.source import Made, Packed, float_dtype
from signbit.linear import PackedLinear
from signbit.models import is_fused
from signbit.models.experts import fused_experts


def no_matrix(layer: PackedLinear) -> str | None:
    """Why no plain matrix computes what `layer` does; None if one does, to its activations' 8 bits."""
    if layer.norm_out == "layer":
        return "a LayerNorm stands behind its product (OneBit's), which no other program's linear layer has"
    if layer.norm_out != "none":
        return f"its output is scaled by the largest of the batch ({layer.norm_out}), which depends on all tokens"
    if layer.norm_in != "none":
        return f"a norm ({layer.norm_in}) of its own stands before its product"
    if layer.act_bits == 1:
        return "its activations have 1 bit"
    return None


def write(
    packed: Packed, out: Path, request: ExportRequest, overwrite: bool, progress: Progress, note: Callable[[str], None]
) -> Path:
    """Writes W of each packed layer as a matrix of --dtype (auto: the model's own) under transformers' names.

    Raises ExportError for a layer that is more than a matrix; one with 8-bit activations needs --approximate.
    """
    dtype = float_dtype(packed.values) if request.dtype == "auto" else getattr(torch, request.dtype)
    _refuse(packed, request, note)
    made, changed = dense_tensors(packed, dtype, progress)
    values = {**packed.plain_values, "dtype": str(dtype).removeprefix("torch.")}
    files = {**packed.files, "config.json": (json.dumps(values, indent=2) + "\n").encode(), "README.md": _card(packed)}
    path = packed_format.write(out, made, files, overwrite)
    if largest := max(changed.values(), default=0.0):
        name = max(changed, key=lambda name: changed[name])
        note(f"{dtype} rounds {len(changed)} of {len(packed.names)} matrices, by up to {largest:.1e} of a weight ({name}); "
             "--dtype float32 rounds none")  # fmt: skip
    return path


def _refuse(packed: Packed, request: ExportRequest, note: Callable[[str], None]) -> None:
    for name in packed.names:
        layer = packed.layer(name)
        if (reason := no_matrix(layer)) is not None:
            raise ExportError(f"{name} is more than a matrix: {reason}. Nothing but signbit runs it: keep it packed")
        if layer.act_bits and not request.approximate:
            raise ExportError(
                f"{name} takes activations of 8 bits, and a dense layer does not; --approximate leaves that out, "
                "--format bitnet keeps it where weights are ternary"
            )
    if any(spec.act_bits for spec in packed.description.layers.values()):
        note("the packed layers round activations to 8 bits, the dense ones do not")


def dense_tensors(packed: Packed, dtype: torch.dtype, progress: Progress) -> tuple[Made, dict[str, float]]:
    """All tensors of the model in full precision, and a dictionary that fills with the layers that `dtype` rounds."""
    changed: dict[str, float] = {}
    made, left = Made(), set(packed.names)

    def matrix(name: str) -> Tensor:
        left.discard(name)
        progress("unpacking", len(packed.names) - len(left), len(packed.names), name)
        return rounded(packed.layer(name).to_dense(), dtype, name, changed)

    taken = set()
    for key, module in _fused(packed).items():
        matrices, biases = _experts(packed, key, module, matrix)
        made.add(key, dtype, tuple(module.get_parameter(key.rpartition(".")[2]).shape), matrices)
        if (bias := getattr(module, f"{key.rpartition('.')[2]}_bias", None)) is not None:
            made.add(f"{key}_bias", dtype, tuple(bias.shape), biases)
        taken |= {name for name in (*packed.names, *packed.rest) if name.startswith(f"{key}.")}
    for name in packed.names:
        if name not in taken:
            module = packed.skeleton.get_submodule(name)
            made.add(f"{name}.weight", dtype, tuple(module.weight.shape), partial(_stored, matrix, name, module))
            if f"{name}.bias" in packed.tensors:
                made.add(
                    f"{name}.bias", dtype, tuple(module.bias.shape), partial(packed.tensors.__getitem__, f"{name}.bias")
                )
    for name, spec in packed.description.int8.items():
        if spec.tied_to is None:
            made.add(f"{name}.weight", dtype, (spec.rows, spec.columns), partial(packed.int8_dense, name))
        if spec.bias:
            made.add(f"{name}.bias", dtype, (spec.rows,), partial(packed.tensors.__getitem__, f"{name}.bias"))
    for name in packed.rest:
        if name not in taken:
            empty = packed.tensors.empty(name)
            kept = dtype if empty.is_floating_point() else empty.dtype
            made.add(name, kept, tuple(empty.shape), partial(packed.tensors.__getitem__, name))
    return made, changed


def rounded(w: Tensor, dtype: torch.dtype, name: str, changed: dict[str, float]) -> Tensor:
    """`w` in `dtype`; the largest relative change goes into `changed`. Raises ExportError where `dtype` has no such size."""
    cast = w.to(dtype)
    if not bool(cast.isfinite().all()):
        raise ExportError(
            f"{name} has a weight of {float(w.abs().max()):.3g}, which {dtype} cannot hold; use --dtype float32"
        )
    error = ((cast.float() - w).abs() / w.abs().clamp_min(torch.finfo(torch.float32).tiny)).max()
    if error > 0:
        changed[name] = float(error)
    return cast


def _stored(matrix: Callable[[str], Tensor], name: str, module: Any) -> Tensor:
    return matrix(name).T if isinstance(module, Conv1D) else matrix(name)


def _fused(packed: Packed) -> dict[str, Any]:
    """The 3-D parameters of mixtures that were taken apart to be packed, and the modules that have them."""
    found = {
        f"{name}.{which}": module
        for name, module in packed.skeleton.named_modules()
        if is_fused(module)
        for which in fused_experts(module)
    }
    return {key: module for key, module in found.items() if key not in packed.tensors}


def _experts(
    packed: Packed, key: str, module: Any, matrix: Callable[[str], Tensor]
) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """What makes the experts' matrices and biases as transformers keeps them, each in one tensor."""
    names = [f"{key}.{e}" for e in range(len(module.get_parameter(key.rpartition(".")[2])))]

    def matrices() -> Tensor:
        layers = packed.description.layers
        rows = (matrix(name) if name in layers else packed.tensors[f"{name}.weight"] for name in names)
        return torch.stack([w.T if getattr(module, "is_transposed", False) else w for w in rows])

    return matrices, lambda: torch.stack([packed.tensors[f"{name}.bias"] for name in names])


def _card(packed: Packed) -> bytes:
    settings = packed.description.settings
    return (
        f"# {packed.folder.resolve().name}, unpacked\n\nA dense copy of a model that signbit packed (method "
        f"{settings.get('method', 'unknown')}): the same weights, 16 bits each or more.\n"
    ).encode()
