"""The solvers against loops written from the equations."""

import pytest
import torch

from signbit.errors import WeightError
from signbit.methods import Moments, PbGptqOptions, PbllmOptions
from signbit.methods.gptq import Grid, descend, factorize, matched_to_dense, output_error, sweep


def inputs(tokens=400, k=24, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(k, k, generator=generator)
    return torch.randn(tokens, k, generator=generator) @ mixing * 0.3


def moments_of(x, dense=None):
    cross = None if dense is None else (dense - x).T @ x / len(x)
    return Moments(x.T @ x / len(x), len(x), cross)


def rounding(values):
    return values.mul(4).round().div(4)


def quarters(rows, columns=24):
    """The grid of all multiples of 1/4 from −32 to 31.75."""
    salient = torch.ones(rows, columns, dtype=torch.bool)
    full, none = torch.full((rows, 1), 0.25), torch.zeros(rows, 1)
    return Grid(salient, full, torch.full((rows, 1), 128.0), 255, "zero", none, none)


def test_the_factor_is_that_of_the_damped_inverse():
    hessian = moments_of(inputs()).hessian
    hessian[5], hessian[:, 5] = 0, 0
    factor = factorize(hessian, 0.01)
    assert factor.dead.nonzero().flatten().tolist() == [5]
    want = hessian.double().clone()
    want[5, 5] = 1
    want += 0.01 * want.diagonal().mean() * torch.eye(24, dtype=torch.float64)
    inverse = want.inverse()
    assert torch.allclose(factor.hessian.double(), want, rtol=1e-5)
    assert torch.allclose(factor.upper.double().T @ factor.upper.double(), inverse, atol=1e-5 * inverse.abs().max())
    assert torch.allclose(factor.inverse_diagonal.double(), inverse.diagonal(), rtol=1e-5)
    assert torch.equal(factor.upper, factor.upper.triu())


def test_a_failed_cholesky_names_the_remedy():
    indefinite = torch.eye(8)
    indefinite[0, 0] = -5.0
    with pytest.raises(
        WeightError, match=r"not positive definite with a damping of 0\.01; use --damping 0\.1, or more"
    ):
        factorize(indefinite, 0.01)


@pytest.mark.parametrize("block", [1, 7, 24, 128])
def test_the_sweep_is_the_column_loop(block):
    w, factor = torch.randn(5, 24), factorize(moments_of(inputs()).hessian, 0.01)
    want, left = torch.zeros(5, 24), w.clone()
    for j in range(24):
        want[:, j] = rounding(left[:, j])
        error = (left[:, j] - want[:, j]) / factor.upper[j, j]
        for other in range(j, 24):
            left[:, other] -= error * factor.upper[j, other]
    got = sweep(w, factor, quarters(len(w)), block)
    assert (got != want).float().mean() < 0.02, "near ties apart"
    rounded = rounding(w)
    assert output_error(w, got, factor.hessian) < output_error(w, rounded, factor.hessian)


@pytest.mark.parametrize("block", [1, 7, 128])
def test_descent_never_raises_the_error_and_ends_where_no_column_moves(block):
    w, factor = torch.randn(16, 24), factorize(moments_of(inputs()).hessian, 0.01)
    q = sweep(w, factor, quarters(len(w)), block)
    before = output_error(w, q, factor.hessian)
    for _ in range(30):
        after = descend(w, q, factor.hessian, quarters(16), block)
        assert output_error(w, after, factor.hessian) <= before * (1 + 1e-6)
        before, unchanged, q = output_error(w, after, factor.hessian), torch.equal(after, q), after
        if unchanged:
            break
    assert unchanged
    for j in range(24):  # no single entry can be bettered
        for step in (-0.25, 0.25):
            other = q.clone()
            other[:, j] += step
            worse = ((w - other) @ factor.hessian * (w - other)).sum(1)
            assert (worse >= ((w - q) @ factor.hessian * (w - q)).sum(1) - 1e-4).all()


def test_matching_the_dense_model_is_least_squares():
    dense, w = inputs(seed=1), torch.randn(6, 24)
    x = dense + 0.2 * torch.randn(400, 24) @ torch.randn(24, 24)
    moments = moments_of(x, dense)
    got = matched_to_dense(w, moments, moments.factor(1e-9))
    want = torch.linalg.lstsq(x.double(), dense.double() @ w.double().T).solution.T
    assert torch.allclose(got.double(), want, atol=1e-3)
    assert matched_to_dense(w, moments_of(x), moments.factor(0.01)) is w


def published(w, hessian, low_frac, damping, metric):
    """PB-GPTQ in loops, from ../shared/methods.md 1.5, group −1, in float64."""
    rows, columns = w.shape
    w, hessian = w.double().clone(), hessian.double().clone()
    scale, zero = [], []
    for row in w.tolist():
        low, high = min(0.0, *row), max(0.0, *row)
        scale.append((high - low) / 255)
        zero.append(round(-low / scale[-1]))
    hessian += damping * hessian.diagonal().mean() * torch.eye(columns)
    upper = torch.linalg.cholesky(hessian.inverse(), upper=True)
    score = w.abs() if metric == "magnitude" else w**2 / upper.diagonal() ** 2
    threshold = score.flatten().sort().values[int(rows * columns * low_frac)]
    mask = score <= threshold
    masked = w * mask
    mu = masked.mean(1)
    s = (masked - mu[:, None]).abs().mean(1)
    q = torch.zeros_like(w)
    for j in range(columns):
        for i in range(rows):
            value = w[i, j].item()
            if mask[i, j]:
                q[i, j] = mu[i] + (s[i] if value >= mu[i] else -s[i])
            else:
                code = min(max(round(value / scale[i]) + zero[i], 0), 255)
                q[i, j] = scale[i] * (code - zero[i])
        error = (w[:, j] - q[:, j]) / upper[j, j]
        w[:, j:] -= error[:, None] * upper[j, j:]
    return q.float()


@pytest.mark.parametrize("metric", ["magnitude", "hessian"])
@pytest.mark.parametrize("share", [0.1, 0.5])
def test_pb_gptq_is_the_published_algorithm(metric, share):
    w, moments = torch.randn(12, 24) * 0.05, moments_of(inputs())
    options = PbGptqOptions(salient=share, saliency=metric, scale_dtype="float32", block=8)
    got = options.binarize(w, moments).to_dense()
    want = published(w, moments.hessian, 1 - share, 0.01, metric)
    assert (got - want).abs().gt(1e-4).float().mean() < 0.02, "near ties apart"


def test_the_saliencies_are_their_formulas():
    w, moments = torch.randn(12, 24), moments_of(inputs())
    factor = moments.factor(0.01)
    scores = {
        "hessian": w**2 / factor.upper.diagonal() ** 2,
        "hessian-diagonal": w**2 / factor.inverse_diagonal,
        "hessian-paper": w**2 / factor.inverse_diagonal**2,
        "magnitude": w.abs(),
    }
    for name, score in scores.items():
        packed = PbGptqOptions(salient=0.25, saliency=name).binarize(w, moments)
        from signbit.bits import unpack_positions

        index = unpack_positions(packed.salient.positions, packed.salient.counts, 12, 24)
        want = score.flatten().argsort(descending=True)[: len(index)]
        assert sorted(index.tolist()) == sorted(want.tolist()), name


@pytest.mark.parametrize("group", [-1, 8])
@pytest.mark.parametrize("low", ["xnor", "sign", "prune", "2bit", "3bit", "4bit"])
def test_each_step_lowers_the_output_error(low, group):
    w, moments = torch.randn(32, 24) * 0.05, moments_of(inputs())
    hessian = moments.factor(0.01).hessian

    def error(**values):
        options = PbllmOptions(low=low, group=group, salient=0.3, match="prefix", **values)
        return output_error(w, options.binarize(w, moments).to_dense(), hessian)

    swept = error(refine=0)
    assert swept < error(gptq=False)
    assert error(refine=1) < swept
    assert error(refine=6) <= error(refine=1) * 1.001


def test_the_fit_is_the_least_squares_of_scale_and_mean():
    w, moments = torch.randn(6, 24) * 0.05, moments_of(inputs())
    hessian = moments.factor(0.01).hessian.double()
    options = PbllmOptions(salient=0.25, group=12, match="prefix", refine=1, scale_dtype="float32")
    packed = options.binarize(w, moments)
    dense = packed.to_dense().double()
    best = ((w - dense) @ hessian * (w - dense)).sum(1)
    for name in ("scale", "shift"):
        for factor in (0.99, 1.01):
            changed = getattr(packed, name) * factor
            other = type(packed)(
                packed.signs, changed if name == "scale" else packed.scale, 24,
                changed if name == "shift" else packed.shift, salient=packed.salient,
            ).to_dense().double()  # fmt: skip
            assert (((w - other) @ hessian * (w - other)).sum(1) >= best - 1e-9).all()


def test_dead_inputs_become_zero():
    x = inputs()
    x[:, 3] = 0
    w = torch.randn(8, 24)
    dense = PbllmOptions(salient=0.5, low="prune").binarize(w, moments_of(x)).to_dense()
    assert not dense[:, 3].any()
