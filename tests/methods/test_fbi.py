"""FBI-LLM's layer beside the paper's formulas, written out entry by entry."""

import pytest
import torch

from signbit.errors import OptionError
from signbit.methods import FbiLinear, FbiOptions

PATTERNS = ("column", "row", "single")


def weight(n=24, k=40):
    return torch.randn(n, k) * 0.02 + 0.003


def layer(pattern, bias=False, n=24, k=40):
    """One whose α and β are not those of the start, α of both signs."""
    made = FbiLinear.start(weight(n, k), torch.randn(n) if bias else None, FbiOptions(pattern))
    made.scale.data = torch.randn_like(made.scale)
    made.shift.data = torch.randn_like(made.shift)
    made.weight.data[0, :3] = 0.0  # sign(0) is +1
    return made


def shared(pattern, i, j):
    """Where α and β of entry i, j stand."""
    return {"column": (0, j), "row": (i, 0), "single": (0, 0)}[pattern]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_effective_weight_is_written_out(pattern):
    made = layer(pattern, bias=True)
    w, alpha, beta = made.weight.detach(), made.scale.detach(), made.shift.detach()
    dense = torch.empty(24, 40)
    for i in range(24):
        for j in range(40):
            at = shared(pattern, i, j)
            dense[i, j] = alpha[at] * (1 if w[i, j] >= 0 else -1) + beta[at]
    assert torch.equal(made.effective_weight(), dense)
    x = torch.randn(2, 5, 40)
    assert torch.allclose(made(x), x @ dense.T + made.bias, atol=1e-5)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_start_is_the_mean_and_the_mean_distance_from_it(pattern):
    w = weight()
    made = FbiLinear.start(w, None, FbiOptions(pattern))
    alphas, betas = made.scale.detach().view(-1), made.shift.detach().view(-1)
    over = {"column": w.T, "row": w, "single": w.reshape(1, -1)}[pattern]
    for number, entries in enumerate(over):
        beta = entries.sum() / len(entries)
        alpha = sum(abs(float(entry - beta)) for entry in entries) / len(entries)
        assert float(betas[number]) == pytest.approx(float(beta), abs=1e-7)
        assert float(alphas[number]) == pytest.approx(alpha, rel=1e-5)
    assert torch.equal(made.weight, w), "latents are the weights themselves"


@pytest.mark.parametrize("pattern", PATTERNS)
def test_gradients_are_the_papers(pattern):
    made = layer(pattern, n=6, k=8).double()
    made.weight.data[1] *= 500
    x, out = torch.randn(5, 8, dtype=torch.float64), torch.randn(5, 6, dtype=torch.float64)
    (made(x) * out).sum().backward()
    g = out.T @ x  # dL/dW̃
    signs = torch.where(made.weight >= 0, 1.0, -1.0).double()
    over = {"column": (0,), "row": (1,), "single": (0, 1)}[pattern]
    assert torch.allclose(made.weight.grad, made.scale * g), "identity: nothing is clipped, whatever |W| is"
    assert torch.allclose(made.scale.grad, (g * signs).sum(over, keepdim=True))
    assert torch.allclose(made.shift.grad, g.sum(over, keepdim=True))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_it_packs_to_itself(pattern):
    made = layer(pattern, bias=True)
    assert torch.equal(made.binary().to_dense(), made.effective_weight())
    x = torch.randn(7, 40)
    packed = made.pack()
    assert (packed(x) - made(x)).abs().max() <= 1e-5 * made(x).abs().max()
    assert packed.weights[0].planes == 1 and packed.norm_in == packed.norm_out == "none" and packed.act_bits == 0


def test_a_column_costs_two_numbers_beside_the_bits():
    binary = FbiOptions().binarize(torch.randn(4096, 4096))
    assert binary.bits_per_weight == pytest.approx(1 + 32 / 4096, rel=1e-3)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_start_alone_is_a_binarized_matrix(pattern):
    w = weight()
    options = FbiOptions(pattern, scale_dtype="float32")
    assert torch.equal(options.binarize(w).to_dense(), FbiLinear.start(w, None, options).effective_weight())


def test_another_pattern_is_refused():
    with pytest.raises(OptionError, match="allowed: column, row, single"):
        FbiOptions("diagonal")
