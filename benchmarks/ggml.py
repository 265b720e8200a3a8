"""A peer's kernel: the Q1_0 matrix multiplication of ggml, out of the source distribution of llama-cpp-python.

    matrix = Ggml.build().q1_0(signs, scale)  # [N, K] bool, [N, K/128] float32
    run = matrix.runner(1, threads=2)
    run(x)  # [1, K] → [1, N] float32; all that it needs was made before

The first use takes the ggml tree that llama.cpp vendors from PyPI and builds its CPU backend natively; the libraries
are kept in the cache. Q1_0 is ggml's type 41: per 128 weights one fp16 d and 16 bytes, lowest bit first, 1 → +d and
0 → −d. ggml rounds activations to int8 with one fp16 scale per 32, which is inside the measured time, as in llama.cpp.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
from demo.smollm2 import cache as project_cache

VERSION = "0.3.36"
SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
BLOCK = 128
_LIBRARIES = ("libggml-base.so.0", "libggml-cpu.so.0")
# What llama.cpp's own build sets (LLAMAFILE is off where ggml is configured alone), for this CPU.
_OPTIONS = [
    "-DCMAKE_BUILD_TYPE=Release", "-DBUILD_SHARED_LIBS=ON", "-DGGML_NATIVE=ON", "-DGGML_OPENMP=ON",
    "-DGGML_LLAMAFILE=ON", "-DGGML_BUILD_TESTS=OFF", "-DGGML_BUILD_EXAMPLES=OFF",
]  # fmt: skip
_F32, _Q1_0 = 0, 41


class _InitParams(ctypes.Structure):
    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


_TYPES = {
    "p": ctypes.c_void_p, "i": ctypes.c_int, "l": ctypes.c_int64, "z": ctypes.c_size_t, "b": ctypes.c_bool,
    "s": ctypes.c_char_p, "I": _InitParams, "-": None,
}  # fmt: skip
# Name after ggml_, type of the result, types of the arguments.
_FUNCTIONS = """
    init:pI free:-p get_data:pp tensor_overhead:z graph_overhead_custom:zzb new_tensor_2d:ppill mul_mat:pppp
    new_graph_custom:ppzb build_forward_expand:-pp threadpool_params_init:-pi threadpool_new:pp
    backend_cpu_reg:p backend_reg_dev_get:ppz backend_reg_get_proc_address:pps backend_dev_supports_op:bpp
    backend_cpu_init:p backend_cpu_set_n_threads:-pi backend_cpu_set_threadpool:-pp backend_cpu_buffer_type:p
    backend_buft_name:sp backend_alloc_ctx_tensors_from_buft:ppp backend_buffer_free:-p backend_tensor_set:-ppzz
    backend_graph_plan_create:ppp backend_graph_plan_free:-pp backend_graph_plan_compute:ipp
