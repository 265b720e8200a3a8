import pytest

from signbit.errors import OptionError
from signbit.evaluate.plot import _curves, check_plot, plot_layers
from signbit.models import Decision, Report

pytest.importorskip("matplotlib", reason="the extra plot")


def report(error=0.01):
    layers = [
        Decision(f"model.layers.{block}.{kind}", "binarized", "", 64, 20, 64, error=error)
        for block in range(3)
        for kind in ("mlp.up_proj", "mlp.experts.down_proj.0", "mlp.experts.down_proj.1")
    ]
    return Report((*layers, Decision("lm_head", "kept", "outside", 64)), 600)


def test_a_curve_for_each_kind_with_experts_as_one():
    curves = _curves(report())
    assert {kind: len(layers) for kind, layers in curves.items()} == {"mlp.up_proj": 3, "mlp.experts.down_proj": 6}


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_a_picture_is_written(ending, tmp_path):
    path = tmp_path / f"layers.{ending}"
    check_plot(path)
    plot_layers(report(), path, "title")
    assert path.stat().st_size > 5000


def test_what_cannot_be_drawn(tmp_path):
    with pytest.raises(OptionError, match=r"ends in \.png, \.svg or \.pdf"):
        check_plot(tmp_path / "x.jpeg")
    with pytest.raises(OptionError, match="there is no directory"):
        check_plot(tmp_path / "none" / "x.png")
    with pytest.raises(OptionError, match="no layer with a known error or size"):
        plot_layers(Report((Decision("lm_head", "kept", "outside", 64),), 600), tmp_path / "x.png", "")
