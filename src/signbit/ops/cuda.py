"""The CUDA kernels (kernels/): where they run, matrices in their order, and the two ops on them."""

from __future__ import annotations

import ctypes
import functools
import itertools
import math
import os
import sys
from collections.abc import Sequence
from ctypes import c_float, c_int, c_void_p
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from signbit import bits
from signbit.bits import Operands
from signbit.errors import OptionError, ShapeError, SignbitError
from signbit.ops import layout, nvrtc, prepared, reference
from signbit.ops.native import FLOATS
from signbit.ops.prepared import Prepared

#: "reference" turns the kernels off.
VARIABLE = "SIGNBIT_CUDA"
#: The matrix units of older devices have no one-bit product, and no copies into shared memory beside the work.
CAPABILITY = (8, 0)
#: So many tokens take one launch; more are cut, or multiplied by a dense matrix that is made for the call.
MOST_TOKENS = 16
#: As `Multiplication.dense_from`: there is no dense matrix for it.
NEVER = sys.maxsize

# What the two ways of many tokens cost: milliseconds for the 6.48 G weights of LLaMA-7B's linears on an H100
# (docs/speed.md; benchmarks.kernels_cuda --crossover measures them). Only their ratios count.
_SLICE_PLANE, _SLICE_GROUPED = 0.16, 1.1  # a token for each plane; so much more with several scales a row
_SLICE_PACKETS = 34.0  # a token, if there were a packet of salient values for each weight
_DENSE, _DENSE_TOKEN = 10.7, 0.005  # to make one of signs and scales; a token
_TERMS_PLANE, _TERMS_PACKETS = 14.6, 2280.0  # to make one of other terms: each plane; packets as above
_SPLIT_PLANE, _SPLIT_PACKETS, _SPLIT_TOKEN = 23.5, 4950.0, 0.0375  # the same in two halves; a token

_SOURCES = Path(__file__).with_name("kernels")
_WARPS, _THREADS, _TILE = 16, 512, layout.TILE_COLUMNS
_SCALE_BYTES = 48 * 1024
#: Beyond this many columns the float32 sums of int8's codes would not be exact.
MAX_COLUMNS = 131072
#: Terms that a plane's sums do not suffice for.
_NOT_SIMPLE = ("SHIFT", "IN_SCALE", "IN_SHIFT")
_SIGNS = -1  # of `unpack_signs` and `quantize`: int8 instead of a float type
#: Whether torch.mm multiplies halves into float32.
_FLOAT_SUMS = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 8)


class _Arguments(ctypes.Structure):
    """struct Arguments of common.cuh."""

    _fields_ = (
        *((name, c_void_p) for name in ("signs", "scale", "shift", "in_scale", "in_shift", "bias")),
        *((name, c_void_p) for name in ("packets", "starts", "salient_scale", "zeros", "x", "y")),
        *((name, c_int) for name in ("rows", "columns", "groups", "width", "planes", "sign_planes", "in_scale_planes")),
        *((name, c_int) for name in ("scale_rows", "float_type", "tokens", "x_type", "bias_type", "chunk")),
        ("in_unit", c_float),
    )  # fmt: skip


class _HalvesArguments(ctypes.Structure):
    """struct HalvesArguments of dense.cu."""

    _fields_ = (("w", _Arguments), ("low", c_void_p), ("unit", c_void_p))


class _TokenArguments(ctypes.Structure):
    """struct TokenArguments of dense.cu."""

    _fields_ = (
        *((name, c_void_p) for name in ("x", "codes", "step")),
        *((name, c_int) for name in ("columns", "x_type", "code_type")),
    )


class _SumArguments(ctypes.Structure):
    """struct SumArguments of dense.cu."""

    _fields_ = (
        *((name, c_void_p) for name in ("sums", "step", "scale", "bias", "y")),
        *((name, c_int) for name in ("rows", "row_blocks", "scale_rows", "float_type", "bias_type", "x_type")),
    )


class _HeadArguments(ctypes.Structure):
    """struct HeadArguments of head.cu."""

    _fields_ = (
        *((name, c_void_p) for name in ("codes", "scale", "x", "y")),
        *((name, c_int) for name in ("rows", "columns", "float_type", "tokens", "x_type")),
    )