"""


class Ggml:
    """The loaded libraries; `version` is llama-cpp-python's, `features` what ggml says of the CPU and of its build."""

    def __init__(self, folder: Path) -> None:
        *_, self.c = (ctypes.CDLL(str(folder / name)) for name in _LIBRARIES)
        for name, types in (entry.split(":") for entry in _FUNCTIONS.split()):
            function = getattr(self.c, f"ggml_{name}")
            function.restype, *function.argtypes = (_TYPES[letter] for letter in types)
        self.version = VERSION
        self._backends: dict[int, int] = {}
        registry = self.c.ggml_backend_cpu_reg()
        self.device = self.c.ggml_backend_reg_dev_get(registry, 0)

        def listed(name: bytes, item: Any, argument: int) -> list[Any]:
            address = self.c.ggml_backend_reg_get_proc_address(registry, name)
            items = ctypes.CFUNCTYPE(ctypes.POINTER(item), ctypes.c_void_p)(address)(argument)
            return list(takewhile(lambda value: value is not None, items))

        words = [word.decode() for word in listed(b"ggml_backend_get_features", ctypes.c_char_p, registry)]
        self.features: dict[str, str] = dict(zip(words[::2], words[1::2], strict=True))
        # Buffers in which ggml lays weights out anew for its kernels, then the plain one: the order of llama.cpp.
        extra = listed(b"ggml_backend_dev_get_extra_bufts", ctypes.c_void_p, self.device)
        self.buffer_types: list[int] = [*extra, self.c.ggml_backend_cpu_buffer_type()]

    @classmethod
    def build(cls, cache: Path | None = None) -> Ggml:
        """Loads the libraries from the cache ($SIGNBIT_DEMO_CACHE or .cache), building them at the first call."""
        return cls(_libraries(cache or project_cache()))

    def q1_0(self, signs: np.ndarray, scale: np.ndarray) -> Q1Matrix:
        """Packs W = ±scale into Q1_0: signs [N, K] bool (True is +), scale [N, K/128], rounded to fp16."""
        return Q1Matrix(self, signs, scale)

    def context(self, resources: ExitStack) -> int:
        """A ggml context for four tensors and a graph of four nodes, without their data, freed with the stack."""
        size = 4 * self.c.ggml_tensor_overhead() + self.c.ggml_graph_overhead_custom(4, False)
        context: int = self.c.ggml_init(_InitParams(size, None, True))
        resources.callback(self.c.ggml_free, context)
        return context

    def allocate(self, context: int, kind: int, resources: ExitStack) -> None:
        """Data for the tensors of a context in a buffer of this kind, freed with the stack."""
        buffer = self.c.ggml_backend_alloc_ctx_tensors_from_buft(context, kind)
        if not buffer:
            raise MemoryError(f"ggml has no memory for a buffer of {self.c.ggml_backend_buft_name(kind).decode()}")
        resources.callback(self.c.ggml_backend_buffer_free, buffer)

    def backend(self, threads: int) -> int:
        """The CPU backend with this many threads and a lasting threadpool (with OPENMP the threads are OpenMP's)."""
        if threads not in self._backends:
            parameters = ctypes.create_string_buffer(4096)  # more than ggml_threadpool_params has
            self.c.ggml_threadpool_params_init(parameters, threads)
            backend = self._backends[threads] = self.c.ggml_backend_cpu_init()
            self.c.ggml_backend_cpu_set_n_threads(backend, threads)
            self.c.ggml_backend_cpu_set_threadpool(backend, self.c.ggml_threadpool_new(parameters))
        return self._backends[threads]


