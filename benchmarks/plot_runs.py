"""Training runs beside each other: loss on held-out text and signs that change, over tokens.

    python -m benchmarks.plot_runs dense=runs/dense FBI=runs/fbi -o docs/scratch.png     # run directories, or metrics.jsonl

The loss is the cross-entropy of the next token, whatever a run was taught by.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

from signbit.train.checkpoints import read_metrics


def lines(path: str) -> list[dict[str, Any]]:
    return read_metrics(Path(path) / "metrics.jsonl" if Path(path).is_dir() else path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", metavar="NAME=RUN")
    parser.add_argument("-o", "--out", required=True)
    parser.add_argument("--title", default="")
    args = parser.parse_args()
    if wrong := [run for run in args.runs if "=" not in run]:
        parser.error(f"{wrong[0]!r} has no name; give NAME=RUN (dense=runs/dense)")
    runs = {name: lines(path) for name, _, path in (run.partition("=") for run in args.runs)}
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained", width_ratios=(3, 2))
    for number, (name, rows) in enumerate(runs.items()):
        made = [row for row in rows if "loss" in row]
        tokens = {row["step"]: row["tokens"] / 1e6 for row in made}
        held = [(tokens[r["step"]], r["validation_cross_entropy"]) for r in rows if "validation_cross_entropy" in r]
        if not held:
            parser.error(
                f"{name} has no loss on held-out text; train with --validation-blocks, by this version or a later one"
            )
        left.plot(*zip(*held, strict=True), "o-", markersize=3, color=f"C{number}", label=f"{name}: {held[-1][1]:.3f}")
        flips = [(row["tokens"] / 1e6, 100 * row["flips"]) for row in made if "flips" in row]
        if flips:
            right.plot(*zip(*flips, strict=True), color=f"C{number}", linewidth=1.2, label=name)
    left.set_ylabel("cross-entropy of held-out text, nats a token")
    left.legend(title="at the end")
    right.set_ylabel("signs that changed, % a step")
    right.set_yscale("log")
    for axes in (left, right):
        axes.set_xlabel("tokens, millions")
        axes.grid(alpha=0.3)
    left.set_title(args.title, loc="left")
    figure.savefig(args.out, dpi=120)


if __name__ == "__main__":
    main()
