"""Pictures of a quantization: each layer's error and true bits over the depth of the model."""

from __future__ import annotations

from pathlib import Path

from signbit.errors import OptionError
from signbit.models import Decision, Report


def check_plot(path: str | Path) -> None:
    """Raises OptionError, before any work is done, if no picture can be written to `path`."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise OptionError("--plot needs the package matplotlib (pip install 'signbit[plot]')") from None
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
        if places and decision.error is not None:
            # The experts of a mixture are one curve.
            rest = [part for part in parts[places[0] + 1 :] if not part.isdigit()]
            curves.setdefault(".".join(rest), []).append((int(parts[places[0]]), decision))
    return curves


def plot_layers(report: Report, path: str | Path, title: str) -> None:
    """Draws, over the blocks, the share of each layer's output energy that is error, and its true bits per weight.

    Source: PB-LLM's error curve (arXiv 2310.00034, gptq_pb --plot), here relative, so that layers compare. Raises
    OptionError if there is nothing to draw or the picture cannot be written.
    """
    curves = _curves(report)
    if not curves:
        raise OptionError("there is no layer with a known error to draw")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6.5), layout="constrained")
    FigureCanvasAgg(figure)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    for number, (kind, layers) in enumerate(sorted(curves.items())):
        style = {"color": f"C{number % 10}", "marker": "os^vDP*X<>"[number % 10], "markersize": 4, "linewidth": 1.2}
        top.plot([block for block, _ in layers], [100 * (d.error or 0) for _, d in layers], label=kind, **style)
        packed = [(block, d.bits_per_weight) for block, d in layers if d.weights]
        bottom.plot([block for block, _ in packed], [bits for _, bits in packed], **style)
    if any(d.error for layers in curves.values() for _, d in layers):
        top.set_yscale("log")
    top.set_ylabel("error, % of the output's energy")
    top.legend(fontsize=8, ncols=2)
    top.set_title(title, loc="left")
    bottom.set_ylabel("true bits per weight")
    bottom.set_xlabel("block")
    bottom.xaxis.get_major_locator().set_params(integer=True)
    for axes in (top, bottom):
        axes.grid(alpha=0.3)
    try:
        figure.savefig(path, dpi=120)
    except OSError as error:
        raise OptionError(f"--plot {path} cannot be written ({error.strerror})") from error
