"""The CPU kernels (csrc/, loaded with ctypes): which library and instruction set, and the two ops on them."""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable
from ctypes import c_char_p, c_float, c_int, c_int32, c_int64, c_void_p
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from signbit import bits
from signbit.bits import Operands
from signbit.errors import OptionError, SignbitError
from signbit.ops import layout, reference

#: Names the instruction set that multiplies ("avx512", "avxvnni", "avx2", "neon", "portable"), or "reference" for none.
VARIABLE = "SIGNBIT_CPU"
_LIBRARY = "signbit/libsignbit_kernels.so"
_ABI = 1
_FLOATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_NORMS = {"none": 0, "rms": 1, "layer": 2}
_NO_BIAS = -1
#: Beyond this many columns the integer sums of int8 would not be exact.
MAX_COLUMNS = 65536


class _Matrix(ctypes.Structure):
    _fields_ = (
        *((name, c_int64) for name in ("rows", "columns", "groups")),
        *(
            (name, c_int32)
            for name in ("planes", "sign_planes", "scale_rows", "in_scale_planes", "float_type", "salient_bits")
        ),
        *((name, c_void_p) for name in ("signs", "scale", "shift", "in_scale", "in_shift")),
        *((name, c_void_p) for name in ("codes", "positions", "counts", "zeros", "starts", "salient_scale")),
    )


class _Int8Matrix(ctypes.Structure):
    _fields_ = (
        ("rows", c_int64), ("columns", c_int64), ("float_type", c_int32), ("codes", c_void_p), ("scale", c_void_p),
    )  # fmt: skip


class _Call(ctypes.Structure):
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
    handle.signbit_clear_salient.argtypes = [c_void_p, c_int32, c_int64, c_int64, c_void_p, c_void_p]
    handle.signbit_clear_salient.restype = None
    names = [handle.signbit_isa_name(i).decode() for i in range(handle.signbit_isa_count())]
    runs = {name: i for i, name in enumerate(names) if handle.signbit_isa_runs(i)}
    return Library(handle, str(path), tuple(handle.signbit_features().decode().split()), tuple(names), runs)


@functools.cache
def selected() -> tuple[str | None, str]:
    """The instruction set that runs and why, or None and why the reference runs.

    Raises OptionError if SIGNBIT_CPU names a set that is not there.
    """
    wanted, found = os.environ.get(VARIABLE, ""), library()
    if wanted == "reference":
        return None, f"{VARIABLE}=reference asks for plain torch"
    if not wanted:
        return None, f"the CPU kernels are used where {VARIABLE} names an instruction set: layers do not keep them yet"
    if isinstance(found, str):
        raise OptionError(f"{VARIABLE}={wanted}, but there are no kernels: {found}")
    if wanted not in found.runs:
        raise OptionError(
            f"{VARIABLE} is {wanted!r}; this processor runs {', '.join(found.runs)}, and reference is always there"
        )
    if (wrong := _check(wanted)) is not None:
        return None, f"the {wanted} kernels failed their check at load ({wrong}); please report this"
    return wanted, f"{VARIABLE} asks for it; checked against the reference at load"


