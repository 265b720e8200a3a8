"""Perplexity against true bits per weight, from the rows that `benchmarks.quality --json` writes.

python -m benchmarks.plot quality.json [more.json …] -o docs/quality.png
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", nargs="+")
    parser.add_argument("-o", "--out", required=True)
    parser.add_argument("--protocol", default="wikitext2")
    args = parser.parse_args()
    rows = [row for file in args.rows for row in json.loads(Path(file).read_text())]
    points = []
    for row in rows:
        label, bits, protocol = re.fullmatch(r"(.*) \(([\d.]+) bits a weight.*\), (\w+).*", row["work"]).groups()
        if protocol == args.protocol:
            points.append((float(bits), row["ours"], label))
    anchor = rows[0]["theirs"]
    figure, axes = plt.subplots(figsize=(7.2, 4.2), dpi=150)
    axes.axhline(anchor, color="0.4", linestyle="--", linewidth=1)
    axes.text(7.4, anchor * 1.12, f"full precision, {anchor:.1f}", ha="right", va="bottom", fontsize=8, color="0.3")
    for bits, value, label in points:
        marker, color = ("s", "#b4443c") if label.startswith("absmean") else ("o", "#2a6f97")
        axes.plot(bits, value, marker, color=color, markersize=7)
        axes.annotate(label, (bits, value), (6, 5), textcoords="offset points", fontsize=8)
    axes.set_yscale("log")
    axes.set_xlim(0.5, 7.5)
    axes.set_ylim(8, 3e7)
    axes.set_xlabel("true bits per weight of the linear layers, counted from bytes")
    axes.set_ylabel(f"perplexity, {args.protocol}")
    axes.set_title("SmolLM2-135M-Instruct, rounding alone (no calibration, no training)", fontsize=10)
    axes.grid(True, which="major", alpha=0.25)
    figure.tight_layout()
    figure.savefig(args.out)


if __name__ == "__main__":
    main()
