"""The laws as functions of a backend, so that the faults can be put through them too. Each raises AssertionError."""

import contextlib

import torch
import torch.nn.functional as F

from signbit import bits

MAGNITUDES = (1e-3, 1e-1, 1e1)


@contextlib.contextmanager
def uninitialized_memory_is_nan():
    """torch.empty gives NaN inside, so that an output element nobody wrote shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]


def size_of_terms(w):
    """Σ |terms| of each entry of the dense matrix: what its rounding error is measured against.

    A salient value counts beside what it replaces: a kernel may add the difference (design, BinaryWeight).
    """
    operands = w.operands()
    positive = operands._replace(
        signs=torch.full_like(operands.signs, 255),
        scale=operands.scale.abs(),
        shift=None if operands.shift is None else operands.shift.abs(),
        in_scale=None if operands.in_scale is None else operands.in_scale.abs(),
        in_shift=None if operands.in_shift is None else operands.in_shift.abs(),
    )
    replaced = bits.dense(positive._replace(salient_codes=None), torch.float64)
    return bits.dense(positive, torch.float64).abs() + (0 if w.salient is None else replaced)


def law_identity(backend, w, dtype, device="cpu"):
    """op(I) is the dense matrix: equal where one term contributes, else within 2 ulp of the result's dtype."""
    with uninitialized_memory_is_nan():
        eye = torch.eye(w.in_features, dtype=dtype, device=device)
        got = backend.binary_linear(eye, w.operands(), "exact").T
    want = w.to_dense(torch.float64)
    single = w.planes == 1 and w.shift is None and w.in_shift is None and w.in_scale is None
    slack = torch.zeros_like(want) if single else 2 * torch.finfo(dtype).eps * size_of_terms(w)
    error = (got.double() - want.to(dtype).double()).abs()
    assert got.dtype is dtype
    assert not bool(torch.isnan(error).any()), "an output element was not written"
    assert bool((error <= slack).all()), f"identity probe off by {error.max():.3g}"


def law_random(backend, w, dtype, device="cpu", magnitude=1.0, outliers=False, tokens=5):
    """Against float64: the largest error is at most twice that of plain torch in the same dtype.

    One float32 rounding beside that: where nearly all weights are 0, a scale that comes last is what errs most.
    """
    # Plain torch's largest error over a single token is a matter of luck.
    x = torch.randn(max(tokens, 16), w.in_features, device=device, dtype=torch.float64) * magnitude
    if outliers:
        x[:, ::17] *= 1e5 / magnitude
    x = x.to(dtype)
    exact = x.double() @ w.to_dense(torch.float64).T
    plain = F.linear(x, w.to_dense().to(dtype))
    with uninitialized_memory_is_nan():
        got = backend.binary_linear(x[:tokens], w.operands(), "exact")
    allowed = 2 * (plain.double() - exact).abs().max() + torch.finfo(torch.float32).eps * exact.abs().max()
    error = (got.double() - exact[:tokens]).abs().max()
    assert not bool(torch.isnan(error)), "an output element was not written"
    assert error <= allowed, f"error {error:.3g}, {allowed:.3g} is allowed"


