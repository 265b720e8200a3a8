"""BitNet's layers beside the papers' formulas, written out, and beside their packed forms, integer for integer."""

import pytest
import torch
from tests import families

from signbit.bits import unpack_signs
from signbit.errors import OptionError
from signbit.methods import (
    METHODS,
    BitnetLinear,
    BitnetOptions,
    BitnetTransformersLinear,
    BitnetTransformersOptions,
)
from signbit.ops import cpu
from signbit.ptq import Plan
from signbit.train import Trained, pack_training_, start_training_

FORMS = [
    {},
    {"norm": "layer", "ste": "sign"},
    {"norm": "layer", "ste": "sign", "groups": 4},
    {"weights": "ternary"},
    {"norm": "none"},
    {"norm_eps": 0.5},
    {"act_bits": 0},
]


@pytest.fixture
def by_the_reference(monkeypatch):
    monkeypatch.setattr(cpu, "selected", lambda: (None, "a test asks for plain torch"))


def weight(n=24, k=40):
    return torch.randn(n, k) * 0.02 + 0.004


def expected(x, w, options):
    """The layer as the papers write it, in float64 and row by row."""
    x, w = x.double(), w.double()
    if options.norm == "layer":
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + options.norm_eps).sqrt()
    elif options.norm == "rms":
        x = x / (x.square().mean(-1, keepdim=True) + options.norm_eps).sqrt()
    rows = w.shape[0] // options.groups
    dense = torch.empty_like(w)
    for group in range(options.groups):
        part = w[group * rows : (group + 1) * rows]
        alpha, beta = part.mean(), part.abs().mean()
        if options.weights == "ternary":
            dense[group * rows : (group + 1) * rows] = beta * (part / beta).round().clamp(-1, 1)
        else:
            dense[group * rows : (group + 1) * rows] = beta * torch.where(part - alpha >= 0, 1.0, -1.0)
    y = torch.empty(*x.shape[:-1], w.shape[0], dtype=torch.float64)
    for token in range(x.shape[0]):
        u = x[token]
        gamma = u.abs().max()
        q = (u * 127 / gamma).round() if options.act_bits else u * 127 / gamma
        y[token] = (dense @ q) * gamma / 127
    return y


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_the_forward_pass_is_the_papers(form):
    options = BitnetOptions(**form)
    w, bias, x = weight(), torch.randn(24), torch.randn(6, 40) * 3 + 1
    got = BitnetLinear.start(w, bias, options)(x)
    want = expected(x, w, options) + bias
    assert (got - want).abs().max() <= 2e-6 * want.abs().max()


def test_sign_of_zero_is_plus_one_and_the_centre_is_the_mean():
    w = torch.tensor([[1.0, 2.0, 3.0, 2.0]])
    dense = BitnetLinear.start(w, None, BitnetOptions()).effective_weight()
    assert dense.tolist() == [[-2.0, 2.0, 2.0, 2.0]], "α = 2, β = 2 of the uncentred W"


def test_ternary_weights_are_b158s_and_two_planes():
    w = torch.tensor([[0.5, -0.2, 0.05, -1.25], [0.0, 2.0, -0.249, 0.251]])
    beta = w.abs().mean()
    layer = BitnetLinear.start(w, None, BitnetOptions(weights="ternary"))
    assert torch.equal(layer.effective_weight() / beta, (w / beta).round().clamp(-1, 1))
    binary = layer.binary()
    assert binary.planes == 2 and torch.equal(binary.to_dense(), layer.effective_weight())
    assert (binary.to_dense() == 0).any()


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_it_packs_to_itself_integer_for_integer(form, by_the_reference):
    """Bit for bit by the reference; of ternary weights two products are added, which round apart."""
    layer = BitnetLinear.start(weight(), torch.randn(24), BitnetOptions(**form))
    layer.weight.data[0, 0] = layer.weight.mean()
    assert torch.equal(layer.binary().to_dense(), layer.effective_weight())
    x = torch.randn(64, 40) * torch.logspace(-9, 3, 64)[:, None]  # the smallest are below what a token's scale may be
    x[5] = 0.0
    got, want = layer.pack()(x), layer(x)
    if form.get("weights") == "ternary":
        assert (got - want).abs().max(-1).values.le(2e-6 * want.abs().max(-1).values).all()
    else:
        assert torch.equal(got, want)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_it_packs_to_itself_on_the_kernels(form):
    """A norm that is summed in another order may move an activation by one of 127 steps, here and there."""
    layer = BitnetLinear.start(weight(), torch.randn(24), BitnetOptions(**form))
    x = torch.randn(64, 40)
    apart = (layer.pack()(x) - layer(x)).abs()
    one_step = float(layer.effective_weight().detach().abs().max()) * 4 / 127
    assert (apart > 1e-5).float().mean() < 0.02 and apart.max() <= 1.01 * one_step


