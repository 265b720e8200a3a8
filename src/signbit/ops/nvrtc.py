"""CUDA C++ without a toolkit: compiled by the NVRTC that torch brings, kept on disk, launched through the driver."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import sys
import tempfile
from collections.abc import Sequence
from ctypes import POINTER, byref, c_char, c_char_p, c_int, c_size_t, c_uint, c_void_p
from pathlib import Path
from typing import Any

import torch

from signbit.errors import SignbitError

#: Where compiled kernels are kept; a folder that cannot be written costs a second at the first use of each process.
CACHE_VARIABLE = "SIGNBIT_CACHE"
_DYNAMIC_SHARED_BYTES = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_CARVEOUT = 9  # CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT, in percent
_SHARED_BYTES_OPTIN = 97  # CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
_PROGRAMMATIC_SERIALIZATION = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute: an id, and a value of 64 bytes of which the first int is used here."""

    _fields_ = (("id", c_int), ("pad", c_char * 4), ("value", c_int), ("rest", c_char * 60))


class _Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        *((name, c_uint) for name in ("grid_x", "grid_y", "grid_z", "block_x", "block_y", "block_z", "shared_bytes")),
        ("stream", c_void_p), ("attributes", POINTER(_Attribute)), ("attribute_count", c_uint),
    )  # fmt: skip


@functools.cache
def _nvrtc() -> ctypes.CDLL | str:
    """The library, or why there is none."""
    if torch.version.cuda is None:
        return "this torch was built without CUDA"
    major = torch.version.cuda.partition(".")[0]
    names = [f"libnvrtc.so.{major}", f"nvrtc64_{major}0_0.dll"]
    for folder in sys.path:
        names += map(str, Path(folder).glob(f"nvidia/*/lib/libnvrtc.so.{major}*"))
    for name in names:
        with contextlib.suppress(OSError):
            return ctypes.CDLL(name)
    return f"NVRTC of CUDA {major} is not found; it comes with torch's wheels as the package nvidia-cuda-nvrtc"


@functools.cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")


def shared_bytes(index: int) -> int:
    """The most shared memory that a block may have on this device; torch tells it only since 2.7."""
    device, value = c_int(), c_int()
    _check(_driver().cuInit(0))
    _check(_driver().cuDeviceGet(byref(device), index))
    _check(_driver().cuDeviceGetAttribute(byref(value), _SHARED_BYTES_OPTIN, device))
    return value.value


def unavailable() -> str | None:
    """Why nothing can be compiled here, or None."""
    found = _nvrtc()
    return found if isinstance(found, str) else None


def _cache() -> Path:
    if named := os.environ.get(CACHE_VARIABLE):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "signbit"


def compiled(source: Path, macros: Sequence[str], arch: str) -> bytes:
    """Machine code of `source` for `arch` ("sm_90"), from the cache if the same was compiled before.

    `macros` are "NAME=VALUE"; it may include the .cuh files beside it. The name of a cached file is a hash of the source,
    those files, the macros, the architecture and NVRTC's version. Raises SignbitError with NVRTC's messages if it does not
    compile.
    """
    nvrtc = _nvrtc()
    if isinstance(nvrtc, str):
        raise SignbitError(nvrtc)
    text = source.read_bytes()
    headers = {path.name: path.read_bytes() for path in sorted(source.parent.glob("*.cuh"))}
    major, minor = c_int(), c_int()
    nvrtc.nvrtcVersion(byref(major), byref(minor))
    options = [f"--gpu-architecture={arch}", "-std=c++17", "-default-device", *(f"-D{macro}" for macro in macros)]
    key = hashlib.sha256(
        b"\0".join([text, *headers.values(), *map(str.encode, options), f"{major.value}.{minor.value}".encode()])
    )
    path = _cache() / f"{source.stem}-{arch}-{key.hexdigest()[:24]}.cubin"
    with contextlib.suppress(OSError):
        return path.read_bytes()
    code = _compile(nvrtc, text, headers, source.name, options)
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as scratch:
            scratch.write(code)
        os.replace(scratch.name, path)
    return code


