"""Perplexity of calibrated settings beside the published one: shares of salient weights × calibration seeds.

    python -m benchmarks.calibration MODEL --data-dir ../shared/data --calibration c4 --ppl wikitext2 \
        --settings pb-gptq pbllm --shares 0.5 0.3 0.2 0.1 0.05 --seeds 0 1 2 --rows rows.jsonl

A setting is a method, with options after a colon ("pbllm: refine=0, match=prefix"). Every finished row is appended to
--rows and not measured again, so that the command can be killed and repeated, or run on several devices at once with
--part. Perplexity is that of the dequantized twin, in which nothing is unpacked per window; a row is refused unless
the packed model gives the same over its first window.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import signbit
from signbit.data import CalibrationOptions
from signbit.evaluate.size import measure_size
from signbit.hub.load import load_any, load_tokenizer
from signbit.hub.stream import quantize
from signbit.methods import METHODS
from signbit.methods.rules import parse_rule


def _settings(text: str) -> tuple[str, dict[str, Any]]:
    method, colon, rest = text.partition(":")
    values = parse_rule(f"x: {rest}", METHODS[method].options)[1] if colon else {}
    return method, values


def measure(args: argparse.Namespace, setting: str, share: float, seed: int) -> dict[str, Any]:
    method, values = _settings(setting)
    config = signbit.SignbitConfig(method, **{"salient": share, **values})
    measured = config.plan.options.needs.moments
    text = CalibrationOptions(args.calibration if measured else None, args.samples, args.sequence_length, seed)
    with tempfile.TemporaryDirectory() as scratch:
        began = time.perf_counter()
        out, report = quantize(
            args.model, Path(scratch) / "out", config, text, args.data_dir, args.device, args.inputs_on
        )
        solved_s = time.perf_counter() - began
        size = measure_size(out)
        packed = load_any(str(out), "float32", args.device)
    tokenizer = load_tokenizer(args.model)

    def perplexity(model: Any, windows: int | None) -> float:
        return signbit.perplexity(model, tokenizer, args.ppl, args.data_dir, max_windows=windows).perplexity

    first = perplexity(packed, 1)
    twin = packed.dequantize(dtype=torch.float32)
    if f"{first:.4g}" != f"{perplexity(twin, 1):.4g}":
        raise SystemExit(f"{setting} {share}: the packed model and its dequantized twin differ over the first window")
    began = time.perf_counter()
    return {
        "setting": setting, "share": share, "seed": seed, "bits_per_weight": size.bits_per_weight,
        "perplexity": perplexity(twin, args.max_windows), "protocol": args.ppl, "windows": args.max_windows,
        "samples": args.samples, "length": args.sequence_length, "quantize_s": solved_s,
        "evaluate_s": time.perf_counter() - began,
        "mean_error": statistics.mean(d.error or 0 for d in report.binarized),
    }  # fmt: skip


def read_rows(path: str | None, run: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows that are finished, all of them of the same `run`."""
    done = []
    if path and Path(path).exists():
        done = [json.loads(line) for line in Path(path).read_text().splitlines()]
    if strange := [row for row in done if {key: row.get(key) for key in run} != run]:
        raise SystemExit(f"{path} has rows of another run ({strange[0]}); give another --rows")
    return done


def keep_row(path: str | None, row: dict[str, Any]) -> None:
    if path:
        with Path(path).open("a") as stream:
            stream.write(json.dumps(row) + "\n")


def table(rows: list[dict[str, Any]]) -> None:
    """Median over the seeds, a line a setting and share."""
    print(f"{'setting':44} {'salient':>8} {'bits':>7} {'median':>10}  seeds")
    for key in sorted({(row["setting"], -row["share"]) for row in rows}):
        same = sorted((r for r in rows if (r["setting"], -r["share"]) == key), key=lambda r: r["seed"])
        values = [row["perplexity"] for row in same]
        bits = statistics.median(row["bits_per_weight"] for row in same)
        each = ", ".join(f"{value:.5g}" for value in values)
        print(f"{key[0]:44} {-key[1]:8.0%} {bits:7.3f} {statistics.median(values):10.5g}  {each}")


