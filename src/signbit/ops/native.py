"""The C interface of the CPU kernels (csrc/signbit.h) through ctypes: the library, its structures, its errors."""

from __future__ import annotations

import ctypes
import functools
from ctypes import c_char_p, c_float, c_int, c_int32, c_int64, c_void_p
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch

_LIBRARY = "signbit/libsignbit_kernels.so"
_ABI = 2
#: The float types of inputs, scales and biases, and their numbers in C.
FLOATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
NORMS = {"none": 0, "rms": 1, "layer": 2}
ACTIVATIONS = {"exact": 0, "int8": 1}
NO_BIAS = -1
ERRORS = {1: "this processor does not have the instruction set", 2: "out of memory", 3: "an operand is not allowed"}


class Matrix(ctypes.Structure):
    """signbit_matrix."""

    _fields_ = (
        *((name, c_int64) for name in ("rows", "columns", "groups")),
        *(
            (name, c_int32)
            for name in ("planes", "sign_planes", "scale_rows", "in_scale_planes", "float_type", "salient_bits")
        ),
        *((name, c_void_p) for name in ("signs", "scale", "shift", "in_scale", "in_shift")),
        *((name, c_void_p) for name in ("codes", "positions", "counts", "zeros", "starts", "salient_scale")),
    )


class Int8Matrix(ctypes.Structure):
    """signbit_int8_matrix."""

    _fields_ = (
        ("rows", c_int64), ("columns", c_int64), ("float_type", c_int32), ("codes", c_void_p), ("scale", c_void_p),
    )  # fmt: skip


class Call(ctypes.Structure):
    """signbit_call."""

    _fields_ = (
        *((name, c_int32) for name in ("isa", "activations", "threads", "x_type", "norm_in", "norm_out", "bias_type")),
        ("norm_in_eps", c_float), ("norm_out_eps", c_float), ("bias", c_void_p),
    )  # fmt: skip


class Library(NamedTuple):
    """The loaded kernels: the ctypes handle, where it lies, what the processor has, and the sets that it can run."""

    handle: Any
    path: str
    features: tuple[str, ...]
    compiled: tuple[str, ...]
    runs: dict[str, int]  # name → number, best first


@functools.cache
def library() -> Library | str:
    """The kernels that were built with this installation, or why there are none."""
    try:
        path = Path(str(metadata.distribution("signbit").locate_file(_LIBRARY)))
    except metadata.PackageNotFoundError:
        return "signbit is not installed (it runs from a source tree); `pip install .` builds the kernels"
    if not path.exists():
        return "this installation was built without a C++ compiler; install one and reinstall signbit"
    try:
        handle = ctypes.CDLL(str(path))
        abi = handle.signbit_abi()
    except (OSError, AttributeError) as error:
        return f"{path} does not load: {error}"
    if abi != _ABI:
        return f"{path} belongs to another version of signbit; reinstall signbit"
    handle.signbit_features.restype = c_char_p
    handle.signbit_isa_name.restype = c_char_p
    handle.signbit_linear.argtypes = [c_void_p, c_void_p, c_void_p, c_int64, c_int64, c_void_p]
    handle.signbit_int8_linear.argtypes = handle.signbit_linear.argtypes
    handle.signbit_linear.restype = handle.signbit_int8_linear.restype = c_int
    handle.signbit_clear_salient.argtypes = [c_void_p, c_int32, c_int64, c_int64, c_void_p, c_int64, c_void_p]
    handle.signbit_clear_salient.restype = c_int64
    names = [handle.signbit_isa_name(i).decode() for i in range(handle.signbit_isa_count())]
    runs = {name: i for i, name in enumerate(names) if handle.signbit_isa_runs(i)}
    return Library(handle, str(path), tuple(handle.signbit_features().decode().split()), tuple(names), runs)
