"""The CPU kernels (csrc/): which instruction set runs, matrices in the kernels' order, and the two ops on them."""

from __future__ import annotations

import ctypes
import functools
import itertools
import os
from collections.abc import Callable

import torch
from torch import Tensor

from signbit import bits
from signbit.bits import Operands
from signbit.errors import OptionError, ShapeError, SignbitError
from signbit.ops import layout, native, prepared, reference
from signbit.ops.prepared import Prepared

#: Names the instruction set that multiplies ("amx", "avx512", "avxvnni", "avx2", "neon", "portable"), or "reference" for none.
VARIABLE = "SIGNBIT_CPU"
#: Beyond this many columns the integer sums of int8 would not be exact.
MAX_COLUMNS = 65536
#: So many tokens are many: the unpacking of a matrix is paid for.
MANY_TOKENS = 256
MANY_TOKENS_OF_A_HEAD = 32
_HEAD_ROWS = 8192


@functools.cache
def selected() -> tuple[str | None, str]:
    """The instruction set that runs and why, or None and why the reference runs.

    Raises OptionError if SIGNBIT_CPU names a set that is not there.
    """
    wanted, found = os.environ.get(VARIABLE, ""), native.library()
    if wanted == "reference":
        return None, f"{VARIABLE}=reference asks for plain torch"
    if isinstance(found, str):
        if wanted:
            raise OptionError(f"{VARIABLE}={wanted}, but there are no kernels: {found}")
        return None, found
    if wanted and wanted not in found.runs:
        raise OptionError(
            f"{VARIABLE} is {wanted!r}; this processor runs {', '.join(found.runs)}, and reference is always there"
        )
    why = f"{VARIABLE} asks for it" if wanted else "the best that this processor runs"
    name = wanted or next(iter(found.runs))
    if (wrong := check(name)) is not None:
        return None, f"the {name} kernels failed their check at load ({wrong}); please report this"
    return name, f"{why}; checked against the reference at load"


def unsupported(w: Operands) -> str | None:
    """Why the kernels do not multiply by `w`, or None if they do."""
    return prepared.unsupported(w, MAX_COLUMNS)


def prepare(w: Operands) -> Prepared:
    """`w` in the kernels' order; the caller has asked `unsupported`."""
    found = native.library()
    assert isinstance(found, native.Library)
    sign_planes, rows, _ = w.signs.shape
    signs = w.signs
    if w.salient_positions is not None:
        signs = w.signs.clone(memory_format=torch.contiguous_format)
        positions = w.salient_positions.contiguous()
        counts = None if w.salient_counts is None else w.salient_counts.contiguous()
        total = found.handle.signbit_clear_salient(
            signs.data_ptr(), sign_planes, rows, w.in_features, positions.data_ptr(), positions.numel(),
            None if counts is None else counts.data_ptr(),
        )  # fmt: skip
        # The kernels read and write where these say.
        if total < 0 or w.salient_codes is None or w.salient_codes.numel() * 8 < total * w.salient_bits:
            raise ShapeError("salient positions, counts and codes do not fit together; the weight is damaged")
    return Prepared.of(w, layout.lay_signs(signs, w.in_features))


def better_dense(w: Prepared) -> tuple[str, ...]:
    """The modes in which many tokens are multiplied faster by a dense matrix that is unpacked for the call.

    Measured (docs/speed.md): a plane costs the kernels half of what the dense product does, and salient values, which
    they gather one by one, 25 times what as many bits do; with int8 activations the reference is slower, and so later.
    """
    rows, columns, _, planes, *_ = w.shape
    share = 0.0 if w.salient_starts is None else int(w.salient_starts[-1]) / (rows * columns)
    modes = {"exact": planes + 25 * share > 2, "int8": share > 0.25}
    return tuple(mode for mode, better in modes.items() if better)


