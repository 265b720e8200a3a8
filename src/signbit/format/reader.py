"""Reading a packed directory: its description, its tensor headers, and whether both are whole."""

from __future__ import annotations

import hashlib
import json
import struct
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from signbit.errors import FormatError
from signbit.format.description import QUANT_METHOD, Description
from signbit.linear import VARIABLE

AGAIN = "copy or download it again, or quantize the source model again"
_ITEM_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4, "F64": 8, "I64": 8, "U64": 8,
}  # fmt: skip
_TORCH_NAMES = {
    "U8": "uint8", "I8": "int8", "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64",
    "BOOL": "bool", "I16": "int16", "I32": "int32", "I64": "int64",
}  # fmt: skip


@dataclass(frozen=True)
class TensorHeader:
    """Where one tensor lies: file, safetensors dtype, shape, and its bytes [begin, end) in the file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return self.end - self.begin


class LazyTensors(Mapping[str, Tensor], ABC):
    """Tensors by name, each read or computed when it is asked for and not kept."""

    @abstractmethod
    def empty(self, name: str) -> Tensor:
        """The tensor's dtype and shape, on the meta device."""


class StoredTensors(LazyTensors):
    """Tensors in safetensors files by name, each read from the disk when it is asked for and not kept."""

    def __init__(self, headers: Mapping[str, TensorHeader]) -> None:
        self.headers = headers

    def __getitem__(self, name: str) -> Tensor:
        header = self.headers[name]
        dtype = getattr(torch, _TORCH_NAMES[header.dtype])
        if not header.nbytes:
            return torch.empty(header.shape, dtype=dtype)
        with header.file.open("rb") as stream:
            stream.seek(header.begin)
            content = bytearray(stream.read(header.nbytes))
        return torch.frombuffer(content, dtype=dtype).reshape(header.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self.headers)

    def __len__(self) -> int:
        return len(self.headers)

    def empty(self, name: str) -> Tensor:
        header = self.headers[name]
        return torch.empty(header.shape, dtype=getattr(torch, _TORCH_NAMES[header.dtype]), device="meta")


def read_description(directory: str | Path) -> tuple[dict[str, Any], Description]:
    """config.json of a packed directory, and the description in it; raises FormatError if there is none."""
    path = Path(directory) / "config.json"
    if not Path(directory).is_dir():
        raise FormatError(f"{directory} is no directory; give the packed directory that `signbit quantize -o` wrote")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FormatError(f"{directory} has no config.json, so it is no model directory") from None
    except ValueError as error:
        raise FormatError(f"{path} is no valid JSON ({error}); {AGAIN}") from error
    quantization = config.get("quantization_config") if isinstance(config, dict) else None
    if not isinstance(quantization, dict) or quantization.get("quant_method") != QUANT_METHOD:
        raise FormatError(
            f"{directory} is not packed by signbit; make it so with `signbit quantize {directory} -o OUT`"
        )
    return config, Description.from_dict(quantization)


def weight_files(directory: str | Path) -> list[Path]:
    """The safetensors files of a model directory, one or those of its index; raises FormatError if one is missing."""
    directory = Path(directory)
    single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if single.exists():
        return [single]
    if not index.exists():
        raise FormatError(f"{directory} has neither model.safetensors nor model.safetensors.index.json; {AGAIN}")
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FormatError(f"{index} is damaged ({type(error).__name__}: {error}); {AGAIN}") from error
    files = [directory / name for name in names]
    for file in files:
        if not file.exists():
            raise FormatError(f"{file} is missing, though the index names it; {AGAIN}")
    return files


