"""The CPU kernels beside torch's dense multiplication and ggml's Q1_0 kernel, in one run.

    python -m benchmarks.kernels_cpu --shapes 4096x4096 --threads 1 2 --json kernels.json
    python -m benchmarks.kernels_cpu --pass-7b      # also all linears of LLaMA-7B against the memory's bandwidth

A row is one matrix form (a scale a row, or one for 128 columns) times 1 token (decode) or 128 (prefill), in
microseconds. Each call takes the next of several matrices, so that weights come from memory as they do in a model.
Nothing is timed that is not correct: every matrix form is compared with the reference first. All contenders take turns,
round after round; a figure is the median of the rounds. Measure on an idle machine: the threads of ggml wait for each
other busily and lose most when disturbed. A virtual machine's host may put two of its processors on one core for a second
and apart again: with --best there is a second row for each, of the best round of both sides.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.ggml import BLOCK, Ggml
from benchmarks.rows import Row, lower_is_better, show
from signbit.bits import unpack_signs
from signbit.ops import cpu, native, reference
from signbit.weight import BinaryWeight

MODES = ("int8", "exact")
# So many bytes of packed bits are cycled through: more than a core's second-level cache.
CYCLED_BYTES = 16 << 20
# A square one, and the linears of a 1.3B and a 7B Llama.
SHAPES = ["4096x4096", "2048x2048", "5632x2048", "2048x5632", "11008x4096", "4096x11008"]
# Threads of OpenMP, torch's and ggml's, go on spinning for milliseconds after their last call, on cores that others
# would use.
QUIET_S = 0.03


def seconds(call: Callable[[int], Any], runs: int, distinct: int = 1) -> float:
    """Median of `runs` calls, each of the next of `distinct` matrices.

    Unmeasured ones go before, for QUIET_S and once for each matrix at least: a model calls each of its layers once a token, so
    that what a first call makes (buffers, a closure of arguments) is long made.
    """
    until = time.perf_counter() + QUIET_S
    for run in itertools.count():
        call(run)
        if run + 1 >= distinct and time.perf_counter() >= until:
            break
    times = []
    for run in range(max(runs, 2 * distinct)):
        began = time.perf_counter()
        call(run)
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def check(weight: BinaryWeight, prepared: cpu.Prepared, isa: str, x: torch.Tensor) -> None:
    """Ends the run unless the kernel gives what the reference gives."""
    for mode, allowed in (("exact", 3e-6), ("int8", 1e-5)):
        want = reference.binary_linear(x, weight.operands(), mode)
        error = (cpu.Multiplication(prepared, isa=isa)(x, mode) - want).abs().max() / want.abs().max()
        if not error <= allowed:
            raise SystemExit(f"{isa}, {mode}: {error:.2g} off the reference; nothing is timed")


def measure(
    rows: int, columns: int, group: int, threads: int, isa: str, ggml: Ggml | None, rounds: int, best: bool
) -> list[Row]:
    """All rows of one shape, form and number of threads."""
    torch.set_num_threads(threads)
    count = max(2, CYCLED_BYTES * 8 // (rows * columns))
    groups = columns // group if group > 0 else 1
    weights = [
        BinaryWeight.from_signs(torch.randn(rows, columns), torch.rand(1, rows, groups).half() + 0.1)
        for _ in range(count)
    ]
    prepared = [cpu.prepare(weight.operands()) for weight in weights]
    ours_of = [cpu.Multiplication(p, isa=isa) for p in prepared]
    blocks = columns // BLOCK
    q1 = (
        []
        if ggml is None
        else [
            ggml.q1_0(
                unpack_signs(w.signs[0], columns).numpy() > 0,
                w.scale[0].float().repeat_interleave(blocks // groups, dim=1).numpy(),
            )
            for w in weights
        ]
    )
    found = []
    form = f"{rows}×{columns}, {'row scale' if groups == 1 else f'group {group}'}, {threads} threads"
    for tokens, name in ((1, "decode"), (128, "prefill")):
        x = torch.randn(tokens, columns)
        for weight, laid in zip(weights, prepared, strict=True) if tokens == 1 else [(weights[0], prepared[0])]:
            check(weight, laid, isa, x)
        calls: dict[str, tuple[Callable[[int], Any], int]] = {}  # of the next of so many matrices
        if runners := [matrix.runner(tokens, threads) for matrix in q1]:
            theirs = runners[0](x.numpy())
            off = np.abs(theirs - reference.binary_linear(x, weights[0].operands(), "exact").numpy()).max()
            if not off <= 0.03 * np.abs(theirs).max():
                raise SystemExit(f"ggml is {off:.2g} off the reference; nothing is timed")
            calls["ggml Q1_0"] = (lambda i, r=runners: r[i % count]()), count
        for dtype in (torch.float32, torch.bfloat16):
            inputs, dense = x.to(dtype), [torch.randn(rows, columns, dtype=dtype) for _ in range(min(count, 4))]
            calls[f"torch {str(dtype).removeprefix('torch.')}"] = (
                (lambda i, u=inputs, d=dense: F.linear(u, d[i % len(d)])), len(dense)
            )  # fmt: skip
        for mode in MODES:
            calls[mode] = (lambda i, u=x, m=mode: ours_of[i % count](u, m)), count
        runs = 60 if tokens == 1 else 4
        took = [{key: seconds(call, runs, distinct) for key, (call, distinct) in calls.items()} for _ in range(rounds)]
        for mode, peer in itertools.product(MODES, [key for key in calls if key not in MODES]):
            for part, words in ((0.5, ""), (0, ", best round"))[: 1 + best]:
                ours, theirs = (1e6 * float(np.quantile([turn[key] for turn in took], part)) for key in (mode, peer))
                found.append(lower_is_better(f"{name} {mode}, {form}{words}", ours, peer, theirs, "µs"))
    return found


def pass_7b(group: int, threads: int, isa: str, rounds: int) -> list[Row]:
    """One token through all linears of LLaMA-7B, each with weights of its own, beside a sum over 1 GiB by torch."""
    torch.set_num_threads(threads)
    shapes = [*[(4096, 4096)] * 4, *[(11008, 4096)] * 2, (4096, 11008)] * 32
    multiply, read, checked = [], 0, set()
    for rows, columns in shapes:
        groups = columns // group if group > 0 else 1
        scale = torch.rand(1, rows, groups).half() + 0.1
        signs = torch.randint(0, 256, (1, rows, columns // 8), dtype=torch.uint8)
        weight = BinaryWeight(signs, scale, columns)
        prepared = cpu.prepare(weight.operands())
        read += 4 * prepared.signs.numel() + 2 * prepared.scale.numel()
        if (rows, columns) not in checked:
            check(weight, prepared, isa, torch.randn(1, columns))
            checked.add((rows, columns))
        multiply.append(cpu.Multiplication(prepared, isa=isa))
    inputs = {columns: torch.randn(1, columns) for columns in (4096, 11008)}
    words = torch.ones(1 << 28)
    calls: dict[str, Callable[[int], Any]] = {"memory": lambda _: words.sum()}
    for mode in MODES:
        calls[mode] = lambda _, m=mode: [f(inputs[k], m) for f, (_, k) in zip(multiply, shapes, strict=True)]
    took = [{key: seconds(call, 3) for key, call in calls.items()} for _ in range(rounds)]
    form = f"LLaMA-7B, {'row scale' if group < 0 else f'group {group}'}, {threads} threads"
    most = 4 * words.numel() / statistics.median(turn["memory"] for turn in took)
    rates = {mode: read / statistics.median(turn[mode] for turn in took) for mode in MODES}
    return [
        Row(f"decode {mode}, one pass of {form}", rate / 1e9, "memory", most / 1e9, rate / most, "GB/s")
        for mode, rate in rates.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=SHAPES)
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=9, help="each figure is the median of so many")
    parser.add_argument("--best", action="store_true", help="also rows of the best round of both sides")
    parser.add_argument("--isa", help="instruction set; the best that runs unless named")
    parser.add_argument(
        "--no-ggml", action="store_true", help="beside torch alone: ggml has to be downloaded and built"
    )
    parser.add_argument("--pass-7b", action="store_true", help="all linears of LLaMA-7B, 0.8 GB of packed bits")
    parser.add_argument("--json")
    args = parser.parse_args()
    library = native.library()
    if isinstance(library, str):
        raise SystemExit(f"there are no kernels: {library}")
    isa = args.isa or next(iter(library.runs))
    if isa not in library.runs:
        raise SystemExit(f"--isa is {isa}; this processor runs {', '.join(library.runs)}")
    ggml = None if args.no_ggml else Ggml.build()
    peer = "" if ggml is None else f", ggml of llama-cpp-python {ggml.version}"
    print(f"{isa}, torch {torch.__version__}{peer}")
    shapes = [tuple(map(int, shape.split("x"))) for shape in args.shapes]
    rows = [
        row
        for (n, k), group, threads in itertools.product(shapes, (-1, 128), args.threads)
        for row in measure(n, k, group, threads, isa, ggml, args.rounds, args.best)
    ]
    if args.pass_7b:
        rows += [row for group in (-1, 128) for row in pass_7b(group, max(args.threads), isa, args.rounds)]
    show(rows, args.json)


if __name__ == "__main__":
    main()
