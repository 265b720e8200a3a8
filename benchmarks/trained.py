"""Perplexity against true bits per weight of packed directories: one table in markdown, one picture.

    python -m benchmarks.trained MODEL "PTQ, 10 %=ptq10" "PTQ, 30 %=ptq30" "QAT, 10 %=qat10" "QAT, 30 %=qat30" \
        "OneBit=onebit" --data-dir ../shared/data --device cuda --dtype bfloat16 --rows rows.jsonl --plot docs/pbllm.png

What stands before the comma of a name is a line of the picture. MODEL is full precision. Every finished row is appended to
--rows and not measured again; rows are known by the digest of a directory's tensors, wherever it lies.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import signbit
from benchmarks.calibration import keep_row, read_rows
from signbit.evaluate.size import measure_size
from signbit.format import read_description
from signbit.hub.load import load_any, load_tokenizer


def markdown(rows: list[dict[str, Any]], protocol: str) -> str:
    lines = [f"| | true bits per weight | {protocol} |", "|---|---|---|"]
    lines += [f"| {row['name']} | {row['bits_per_weight']:.3f} | {row['perplexity']:.5g} |" for row in rows]
    return "\n".join(lines)


def draw(rows: list[dict[str, Any]], path: str, protocol: str) -> None:
    """A line through the rows of one kind, a dot each; full precision, the first row, is a level."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    figure = Figure(figsize=(7.2, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    dense, *packed = rows
    axes.axhline(dense["perplexity"], color="0.4", linestyle="--", linewidth=1)
    axes.text(0.99, dense["perplexity"], f"full precision, {dense['perplexity']:.2f}", fontsize=8, color="0.3", ha="right",
              va="bottom", transform=axes.get_yaxis_transform())  # fmt: skip
    kinds: dict[str, list[tuple[float, float]]] = {}
    for row in packed:
        kinds.setdefault(row["name"].partition(",")[0], []).append((row["bits_per_weight"], row["perplexity"]))
    for kind, points in kinds.items():
        axes.plot(*zip(*sorted(points), strict=True), "o-", label=kind)
    for bits, value in (point for points in kinds.values() for point in points):
        axes.annotate(f"{value:.4g}", (bits, value), (0, 6), textcoords="offset points", fontsize=8, ha="center")
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.margins(x=0.08, y=0.1)
    axes.set_xlabel("true bits per weight of the binary layers, counted from bytes")
    axes.set_ylabel(f"perplexity, {protocol}")
    axes.grid(alpha=0.25)
    axes.legend(fontsize=9)
    figure.savefig(path, dpi=140)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("packed", nargs="+", metavar="NAME=DIRECTORY")
    parser.add_argument("--data-dir")
    parser.add_argument("--ppl", default="wikitext2")
    parser.add_argument("--max-windows", type=int)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rows", help="JSON lines, one a finished row")
    parser.add_argument("--plot", help="also draw them to this picture")
    args = parser.parse_args()
    if wrong := [word for word in args.packed if "=" not in word]:
        parser.error(f"{wrong[0]!r} has no name; give NAME=DIRECTORY (PTQ=out)")
    run = {"model": args.model, "protocol": args.ppl, "windows": args.max_windows, "dtype": args.dtype}
    done = {row["of"]: row for row in read_rows(args.rows, run)}
    tokenizer = load_tokenizer(args.model)

    def row(name: str, folder: str, of: str, bits: float) -> dict[str, Any]:
        if of not in done:
            model = load_any(folder, args.dtype, args.device)
            found = signbit.perplexity(model, tokenizer, args.ppl, args.data_dir, max_windows=args.max_windows)
            done[of] = {**run, "of": of, "bits_per_weight": bits, "perplexity": found.perplexity}
            keep_row(args.rows, done[of])
        return {**done[of], "name": name}

    rows = [row("full precision", args.model, "full precision", 16.0)]
    for word in args.packed:
        name, _, folder = word.partition("=")
        digest = read_description(folder)[1].tensors_sha256
        assert digest is not None
        rows.append(row(name, folder, digest, measure_size(Path(folder)).bits_per_weight))
    print(markdown(rows, args.ppl))
    if args.plot:
        draw(rows, args.plot, args.ppl)


if __name__ == "__main__":
    main()