def read_headers(files: Iterable[str | Path]) -> dict[str, TensorHeader]:
    """Name → header of every tensor; raises FormatError for a file that is cut short or whose header is damaged."""
    headers: dict[str, TensorHeader] = {}
    for file in map(Path, files):
        size = file.stat().st_size
        with file.open("rb") as stream:
            prefix = stream.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
            if 8 + length > size:
                raise FormatError(f"{file} is cut short ({size} bytes, its header alone needs {8 + length}); {AGAIN}")
            try:
                entries = json.loads(stream.read(length).decode("utf-8"))
                entries.pop("__metadata__", None)
                for name, entry in entries.items():
                    begin, end = entry["data_offsets"]
                    shape = tuple(int(n) for n in entry["shape"])
                    if end - begin != prod(shape) * _ITEM_BYTES[entry["dtype"]]:
                        raise ValueError(f"{name} has {end - begin} bytes for {entry['dtype']} {list(shape)}")
                    headers[name] = TensorHeader(file, entry["dtype"], shape, 8 + length + begin, 8 + length + end)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise FormatError(f"the header of {file} is damaged ({error}); {AGAIN}") from error
        ends = [header.end for header in headers.values() if header.file == file]
        if max(ends, default=size) != size:
            raise FormatError(f"{file} is {size} bytes long, its header says {max(ends)}: it was cut short; {AGAIN}")
    return headers


def verify(headers: Mapping[str, TensorHeader], description: Description) -> None:
    """Raises FormatError, naming the tensor, if one of a packed layer is missing, too many or of another shape."""
    expected: dict[str, tuple[str, tuple[int, ...]]] = {}
    own: set[str] = set()
    for name, spec in description.layers.items():
        own.add(name)
        lengths = {
            tensor.rpartition(".")[2]: header.shape[0]
            for tensor in (
                f"{name}.{v}{s}" for v in VARIABLE for s in ("", *(f"_{i}" for i in range(len(spec.weights))))
            )
            if (header := headers.get(tensor)) is not None and len(header.shape) == 1
        }
        try:
            shapes = spec.shapes(lengths)
        except KeyError as error:
            raise FormatError(f"the tensor {name}.{error.args[0]} is missing; {AGAIN}") from None
        for tensor, (dtype, shape) in shapes.items():
            expected[f"{name}.{tensor}"] = (str(dtype).removeprefix("torch."), shape)
        if spec.bias:
            expected[f"{name}.bias"] = ("", (spec.weights[-1].out_features,))
    for name, int8 in description.int8.items():
        own.add(name)
        if int8.tied_to is None:
            expected[f"{name}.weight"] = ("int8", (int8.rows, int8.columns))
            expected[f"{name}.scale"] = ("", (int8.rows,))
        if int8.bias:
            expected[f"{name}.bias"] = ("", (int8.rows,))
    for tensor, (dtype_name, shape) in expected.items():
        header = headers.get(tensor)
        if header is None:
            raise FormatError(f"the tensor {tensor} is missing; {AGAIN}")
        stored = _TORCH_NAMES.get(header.dtype, header.dtype)
        if header.shape != shape or (dtype_name and stored != dtype_name):
            raise FormatError(
                f"the tensor {tensor} is {stored} {list(header.shape)}, config.json asks for "
                f"{dtype_name or 'a float'} {list(shape)}; {AGAIN}"
            )
    for tensor, header in headers.items():
        packed = header.dtype == "U8"  # no dense layer has bytes
        if (packed or tensor.rpartition(".")[0] in own) and tensor not in expected:
            raise FormatError(f"the tensor {tensor} is not one that config.json describes; {AGAIN}")


def headers_sha256(headers: Mapping[str, TensorHeader]) -> str:
    """The SHA-256 of the tensors in the files (docs/format.md); reads each file once, in pieces."""
    digest = hashlib.sha256()
    for name in sorted(headers):
        header = headers[name]
        digest.update(f"{name}\0{header.dtype}\0{','.join(map(str, header.shape))}\0".encode())
        with header.file.open("rb") as stream:
            stream.seek(header.begin)
            left = header.nbytes
            while left:
                piece = stream.read(min(left, 1 << 22))
                if not piece:
                    raise FormatError(f"{header.file} ends inside the tensor {name}; {AGAIN}")
                digest.update(piece)
                left -= len(piece)
    return digest.hexdigest()
