"""Pictures: each layer's error and true bits over the depth of a model, and models' quality over their bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from signbit.errors import OptionError
from signbit.extras import install
from signbit.models import Decision, Report


def check_plot(path: str | Path) -> None:
    """Raises OptionError, before any work is done, if no picture can be written to `path`."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise OptionError(f"--plot needs the package matplotlib ({install('plot')})") from None
    if Path(path).suffix not in (".png", ".svg", ".pdf"):
        raise OptionError(f"--plot {path}: the name ends in .png, .svg or .pdf")
    if not Path(path).absolute().parent.is_dir():
        raise OptionError(f"--plot {path}: there is no directory {Path(path).absolute().parent}")


def _curves(report: Report) -> dict[str, list[tuple[int, Decision]]]:
    """Kind of layer (what follows the block's number) → its layers with their block's number."""
    curves: dict[str, list[tuple[int, Decision]]] = {}
    for decision in report.decisions:
        parts = decision.name.split(".")
        places = [i for i, part in enumerate(parts) if part.isdigit()]
        if places and (decision.error is not None or decision.weights):
            # The experts of a mixture are one curve.
            rest = [part for part in parts[places[0] + 1 :] if not part.isdigit()]
            curves.setdefault(".".join(rest), []).append((int(parts[places[0]]), decision))
    return curves


def plot_layers(report: Report, path: str | Path, title: str, of: str = "the output's energy") -> None:
    """Draws, over the blocks, the share of `of` that is error, and the true bits per weight, of each layer.

    Source: PB-LLM's error curve (arXiv 2310.00034, gptq_pb --plot), here relative, so that layers compare. Raises
    OptionError if there is nothing to draw or the picture cannot be written.
    """
    curves = _curves(report)
    if not curves:
        raise OptionError("there is no layer with a known error or size to draw")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    known = [d.error for layers in curves.values() for _, d in layers if d.error is not None]
    figure = Figure(figsize=(7, 6.4 if known else 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    if known:
        top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    else:
        top = bottom = figure.subplots()
    for number, (kind, layers) in enumerate(sorted(curves.items())):
        style = {"color": f"C{number % 10}", "marker": "os^vDP*X<>"[number % 10], "markersize": 4, "linewidth": 1.2}
        if known:
            measured = [(block, 100 * d.error) for block, d in layers if d.error is not None]
            top.plot([block for block, _ in measured], [error for _, error in measured], label=kind, **style)
        packed = [(block, d.bits_per_weight) for block, d in layers if d.weights]
        label = {} if known else {"label": kind}
        bottom.plot([block for block, _ in packed], [bits for _, bits in packed], **style, **label)
    if known:
        top.set_ylabel(f"error, % of {of}")
    if any(known):
        top.set_yscale("log")
    top.legend(fontsize=8, ncols=2)
    top.set_title(title, loc="left")
    bottom.set_ylabel("true bits per weight")
    bottom.set_xlabel("block")
    bottom.xaxis.get_major_locator().set_params(integer=True)
    for axes in {top, bottom}:
        axes.grid(alpha=0.3)
    try:
        figure.savefig(path, dpi=120)
    except OSError as error:
        raise OptionError(f"--plot {path} cannot be written ({error.strerror})") from error


#: More points than these are numbered in the picture and named below it: names would lie on each other.
_NAMED = 4
#: Pixels within which two points share a label.
_NEAR = 14


@dataclass(frozen=True)
class Quality:
    """A measure of models beside their bytes: (name, bytes, value) each."""

    axis: str
    points: tuple[tuple[str, float, float], ...]
    better: int
    """1 if more is better, −1 if less is."""
    logarithmic: bool = False


def pareto(points: Sequence[tuple[str, float, float]], better: int) -> list[int]:
    """The places of points that no other beats: none has as few bytes and is as good, and better in one of both."""
    return [
        place
        for place, (_, size, value) in enumerate(points)
        if not any(
            s <= size and better * v >= better * value and (s < size or better * v > better * value)
            for _, s, v in points
        )
    ]


def _label(axes: Any, panel: Quality, named: bool) -> None:
    """Names or numbers beside the points; points that lie on each other share one label."""
    points = [(size / 1e6, value) for _, size, value in panel.points]
    pixels = axes.transData.transform(points)
    front, largest = pareto(panel.points, panel.better), max(x for x, _ in points)
    groups: list[list[int]] = []
    for place, here in enumerate(pixels):
        near = (g for g in groups if not named and abs(pixels[g[0]] - here).max() < _NEAR)
        if (group := next(near, None)) is None:
            groups.append([place])
        else:
            group.append(place)
    for group in groups:
        first = points[group[0]]
        right = first[0] == largest
        above = right or panel.better < 0  # off the line
        axes.annotate(
            ", ".join(panel.points[place][0] if named else str(place + 1) for place in group), first,
            xytext=(-7 if right else 7, 8 if above else -13), textcoords="offset points", fontsize=9,
            weight="bold" if set(group) & set(front) else "normal", horizontalalignment="right" if right else "left",
        )  # fmt: skip


def plot_quality(panels: Sequence[Quality], path: str | Path) -> None:
    """Draws each measure over the bytes of the weight files; the models on the Pareto front are filled and joined.

    Raises OptionError if the picture cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.7 * len(panels)), layout="constrained")  # readable on a phone too
    FigureCanvasAgg(figure)
    for axes, panel in zip(figure.subplots(len(panels), 1, squeeze=False)[:, 0], panels, strict=True):
        front = pareto(panel.points, panel.better)
        line = sorted((panel.points[place][1] / 1e6, panel.points[place][2]) for place in front)
        axes.plot(*zip(*line, strict=True), color="C0", linewidth=1, linestyle="--", label="Pareto front", zorder=1)
        named = len(panel.points) <= _NAMED
        for place, (name, size, value) in enumerate(panel.points):
            color = "C0" if place in front else "white"
            axes.scatter(size / 1e6, value, s=55, color=color, edgecolors="C0", zorder=2)
            if not named:
                axes.plot([], [], linestyle="", label=f"{place + 1}  {name}")
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("{x:g}")
        axes.tick_params(axis="x", which="minor", labelsize=8)
        if panel.logarithmic:
            axes.set_yscale("log")
        axes.margins(x=0.15, y=0.18)
        axes.set_xlabel("weight files, MB")
        axes.set_ylabel(panel.axis)
        if named:
            axes.legend(fontsize=8)
        else:
            axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(0, -0.17), ncols=2, frameon=False, handlelength=1)
        axes.grid(alpha=0.3)
    figure.draw_without_rendering()  # where points lie on the picture, some on others
    for axes, panel in zip(figure.axes, panels, strict=True):
        _label(axes, panel, len(panel.points) <= _NAMED)
    try:
        figure.savefig(path, dpi=120)
    except OSError as error:
        raise OptionError(f"{path} cannot be written ({error.strerror})") from error
