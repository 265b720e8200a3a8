"""Perplexity and true bits of each method beside the full-precision model and the dequantized twin.

    python -m benchmarks.quality MODEL --data-dir ../shared/data --ppl wikitext2

Refuses to report a packed model whose perplexity differs from its dequantized twin's in the first four digits.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch

import signbit
from benchmarks.rows import Row, lower_is_better, show
from signbit.evaluate.perplexity import Perplexity
from signbit.evaluate.size import measure_size
from signbit.hub.load import load_any, load_source, load_tokenizer
from signbit.serve.generate import GenerateOptions, generate

RTN = {"gptq": False, "saliency": "magnitude"}
SETTINGS = {
    "absmean, group 64": {"method": "absmean", "group": 64},
    "absmean, row": {"method": "absmean"},
    "pbllm 3bit, 2 % salient": {"method": "pbllm", "low": "3bit", "salient": 0.02, **RTN},
    "pbllm, 10 % salient": {"method": "pbllm", "salient": 0.1, **RTN},
    "pbllm, 30 % salient": {"method": "pbllm", "salient": 0.3, **RTN},
    "pbllm, 50 % salient": {"method": "pbllm", "salient": 0.5, **RTN},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--data-dir")
    parser.add_argument("--ppl", default="wikitext2")
    parser.add_argument("--max-windows", type=int)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--only", help="measure only settings whose name contains this; | divides several")
    parser.add_argument("--sample", help="also print a greedy continuation of this text")
    parser.add_argument("--json")
    args = parser.parse_args()
    tokenizer = load_tokenizer(args.model)
    names = args.ppl.split(",")

    def measure(model: object) -> list[Perplexity]:
        return [signbit.perplexity(model, tokenizer, n, args.data_dir, max_windows=args.max_windows) for n in names]

    def sample(model: object, label: str) -> None:
        if args.sample:
            text = generate(model, tokenizer, args.sample, GenerateOptions(max_new_tokens=40)).text
            print(f"  {label}: {args.sample}{text!r}", flush=True)

    dense = load_any(args.model, args.dtype, args.device)
    anchors = measure(dense)
    sample(dense, "dense")
    del dense
    rows: list[Row] = []
    for label, setting in SETTINGS.items():
        if args.only and not any(part in label for part in args.only.split("|")):
            continue
        with tempfile.TemporaryDirectory() as scratch:
            source = load_source(args.model)
            signbit.quantize_(source, signbit.SignbitConfig(**setting))
            out = signbit.save(source, Path(scratch) / "packed", tokenizer)
            size = measure_size(out)
            packed = load_any(str(out), args.dtype, args.device)
            results = measure(packed)
            sample(packed, label)
            twin = measure(packed.dequantize(dtype=getattr(torch, args.dtype)))
        bits = f"{size.bits_per_weight:.3f} bits a weight, {size.bits_per_parameter:.3f} a parameter"
        for ours, theirs, other in zip(results, anchors, twin, strict=True):
            if f"{ours.perplexity:.4g}" != f"{other.perplexity:.4g}":
                raise SystemExit(f"{label}: packed {ours.perplexity} but its dequantized twin {other.perplexity}")
            rows.append(
                lower_is_better(
                    f"{label} ({bits}), {ours.protocol}",
                    ours.perplexity,
                    "full precision",
                    theirs.perplexity,
                    "perplexity",
                )
            )
            print(f"{label}: {ours.protocol} {ours.perplexity:.4f}, twin {other.perplexity:.4f}, {bits}", flush=True)
    show(rows, args.json)


if __name__ == "__main__":
    main()