class Q1Matrix:
    """A packed matrix in a buffer of ggml: `buffer` is CPU, or CPU_REPACK where ggml has a kernel for repacked Q1_0."""

    def __init__(self, ggml: Ggml, signs: np.ndarray, scale: np.ndarray) -> None:
        n, k = self.shape = signs.shape
        if signs.dtype != bool or k % BLOCK or scale.shape != (n, k // BLOCK):
            raise ValueError(
                f"signs {signs.dtype} {signs.shape}, scale {scale.shape}: Q1_0 takes bool [N, K] and [N, K/{BLOCK}]"
            )
        d = scale.astype("<f2")[..., None].view(np.uint8)
        bits = np.packbits(signs.reshape(n, -1, BLOCK), axis=-1, bitorder="little")
        blocks = np.concatenate([d, bits], axis=-1)
        self._ggml = ggml
        self._runners: dict[tuple[int, int], Callable[..., np.ndarray]] = {}
        for kind in ggml.buffer_types:
            resources = ExitStack()
            context = ggml.context(resources)
            self.tensor = ggml.c.ggml_new_tensor_2d(context, _Q1_0, k, n)
            ggml.allocate(context, kind, resources)
            product = ggml.c.ggml_mul_mat(context, self.tensor, ggml.c.ggml_new_tensor_2d(context, _F32, k, 1))
            if ggml.c.ggml_backend_dev_supports_op(ggml.device, product):
                break
            resources.close()
        self.buffer: str = ggml.c.ggml_backend_buft_name(kind).decode()
        ggml.c.ggml_backend_tensor_set(self.tensor, blocks.ctypes.data, 0, blocks.nbytes)
        weakref.finalize(self, resources.close)

    def multiply(self, x: np.ndarray, threads: int) -> np.ndarray:
        """Y = X Wᵀ, [M, K] → [M, N] float32; the graph is made at the first call with this M and `threads`."""
        key = len(x), threads
        if key not in self._runners:
            self._runners[key] = self.runner(*key)
        return self._runners[key](x).copy()

    def runner(self, m: int, threads: int) -> Callable[..., np.ndarray]:
        """A function that computes Y for X [M, K], or for the last X if given none; the next call overwrites Y."""
        (n, k), ggml, c, resources = self.shape, self._ggml, self._ggml.c, ExitStack()
        context, backend = ggml.context(resources), ggml.backend(threads)
        x = c.ggml_new_tensor_2d(context, _F32, k, m)
        y = c.ggml_mul_mat(context, self.tensor, x)
        graph = c.ggml_new_graph_custom(context, 4, False)
        c.ggml_build_forward_expand(graph, y)
        ggml.allocate(context, c.ggml_backend_cpu_buffer_type(), resources)
        plan = c.ggml_backend_graph_plan_create(backend, graph)
        resources.callback(c.ggml_backend_graph_plan_free, backend, plan)
        inputs, outputs = (
            np.ctypeslib.as_array(ctypes.cast(c.ggml_get_data(tensor), ctypes.POINTER(ctypes.c_float)), (m, width))
            for tensor, width in ((x, k), (y, n))
        )
        inputs[:] = 0
        compute = c.ggml_backend_graph_plan_compute

        def run(x: np.ndarray | None = None, _weights: Q1Matrix = self) -> np.ndarray:
            if x is not None:
                if x.shape != inputs.shape:
                    raise ValueError(f"x is {x.shape}: this runner takes {inputs.shape}")
                inputs[:] = x
            if status := compute(backend, plan):
                raise RuntimeError(f"ggml_graph_compute gave status {status}")
            return outputs

        weakref.finalize(run, resources.close)
        return run


def _libraries(cache: Path) -> Path:
    """The folder of the libraries, built if missing; a native build is kept per kind of CPU."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = "".join(sorted({line for line in lines if line.lower().startswith(("flags", "features", "model name"))}))
    out = cache / f"ggml-{VERSION}-{hashlib.sha256(cpu.encode()).hexdigest()[:8]}"
    if not out.exists():
        for tool in ("cmake", os.environ.get("CC", "cc"), os.environ.get("CXX", "c++")):
            if shutil.which(tool) is None:
                raise SystemExit(f"{tool} is not found, ggml is built from source: apt-get install cmake g++ make")
        cache.mkdir(parents=True, exist_ok=True)
        print(f"building ggml of llama-cpp-python {VERSION} (77 MB from PyPI, minutes, once): {out}", file=sys.stderr)
        began = time.perf_counter()
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            _make(Path(scratch)).rename(out)
        print(f"built in {time.perf_counter() - began:.0f} s", file=sys.stderr)
    return out


def _make(folder: Path) -> Path:
    """Downloads the source distribution, builds ggml-cpu in its ggml tree and gathers the libraries."""
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary=llama-cpp-python"]
    subprocess.run([*pip, "-d", str(folder), f"llama-cpp-python=={VERSION}"], check=True)
    (source,) = folder.glob("*.tar.gz")
    if (digest := hashlib.sha256(source.read_bytes()).hexdigest()) != SHA256:
        raise SystemExit(f"{source.name} has another content than expected ({digest})")
    inside = f"llama_cpp_python-{VERSION}/vendor/llama.cpp/ggml"
    with tarfile.open(source) as archive:
        archive.extractall(folder, [m for m in archive if m.name.startswith(inside + "/")], filter="data")
    (folder / inside / "ggml.pc.in").touch()  # CMake wants it and the source distribution leaves it out
    made, work = folder / "made", str(folder / "work")
    configure = ["cmake", "-S", str(folder / inside), "-B", work, *_OPTIONS]
    for command in (configure, ["cmake", "--build", work, "--target", "ggml-cpu", f"-j{os.cpu_count()}"]):
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout[-4000:]}")
    made.mkdir()
    for name in _LIBRARIES:
        (found,) = Path(work).rglob(name)
        shutil.copyfile(found, made / name)
    return made