#: Round to nearest, docs/results.md: true bits and perplexity.
ROUNDED = ((2.718, 581614), (4.481, 273206), (6.080, 82.69))
DENSE = 21.63


def draw(rows: list[dict[str, Any]], path: str) -> None:
    """Perplexity over true bits, a dot a seed and a line through the medians."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.axhline(DENSE, color="0.4", linestyle="--", linewidth=1)
    axes.text(6.2, DENSE * 0.96, f"full precision, {DENSE}", fontsize=8, color="0.3", ha="right", va="top")
    axes.plot(*zip(*ROUNDED, strict=True), color="0.6", marker="x", label="rounded to nearest")
    names = {
        "pb-gptq": ("C1", "s", "PB-GPTQ as published (--method pb-gptq)"),
        "pbllm": ("C0", "o", "signbit (--method pbllm)"),
    }
    for setting, (color, marker, label) in names.items():
        points: dict[float, list[float]] = {}
        first_bits: dict[float, float] = {}
        for row in rows:
            if row["setting"] == setting:
                # Salient positions differ a little from seed to seed, and so do the bits: the first seed's stand for all.
                bits = first_bits.setdefault(row["share"], row["bits_per_weight"])
                points.setdefault(bits, []).append(row["perplexity"])
        ordered = sorted(points)
        axes.plot(ordered, [statistics.median(points[bits]) for bits in ordered], color=color, label=label)
        for bits in ordered:
            axes.plot([bits] * len(points[bits]), points[bits], marker, color=color, markersize=4, linestyle="")
    axes.set_yscale("log")
    axes.set_ylim(15, 2e6)
    axes.set_xlabel("true bits per weight of the linear layers (5, 10, 20, 30, 50 % salient at 8 bits)")
    axes.set_ylabel("perplexity, WikiText-2")
    axes.set_title("SmolLM2-135M-Instruct, 128 windows of C4; a dot a calibration seed", fontsize=10)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=9, loc="upper right")
    figure.savefig(path, dpi=140)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--data-dir")
    parser.add_argument("--calibration", default="c4")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--sequence-length", type=int, default=2048)
    parser.add_argument("--ppl", default="wikitext2")
    parser.add_argument("--max-windows", type=int)
    parser.add_argument("--settings", nargs="+", default=["pb-gptq", "pbllm"])
    parser.add_argument("--shares", nargs="+", type=float, default=[0.5, 0.3, 0.2, 0.1, 0.05])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--inputs-on", default="device")
    parser.add_argument("--rows", help="JSON lines, one a finished row")
    parser.add_argument("--plot", help="also draw the rows, with those of rounding to nearest, to this picture")
    parser.add_argument("--part", default="0/1", help="i/n: measure every n-th row from the i-th")
    args = parser.parse_args()
    part, parts = map(int, args.part.split("/"))
    wanted = [(s, share, seed) for seed in args.seeds for share in args.shares for s in args.settings]
    run = {"protocol": args.ppl, "windows": args.max_windows, "samples": args.samples, "length": args.sequence_length}
    done = read_rows(args.rows, run)
    known = {(row["setting"], row["share"], row["seed"]) for row in done}
    for key in [key for key in wanted[part::parts] if key not in known]:
        row = measure(args, *key)
        done.append(row)
        print(
            f"{row['setting']}, {row['share']:.0%}, seed {row['seed']}: {row['perplexity']:.5g} at "
            f"{row['bits_per_weight']:.3f} bits, {row['quantize_s']:.0f} + {row['evaluate_s']:.0f} s", flush=True,
        )  # fmt: skip
        keep_row(args.rows, row)
    table(done)
    if args.plot:
        draw(done, args.plot)


if __name__ == "__main__":
    main()
