"""SVID beside the singular value decomposition, the layer beside the paper's formulas and golden numbers."""

import pytest
import torch
import torch.nn.functional as F

from signbit.errors import OptionError
from signbit.methods import OnebitLinear, OnebitOptions


def weight(n=24, k=40):
    return torch.randn(n, k) * torch.rand(n, 1) * torch.rand(k)


@pytest.mark.parametrize(
    "options",
    [{}, {"solver": "nmf"}, {"solver": "nmf", "balance": "found"}, {"balance": "rows"}, {"balance": "columns"}],
)
def test_the_vectors_are_the_leading_pair_of_the_magnitudes(options):
    a = weight()
    h, g = OnebitOptions(**options).svid(a)
    u, s, v = torch.linalg.svd(a.abs())
    assert torch.allclose(h.T @ g, s[0] * u[:, :1] @ v[:1], atol=1e-4 * s[0])
    assert h.min() > 0 and g.min() > 0
    if options.get("balance") == "rows":
        assert float(g.mean()) == pytest.approx(1.0)
    if options.get("balance") == "columns":
        assert float(h.mean()) == pytest.approx(1.0)
    if not options:
        assert float(h.norm()) == pytest.approx(float(g.norm()))


def test_there_are_as_many_pairs_as_asked_for():
    """Those that a small matrix has not are 0."""
    a = weight(3, 5)
    h, g = OnebitOptions(rank=4).svid(a)
    assert h.shape == (4, 3) and g.shape == (4, 5) and not h[3].any() and not g[3].any()
    assert torch.allclose(h.T @ g, a.abs(), atol=1e-5)


def test_the_error_is_below_that_of_the_best_rank_one_matrix():
    """Proposition 2."""
    a = weight()
    h, g = OnebitOptions().svid(a)
    u, s, v = torch.linalg.svd(a)
    assert (a - a.sign() * (h.T @ g)).norm() <= (a - s[0] * u[:, :1] @ v[:1]).norm()


def test_more_pairs_are_nearer():
    a = weight()
    errors = []
    for rank in (1, 2, 4):
        h, g = OnebitOptions(rank=rank).svid(a)
        errors.append(float((a.abs() - h.T @ g).norm()))
    assert errors[0] > errors[1] > errors[2]
    s = torch.linalg.svdvals(a.abs())
    assert errors[1] == pytest.approx(float(s[2:].norm()), rel=1e-3)


def test_one_vector_is_the_mean_of_the_magnitudes():
    a = weight()
    binary = OnebitOptions(vectors="rows", scale_dtype="float32").binarize(a)
    assert binary.in_scale is None and torch.allclose(binary.scale[0, :, 0], a.abs().mean(1))
    binary = OnebitOptions(vectors="columns", scale_dtype="float32").binarize(a)
    assert torch.equal(binary.scale, torch.ones(1, 24, 1)) and torch.allclose(binary.in_scale[0], a.abs().mean(0))


def test_a_matrix_of_zeros_has_zero_vectors():
    for solver in ("power", "nmf"):
        binary = OnebitOptions(solver=solver).binarize(torch.zeros(8, 16))
        assert torch.equal(binary.to_dense(), torch.zeros(8, 16))


@pytest.mark.parametrize("norm", ["none", "layer"])
@pytest.mark.parametrize("options", [{}, {"rank": 3}, {"vectors": "rows"}, {"vectors": "columns"}])
def test_the_layer_packs_to_itself(norm, options):
    layer = OnebitLinear.start(weight(), torch.randn(24), OnebitOptions(norm=norm, **options))
    layer.weight.data[0, 0] = 0.0  # sign(0) is +1 in both
    assert torch.equal(layer.binary().to_dense(), layer.effective_weight())
    x = torch.randn(5, 40)
    packed = layer.pack()
    assert packed.norm_out == norm and packed.weights[0].signs.shape[0] == 1
    assert (packed(x) - layer(x)).abs().max() <= 1e-5 * layer(x).abs().max()


def test_the_published_slope():
    """1.001 − tanh²: .787 at a half, .421 at 1, .011 at 3 (methods.md 7.3)."""
    layer = OnebitLinear.start(torch.tensor([[0.0, 0.5, 1.0, 3.0]]), None, OnebitOptions(ste="tanh", vectors="rows"))
    layer.weight.data = torch.tensor([[0.0, 0.5, 1.0, 3.0]])
    layer.scale.data.fill_(1.0)
    layer.effective_weight().sum().backward()
    assert torch.allclose(layer.weight.grad, torch.tensor([[1.001, 0.787, 0.421, 0.011]]), atol=1e-3)


def test_gradients_are_the_papers():
    options = OnebitOptions(norm="layer", ste="tanh")
    layer = OnebitLinear.start(weight(6, 8), None, options).double()
    x = torch.randn(3, 8, dtype=torch.float64)
    out = torch.randn(3, 6, dtype=torch.float64)
    (layer(x) * out).sum().backward()
    w, h, g = (p.detach() for p in (layer.weight, layer.scale[0], layer.in_scale[0]))
    signs = torch.where(w >= 0, 1.0, -1.0).double()
    u = x * g
    q = u @ signs.T
    z = (q * h).requires_grad_()
    (F.layer_norm(z, (6,), eps=1e-5) * out).sum().backward()
    dz = z.grad
    assert torch.allclose(layer.scale.grad[0], (dz * q).sum(0))
    assert torch.allclose(layer.weight.grad, ((dz * h).T @ u) * (1.001 - w.tanh() ** 2))
    assert torch.allclose(layer.in_scale.grad[0], (((dz * h) @ signs) * x).sum(0))


def test_a_published_layer_has_rows_of_mean_zero_and_variance_one():
    layer = OnebitLinear.start(weight(200, 40), None, OnebitOptions(norm="layer"))
    y = layer(torch.randn(4, 40))
    assert y.mean(-1).abs().max() < 1e-5 and (y.var(-1, unbiased=False) - 1).abs().max() < 1e-3


def test_latents_at_the_start():
    a = weight()
    kept = OnebitLinear.start(a, None, OnebitOptions(latent_size=0.02))
    assert float(kept.weight.detach().abs().mean()) == pytest.approx(0.02) and torch.allclose(
        kept.weight / a, kept.weight[0, 0] / a[0, 0]
    )
    signs = OnebitLinear.start(a, None, OnebitOptions(latent="signs", latent_size=0.01))
    assert torch.equal(signs.weight, 0.01 * a.sign())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rank": 0}, "at least one pair"),
        ({"rank": 2, "vectors": "rows"}, "which one vector"),
        ({"balance": "found"}, "belongs to the solver nmf"),
        ({"latent_size": 0.0}, "a positive number"),
        ({"norm": "rms"}, "allowed: none, layer"),
    ],
)
def test_wrong_options_are_refused(values, message):
    with pytest.raises(OptionError, match=message):
        OnebitOptions(**values)