def test_bfloat16_multiplies_the_integers_exactly():
    """Under autocast too: signs and 127ths are whole in bfloat16, sums in float32; the sum alone is rounded."""
    layer = BitnetLinear.start(weight(16, 512), None, BitnetOptions(norm="none"))
    x = torch.randn(8, 512)
    with torch.autocast("cpu", torch.bfloat16):
        got = layer(x)
    want = layer(x)
    assert (got - want).abs().max() <= 2**-8 * want.abs().max()


def gradients(options, shifted=False):
    layer = BitnetLinear.start(weight(6, 8), None, options).double()
    x = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    out = torch.randn(5, 6, dtype=torch.float64)
    (layer(x) * out).sum().backward()
    return layer, x, out


def int8(u):
    gamma = u.abs().amax(-1, keepdim=True)
    return (127 * u / gamma).round() * gamma / 127


@pytest.mark.parametrize("groups", [1, 3])
def test_gradients_are_the_papers(groups):
    """Sign and clip are passed through; α and β have the gradients of their formulas."""
    options = BitnetOptions(norm="layer", ste="sign", groups=groups)
    layer, x, out = gradients(options)
    u = torch.nn.functional.layer_norm(x.detach(), (8,), eps=1e-5).requires_grad_()
    g = out.T @ int8(u.detach())
    w = layer.weight.detach().reshape(groups, -1)
    g_of = g.reshape(groups, -1)
    alpha, beta = w.mean(1, keepdim=True), w.abs().mean(1, keepdim=True)
    signs = torch.where(w - alpha >= 0, 1.0, -1.0)
    want = beta * (g_of - g_of.mean(1, keepdim=True)) + w.sign() * (g_of * signs).mean(1, keepdim=True)
    assert torch.allclose(layer.weight.grad, want.view(6, 8), rtol=1e-5, atol=1e-8)
    dense = (signs * beta).view(6, 8)
    again = x.detach().requires_grad_()
    (torch.nn.functional.layer_norm(again, (8,), eps=1e-5) @ dense.T * out).sum().backward()
    assert torch.allclose(x.grad, again.grad, rtol=1e-5, atol=1e-8), "rounding is passed through"


@pytest.mark.parametrize("weights", ["binary", "ternary"])
def test_gradients_are_the_authors(weights):
    """x + (q(x) − x).detach() around activations and weights: dW is the gradient for the quantized weight."""
    layer, x, out = gradients(BitnetOptions(weights=weights))
    again, w = x.detach().requires_grad_(), layer.weight.detach().clone().requires_grad_()
    u = again * torch.rsqrt(again.square().mean(-1, keepdim=True) + 1e-5)
    u = u + (int8(u.detach()) - u).detach()
    quantized = w + (layer.effective_weight() - w).detach()
    ((u @ quantized.T) * out).sum().backward()
    assert torch.allclose(layer.weight.grad, w.grad, rtol=1e-5, atol=1e-8)
    assert torch.allclose(x.grad, again.grad, rtol=1e-5, atol=1e-8)


def test_shifted_activations_are_the_papers_and_cannot_be_packed():
    options = BitnetOptions(shifted=True, norm="none")
    w, x = weight(), torch.randn(6, 40)
    layer = BitnetLinear.start(w, None, options)
    gamma, eta = x.abs().amax(-1, keepdim=True), x.amin(-1, keepdim=True)
    q = ((x - eta) * 127 / gamma).round().clamp(0, 127)
    want = (q @ layer.effective_weight().T) * gamma / 127
    assert torch.allclose(layer(x), want, rtol=1e-5, atol=1e-6)
    with pytest.raises(OptionError, match=r"shifted activations cannot be packed: .* Train without shifted"):
        layer.pack()


