"""The CUDA kernels beside torch's dense bfloat16 multiplication, in one run on one GPU.

    python -m benchmarks.kernels_cuda --json kernels.json

All linears of LLaMA-7B with weights of their own: q, k, v and gate, up as one matrix each, 4 × 32 launches (torch: 7 ×
32), in one CUDA graph a replay of which is timed; for prefill without a graph. Quantizing the activations is inside.
Nothing is timed that is not correct: each shape is compared with the reference first.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import torch
import torch.nn.functional as F

from benchmarks.rows import Row, lower_is_better, show
from signbit.bits import unpack_signs
from signbit.ops import cuda, reference
from signbit.weight import BinaryWeight, Salient

Way = Literal["slices", "dense"]
WARM_S = 0.3
FUSED = [(12288, 4096), (4096, 4096), (22016, 4096), (4096, 11008)]
CROSSED = (17, 33, 64, 96, 128, 256, 512, 1024)
SINGLE = [*[(4096, 4096)] * 4, *[(11008, 4096)] * 2, (4096, 11008)]


def milliseconds(run: Callable[[], Any], runs: int) -> float:
    """Median of `runs` calls, each between two events of the device, after WARM_S of calls that bring its clock up."""
    until = time.perf_counter() + WARM_S
    while time.perf_counter() < until:
        run()
        torch.cuda.synchronize()
    times = []
    for _ in range(runs):
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        run()
        ended.record()
        ended.synchronize()
        times.append(began.elapsed_time(ended))
    return statistics.median(times)


def in_a_graph(run: Callable[[], Any]) -> Callable[[], Any]:
    """`run`, captured once; what it allocates stays with the graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run.kept = run()  # type: ignore[attr-defined]
    return graph.replay


def bandwidth() -> float:
    """Bytes a second that a copy of 1 GiB reads and writes."""
    source = torch.ones(1 << 28, device="cuda")
    target = torch.empty_like(source)
    return 2 * 4 * source.numel() / milliseconds(lambda: target.copy_(source), 10) * 1e3


