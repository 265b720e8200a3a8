"""Layers that go on from a packed one: the same matrix, and latents to learn with."""

import pytest
import torch

from signbit.errors import OptionError
from signbit.linear import PackedLinear
from signbit.methods import METHODS
from signbit.weight import BinaryWeight

CASES = {
    "absmean": {},
    "absmean group": {"group": 16},
    "bitnet": {},
    "bitnet groups": {"groups": 4, "norm": "layer"},
    "bitnet ternary": {"weights": "ternary", "act_bits": 0},
    "fbi": {},
    "fbi row": {"pattern": "row"},
    "fbi single": {"pattern": "single"},
    "onebit": {"norm": "layer"},
    "onebit rank": {"rank": 3, "latent": "signs"},
    "onebit rows": {"vectors": "rows"},
    "onebit columns": {"vectors": "columns"},
    "pbllm": {"gptq": False, "saliency": "magnitude", "scale": "learned"},
}


def trained(case):
    """A layer after some training: nothing in it is as it was started."""
    method = METHODS[case.split()[0]]
    options = method.options(**CASES[case])
    layer = method.layer.start(torch.randn(24, 64) * 0.02 + 0.002, torch.randn(24), options)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(1 + 0.2 * torch.randn_like(parameter))
    return method, options, layer.eval()


@pytest.mark.parametrize("case", CASES)
def test_a_layer_goes_on_from_its_packed_form(case):
    method, options, layer = trained(case)
    again = method.layer.from_packed(layer.pack(), None, options).eval()
    assert torch.equal(again.binary().signs, layer.binary().signs)
    x = torch.randn(5, 64)
    assert (again(x) - layer(x)).abs().max() <= 1e-5 * layer(x).abs().max()
    assert again.weight.abs().max() < 100 * again.weight.abs().mean(), "latents of one size: no sign is out of reach"


@pytest.mark.parametrize("case", [case for case in CASES if case.split()[0] not in ("absmean", "bitnet")])
def test_latents_take_the_magnitudes_of_a_source(case):
    method, options, layer = trained(case)
    source = torch.randn(24, 64)
    again = method.layer.from_packed(layer.pack(), source, options).eval()
    assert torch.equal(again.binary().signs, layer.binary().signs)
    x = torch.randn(5, 64)
    assert (again(x) - layer(x)).abs().max() <= 1e-5 * layer(x).abs().max()
    size = again.weight.detach().abs()
    if case.startswith("onebit"):
        want = torch.ones_like(source) if "latent" in CASES[case] else source.abs()
        assert torch.allclose(size / size.mean(), want / want.mean(), rtol=1e-4)
    elif case.startswith("fbi"):
        assert torch.equal(size, source.abs())


@pytest.mark.parametrize("case", ["absmean", "bitnet"])
def test_a_computed_scale_takes_no_source(case):
    method, options, layer = trained(case)
    with pytest.raises(OptionError, match="leave out --source"):
        method.layer.from_packed(layer.pack(), torch.randn(24, 64), options)


@pytest.mark.parametrize("case", CASES)
def test_a_packed_layer_of_another_form_is_refused(case):
    method, options, _ = trained(case)
    planes = BinaryWeight.from_signs(torch.randn(4, 24, 64), torch.rand(4, 24, 1))
    for packed in (PackedLinear(planes), PackedLinear(planes, norm_in="layer", act_bits=1)):
        with pytest.raises(OptionError):
            method.layer.from_packed(packed, None, options)


def test_fixed_random_signs_do_not_go_on():
    method = METHODS["bitnet-transformers"]
    with pytest.raises(OptionError, match="go on from the run itself"):
        method.layer.from_packed(method.layer.start(torch.randn(8, 16), None, method.options()).pack(), None, None)