def test_a_matrix_of_zeros_has_numbers():
    for options in (BitnetOptions(), BitnetOptions(weights="ternary"), BitnetOptions(norm="layer", ste="sign")):
        layer = BitnetLinear.start(torch.zeros(6, 8), None, options)
        layer(torch.randn(5, 8)).sum().backward()
        assert (layer.effective_weight() == 0).all() and torch.isfinite(layer.weight.grad).all(), options


def test_groups_are_of_output_rows():
    w = weight()
    whole = BitnetLinear.start(w, None, BitnetOptions(groups=4))
    for group in range(4):
        rows = slice(6 * group, 6 * group + 6)
        alone = BitnetLinear.start(w[rows], None, BitnetOptions())
        assert torch.equal(whole.effective_weight()[rows], alone.effective_weight()), (
            "a device needs its own rows alone"
        )


def test_a_whole_model_packs_to_its_logits_bit_for_bit(by_the_reference):
    model = families.llama()
    options = BitnetOptions(norm="layer", ste="sign")
    report = start_training_(model, METHODS["bitnet"], Plan(options), Trained())
    ids = torch.randint(3, 60, (2, 12))
    want = model.eval()(ids).logits
    pack_training_(model, report)
    assert torch.equal(model(ids).logits, want)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"groups": 0}, "at least 1 is needed"),
        ({"norm_eps": -1.0}, "norm_eps is -1.0; a small number is needed"),
        ({"norm_eps": float("nan")}, "norm_eps is nan"),
        ({"act_bits": 4}, "allowed: 8, 0"),
        ({"shifted": True, "act_bits": 0}, "shifted activations are 8-bit ones"),
        ({"ste": "sign", "weights": "ternary"}, "ste sign belongs to binary weights"),
    ],
)
def test_wrong_options_are_refused(values, message):
    with pytest.raises(OptionError, match=message):
        BitnetOptions(**values)


def test_groups_that_do_not_divide_the_rows_are_refused():
    for start in (BitnetLinear.start, lambda w, bias, options: options.binarize(w)):
        with pytest.raises(OptionError, match="5 groups do not divide 24 rows"):
            start(weight(), None, BitnetOptions(groups=5))


# BitNet-Transformers, as published.


@pytest.mark.parametrize("side", [1, -1])
@pytest.mark.parametrize("signs", ["fixed", "trained"])
def test_the_published_layer_is_reproduced(signs, side):
    w, x = side * weight(), torch.randn(3, 5, 40)
    layer = BitnetTransformersLinear.start(w, None, BitnetTransformersOptions(signs))
    if signs == "fixed":
        q = torch.where(w >= 0, 1.0, -1.0)
        read = q * q.mean()  # its property `weight`
        hat = torch.where(read - read.mean() >= 0, 1.0, -1.0)
    else:
        hat = torch.where(w - w.mean() >= 0, 1.0, -1.0)
    z = x @ hat.T
    gamma = z.abs().max()
    want = (z * 128 / (gamma + 1e-5)).clamp(-128 + 1e-5, 128 - 1e-5)
    assert torch.allclose(layer(x), want, atol=1e-3)
    assert float(layer(x).detach().abs().max()) == pytest.approx(128, abs=1e-3)
    packed = layer.pack()
    assert packed.norm_out == "batch_absmax" and (packed(x) - layer(x)).abs().max() < 1e-3
    assert torch.equal(unpack_signs(packed.weights[0].signs[0], 40), hat)
    assert not torch.allclose(layer(x[:1])[0], layer(x)[0]), "a sequence's result depends on those beside it"


def test_its_signs_learn_only_if_told_to():
    fixed = BitnetTransformersLinear.start(weight(), None, BitnetTransformersOptions())
    assert not any(parameter.requires_grad for parameter in fixed.parameters())
    layer = BitnetTransformersLinear.start(weight(6, 8), None, BitnetTransformersOptions("trained")).double()
    hat = layer.effective_weight()
    hat.retain_grad()
    x, out = torch.randn(5, 8, dtype=torch.float64), torch.randn(5, 6, dtype=torch.float64)
    layer.effective_weight = lambda: hat
    (layer(x) * out).sum().backward()
    assert torch.allclose(layer.weight.grad, hat.grad - hat.grad.mean()), "G less its mean"


def test_a_bias_of_it_cannot_be_packed():
    layer = BitnetTransformersLinear.start(weight(), torch.randn(24), BitnetTransformersOptions())
    with pytest.raises(OptionError, match="a layer with a bias cannot be packed"):
        layer.pack()