def law_input_gradient(multiply, w, dtype, device="cpu", tokens=16):
    """dx = dy · W against float64: the largest error is at most twice that of plain torch in the same dtype.

    `multiply` takes an input [..., K] that wants a gradient, whatever it does with its activations.
    """
    x = torch.randn(2, tokens // 2, w.in_features, device=device, dtype=dtype, requires_grad=True)
    upstream = torch.randn(2, tokens // 2, w.out_features, device=device, dtype=dtype)
    with uninitialized_memory_is_nan():
        multiply(x).backward(upstream)
    exact = upstream.double() @ w.to_dense(torch.float64)
    plain = upstream @ w.to_dense().to(dtype)
    allowed = 2 * (plain.double() - exact).abs().max() + torch.finfo(torch.float32).eps * exact.abs().max()
    assert x.grad.dtype is dtype and x.grad.shape == x.shape
    error = (x.grad.double() - exact).abs().max()
    assert bool(error <= allowed), f"gradient off by {error:.3g}, {allowed:.3g} is allowed"  # NaN is not


def int8_by_definition(x, w):
    """design.md §4.7 written out in float64, token by token; also the sum of |terms| for the tolerance."""

    def quantize(u):
        a = u.float().abs().amax(-1, keepdim=True).clamp_min(1e-5)
        return (127 * u.float() / a).round().clamp(-127, 127).double(), a.double() / 127

    n, k = w.out_features, w.in_features
    width = k // w.groups
    kept = torch.ones(n, k, dtype=torch.float64, device=x.device)
    salient = torch.zeros_like(kept)
    if w.salient is not None:
        index, row, integers = bits.salient_integers(w.operands())
        kept.view(-1)[index] = 0
        salient.view(-1)[index] = integers.double() * w.salient.scale.double()[row]
    q, step = quantize(x)
    y = torch.zeros(x.shape[0], n, dtype=torch.float64, device=x.device)
    size = torch.zeros_like(y)
    for p in range(w.planes):
        qp, sp = q, step
        if w.in_scale is not None:
            qp, sp = quantize(x.float() * w.in_scale[min(p, w.in_scale.shape[0] - 1)].float())
        signs = bits.unpack_signs(w.signs[min(p, w.signs.shape[0] - 1)], k, torch.float64) * kept
        scale = w.scale[p].double().expand(n, -1).repeat_interleave(width, dim=1)
        y += qp @ (signs * scale).T * sp
        size += qp.abs() @ (signs * scale).abs().T * sp
    plus = salient
    if w.shift is not None:
        plus = plus + w.shift.double().repeat_interleave(width, dim=1) * kept
    y += q @ plus.T * step
    size += q.abs() @ plus.abs().T * step
    if w.in_shift is not None:
        y += x.double() @ (w.in_shift.double() * kept).T
        size += x.double().abs() @ (w.in_shift.double().abs() * kept).T
    return y, size


def law_int8(backend, w, dtype, device="cpu", magnitude=1.0, tokens=5):
    """int8 activations: integer sums are exact, so only the float32 of scales and the output's rounding may differ."""
    x = (torch.randn(tokens, w.in_features, device=device) * magnitude).to(dtype)
    with uninitialized_memory_is_nan():
        got = backend.binary_linear(x, w.operands(), "int8").double()
    want, size = int8_by_definition(x, w)
    slack = 16 * torch.finfo(torch.float32).eps * size + torch.finfo(dtype).eps * want.abs() + torch.finfo(dtype).tiny
    error = (got - want).abs()
    assert not bool(torch.isnan(error).any()), "an output element was not written"
    assert bool((error <= slack).all()), f"int8 off by {(error - slack).max():.3g}"


def law_int8_integers(backend, n, k, device="cpu"):
    """With scale 1 and a largest activation of 127 the result is an integer, and equal."""
    from signbit.weight import BinaryWeight

    signs = torch.randn(n, k, device=device)
    w = BinaryWeight.from_signs(signs, torch.ones(1, n, 1, device=device))
    x = torch.randint(-127, 128, (4, k), device=device).float()
    x[:, 0] = 127
    got = backend.binary_linear(x, w.operands(), "int8")
    want = (x.double() @ torch.where(signs >= 0, 1.0, -1.0).double().T).float()
    assert torch.equal(got, want)


def law_int8_ties(backend, device="cpu"):
    """Halves are rounded to even: with a largest activation of 127, k + 0.5 becomes the even one of its neighbours."""
    from signbit.weight import BinaryWeight

    x = torch.arange(-126, 127, device=device).float()[None] + 0.5
    x[0, 0] = 127
    signs = torch.where(torch.rand(5, x.shape[1], device=device) < 0.7, 1.0, -1.0)
    got = backend.binary_linear(
        x, BinaryWeight.from_signs(signs, torch.ones(1, 5, 1, device=device)).operands(), "int8"
    )
    assert torch.equal(got, (x.double().round() @ signs.double().T).float())


def law_shapes(backend, w, dtype, device="cpu"):
    """Any leading shape, the empty one included, and inputs that are not contiguous."""
    dense = w.to_dense().to(dtype)
    for shape in ((), (1,), (3,), (2, 3), (0,)):
        x = torch.randn(*shape, w.in_features, device=device).to(dtype)
        for mode in ("exact", "int8"):
            got = backend.binary_linear(x, w.operands(), mode)
            assert got.shape == (*shape, w.out_features)
            assert got.dtype is dtype
    x = torch.randn(4, 2 * w.in_features, device=device).to(dtype)[:, ::2]
    assert not x.is_contiguous()
    before = x.clone()
    got = backend.binary_linear(x, w.operands(), "exact")
    slack = 4 * torch.finfo(dtype).eps * (x.abs().float() @ dense.abs().float().T).max()
    assert (got.float() - F.linear(x, dense).float()).abs().max() <= slack
    assert torch.equal(x, before), "the input was changed"


def law_int8_linear(backend, dtype, device="cpu", n=19, k=33, tokens=5):
    """The int8 head, both modes, against float64."""
    codes = torch.randint(-127, 128, (n, k), dtype=torch.int8, device=device)
    scale = torch.rand(n, device=device) * 0.1
    x = torch.randn(tokens, k, device=device).to(dtype)
    exact = x.double() @ (scale.double()[:, None] * codes.double()).T
    plain = F.linear(x, (scale[:, None] * codes).to(dtype)).double()
    got = backend.int8_linear(x, codes, scale, "exact").double()
    assert (got - exact).abs().max() <= 2 * (plain - exact).abs().max() + 4 * torch.finfo(dtype).eps * exact.abs().max()
    a = x.float().abs().amax(-1, keepdim=True)
    q = (127 * x.float() / a).round().double()
    want = q @ codes.double().T * (scale.double() * a.double() / 127)
    got = backend.int8_linear(x, codes, scale, "int8").double()
    size = q.abs() @ codes.double().abs().T * (scale.double() * a.double() / 127)
    assert bool(((got - want).abs() <= 1e-6 * size + torch.finfo(dtype).eps * want.abs()).all())