def unsupported(w: Operands, activations: str) -> str | None:
    """Why the kernels do not multiply by `w`, or None if they do."""
    groups = w.scale.shape[2]
    floats = {t.dtype for t in (w.scale, w.shift, w.in_scale, w.in_shift, w.salient_scale) if t is not None}
    if activations not in ("exact", "int8"):
        return f"{activations} activations are left to the reference"
    if groups > 1 and (w.in_features // groups) % layout.WORD_COLUMNS:
        return f"groups of {w.in_features // groups} columns are no multiple of {layout.WORD_COLUMNS}"
    if len(floats) > 1 or not floats <= _FLOATS.keys():
        return f"scales of type {', '.join(sorted(map(str, floats)))}"
    if w.in_features > MAX_COLUMNS:
        return f"{w.in_features} columns are more than {MAX_COLUMNS}"
    return None


class Prepared(NamedTuple):
    """One matrix in the kernels' order; `stored` gives its operands back. Made by `prepare`.

    `signs`, `scale` and `shift` as in `layout`, `salient_starts` int32 [N + 1]: how many salient values lie before each
    row; the other tensors are the stored ones.
    """

    signs: Tensor
    scale: Tensor
    shift: Tensor | None
    in_scale: Tensor | None
    in_shift: Tensor | None
    salient_codes: Tensor | None
    salient_positions: Tensor | None
    salient_counts: Tensor | None
    salient_scale: Tensor | None
    salient_zero: Tensor | None
    salient_starts: Tensor | None
    shape: list[int]  # rows, columns, groups, planes, sign planes, scale rows, in_scale planes, salient bits

    def stored(self) -> Operands:
        """The operands that `prepare` took, equal but for sign bits under salient positions, which are 0."""
        rows, columns, _, planes, sign_planes, scale_rows, _, salient_bits = self.shape
        scale = layout.stored_rows(self.scale, rows) if scale_rows else self.scale
        return Operands(
            layout.stored_signs(self.signs, sign_planes, rows, columns), scale.reshape(planes, -1, scale.shape[-1]),
            None if self.shift is None else layout.stored_rows(self.shift, rows), self.in_scale, self.in_shift,
            self.salient_codes, self.salient_positions, self.salient_counts, self.salient_scale, self.salient_zero,
            salient_bits, columns,
        )  # fmt: skip


def prepare(w: Operands) -> Prepared:
    """`w` in the kernels' order; the caller has asked `unsupported`."""
    found = library()
    assert isinstance(found, Library)
    sign_planes, rows, _ = w.signs.shape
    signs, starts = w.signs, None
    if w.salient_positions is not None:
        signs = w.signs.clone(memory_format=torch.contiguous_format)
        positions = w.salient_positions.contiguous()
        found.handle.signbit_clear_salient(
            signs.data_ptr(), sign_planes, rows, w.in_features, positions.data_ptr(),
            None if w.salient_counts is None else w.salient_counts.contiguous().data_ptr(),
        )  # fmt: skip
        starts = _starts(w)
    planes, scale_rows, groups = w.scale.shape
    # One row may share its scale with all: only a matrix of one row can be read both ways, and then they are the same.
    per_row = scale_rows == rows
    return Prepared(
        layout.lay_signs(signs, w.in_features), layout.lay_rows(w.scale) if per_row else w.scale.contiguous(),
        None if w.shift is None else layout.lay_rows(w.shift), _contiguous(w.in_scale), _contiguous(w.in_shift),
        _contiguous(w.salient_codes), _contiguous(w.salient_positions), _contiguous(w.salient_counts),
        _contiguous(w.salient_scale), _contiguous(w.salient_zero), starts,
        [rows, w.in_features, groups, planes, sign_planes, int(per_row), 0 if w.in_scale is None else len(w.in_scale),
         w.salient_bits],
    )  # fmt: skip


def linear(
    x: Tensor,
    w: Prepared,
    activations: str,
    bias: Tensor | None = None,
    norm_in: str = "none",
    norm_in_eps: float = 0.0,
    norm_out: str = "none",
    norm_out_eps: float = 0.0,
    isa: str | None = None,
) -> Tensor:
    """norm_out(W · norm_in(x)) + bias in one pass; `isa` None takes the selected instruction set.

    `x` is float32, bfloat16 or float16 [..., K] on the CPU; the result has its dtype, [..., N].
    """
    rows, columns = w.shape[0], w.shape[1]
    flat = x.reshape(-1, columns)
    if flat.stride(-1) != 1:
        flat = flat.contiguous()
    y = torch.empty(*x.shape[:-1], rows, dtype=x.dtype, device=x.device)
    call = _call(isa, activations, x.dtype)
    call.norm_in, call.norm_in_eps = _NORMS[norm_in], norm_in_eps
    call.norm_out, call.norm_out_eps = _NORMS[norm_out], norm_out_eps
    if bias is not None:
        call.bias_type, call.bias = _FLOATS[bias.dtype], bias.data_ptr()
    matrix = _matrix(*[t.data_ptr() if t is not None else None for t in w[:-1]], w.scale.dtype, *w.shape)
    _run("signbit_linear", matrix, call, flat, y)
    return y


def int8_linear(x: Tensor, codes: Tensor, scale: Tensor, activations: str, isa: str | None = None) -> Tensor:
    """As `signbit.ops.int8_linear`, on the kernels."""
    flat = x.reshape(-1, codes.shape[1])
    if flat.stride(-1) != 1:
        flat = flat.contiguous()
    codes, scale = codes.contiguous(), scale.contiguous()
    y = torch.empty(*x.shape[:-1], codes.shape[0], dtype=x.dtype, device=x.device)
    matrix = _Int8Matrix(*codes.shape, _FLOATS[scale.dtype], codes.data_ptr(), scale.data_ptr())
    _run("signbit_int8_linear", matrix, _call(isa, activations, x.dtype), flat, y)
    return y


def supports_int8(x: Tensor, codes: Tensor, scale: Tensor) -> bool:
    """Whether `int8_linear` takes these."""
    return x.dtype in _FLOATS and scale.dtype in _FLOATS and codes.shape[1] <= MAX_COLUMNS


def supports_input(x: Tensor) -> bool:
    """Whether `linear` takes this dtype."""
    return x.dtype in _FLOATS


def backend_functions(isa: str | None = None) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """`binary_linear` and `int8_linear` with the reference's signatures on one instruction set.

    A matrix is brought into the kernels' order on every call; what the kernels do not do is left to the reference.
    """

    def binary_linear(x: Tensor, w: Operands, activations: str) -> Tensor:
        if not supports_input(x) or unsupported(w, activations):
            return reference.binary_linear(x, w, activations)
        return linear(x, prepare(w), activations, isa=isa)

    def head(x: Tensor, codes: Tensor, scale: Tensor, activations: str) -> Tensor:
        if activations == "sign" or not supports_int8(x, codes, scale):
            return reference.int8_linear(x, codes, scale, activations)
        return int8_linear(x, codes, scale, activations, isa)

    return binary_linear, head


def _call(isa: str | None, activations: str, dtype: torch.dtype) -> _Call:
    found = library()
    assert isinstance(found, Library)
    name = isa or selected()[0]
    assert name is not None
    return _Call(
        found.runs[name], int(activations == "int8"), torch.get_num_threads(), _FLOATS[dtype], bias_type=_NO_BIAS
    )


@functools.lru_cache(maxsize=8192)
def _matrix(
    signs: int, scale: int, shift: int | None, in_scale: int | None, in_shift: int | None, codes: int | None,
    positions: int | None, counts: int | None, salient_scale: int | None, zeros: int | None, starts: int | None,
    dtype: torch.dtype, rows: int, columns: int, groups: int, planes: int, sign_planes: int, scale_rows: int,
    in_scale_planes: int, salient_bits: int,
) -> _Matrix:  # fmt: skip
    # A description of where things lie: it holds whatever has been freed since, as its key has every address.
    return _Matrix(
        rows, columns, groups, planes, sign_planes, scale_rows, in_scale_planes, _FLOATS[dtype], salient_bits, signs,
        scale, shift, in_scale, in_shift, codes, positions, counts, zeros, starts, salient_scale,
    )  # fmt: skip


_ERRORS = {1: "this processor does not have the instruction set", 2: "out of memory", 3: "an operand is not allowed"}


def _run(function: str, matrix: ctypes.Structure, call: _Call, x: Tensor, y: Tensor) -> None:
    found = library()
    assert isinstance(found, Library)
    stride = x.stride(0) if x.shape[0] > 1 else x.shape[1]
    error = getattr(found.handle, function)(
        ctypes.byref(matrix), ctypes.byref(call), x.data_ptr(), x.shape[0], stride, y.data_ptr()
    )
    if error:
        raise SignbitError(f"{function}: {_ERRORS.get(error, error)}")


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _starts(w: Operands) -> Tensor:
    """How many salient values lie before each row: int32 [N + 1]."""
    assert w.salient_positions is not None
    if w.salient_counts is not None:
        counts = w.salient_counts.sum(dim=1, dtype=torch.int32)
    else:
        ones = bits.unpack_bits(torch.arange(256, dtype=torch.uint8)[:, None], 8).sum(dim=1).to(torch.int32)
        counts = ones[w.salient_positions.to(torch.int32)].sum(dim=1, dtype=torch.int32)
    return torch.cat([counts.new_zeros(1), counts.cumsum(0, dtype=torch.int32)])


def _check(isa: str) -> str | None:
    """What is wrong with the kernels of `isa` on a few rows, both modes, both ops; None if nothing is."""
    generator = torch.Generator().manual_seed(0)
    rows, columns = 40, 136
    signs = bits.pack_signs(torch.randn(1, rows, columns, generator=generator))
    scale = torch.rand(1, rows, 1, generator=generator) + 0.5
    w = Operands(signs, scale, None, None, None, None, None, None, None, None, 0, columns)
    codes = torch.randint(-127, 128, (rows, columns), dtype=torch.int8, generator=generator)
    x = torch.randn(3, columns, generator=generator)
    for activations in ("exact", "int8"):
        for what, got, want in (
            ("binary_linear", linear(x, prepare(w), activations, isa=isa), reference.binary_linear(x, w, activations)),
            (
                "int8_linear",
                int8_linear(x, codes, scale[0, :, 0], activations, isa),
                reference.int8_linear(x, codes, scale[0, :, 0], activations),
            ),
        ):
            if not bool(((got - want).abs() <= 1e-5 * want.abs().max()).all()):
                return f"{what}, {activations}: off by {(got - want).abs().max():.3g}"
    return None
