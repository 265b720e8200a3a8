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
    "bireal": {"norm": "layer"},
    "bireal signs": {"act_bits": 1},
    "bitnet": {},
    "bitnet groups": {"groups": 4, "norm": "layer"},
    "bitnet ternary": {"weights": "ternary", "act_bits": 0},
    "bnn": {},
    "bnn bare": {"norm": "none", "ste": "identity"},
    "fbi": {},
    "fbi row": {"pattern": "row"},
    "fbi single": {"pattern": "single"},
    "fda": {},
    "irnet": {},
    "irnet published": {"scale": "standardised", "norm": "layer"},
    "onebit": {"norm": "layer"},
    "onebit rank": {"rank": 3, "latent": "signs"},
    "onebit rows": {"vectors": "rows"},
    "onebit columns": {"vectors": "columns"},
    "pbllm": {"gptq": False, "saliency": "magnitude", "scale": "learned"},
    "recu": {"norm": "layer"},
    "xnor": {},
    "xnor centred": {"center": True},
}
#: Methods whose scales are computed of their latents.
COMPUTED = ("absmean", "bireal", "bitnet", "irnet", "recu", "xnor")


def trained(case):
    """A layer after some training: nothing in it is as it was started."""
    method = METHODS[case.split()[0]]
    options = method.options(**CASES[case])
    layer = method.layer.start(torch.randn(24, 64) * 0.02 + 0.002, torch.randn(24), options)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(1 + 0.2 * torch.randn_like(parameter))
    layer.set_progress(1.0)
    return method, options, layer.eval()


@pytest.mark.parametrize("case", CASES)
def test_a_layer_goes_on_from_its_packed_form(case):
    method, options, layer = trained(case)
    again = method.layer.from_packed(layer.pack(), None, options).eval()
    assert torch.equal(again.binary().signs, layer.binary().signs)
    x = torch.randn(5, 64)
    assert (again(x) - layer(x)).abs().max() <= 1e-5 * layer(x).abs().max()
    assert again.weight.abs().max() < 100 * again.weight.abs().mean(), "latents of one size: no sign is out of reach"


@pytest.mark.parametrize("case", [case for case in CASES if case.split()[0] not in COMPUTED])
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
    elif case.startswith(("bnn", "fbi", "fda")):
        assert torch.equal(size, source.abs())


@pytest.mark.parametrize("case", [case for case in CASES if case.split()[0] in COMPUTED])
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


def plain(scale, signs=None):
    signs = torch.randn(6, 32) if signs is None else signs
    return PackedLinear(BinaryWeight.from_signs(signs, torch.tensor(scale).expand(1, 6, 1)))


@pytest.mark.parametrize("name", ["bnn", "fda"])
def test_without_a_scale_latents_are_far_from_the_clip(name):
    method = METHODS[name]
    options = method.options(norm="none")
    layer = method.layer.from_packed(plain(1.0), None, options)
    assert torch.equal(layer.weight.abs(), torch.full((6, 32), 0.02))
    with pytest.raises(OptionError, match=r"6 of the packed layer's 6 rows .*signbit finetune RUN"):
        method.layer.from_packed(plain(0.5), None, options)


@pytest.mark.parametrize("case", ["xnor centred", "irnet", "recu"])
def test_a_row_whose_signs_are_alike_has_no_latents_around_their_mean(case):
    method = METHODS[case.split()[0]]
    options = method.options(**CASES[case] | {"norm": "none"})
    signs = torch.randn(6, 32)
    signs[1], signs[4] = 1.0, -1.0
    with pytest.raises(OptionError, match="rows have a scale that this method computes"):
        method.layer.from_packed(plain(0.5, signs), None, options)
    signs[2:] = 1.0
    scale = torch.tensor([0.5, 0, 0, 0, 0, 0])[None, :, None]
    packed = PackedLinear(BinaryWeight.from_signs(signs[[0, 1, 2, 3, 3, 5]], scale))
    layer = method.layer.from_packed(packed, None, options)
    assert torch.allclose(layer.effective_weight(), packed.to_dense()), "a constant row is 0, and others do not feel it"


def test_a_scale_that_only_the_shape_of_the_latents_tells_is_refused():
    """ReCU's as published, mean |C| of standardised latents; IR-Net's where it is not 1."""
    for name, scale in (("recu", 0.6), ("irnet", 0.5)):
        method = METHODS[name]
        with pytest.raises(
            OptionError, match=r"go on from the run itself .*or start from the model that was quantized"
        ):
            method.layer.from_packed(plain(scale), None, method.options(scale="standardised"))
