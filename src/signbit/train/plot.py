"""Pictures of a run: its loss, and how many signs change."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from signbit.errors import OptionError


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def plot_run(metrics: str | Path, folder: str | Path) -> list[Path]:
    """Draws loss.png and flips.png into `folder` from a run's metrics.jsonl; returns those that were drawn.

    Loss: the whole and its parts over tokens, and the loss on held-out blocks. Flips: the share of all signs that changed
    a step, and of the layers the one with most and the one with fewest; a dense run has none. Without matplotlib nothing
    is drawn.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return []
    rows = read_metrics(metrics)
    lines = [row for row in rows if "loss" in row]
    held = [row for row in rows if "validation_loss" in row]
    if not lines:
        raise OptionError(f"{metrics} has no line to draw")
    tokens = {row["step"]: row["tokens"] / 1e6 for row in lines}
    drawn = []

    def figure(name: str, ylabel: str) -> tuple[Any, Any]:
        canvas = Figure(figsize=(8, 4.5), layout="constrained")
        FigureCanvasAgg(canvas)
        axes = canvas.subplots()
        axes.set_xlabel("tokens, millions")
        axes.set_ylabel(ylabel)
        axes.grid(alpha=0.3)
        drawn.append(Path(folder) / name)
        return canvas, axes

    canvas, axes = figure("loss.png", "loss")
    x = [tokens[row["step"]] for row in lines]
    for number, key in enumerate(("loss", "kl", "hidden", "attention", "cross_entropy")):
        values = [row.get(key) for row in lines]
        if all(value is not None for value in values) and any(values):
            axes.plot(x, values, label=key.replace("_", "-"), color=f"C{number}", linewidth=1.2)
    if held:
        points = [(tokens[row["step"]], row["validation_loss"]) for row in held if row["step"] in tokens]
        axes.plot(*zip(*points, strict=True), "ko", markersize=4, label="held out")
    axes.set_yscale("log")
    axes.legend()
    canvas.savefig(drawn[-1], dpi=120)
    if "flips" not in lines[0]:
        return drawn
    canvas, axes = figure("flips.png", "signs that changed, % a step")
    steps = [b["step"] - a["step"] for a, b in zip([{"step": 0}, *lines], lines, strict=False)]
    share = [100 * row["flips"] / step for row, step in zip(lines, steps, strict=True)]
    low = [100 * min(row["flips_by_layer"].values()) / step for row, step in zip(lines, steps, strict=True)]
    high = [100 * max(row["flips_by_layer"].values()) / step for row, step in zip(lines, steps, strict=True)]
    axes.fill_between(x, low, high, alpha=0.2, label="layers")
    axes.plot(x, share, label="all")
    axes.legend()
    canvas.savefig(drawn[-1], dpi=120)
    return drawn
