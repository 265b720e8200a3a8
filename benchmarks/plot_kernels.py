"""Speed of the CPU kernels beside their peers, from the rows that `benchmarks.kernels_cpu --json` writes.

python -m benchmarks.plot_kernels docs/kernels_cpu.json --shape 4096×4096 -o docs/kernels_cpu.png
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

TOKENS = {"decode": 1, "prefill": 128}
BARS = {
    "signbit int8": "#b4443c", "signbit exact": "#e0938d", "ggml Q1_0": "#2a6f97", "torch bfloat16": "0.55",
    "torch float32": "0.75",
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows")
    parser.add_argument("--shape", default="4096×4096")
    parser.add_argument("-o", "--out", required=True)
    args = parser.parse_args()
    rows, columns = map(int, args.shape.split("×"))
    # What is multiplied, in 1e9 weights times tokens a second: {(work, form): {name: rate}}.
    rates: dict[tuple[str, str], dict[str, float]] = {}
    for row in json.loads(Path(args.rows).read_text()):
        found = re.fullmatch(rf"(\w+) (\w+), {args.shape}, (.*), (\d) threads", row["work"])
        if found is None:
            continue
        work, mode, form, threads = found.groups()
        at = rates.setdefault((work, f"{form}\n{threads} thread{'s' * (threads != '1')}"), {})
        each = TOKENS[work] * rows * columns / 1e3
        at[f"signbit {mode}"], at[row["peer"]] = each / row["ours"], each / row["theirs"]
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), dpi=150, layout="constrained")
    for axis, work in zip(axes, TOKENS, strict=True):
        forms = [form for kind, form in rates if kind == work]
        for i, (name, color) in enumerate(BARS.items()):
            places = [place + (i - 2) * 0.17 for place in range(len(forms))]
            bars = axis.bar(places, [rates[work, form][name] for form in forms], 0.16, color=color, label=name)
            axis.bar_label(bars, fmt="%.0f", fontsize=6.5)
        axis.set_xticks(range(len(forms)), forms, fontsize=8)
        axis.set_title(f"{work}, {TOKENS[work]} token{'s' * (TOKENS[work] > 1)}", fontsize=10)
        axis.set_ylabel("10⁹ weights × tokens a second", fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(fontsize=8)
    figure.suptitle(f"One {args.shape} matrix, more is better", fontsize=11)
    figure.savefig(args.out)


if __name__ == "__main__":
    main()
