"""True size of a packed directory, counted from the bytes in its files."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from signbit.format import TensorHeader, read_description, read_headers, verify, weight_files
from signbit.linear import LayerSpec
from signbit.models.report import bits_range, kind_of


@dataclass(frozen=True)
class LayerSize:
    """One packed layer: its size, its bytes without bias, and the share of its weights that is salient."""

    name: str
    out_features: int
    in_features: int
    nbytes: int
    salient: float

    @property
    def bits_per_weight(self) -> float:
        """8 · nbytes / (N·K)."""
        return 8 * self.nbytes / (self.out_features * self.in_features)


@dataclass(frozen=True)
class Kind:
    """Packed layers that differ only in the number of their block."""

    name: str
    layers: int
    shape: str
    bits: str
    salient: float
    nbytes: int


@dataclass(frozen=True)
class ModelSize:
    """All packed layers, and the whole: parameters as in full precision, bytes of all weight files."""

    layers: tuple[LayerSize, ...]
    parameters: int
    tensor_bytes: int
    file_bytes: int
    settings: dict[str, Any]

    @property
    def bits_per_weight(self) -> float:
        """True bits per weight over the packed layers."""
        weights = sum(layer.out_features * layer.in_features for layer in self.layers)
        return 8 * sum(layer.nbytes for layer in self.layers) / max(1, weights)

    @property
    def bits_per_parameter(self) -> float:
        """Bits of the whole files per parameter, embeddings, norms and file headers included."""
        return 8 * self.file_bytes / self.parameters

    @property
    def linears_saved(self) -> float:
        """Share of the packed layers' bytes that is saved against 16 bits a weight."""
        return 1 - self.bits_per_weight / 16

    @property
    def file_saved(self) -> float:
        """The same of the whole files, in which what is not packed weighs most in a small model."""
        return 1 - self.bits_per_parameter / 16

    def kinds(self) -> list[Kind]:
        """The layers, those that differ only in their block's number and have one shape in one line."""
        same: dict[tuple[str, int, int], list[LayerSize]] = {}
        for layer in self.layers:
            same.setdefault((kind_of(layer.name), layer.out_features, layer.in_features), []).append(layer)
        return [
            Kind(
                name, len(layers), f"{rows} × {columns}", bits_range(layer.bits_per_weight for layer in layers),
                sum(layer.salient for layer in layers) / len(layers), sum(layer.nbytes for layer in layers),
            )
            for (name, rows, columns), layers in same.items()
        ]  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            **asdict(self),
            "bits_per_weight": self.bits_per_weight,
            "bits_per_parameter": self.bits_per_parameter,
            "linears_saved": self.linears_saved,
            "file_saved": self.file_saved,
            "layers": [{**asdict(layer), "bits_per_weight": layer.bits_per_weight} for layer in self.layers],
        }


@dataclass(frozen=True)
class DenseSize:
    """A directory of which nothing is packed: its entries, those of a shared tensor once, and the bytes of its files."""

    parameters: int
    file_bytes: int

    @property
    def bits_per_parameter(self) -> float:
        """8 · bytes of the whole files / parameters."""
        return 8 * self.file_bytes / self.parameters

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        saved = 1 - self.bits_per_parameter / 16
        return {**asdict(self), "bits_per_parameter": self.bits_per_parameter, "file_saved": saved}


def dense_size(directory: str | Path) -> DenseSize:
    """Size of a directory in full precision, from its headers; raises FormatError as `format` does."""
    files = weight_files(directory)
    parameters = sum(math.prod(header.shape) for header in read_headers(files).values())
    return DenseSize(parameters, sum(file.stat().st_size for file in files))


def _salient_count(headers: Mapping[str, TensorHeader], name: str, spec: LayerSpec) -> int:
    positions = headers.get(f"{name}.salient_positions")
    if positions is None:
        return 0
    if spec.weights[0].salient_positions == "offsets":
        return positions.shape[0]
    bitmap = np.fromfile(positions.file, np.uint8, positions.nbytes, offset=positions.begin)
    return int(np.unpackbits(bitmap).sum())


def measure_size(directory: str | Path) -> ModelSize:
    """Sizes of a packed directory from its headers; no weight is loaded. Raises FormatError as `format` does."""
    _, description = read_description(directory)
    files = weight_files(directory)
    headers = read_headers(files)
    verify(headers, description)
    layers = []
    parameters = 0
    counted: set[str] = set()
    for name, spec in description.layers.items():
        tensors = {tensor for tensor in headers if tensor.rpartition(".")[0] == name and not tensor.endswith(".bias")}
        counted |= tensors
        rows, columns = spec.weights[-1].out_features, spec.weights[0].in_features
        salient = _salient_count(headers, name, spec) / (rows * columns)
        layers.append(LayerSize(name, rows, columns, sum(headers[t].nbytes for t in tensors), salient))
        parameters += sum(weight.out_features * weight.in_features for weight in spec.weights)
    for name, int8 in description.int8.items():
        if int8.tied_to is None:
            counted |= {f"{name}.weight", f"{name}.scale"}
            parameters += int8.rows * int8.columns
    for tensor, header in headers.items():
        if tensor not in counted:
            size = 1
            for n in header.shape:
                size *= n
            parameters += size
    return ModelSize(
        tuple(layers),
        parameters,
        sum(header.nbytes for header in headers.values()),
        sum(file.stat().st_size for file in files),
        description.settings,
    )