class Multiplication:
    """y = norm_out(W · norm_in(x)) + bias for one prepared matrix, in one pass over it; what C is told is made once.

    `isa` None takes the selected instruction set; `norm_in` "rms" or "layer", `norm_out` "layer", none with affine
    part. It keeps the tensors of `w` and the bias where they are, and is not to be copied or pickled.
    """

    def __init__(
        self,
        w: Prepared,
        bias: Tensor | None = None,
        norm_in: str = "none",
        norm_in_eps: float = 0.0,
        norm_out: str = "none",
        norm_out_eps: float = 0.0,
        isa: str | None = None,
    ) -> None:
        self.w, self.bias = w, bias
        self._norms = (native.NORMS[norm_in], native.NORMS[norm_out], norm_in_eps, norm_out_eps)
        self._isa = isa
        self._rows, self._columns = w.shape[:2]
        self._run = _function("signbit_linear")
        self._torch = () if norm_in != "none" or norm_out != "none" else better_dense(w)
        self._point()

    def _point(self) -> None:
        """Tells C where the tensors lie."""
        w, bias = self.w, self.bias
        rows, columns, groups, planes, sign_planes, scale_rows, in_scale_planes, salient_bits, *_ = w.shape
        pointers = (
            w.signs, w.scale, w.shift, w.in_scale, w.in_shift, w.salient_codes, w.salient_positions, w.salient_counts,
            w.salient_zero, w.salient_starts, w.salient_scale,
        )  # fmt: skip
        for tensor in (*pointers, bias):
            if tensor is not None and not (tensor.device.type == "cpu" and tensor.is_contiguous()):
                raise ShapeError(f"the CPU kernels take contiguous tensors on the CPU, not one on {tensor.device}")
        laid = -(-rows // 16) * 16, -(-columns // 32)  # rows and words
        if w.signs.numel() != sign_planes * laid[0] * laid[1] or w.scale.numel() != planes * groups * (
            laid[0] if scale_rows else 1
        ):
            raise ShapeError(f"the prepared signs or scale are not those of a matrix of shape {[rows, columns]}")
        if bias is not None and (list(bias.shape) != [rows] or bias.dtype not in native.FLOATS):
            raise ShapeError(f"a bias is float32, bfloat16 or float16 [{rows}], not {bias.dtype} {list(bias.shape)}")
        self._signs, self._signs_at = w.signs, w.signs.data_ptr()
        self._bias_at = 0 if bias is None else bias.data_ptr()
        self._bias_dtype = None if bias is None else bias.dtype
        self._matrix = native.Matrix(
            rows, columns, groups, planes, sign_planes, scale_rows, in_scale_planes, native.FLOATS[w.scale.dtype],
            salient_bits, *(None if t is None else t.data_ptr() for t in pointers),
        )  # fmt: skip
        self._matrix_address = ctypes.addressof(self._matrix)
        self._calls: dict[tuple[torch.dtype, str, int], tuple[int, native.Call]] = {}  # with its address

    def __call__(self, x: Tensor, activations: str) -> Tensor:
        """`x` is float32, bfloat16 or float16 [..., K] on the CPU; the result has its dtype, [..., N].

        Raises ShapeError if x does not end in K columns or has another dtype, OptionError for another mode.
        """
        shape = x.shape
        if not shape or shape[-1] != self._columns:
            raise ShapeError(f"the input has shape {list(shape)}; this layer takes [..., {self._columns}]")
        if not x.is_cpu:
            raise ShapeError(f"the input is on {x.device}, the layer on the CPU")
        if activations in self._torch and x.numel() >= MANY_TOKENS * self._columns:
            with torch.autocast("cpu", enabled=False):
                y = reference.binary_linear(x, self.w.stored(), activations)
            return y if self.bias is None else (y + self.bias).to(x.dtype)
        bias = self.bias
        # A tensor that stays the same object may still get another storage: by .data, or when another process shares it.
        if self._signs.data_ptr() != self._signs_at or (
            bias is not None and (bias.data_ptr() != self._bias_at or bias.dtype is not self._bias_dtype)
        ):
            self._point()
        if not x.is_contiguous() or x.is_neg():  # a view that says that its memory is to be read negated
            x = x.resolve_neg().contiguous()
        y = x.new_empty(*shape[:-1], self._rows)  # not as a tuple: that takes half a microsecond longer
        key = (x.dtype, activations, torch.get_num_threads())
        call = self._calls.get(key) or self._call(*key)
        columns = self._columns
        error = self._run(self._matrix_address, call[0], x.data_ptr(), x.numel() // columns, columns, y.data_ptr())
        if error:
            raise SignbitError(f"the CPU kernels: {native.ERRORS.get(error, error)}")
        return y

    def _call(self, dtype: torch.dtype, activations: str, threads: int) -> tuple[int, native.Call]:
        if dtype not in native.FLOATS:
            raise ShapeError(f"the input is {dtype}; the kernels take {', '.join(map(str, native.FLOATS))}")
        if activations not in native.ACTIVATIONS:
            raise OptionError(f"activations are {activations!r}; allowed: {', '.join(native.ACTIVATIONS)}")
        call = _call(self._isa, activations, dtype, threads)
        call.norm_in, call.norm_out, call.norm_in_eps, call.norm_out_eps = self._norms
        if self.bias is not None:
            call.bias_type, call.bias = native.FLOATS[self.bias.dtype], self.bias.data_ptr()
        self._calls[dtype, activations, threads] = ctypes.addressof(call), call
        return self._calls[dtype, activations, threads]


def int8_linear(x: Tensor, codes: Tensor, scale: Tensor, activations: str, isa: str | None = None) -> Tensor:
    """As `signbit.ops.int8_linear`, on the kernels; what they do not take is left to the reference."""
    supported = x.dtype in native.FLOATS and scale.dtype in native.FLOATS and codes.shape[1] <= MAX_COLUMNS
    if not supported or activations not in native.ACTIVATIONS:
        return reference.int8_linear(x, codes, scale, activations)
    rows, columns = codes.shape
    if activations == "exact" and x.numel() >= MANY_TOKENS_OF_A_HEAD * columns:
        # Floats times bytes: torch's own product of floats is faster, made of some rows at a time.
        pieces = zip(codes.split(_HEAD_ROWS), scale.split(_HEAD_ROWS), strict=True)
        with torch.autocast("cpu", enabled=False):
            return torch.cat([reference.int8_linear(x, c, s, activations) for c, s in pieces], dim=-1)
    x, codes, scale = x.resolve_neg().contiguous(), codes.contiguous(), scale.contiguous()
    y = x.new_empty((*x.shape[:-1], rows))
    matrix = native.Int8Matrix(rows, columns, native.FLOATS[scale.dtype], codes.data_ptr(), scale.data_ptr())
    call = _call(isa, activations, x.dtype, torch.get_num_threads())
    error = _function("signbit_int8_linear")(
        ctypes.addressof(matrix), ctypes.addressof(call), x.data_ptr(), x.numel() // columns, columns, y.data_ptr()
    )
    if error:
        raise SignbitError(f"the CPU kernels: {native.ERRORS.get(error, error)}")
    return y


def binary_linear(x: Tensor, w: Operands, activations: str, isa: str | None = None) -> Tensor:
    """As `signbit.ops.binary_linear`, on the kernels; what they do not take is left to the reference.

    The matrix is brought into the kernels' order on every call: a layer that stays keeps a Multiplication.
    """
    if x.dtype not in native.FLOATS or activations not in native.ACTIVATIONS or unsupported(w):
        return reference.binary_linear(x, w, activations)
    return Multiplication(prepare(w), isa=isa)(x, activations)


def _function(name: str) -> Callable[..., int]:
    found = native.library()
    assert isinstance(found, native.Library)
    function: Callable[..., int] = getattr(found.handle, name)
    return function


def _call(isa: str | None, activations: str, dtype: torch.dtype, threads: int) -> native.Call:
    found = native.library()
    assert isinstance(found, native.Library)
    name = isa or selected()[0]
    assert name is not None
    return native.Call(
        found.runs[name], native.ACTIVATIONS[activations], threads, native.FLOATS[dtype], bias_type=native.NO_BIAS
    )


def check(isa: str) -> str | None:
    """What is wrong with the kernels of `isa` on a few rows, both modes, both ops; None if nothing is."""
    # Whatever the caller has set: its verdict holds for the whole process.
    with torch.device("cpu"), torch.autocast("cpu", enabled=False), torch.no_grad():
        return _check(isa)


def _check(isa: str) -> str | None:
    generator = torch.Generator().manual_seed(0)
    rows = 40

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float32)

    def packed(columns: int, groups: int) -> Operands:
        signs, scale = bits.pack_signs(normal(1, rows, columns)), normal(1, rows, groups).abs() + 0.5
        return Operands(signs, scale, None, None, None, None, None, None, None, None, 0, columns)

    forms = {"binary_linear": packed(136, 1), "binary_linear in groups": packed(256, 2)}
    codes = torch.randint(-127, 128, (rows, 136), dtype=torch.int8, generator=generator)
    head = codes, normal(rows).abs() + 0.5
    # Some tokens, many and one: they are multiplied in other ways.
    for activations, tokens in itertools.product(("exact", "int8"), (3, 19, 1)):
        found = []
        for what, w in forms.items():
            x = normal(tokens, w.in_features)
            found.append((what, binary_linear(x, w, activations, isa), reference.binary_linear(x, w, activations)))
        x = normal(tokens, codes.shape[1])
        found.append(
            ("int8_linear", int8_linear(x, *head, activations, isa), reference.int8_linear(x, *head, activations))
        )
        for what, got, want in found:
            if not bool(((got - want).abs() <= 1e-5 * want.abs().max()).all()):
                return f"{what}, {activations}, {tokens} tokens: off by {(got - want).abs().max():.3g}"
    return None
