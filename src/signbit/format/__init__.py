"""The packed directory on disk (docs/format.md): its description, one writer, one reader. Knows no transformers."""

from signbit.format.description import FORMAT_VERSION, Description, Int8Spec
from signbit.format.parts import Parts
from signbit.format.reader import (
    LazyTensors,
    StoredTensors,
    TensorHeader,
    headers_sha256,
    read_description,
    read_headers,
    verify,
    weight_files,
)
from signbit.format.writer import check_target, staged, tensors_sha256, total_bytes, write

__all__ = [
    "FORMAT_VERSION",
    "Description",
    "Int8Spec",
    "LazyTensors",
    "Parts",
    "StoredTensors",
    "TensorHeader",
    "check_target",
    "headers_sha256",
    "read_description",
    "read_headers",
    "staged",
    "tensors_sha256",
    "total_bytes",
    "verify",
    "weight_files",
    "write",
]