def random_weight(rows: int, columns: int, group: int) -> BinaryWeight:
    signs = torch.randint(0, 256, (1, rows, columns // 8), dtype=torch.uint8, device="cuda")
    scale = torch.rand(1, rows, columns // group if group > 0 else 1, device="cuda").half() * 0.02 + 0.01
    return BinaryWeight(signs, scale, columns)


def check(
    weight: BinaryWeight, multiply: cuda.Multiplication, tokens: int, dtype: torch.dtype, way: Way | None = None
) -> None:
    """Ends the run unless the kernels give what the reference gives."""
    x = torch.randn(tokens, weight.in_features, device="cuda").to(dtype)
    for mode in ("exact", "int8"):
        want = reference.binary_linear(x.float(), weight.operands(), mode)
        error = float((multiply(x, mode, way).float() - want).abs().max() / want.abs().max())
        if not error <= 2 * torch.finfo(dtype).eps:
            raise SystemExit(f"{mode}, {tokens} tokens: {error:.2g} off the reference; nothing is timed")


def salient_weight(rows: int, columns: int, group: int, share: float) -> BinaryWeight:
    """As `random_weight`, with a share of the values kept at 8 bits in places that differ from row to row."""
    w, count = random_weight(rows, columns, group), int(share * columns)
    mask = torch.rand(rows, columns, device="cuda").argsort(dim=1) < count
    codes = torch.randint(0, 256, (rows, columns), dtype=torch.uint8, device="cuda")
    zero = torch.full((rows,), 128, device="cuda")
    return replace(w, salient=Salient.from_mask(mask, codes, w.scale[0, :, 0] / 64, zero, 8))


def two_planes(rows: int, columns: int) -> BinaryWeight:
    """Two planes with a shift, a scale a row."""
    first, second = (random_weight(rows, columns, -1) for _ in range(2))
    signs, scale = torch.cat([first.signs, second.signs]), torch.cat([first.scale, second.scale])
    return BinaryWeight(signs, scale, columns, shift=second.scale[0] / 4)


def crossovers(layers: int, runs: int, dtype: torch.dtype) -> list[Row]:
    """Slices beside a dense matrix by number of tokens; prints where they cross and what the kernels take for it."""
    forms: dict[str, Callable[[int, int], BinaryWeight]] = {
        "row scale": functools.partial(random_weight, group=-1),
        "group 128": functools.partial(random_weight, group=128),
        "10% salient": functools.partial(salient_weight, group=-1, share=0.1),
        "2 planes, shift": two_planes,
    }
    rows = []
    for form, make in forms.items():
        weights = [make(n, k) for _ in range(layers) for n, k in FUSED]
        multiplies = [cuda.Multiplication(cuda.prepare(w.operands())) for w in weights]
        ways: tuple[Way, Way] = ("dense", "slices")
        for way in ways:
            check(weights[0], multiplies[0], 64, dtype, way)
        for mode in ("int8", "exact"):
            before, cross = (0, 0.0), "nowhere in these"
            for tokens in CROSSED:
                inputs = [torch.randn(tokens, w.in_features, device="cuda", dtype=dtype) for w in weights]
                dense, slices = (
                    milliseconds(chain([lambda x, f=f, m=mode, w=w: f(x, m, w) for f in multiplies], inputs), runs)
                    for w in ways
                )
                work = f"dense {mode}, {tokens} tokens, {form}, {len(FUSED)} × {layers} linears"
                rows.append(lower_is_better(work, dense, "slices", slices, "ms"))
                ahead = slices - dense
                if ahead > 0 >= before[1]:
                    share = ahead / (ahead - before[1])
                    cross = f"at {tokens - share * (tokens - before[0]):.0f} tokens" if before[0] else "before these"
                before = (tokens, ahead)
            print(f"{mode}, {form}: they cross {cross}; taken for it: {multiplies[0].dense_from(mode)}", flush=True)
    return rows


def gemlite_multiply(w: BinaryWeight, dtype: torch.dtype) -> Callable[[torch.Tensor], Any]:
    """The same matrix in GemLite's packing: (code − ½) · 2·scale."""
    import gemlite

    kind = gemlite.DType.BF16 if dtype is torch.bfloat16 else gemlite.DType.FP16
    rows, columns, groups = w.out_features, w.in_features, w.scale.shape[2]
    linear = gemlite.GemLiteLinear(1, columns // groups, columns, rows, kind, kind)
    codes = (unpack_signs(w.signs[0], columns) > 0).to(torch.uint8)
    scale = 2 * w.scale[0].to(dtype).reshape(-1, 1)
    linear.pack(codes.view(-1, columns // groups), scale, torch.full_like(scale, 0.5), None)
    return linear


def chain(multiplies: list[Callable[[torch.Tensor], Any]], inputs: list[torch.Tensor]) -> Callable[[], Any]:
    return lambda: [multiply(x) for multiply, x in zip(multiplies, inputs, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 8, 2048])
    parser.add_argument("--groups", nargs="+", type=int, default=[-1, 128])
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16"])
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--single", action="store_true", help="also the seven linears of a block one by one")
    parser.add_argument("--salient", type=float, help="also with this share of values at 8 bits, beside none")
    parser.add_argument("--gemlite", action="store_true", help="also beside GemLite, if it is installed")
    parser.add_argument(
        "--crossover",
        action="store_true",
        help="instead: slices beside a dense matrix, by tokens, of each kind of term",
    )
    parser.add_argument("--json")
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    copied = bandwidth()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, copy {copied / 1e9:.0f} GB/s")
    if args.crossover:
        show(crossovers(args.layers, args.runs, dtype), args.json)
        return
    dense = [torch.randn(n, k, device="cuda", dtype=torch.bfloat16) for _ in range(args.layers) for n, k in SINGLE]
    theirs = {}
    for tokens in args.tokens:
        inputs = [torch.randn(tokens, w.shape[1], device="cuda", dtype=torch.bfloat16) for w in dense]
        run = chain([lambda x, w=w: F.linear(x, w) for w in dense], inputs)
        theirs[tokens] = milliseconds(in_a_graph(run) if tokens < 64 else run, args.runs)
    del dense, inputs, run
    rows: list[Row] = []
    plain: dict[str, float] = {}
    for group, shapes, share in itertools.product(
        args.groups, (FUSED, SINGLE) if args.single else (FUSED,), (None, args.salient) if args.salient else (None,)
    ):
        make = random_weight if share is None else functools.partial(salient_weight, share=share)
        weights = [make(n, k, group) for _ in range(args.layers) for n, k in shapes]
        multiplies = [cuda.Multiplication(cuda.prepare(w.operands())) for w in weights]
        packed_bytes = sum(w.nbytes for w in weights)
        form = f"{'row scale' if group < 0 else f'group {group}'}, {len(shapes)} × {args.layers} linears"
        for tokens in args.tokens:
            for weight, multiply in list(zip(weights, multiplies, strict=True))[: len(set(shapes)) + 1]:
                check(weight, multiply, tokens, dtype)
            inputs = [torch.randn(tokens, w.in_features, device="cuda", dtype=dtype) for w in weights]
            for mode in ("int8", "exact"):
                run = chain([lambda x, f=f, m=mode: f(x, m) for f in multiplies], inputs)
                ours = milliseconds(in_a_graph(run) if tokens < 64 else run, args.runs)
                work = f"{'decode' if tokens < 64 else 'prefill'} {mode}, {tokens} tokens, {form}"
                if share is not None:
                    rows.append(
                        lower_is_better(f"{work}, {share:.0%} salient", ours, "none salient", plain[work], "ms")
                    )
                    continue
                plain[work] = ours
                rows.append(lower_is_better(work, ours, "torch bfloat16", theirs[tokens], "ms"))
                if tokens < 64:
                    read = packed_bytes / ours * 1e3
                    rows.append(Row(f"{work}: bytes", read / 1e9, "copy", copied / 1e9, read / copied, "GB/s"))
        if args.gemlite and share is None and shapes is FUSED:
            import gemlite

            peers = [gemlite_multiply(w, dtype) for w in weights]
            for tokens in args.tokens:
                inputs = [torch.randn(tokens, w.in_features, device="cuda", dtype=dtype) for w in weights]
                for peer, w, x in list(zip(peers, weights, inputs, strict=True))[: len(set(shapes))]:
                    want = reference.binary_linear(x.float(), w.operands(), "exact")
                    error = float((peer(x).float() - want).abs().max() / want.abs().max())
                    # In bfloat16 it comes 0.03 off: rounding, not a wrong product.
                    if not error <= max(0.02, 8 * torch.finfo(dtype).eps):
                        raise SystemExit(f"GemLite, {tokens} tokens: {error:.2g} off the reference; nothing is timed")
                run = chain(peers, inputs)
                took = milliseconds(in_a_graph(run) if tokens < 64 else run, args.runs)
                name = f"GemLite {gemlite.__version__}"
                for work, ours in plain.items():
                    if work.endswith(f", {tokens} tokens, {form}"):
                        rows.append(lower_is_better(work, ours, name, took, "ms"))
            del peers
        del weights, multiplies, inputs, run
    show(rows, args.json)


if __name__ == "__main__":
    main()
