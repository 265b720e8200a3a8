"""All tests that need a GPU, on a machine that has one, in one go and with one summary: python -m tests.gpu [FOLDER]

The parts run side by side, each with its whole output in FOLDER. With compute-sanitizer on the PATH, tests of each kernel
run again under memcheck, and some launches of each (`launches`) under racecheck; without it the summary says that they
did not. It needs pytest, torch and transformers, no installed signbit (PYTHONPATH=src) and no pytest plugin.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
#: Name of a part: its tests and a further choice among those that are marked `gpu`.
PARTS = {
    "kernels": (["tests/ops"], ""),
    "laws on random inputs": (["tests/laws"], "random or int8_activations"),
    "other laws, faults": (["tests/laws", "tests/faults"], "not random and not int8_activations"),
    "calibration and models": (
        [
            "tests/test_benchmarks.py",
            "tests/evaluate",
            "tests/hub",
            "tests/methods",
            "tests/models",
            "tests/ptq",
            "tests/train",
        ],
        "",
    ),
}
KERNELS = (
    "linear", "head", "quantize", "finish", "unpack", "unpack_signs", "put_salient", "unpack_halves", "put_salient_halves",
)  # fmt: skip
#: What each of them is run by under a sanitizer: one and several tokens of all terms, dense products, odd sizes, heads.
SANITIZED = [
    *(
        f"tests/ops/test_cuda.py::test_every_number_of_tokens[{kind}-{tokens}]"
        for kind in ("row", "group", "all", "salient_offsets", "shared_signs", "in_shift")
        for tokens in (1, 7, 16, 33)
    ),
    "tests/ops/test_cuda.py::test_many_tokens",
    "tests/ops/test_cuda.py::test_sizes[row-300-11008]",
    "tests/ops/test_cuda.py::test_sizes[salient_bitmap-129-999]",
    "tests/ops/test_cuda.py::test_sizes[all-129-999]",
    "tests/ops/test_cuda.py::test_the_head",
]


def launches() -> int:
    """Launches every kernel a few times, compared with the reference on the CPU.

    For racecheck: under it cuBLAS fails by itself (torch.mm of two small matrices is enough), so it does no product here.
    """
    import torch

    from signbit.linear import PackedLinear
    from signbit.ops import cuda, reference
    from tests.laws import cases

    def product(a, b, out_dtype=None):
        return (a.cpu().float() @ b.cpu().float()).to(out_dtype or torch.int32).to(a.device)

    torch._int_mm = torch.mm = product
    torch.manual_seed(0)
    wrong = []

    def compare(what, got, want):
        if not (got.cpu().float() - want).abs().max() <= 0.02 * want.abs().max():
            wrong.append(what)

    # The last are of many row tiles a block, and of columns that do not lie prepared at once.
    sizes = [(kind, 88, 1024) for kind in ("row", "group", "all", "salient_offsets", "salient_bitmap")]
    for kind, n, k in (*sizes, ("row", 40000, 64), ("all", 32, 16384), ("row", 48, 99840)):
        stored = cases.make(kind, n, k)
        matrix = cuda.Multiplication(cuda.prepare(PackedLinear(stored).to("cuda").weights[0].operands()))
        compare(f"{kind} {n} × {k}, dense", matrix.dense(torch.bfloat16), stored.to_dense())
        for tokens in (1, 3, 16, 40):
            for dtype in (torch.bfloat16, torch.float16):
                x = torch.randn(tokens, k, dtype=dtype)
                for mode in ("exact", "int8") if tokens <= cuda.MOST_TOKENS else ("int8",):
                    want = reference.binary_linear(x.float(), stored.operands(), mode)
                    got = matrix(x.cuda(), mode, "dense")
                    compare(f"{kind} {n} × {k}, {tokens} tokens, {dtype}, {mode}", got, want)
    codes, scale = torch.randint(-127, 128, (504, 512), dtype=torch.int8), torch.rand(504)
    for tokens in (1, 5, 20):
        for mode in ("exact", "int8") if tokens <= cuda.MOST_TOKENS else ("int8",):
            x = torch.randn(tokens, 512, dtype=torch.bfloat16)
            got = cuda.int8_linear(x.cuda(), codes.cuda(), scale.cuda(), mode)
            compare(f"head, {tokens} tokens, {mode}", got, reference.int8_linear(x.float(), codes, scale, mode))
    print(f"off the reference: {wrong}" if wrong else "all as the reference")
    return int(bool(wrong))


def main() -> int:
    """Exit status 1 if a test failed or a part ran none."""
    import torch

    if not torch.cuda.is_available():
        print("there is no GPU here")
        return 1
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    # Without pyproject.toml, whose options belong to plugins.
    command = [sys.executable, "-m", "pytest", "-q", "-c", "/dev/null", "--rootdir", ROOT, "-p", "no:cacheprovider"]
    command += ["-m", "gpu", "-W", "ignore::pytest.PytestUnknownMarkWarning"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    commands = {
        name: [*command, *paths, *(["-k", choice] if choice else [])] for name, (paths, choice) in PARTS.items()
    }
    if shutil.which("compute-sanitizer"):
        only = [part for kernel in KERNELS for part in ("--kernel-name", f"kernel_name={kernel}")]
        sanitizer = ["compute-sanitizer", "--error-exitcode", "1", *only, "--tool"]
        commands["memcheck"] = [*sanitizer, "memcheck", *command, *SANITIZED]
        commands["racecheck"] = [*sanitizer, "racecheck", sys.executable, "-m", "tests.gpu", "--launches"]
    else:
        print("compute-sanitizer is not on the PATH: memory and races are not checked")
    running = {}
    for name, line in commands.items():
        log = (folder / f"{name.replace(' ', '_').replace(',', '')}.txt").open("w")
        running[name] = (log, subprocess.Popen(line, cwd=ROOT, env=environment, stdout=log, stderr=log))
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, output in {folder}")
    worst = 0
    for name, (log, process) in running.items():
        worst = max(worst, int(process.wait() != 0))  # of one that a signal ended it is negative
        log.close()
        lines = Path(log.name).read_text().splitlines()
        # Under a sanitizer the last line is its own, and pytest's stands somewhere above.
        ends = [line for line in lines if re.search(r" in [0-9.]+s", line)][-1:]
        print(f"{name}: {', '.join(dict.fromkeys([*ends, *lines[-1:]])) or 'nothing'}")
        for line in lines:
            if line.startswith(("FAILED", "ERROR ", "========= Error", "========= Invalid")):
                print(f"  {line[:200]}")
    return worst


if __name__ == "__main__":
    sys.exit(launches() if sys.argv[1:] == ["--launches"] else main())