@functools.cache
def selected(index: int) -> tuple[str | None, str]:
    """ "cuda" if the kernels run on this device, else None; and why. Raises OptionError for a wrong SIGNBIT_CUDA."""
    wanted = os.environ.get(VARIABLE, "")
    if wanted not in ("", "reference"):
        raise OptionError(f"{VARIABLE} is {wanted!r}; only reference is allowed, which asks for plain torch")
    if wanted:
        return None, f"{VARIABLE}=reference asks for plain torch"
    capability = torch.cuda.get_device_capability(index)
    if capability < CAPABILITY:
        return None, (
            f"compute capability {capability[0]}.{capability[1]} is below {CAPABILITY[0]}.{CAPABILITY[1]}, "
            "which the kernels need; plain torch unpacks the bits on every call"
        )
    if (reason := nvrtc.unavailable()) is not None:
        return None, reason
    return "cuda", f"compute capability {capability[0]}.{capability[1]}; compiled by NVRTC at the first use"


def unsupported(w: Operands) -> str | None:
    """Why the kernels do not multiply by `w`, or None if they do."""
    return prepared.unsupported(w, MAX_COLUMNS)


def prepare(w: Operands) -> Prepared:
    """`w` in the kernels' order; the caller has asked `unsupported`. Raises SignbitError inside the capture of a graph."""
    nvrtc.refuse_capture("a matrix is brought into the kernels' order")
    signs, rows, columns = w.signs, w.signs.shape[1], w.in_features
    packets = None
    if w.salient_positions is not None and w.salient_codes is not None:
        index = bits.unpack_positions(w.salient_positions, w.salient_counts, rows, columns)
        codes = bits.unpack_codes(w.salient_codes, len(index), w.salient_bits)
        packets = layout.lay_packets(index, codes, rows, columns, columns // w.scale.shape[2])
        mask = torch.zeros(rows * columns, dtype=torch.bool, device=signs.device)
        mask[index] = True
        signs = signs & ~bits.pack_signs(mask.view(rows, columns))
    laid = Prepared.of(w, layout.lay_tiles(signs, columns), packets)
    if w.in_scale is not None and 0 < (largest := float(w.in_scale.abs().max())) < math.inf:
        laid.shape[-1] = math.ceil(math.log2(largest))
    # A kernel may read its weights before the work ahead of it has ended: let none of that be the making of them.
    torch.cuda.current_stream(w.signs.device).synchronize()
    return laid


class Multiplication:
    """y = W · x + bias for one prepared matrix on a GPU; what the kernels are told is made once.

    It keeps the tensors of `w` and the bias where they are, and is not to be copied or pickled.
    """

    def __init__(self, w: Prepared, bias: Tensor | None = None) -> None:
        self.w, self.bias = w, bias
        self._rows, self._columns, self._groups, self._planes = w.shape[:4]
        terms = {"SHIFT": w.shift, "IN_SCALE": w.in_scale, "IN_SHIFT": w.in_shift, "SALIENT": w.salient_codes}
        self._terms = {name: term is not None for name, term in terms.items()}
        self._device = w.signs.device
        self._tensors = [tensor for tensor in (*w[:-1], bias) if tensor is not None]
        self._most: dict[tuple[torch.dtype, str], int] = {}
        self._launches: dict[tuple[torch.dtype, str, int, bool], tuple[nvrtc.Kernel, int, int, int]] = {}
        self._point()
        self._dense_from = {mode: self.dense_from(mode) for mode in ("exact", "int8")}

    def _point(self) -> None:
        """Tells the kernels where the tensors lie."""
        w, bias = self.w, self.bias
        rows, columns, groups, planes, sign_planes, scale_rows, in_scale_planes, *_ = w.shape
        if bias is not None and (list(bias.shape) != [rows] or bias.dtype not in FLOATS or not bias.is_contiguous()):
            raise ShapeError(f"a bias is float32, bfloat16 or float16 [{rows}], not {bias.dtype} {list(bias.shape)}")
        self._places = self._where()
        pointers = (
            w.signs, w.scale, w.shift, w.in_scale, w.in_shift, bias, w.salient_codes, w.salient_starts, w.salient_scale,
            w.salient_zero, None, None,
        )  # fmt: skip
        self._arguments = _Arguments(
            *(None if t is None else t.data_ptr() for t in pointers), rows, columns, groups, columns // groups, planes,
            sign_planes, in_scale_planes, scale_rows, FLOATS[w.scale.dtype],
            bias_type=0 if bias is None else FLOATS[bias.dtype], in_unit=2.0 ** w.shape[-1],
        )  # fmt: skip

    def _where(self) -> tuple[object, ...]:
        # A tensor that stays the same object may still get another storage, by .data for one.
        return (*(tensor.data_ptr() for tensor in self._tensors), None if self.bias is None else self.bias.dtype)

    def dense_from(self, activations: str) -> int:
        """From so many tokens on a dense matrix, made for the call, is faster than slices of 16; NEVER if there is none."""
        packets = 0 if self.w.salient_codes is None else len(self.w.salient_codes) / (self._rows * self._columns)
        a_token = self._planes * _SLICE_PLANE * (_SLICE_GROUPED if self._groups > 1 else 1) + packets * _SLICE_PACKETS
        plain = self._planes == 1 and not any(self._terms.values())
        made = _DENSE if plain else self._planes * _TERMS_PLANE + packets * _TERMS_PACKETS
        a_dense_token = _DENSE_TOKEN
        if activations == "int8":
            if self._code_type() is not None:
                made = _DENSE  # input scales are in the codes
            elif self._splits():
                made, a_dense_token = self._planes * _SPLIT_PLANE + packets * _SPLIT_PACKETS, _SPLIT_TOKEN
            else:
                return NEVER
        return math.ceil(made / (a_token - a_dense_token))

    def __call__(self, x: Tensor, activations: str, way: Literal["slices", "dense"] | None = None) -> Tensor:
        """`x` is float32, bfloat16 or float16 [..., K] on the matrix's device; the result has its dtype, [..., N].

        `way`: how more than 16 tokens go, instead of by `dense_from`; slices where there is no dense matrix, and in exact
        never of float32. Raises ShapeError if x does not end in K columns.
        """
        shape = x.shape
        if not shape or shape[-1] != self._columns:
            raise ShapeError(f"the input has shape {list(shape)}; this layer takes [..., {self._columns}]")
        if x.device != self._device:
            raise ShapeError(f"the input is on {x.device}, the layer on {self._device}")
        if self._where() != self._places:
            self._point()
        with torch.cuda.device(self._device), torch.autocast("cuda", enabled=False):
            flat = x.reshape(-1, self._columns)
            tokens = flat.shape[0]
            if tokens == 0:
                return x.new_empty((*shape[:-1], self._rows))
            turn = self._dense_from[activations]
            dense = tokens > MOST_TOKENS and (tokens >= turn if way is None else way == "dense" and turn < NEVER)
            if activations == "exact" and (dense or x.dtype is torch.float32):
                bias = None if self.bias is None else self.bias.to(x.dtype)
                return F.linear(x, self.dense(x.dtype), bias)
            flat = flat.contiguous()
            if dense:
                codes = self._code_type()
                y = self._split_product(flat) if codes is None else self._dense_product(flat, codes)
                return y.reshape(*shape[:-1], self._rows)
            y = flat.new_empty((tokens, self._rows))
            stream = torch.cuda.current_stream().cuda_stream
            at_once = self._at_once(x.dtype, activations)
            for first in range(0, tokens, at_once):
                self._some(flat[first : first + at_once], y[first : first + at_once], activations, stream)
            return y.reshape(*shape[:-1], self._rows)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The matrix as `dtype` [N, K]: `bits.dense`, rounded to it."""
        out = torch.empty(self._rows, self._columns, dtype=dtype, device=self._device)
        self._unpack(out, FLOATS[dtype])
        return out

    def _some(self, x: Tensor, y: Tensor, activations: str, stream: int) -> None:
        tokens = x.shape[0]
        vectors = x.dtype is not torch.float32 and self._columns % 8 == 0 and x.data_ptr() % 16 == 0
        key = (x.dtype, activations, tokens, vectors)
        kernel, grid, shared_bytes, chunk = self._launches.get(key) or self._plan(*key)
        arguments = _Arguments.from_buffer_copy(self._arguments)
        arguments.x, arguments.y, arguments.tokens, arguments.chunk = x.data_ptr(), y.data_ptr(), tokens, chunk
        kernel.launch(grid, _THREADS, shared_bytes, stream, arguments)

    def _at_once(self, dtype: torch.dtype, activations: str) -> int:
        """So many tokens take one launch: fewer than MOST_TOKENS where the sums of their groups do not fit shared memory."""
        if (known := self._most.get((dtype, activations))) is not None:
            return known
        tokens = MOST_TOKENS
        while self._division(self._mode(dtype, activations, tokens), tokens) is None:
            if tokens == 1:
                raise SignbitError(
                    f"one token times {self._rows} × {self._columns} in {self._groups} groups does not fit the shared memory "
                    f"of {torch.cuda.get_device_name(self._device)}; {VARIABLE}=reference multiplies by plain torch"
                )
            tokens //= 2
        self._most[dtype, activations] = tokens
        return tokens

    def _mode(self, dtype: torch.dtype, activations: str, tokens: int) -> int:
        """MODE of linear.cu."""
        if activations == "int8":
            return 0 if tokens == 1 and self._groups == 1 and self._columns <= 32768 else 1
        return 2 if dtype is torch.float16 else 3

    def _division(self, mode: int, tokens: int) -> tuple[int, int, bool, int] | None:
        """Blocks, prepared columns, whether the product is SIMPLE, and the bytes of shared memory; None if nothing fits.

        One wave of blocks if their rows' results fit. All columns at once if they fit beside these, else as large a part as
        fits.
        """
        row_tiles, column_tiles = -(-self._rows // layout.BLOCK_ROWS), -(-self._columns // _TILE)
        processors, most = _limits(self._device.index)
        plain = self._planes == 1 and not any(self._terms[name] for name in _NOT_SIMPLE)
        for waves, parts in itertools.product(range(1, -(-row_tiles // processors) + 1), range(1, column_tiles + 1)):
            grid, chunk = min(row_tiles, processors * waves), -(-column_tiles // parts) * _TILE
            simple = parts == 1 and plain
            needed = self._shared_bytes(mode, tokens, chunk, -(-row_tiles // grid), simple)
            if needed <= most:
                return grid, chunk, simple, needed
        return None

    def _plan(
        self, dtype: torch.dtype, activations: str, tokens: int, vectors: bool
    ) -> tuple[nvrtc.Kernel, int, int, int]:
        mode = self._mode(dtype, activations, tokens)
        division = self._division(mode, tokens)
        assert division is not None, "_at_once says how many tokens fit"
        grid, chunk, simple, shared_bytes = division
        row_tiles = -(-self._rows // layout.BLOCK_ROWS)
        flags = {
            "MODE": mode, "COLUMNS": 2 if tokens > 8 else 1, "ONE": tokens == 1, "X_TYPE": FLOATS[dtype],
            "VECTORS": vectors, "SCALES": FLOATS[self.w.scale.dtype],
            "SHARED_SCALES": self._scale_bytes(-(-row_tiles // grid)) > 0,
            "GROUPED": self._groups > 1, **self._terms, "SIMPLE": simple, "STAGES": _stages(mode),
        }  # fmt: skip
        macros = tuple(f"{name}={int(value)}" for name, value in flags.items())
        plan = (_kernel(self._device.index, "linear", "linear", macros, True), grid, shared_bytes, chunk)
        self._launches[dtype, activations, tokens, vectors] = plan
        return plan

    def _shared_bytes(self, mode: int, tokens: int, chunk: int, tiles: int, simple: bool) -> int:
        """What `linear` takes of shared memory, in the order in which it takes it."""
        wide = 1 if tokens == 1 else 16 if tokens > 8 else 8
        slots = 1
        while slots < min(_WARPS, chunk // _TILE):
            slots *= 2
        turns = min({1: 16, 8: 4, 16: 2}[wide], -(-tiles // (_WARPS // slots)))
        own = -(-chunk // _TILE // slots) * _TILE  # bytes of bit planes that a warp makes for itself
        activations = _WARPS * own if mode == 0 else tokens * (chunk + 32 if mode == 1 else chunk * 2 + 64)
        results, salient, shift = tiles * 16 * wide * 4, self._terms["SALIENT"], self._terms["SHIFT"]
        pieces = (
            _WARPS * _stages(mode) * 512, activations, _WARPS * _TILE if mode == 0 else 0,
            chunk if mode == 0 and (shift or salient) else 0,
            turns * _WARPS * 16 * wide * 4, 0 if simple else results, 0 if simple and not salient else results,
            self._scale_bytes(tiles), tokens * self._groups * 4 if shift else 0, 64, 64, 3 * _WARPS * 4,
            *((tiles * 16 * 4 + 4, tiles * 16 * 4, tiles * 16 * 4) if salient else ()),
        )  # fmt: skip
        return sum(-(-piece // 128) * 128 for piece in pieces)

    def _scale_bytes(self, tiles: int) -> int:
        """Of the scales of a block's rows in shared memory; 0 if they are too many and stay where they are."""
        needed = self._planes * tiles * self._groups * 64
        return needed if needed <= _SCALE_BYTES else 0

    def _code_type(self) -> torch.dtype | None:
        """How int8 activations meet a dense matrix without a loss; None if they cannot, or in sizes that torch does not take.

        Integers where the scales come after them; else halves, which hold 8 bits and ±scale as it is stored.
        """
        others = any(there for name, there in self._terms.items() if name != "IN_SCALE")
        if self._planes > 1 or others or self._columns % 8:  # halves, in rows of 16 bytes
            return None
        if self._groups == 1:
            return torch.int8 if _in_integers(self._rows, self._columns) else None
        return self.w.scale.dtype if self.w.scale.dtype is not torch.float32 and _FLOAT_SUMS else None

    def _dense_product(self, x: Tensor, code_type: torch.dtype) -> Tensor:
        """int8: x [T, K] as codes of `code_type` times the dense matrix, integer or float32 sums, then the scales."""
        integers = code_type is torch.int8
        scaled = x if self.w.in_scale is None else x.float() * self.w.in_scale[0].float()
        codes, step = _quantized(scaled, code_type)
        matrix = torch.empty(self._rows, self._columns, dtype=code_type, device=self._device)
        self._unpack(matrix, _SIGNS if integers else FLOATS[code_type], signs=True)
        sums = torch._int_mm(codes, matrix.T) if integers else torch.mm(codes, matrix.T, out_dtype=torch.float32)
        return _finished(sums, step, self.w.scale if integers else None, self.bias, x.dtype)

    def _splits(self) -> bool:
        return _FLOAT_SUMS and not (self._terms["IN_SCALE"] or self._terms["IN_SHIFT"])

    def _split_product(self, x: Tensor) -> Tensor:
        """int8: codes of x [T, K] times W as the sum of two float16 matrices, W·2⁻ᵉ = high + low·2⁻¹², e of a row.

        22 bits of a weight, which one half would round, and below 2⁻¹⁴ of what the row's largest can be 2⁻³⁷ of that.
        """
        codes, step = _quantized(x, torch.float16)
        exponent = torch.frexp(self._bounds())[1].clamp_(-120, 120)
        high, low = (codes.new_empty(self._rows, self._columns) for _ in range(2))
        unit = torch.ldexp(torch.ones_like(exponent, dtype=torch.float32), -exponent)
        arguments = _HalvesArguments(_Arguments.from_buffer_copy(self._arguments), low.data_ptr(), unit.data_ptr())
        arguments.w.y = high.data_ptr()
        self._launch_unpack("unpack_halves", "put_salient_halves", arguments)
        sums = torch.mm(codes, high.T, out_dtype=torch.float32)
        sums.add_(torch.mm(codes, low.T, out_dtype=torch.float32), alpha=1 / 4096)
        return _finished(torch.ldexp(sums, exponent), step, None, self.bias, x.dtype)

    def _bounds(self) -> Tensor:
        """What no weight of a row exceeds, float32 [N], without input scales and shifts."""
        w, rows = self.w, self._rows
        # Of a row [P, tile, G, 16], or of all [P, 1, G]: see layout.lay_rows.
        of_rows = w.scale.ndim == 4
        bound = w.scale.float().abs().amax(2).sum(0).view(-1)
        bound = bound[:rows] if of_rows else bound.expand(rows)
        if w.shift is not None:
            bound = bound + w.shift.float().abs().amax(1).view(-1)[:rows]
        return bound if w.salient_scale is None else bound.maximum(w.salient_scale.float().abs() * 255)

    def _unpack(self, out: Tensor, out_type: int, signs: bool = False) -> None:
        """`bits.dense` into `out`; `signs`: of one plane, ±scale or ±1 without any other term."""
        arguments = _Arguments.from_buffer_copy(self._arguments)
        arguments.y, arguments.x_type = out.data_ptr(), out_type
        plain = self._planes == 1 and not any(self._terms.values()) and self._columns % 8 == 0
        self._launch_unpack("unpack_signs" if signs or plain else "unpack", "put_salient", arguments)

    def _launch_unpack(self, weights: str, salient: str, arguments: ctypes.Structure) -> None:
        stream = torch.cuda.current_stream().cuda_stream
        tiles = -(-self._rows // layout.BLOCK_ROWS) * -(-self._columns // _TILE)
        _helper(self._device, weights).launch(-(-tiles // 8), 256, 0, stream, arguments)
        if self._terms["SALIENT"]:
            _helper(self._device, salient).launch(-(-self._rows // 8), 256, 0, stream, arguments)


def binary_linear(x: Tensor, w: Operands, activations: str) -> Tensor:
    """As `signbit.ops.binary_linear`, on the kernels; what they do not take is left to the reference.

    The matrix is brought into the kernels' order on every call: a layer that stays keeps a Multiplication.
    """
    if x.dtype not in FLOATS or activations not in ("exact", "int8") or unsupported(w):
        return reference.binary_linear(x, w, activations)
    return Multiplication(prepare(w))(x, activations)


def int8_linear(x: Tensor, codes: Tensor, scale: Tensor, activations: str) -> Tensor:
    """As `signbit.ops.int8_linear`, on the kernels.

    More than 16 tokens go by torch's product of integers in int8; those in exact and other sizes and types by the reference.
    """
    rows, columns = codes.shape
    tokens = x.numel() // columns if columns else 0
    known = x.is_cuda and x.dtype in FLOATS and scale.dtype in FLOATS and activations in ("exact", "int8")
    if known and activations == "int8" and tokens > MOST_TOKENS and _in_integers(rows, columns):
        with torch.cuda.device(x.device):
            q, step = _quantized(x.reshape(-1, columns).contiguous(), torch.int8)
            y = _finished(torch._int_mm(q, codes.contiguous().T), step, scale.contiguous(), None, x.dtype)
        return y.reshape(*x.shape[:-1], rows)
    at_once = tokens if activations == "int8" else 1
    shared_bytes = 256 + (columns * at_once if activations == "int8" else -(-columns // 512) * 2048)
    few = known and 0 < tokens <= MOST_TOKENS and columns % 16 == 0
    if not few or shared_bytes > _limits(x.device.index)[1]:
        return reference.int8_linear(x, codes, scale, activations)
    x, codes, scale = x.contiguous(), codes.contiguous(), scale.contiguous()
    y = x.new_empty((*x.shape[:-1], rows))
    with torch.cuda.device(x.device):
        macros = (f"HEAD={int(activations == 'int8')}", f"ONE={int(at_once == 1)}")
        kernel = _kernel(x.device.index, "head", "head", macros, True)
        processors, _ = _limits(x.device.index)
        stream = torch.cuda.current_stream().cuda_stream
        for first in range(0, tokens, at_once):
            arguments = _HeadArguments(
                codes.data_ptr(), scale.data_ptr(), x.data_ptr() + first * columns * x.element_size(),
                y.data_ptr() + first * rows * y.element_size(), rows, columns, FLOATS[scale.dtype], at_once,
                FLOATS[x.dtype],
            )  # fmt: skip
            blocks = min(processors * (4 if at_once == 1 else 2), -(-rows // 8))
            kernel.launch(blocks, 256, shared_bytes, stream, arguments)
    return y


def _in_integers(rows: int, columns: int) -> bool:
    """Whether torch._int_mm takes a matrix of this size, more than 16 tokens of int8, and its sums of them fit 32 bits."""
    return rows % 8 == 0 and columns % 8 == 0 and columns <= MAX_COLUMNS


def _stages(mode: int) -> int:
    """Tiles that a warp fetches ahead, STAGES of linear.cu."""
    return 8 if mode == 0 else 4


@functools.cache
def _limits(index: int) -> tuple[int, int]:
    """Multiprocessors of the device, and the bytes of shared memory that a block may have."""
    return torch.cuda.get_device_properties(index).multi_processor_count, nvrtc.shared_bytes(index)


def check(index: int) -> str | None:
    """What is wrong with the kernels on this device on a few rows, both modes, both ops; None if nothing is."""
    device = torch.device("cuda", index)
    generator = torch.Generator().manual_seed(0)
    rows, columns = 40, 144
    signs = bits.pack_signs(torch.randn(1, rows, columns, generator=generator)).to(device)
    scale = torch.rand(1, rows, 1, generator=generator).to(device) + 0.5
    w = Operands(signs, scale, None, None, None, None, None, None, None, None, 0, columns)
    codes = torch.randint(-127, 128, (rows, columns), dtype=torch.int8, generator=generator).to(device)
    for tokens in (1, 3):
        x = torch.randn(tokens, columns, generator=generator).to(device, torch.bfloat16)
        for activations in ("exact", "int8"):
            for what, got, want in (
                ("binary_linear", binary_linear(x, w, activations), reference.binary_linear(x.float(), w, activations)),
                (
                    "int8_linear",
                    int8_linear(x, codes, scale[0, :, 0], activations),
                    reference.int8_linear(x.float(), codes, scale[0, :, 0], activations),
                ),
            ):
                if not bool(((got - want).abs() <= 0.01 * want.abs().max()).all()):
                    return f"{what}, {activations}, {tokens} tokens: off by {(got - want).abs().max():.3g}"
    return None


def _quantized(x: Tensor, code_type: torch.dtype) -> tuple[Tensor, Tensor]:
    """The codes of x [T, K] as `code_type`, and the step of each token, float32 [T]."""
    tokens, columns = x.shape
    codes, step = torch.empty_like(x, dtype=code_type), x.new_empty(tokens, dtype=torch.float32)
    type_of_codes = _SIGNS if code_type is torch.int8 else FLOATS[code_type]
    _helper(x.device, "quantize").launch(
        tokens, 256, 0, torch.cuda.current_stream().cuda_stream,
        _TokenArguments(x.data_ptr(), codes.data_ptr(), step.data_ptr(), columns, FLOATS[x.dtype], type_of_codes),
    )  # fmt: skip
    return codes, step


def _finished(sums: Tensor, step: Tensor, scale: Tensor | None, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """What sums [T, N] are worth: integers get the scales of rows (or of all), float32 has them; steps and bias. [T, N]."""
    (tokens, rows), row_blocks = sums.shape, -(-sums.shape[1] // 1024)
    y = torch.empty_like(sums, dtype=dtype)
    _helper(sums.device, "finish").launch(
        tokens * row_blocks, 256, 0, torch.cuda.current_stream().cuda_stream,
        _SumArguments(
            sums.data_ptr(), step.data_ptr(), None if scale is None else scale.data_ptr(),
            None if bias is None else bias.data_ptr(), y.data_ptr(), rows, row_blocks,
            int(scale is not None and scale.numel() > 1), 0 if scale is None else FLOATS[scale.dtype],
            0 if bias is None else FLOATS[bias.dtype], FLOATS[dtype],
        ),
    )  # fmt: skip
    return y


def _helper(device: torch.device, name: str) -> nvrtc.Kernel:
    return _kernel(device.index, "dense", name, (), False)


@functools.cache
def _kernel(index: int, source: str, name: str, macros: Sequence[str], overlaps: bool) -> nvrtc.Kernel:
    major, _ = torch.cuda.get_device_capability(index)
    return nvrtc.Kernel(_module(index, source, macros), name, overlaps and major >= 9)


@functools.cache
def _module(index: int, source: str, macros: Sequence[str]) -> nvrtc.Module:
    with torch.cuda.device(index):
        major, minor = torch.cuda.get_device_capability(index)
        return nvrtc.Module(nvrtc.compiled(_SOURCES / f"{source}.cu", macros, f"sm_{major}{minor}"))