def _compile(nvrtc: ctypes.CDLL, text: bytes, headers: dict[str, bytes], name: str, options: list[str]) -> bytes:
    program = c_void_p()

    def check(status: int) -> None:
        if status:
            nvrtc.nvrtcGetErrorString.restype = c_char_p
            raise SignbitError(f"NVRTC: {nvrtc.nvrtcGetErrorString(status).decode()}")

    def output(what: str) -> bytes:
        size = c_size_t()
        check(getattr(nvrtc, f"nvrtcGet{what}Size")(program, byref(size)))
        buffer = ctypes.create_string_buffer(size.value)
        check(getattr(nvrtc, f"nvrtcGet{what}")(program, buffer))
        return buffer.raw

    strings = c_char_p * len(headers)
    included = strings(*headers.values()), strings(*map(str.encode, headers))
    check(nvrtc.nvrtcCreateProgram(byref(program), text, name.encode(), len(headers), *included))
    try:
        status = nvrtc.nvrtcCompileProgram(program, len(options), (c_char_p * len(options))(*map(str.encode, options)))
        if status:
            log = output("ProgramLog").rstrip(b"\0").decode(errors="replace")
            raise SignbitError(f"{name} does not compile with {' '.join(options)}:\n{log}")
        return output("CUBIN")
    finally:
        nvrtc.nvrtcDestroyProgram(byref(program))


class Kernel:
    """A function of a module on one device; `overlaps`: it may begin before the kernel ahead of it has ended."""

    def __init__(self, module: Module, name: str, overlaps: bool) -> None:
        self._module = module  # keeps it loaded
        self._function = c_void_p()
        _check(_driver().cuModuleGetFunction(byref(self._function), module.handle, name.encode()))
        # A multiprocessor is emptied to divide its memory anew between cache and shared memory: always the same division.
        _check(_driver().cuFuncSetAttribute(self._function, _CARVEOUT, 100))
        self._attribute = _Attribute(id=_PROGRAMMATIC_SERIALIZATION, value=1)
        self._overlaps = overlaps
        self._shared = 48 * 1024

    def launch(self, grid: int, threads: int, shared_bytes: int, stream: int, arguments: ctypes.Structure) -> None:
        """Puts it on the stream; the device of its module must be the current one. Raises SignbitError."""
        if shared_bytes > self._shared:
            _check(_driver().cuFuncSetAttribute(self._function, _DYNAMIC_SHARED_BYTES, shared_bytes))
            self._shared = shared_bytes
        config = _Config(grid, 1, 1, threads, 1, 1, shared_bytes, stream)
        if self._overlaps:
            config.attributes, config.attribute_count = ctypes.pointer(self._attribute), 1
        pointer = (c_void_p * 1)(ctypes.addressof(arguments))
        _check(_driver().cuLaunchKernelEx(byref(config), self._function, pointer, None))


def refuse_capture(what: str) -> None:
    """Raises SignbitError if the current stream is being captured, which waiting for the device would break off."""
    if torch.cuda.is_current_stream_capturing():
        raise SignbitError(
            f"{what} for the first time inside the capture of a CUDA graph; call the layer once before the capture, with as "
            "many tokens and the same dtype and mode"
        )


class Module:
    """Compiled code, loaded into the current device's context. Raises SignbitError inside the capture of a graph."""

    def __init__(self, code: bytes) -> None:
        refuse_capture("a kernel is loaded")
        torch.cuda.current_stream()  # the context is there from here on
        torch.cuda.synchronize()
        self.handle = c_void_p()
        _check(_driver().cuModuleLoadData(byref(self.handle), code))


def _check(status: int) -> None:
    if status:
        text = c_char_p()
        _driver().cuGetErrorString(status, byref(text))
        message: Any = text.value
        raise SignbitError(f"CUDA: {message.decode() if message else status}")
