"""Pictures of a run: its loss, and how many signs change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from signbit.errors import OptionError
from signbit.train.checkpoints import read_metrics
from signbit.train.flips import FlipHistory


def plot_run(metrics: str | Path, folder: str | Path) -> list[Path]:
    """Draws loss.png and flips.png into `folder` from a run's metrics.jsonl; returns those that were drawn.

    Loss: the whole and its parts over tokens, the loss on held-out blocks, and where data was skipped. Flips: the share of
    all signs that changed a step, and of the layers the one with most and the one with fewest (`plot_flips` has more of
    them); a dense run has none. Without matplotlib nothing is drawn.
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
    for number, row in enumerate(row for row in rows if "spike" in row and row["step"] in tokens):
        axes.axvline(tokens[row["step"]], color="r", linestyle=":", label=None if number else "went back, skipped data")
    axes.set_yscale("log")
    axes.legend()
    canvas.savefig(drawn[-1], dpi=120)
    if "flips" not in lines[0]:
        return drawn
    canvas, axes = figure("flips.png", "signs that changed, % a step")
    by_layer = [[100 * share for share in row["flips_by_layer"].values()] for row in lines]
    axes.fill_between(x, list(map(min, by_layer)), list(map(max, by_layer)), alpha=0.2, label="layers")
    axes.plot(x, [100 * row["flips"] for row in lines], label="all")
    axes.legend()
    canvas.savefig(drawn[-1], dpi=120)
    return drawn


def _by_kind(history: FlipHistory) -> dict[str, list[tuple[int, str]]]:
    """Kind of layer (its name behind the block's number) → blocks and names, in the order of the blocks."""
    kinds: dict[str, list[tuple[int, str]]] = {}
    for name in history.weights:
        parts = name.split(".")
        place = next((i for i, part in enumerate(parts) if part.isdigit()), -1)
        kinds.setdefault(".".join(parts[place + 1 :]), []).append((int(parts[place]) if place >= 0 else 0, name))
    return {kind: sorted(layers) for kind, layers in kinds.items()}


def plot_flips(history: FlipHistory, path: str | Path, title: str) -> None:
    """Draws the share of signs that changed a step: over the run by kind of layer, and over the blocks on its average.

    Source: FBI-LLM's analysis (arXiv 2407.07093). Raises OptionError if the picture cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(3, 2), sharey=True)
    x = [tokens / 1e6 for tokens in history.tokens]
    for number, (kind, layers) in enumerate(_by_kind(history).items()):
        style = {"color": f"C{number % 10}", "linewidth": 1.2}
        means = history.mean(name for _, name in layers)
        left.plot(x, [100 * rate for rate in means], label=kind, **style)
        averages = [100 * history.over_the_run(history.flip_rate[name]) for _, name in layers]
        right.plot([block for block, _ in layers], averages, marker="os^vDP*X<>"[number % 10], markersize=4, **style)
    left.plot(x, [100 * rate for rate in history.ave_flip_rate], "k", linewidth=1.8, label="all, weighted by size")
    left.set_xlabel("tokens, millions")
    left.set_ylabel("signs that changed, % a step")
    left.set_title(title, loc="left")
    left.legend(fontsize=8, ncols=2)
    right.set_xlabel("block")
    right.set_title("average over the run", loc="left")
    right.xaxis.get_major_locator().set_params(integer=True)
    for axes in (left, right):
        axes.set_yscale("symlog", linthresh=1e-3)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    try:
        figure.savefig(path, dpi=120)
    except OSError as error:
        raise OptionError(f"--plot {path} cannot be written ({error.strerror})") from error
