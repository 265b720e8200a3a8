import subprocess
import sys

import pytest
import torch

from signbit import bits
from signbit.linear import Int8Embedding, Int8Head, PackedLinear
from signbit.methods import AbsmeanLinear
from signbit.ops import BACKENDS, binary_linear, cuda, int8_linear, prepare, prepared_linear
from signbit.ops.dispatch import Backend
from signbit.ops.schema import _binary_linear, _binary_linear_input_grad, _int8_linear
from signbit.weight import BinaryWeight
from tests.laws import cases, laws

SIZES = (1, 2, 7, 8, 9, 31, 32, 33, 63, 64, 65, 127, 129, 1000)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def in_slices(count):
    """The CUDA kernels as they multiply few tokens: `count` at a time."""

    def multiply(x, w, activations):
        if cuda.unsupported(w) or activations not in ("exact", "int8"):
            return cuda.binary_linear(x, w, activations)
        multiplication = cuda.Multiplication(cuda.prepare(w))
        flat = x.reshape(-1, x.shape[-1])
        pieces = [multiplication(piece, activations) for piece in flat.split(count)]
        return torch.cat(pieces).reshape(*x.shape[:-1], w.signs.shape[1])

    return Backend(f"cuda by {count}", multiply, cuda.int8_linear, "cuda")


PLACES = [
    *((backend, "cpu") for backend in BACKENDS.values() if backend.device != "cuda"),
    *(
        pytest.param((backend, "cuda"), marks=pytest.mark.gpu)
        for backend in (BACKENDS["reference"], BACKENDS["cuda"], in_slices(1), in_slices(3), in_slices(16))
    ),
]


@pytest.fixture(params=PLACES, ids=lambda place: f"{place[0].name} on {place[1]}")
def place(request):
    if request.param[1] == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return request.param


@pytest.fixture
def backend(place):
    return place[0]


@pytest.fixture
def device(place):
    return place[1]


def to_device(w, device):
    if device == "cpu":
        return w
    return PackedLinear(w).to(device).weights[0]


# 1. Packing.


@pytest.mark.parametrize("k", SIZES)
def test_unpack_is_the_inverse_of_pack(k):
    for n in SIZES:
        signs = torch.where(torch.rand(n, k) < 0.5, -1.0, 1.0)
        packed = bits.pack_signs(signs)
        assert packed.shape == (n, -(-k // 8))
        assert torch.equal(bits.unpack_signs(packed, k), signs)
        pad = -k % 8
        assert not bool((packed[:, -1] >> (8 - pad)).any() if pad else False), "pad bits are 0"


def test_golden_bytes():
    minus_first = torch.tensor([-1.0, 1, 1, 1, 1, 1, 1, 1])
    minus_last = torch.tensor([1.0, 1, 1, 1, 1, 1, 1, -1])
    assert bits.pack_signs(minus_first).tolist() == [0b11111110]
    assert bits.pack_signs(minus_last).tolist() == [0b01111111]
    assert bits.pack_signs(torch.tensor([1.0, -1, -1, 1, -1, -1, -1, -1, -1, 1])).tolist() == [0b00001001, 0b00000010]
    assert bits.pack_signs(torch.tensor([0.0, -0.0, -1e-30, 1e-30])).tolist() == [0b00001011], "sign(0) is +1"
    assert bits.pack_codes(torch.tensor([1, 2, 3, 7, 0]), 3).tolist() == [0b11010001, 0b00001110]


@pytest.mark.parametrize("code_bits", range(1, 9))
def test_codes_round_trip(code_bits):
    for count in (0, 1, 7, 8, 9, 1001):
        codes = torch.randint(0, 2**code_bits, (count,), dtype=torch.int32)
        if count:
            codes[0] = 2**code_bits - 1
        packed = bits.pack_codes(codes, code_bits)
        assert packed.shape == (-(-count * code_bits // 8),)
        assert torch.equal(bits.unpack_codes(packed, count, code_bits), codes)


@pytest.mark.parametrize("k", [1, 31, 256, 257, 600])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 1.0])
def test_positions_round_trip_in_the_smaller_form(k, share):
    mask = torch.rand(13, k) < share
    positions, counts = bits.pack_positions(mask)
    index = bits.unpack_positions(positions, counts, 13, k)
    assert torch.equal(index, mask.reshape(-1).nonzero()[:, 0])
    bitmap = 13 * -(-k // 8)
    offsets = int(mask.sum()) + 13 * -(-k // 256)
    assert (
        positions.numel() + (0 if counts is None else counts.numel()) <= min(bitmap, offsets) + (share == 1.0) * bitmap
    )


def test_a_full_block_of_256_has_a_bitmap():
    mask = torch.zeros(64, 2560, dtype=torch.bool)
    mask[5, 256:512] = True
    positions, counts = bits.pack_positions(mask)
    assert counts is None
    assert torch.equal(bits.unpack_positions(positions, counts, 64, 2560), mask.reshape(-1).nonzero()[:, 0])


# 2. The effective weight of a latent layer.


@pytest.mark.parametrize("group", [-1, 8])
def test_binary_equals_the_effective_weight_bit_for_bit(group):
    layer = AbsmeanLinear(torch.randn(9, 24), torch.randn(9), group)
    with torch.no_grad():
        layer.weight[0, :3] = 0
    assert torch.equal(layer.binary().to_dense(), layer.effective_weight())
    x = torch.randn(5, 24)
    assert (layer.pack()(x) - layer(x)).abs().max() <= 3e-6


# 3.–5. A backend against the dense matrix.


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", cases.KINDS)
def test_identity_probe(backend, kind, dtype, device):
    laws.law_identity(backend, to_device(cases.make(kind), device), dtype, device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", cases.KINDS)
def test_random_inputs(backend, kind, dtype, device):
    w = to_device(cases.make(kind), device)
    for magnitude in laws.MAGNITUDES:
        laws.law_random(backend, w, dtype, device, magnitude)
    if dtype is not torch.float16:
        laws.law_random(backend, w, dtype, device, outliers=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", cases.KINDS)
def test_int8_activations(backend, kind, dtype, device):
    w = to_device(cases.make(kind), device)
    for magnitude in laws.MAGNITUDES:
        laws.law_int8(backend, w, dtype, device, magnitude)


@pytest.mark.parametrize("k", [1, 31, 64, 1000])
def test_int8_sums_are_exact(backend, k, device):
    laws.law_int8_integers(backend, 17, k, device)


def test_int8_rounds_halves_to_even(backend, device):
    laws.law_int8_ties(backend, device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["row", "all"])
def test_shapes(backend, kind, dtype, device):
    for n, k in ((1, 1), (7, 31), (33, 172), (24, 96)):
        laws.law_shapes(backend, to_device(cases.make(kind, n, k), device), dtype, device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_int8_head(backend, dtype, device):
    for n, k in ((19, 33), (19, 300), (70, 4096)):  # less than a vector; some and a rest; more rows than pass at once
        laws.law_int8_linear(backend, dtype, device, n, k)


def test_every_method_has_a_case():
    assert cases.EVERY_METHOD_HAS_A_CASE


# 6. Gradients.


@pytest.mark.parametrize("group", [-1, 4])
def test_straight_through_gradient_is_the_written_formula(group):
    layer = AbsmeanLinear(torch.randn(3, 12), torch.randn(3), group).double()
    x = torch.randn(5, 12, dtype=torch.float64)
    upstream = torch.randn(5, 3, dtype=torch.float64)
    layer(x).backward(upstream)
    g = upstream.T @ x
    w = layer.weight.detach()
    width = 12 if group == -1 else group
    grouped_g, grouped_w = g.reshape(3, -1, width), w.reshape(3, -1, width)
    s = grouped_w.abs().mean(-1, keepdim=True)
    formula = s * grouped_g + grouped_w.sign() * (grouped_g * grouped_w.sign()).mean(-1, keepdim=True)
    assert torch.allclose(layer.weight.grad, formula.reshape(3, 12), atol=1e-12)
    assert torch.allclose(layer.bias.grad, upstream.sum(0))


@pytest.mark.parametrize("mode", ["exact", "int8"])
@pytest.mark.parametrize("form", ["as stored", "prepared"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", cases.TERMS)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_gradient_of_the_input_is_that_of_the_dense_matrix(kind, dtype, form, mode, device):
    """On the kernels and without, and straight through quantized activations."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    w = to_device(cases.make(kind), device)
    multiply, operands = binary_linear, w.operands()
    if form == "prepared":
        multiply, operands = prepared_linear, prepare(operands, torch.device(device))
        if isinstance(operands, str):
            pytest.skip(operands)
    laws.law_input_gradient(lambda x: multiply(x, operands, mode), w, dtype, device)


def test_packed_parameters_take_no_gradient():
    layer = PackedLinear(cases.make("all"), torch.randn(24))
    layer(torch.randn(2, 128, requires_grad=True)).sum().backward()
    assert not any(parameter.requires_grad for parameter in layer.parameters())


def test_gradient_of_the_int8_head():
    codes, scale = Int8Head.quantize(torch.randn(5, 8))
    x = torch.randn(3, 8, requires_grad=True)
    int8_linear(x, codes, scale).sum().backward()
    assert torch.allclose(x.grad, (scale[:, None] * codes).sum(0).expand(3, 8), atol=1e-5)


# 8. torch's own checks.


@pytest.mark.parametrize("kind", ["row", "salient_offsets", "salient_bitmap", "all"])
@pytest.mark.parametrize("mode", ["exact", "int8"])
def test_opcheck(kind, mode):
    w = cases.make(kind)
    x = torch.randn(3, w.in_features, requires_grad=True)
    torch.library.opcheck(_binary_linear, (x, *w.operands(), mode))
    grad = torch.randn(3, w.out_features)
    torch.library.opcheck(_binary_linear_input_grad, (grad, *w.operands()))


def test_opcheck_of_the_int8_head():
    codes, scale = Int8Head.quantize(torch.randn(5, 8))
    torch.library.opcheck(_int8_linear, (torch.randn(3, 8, requires_grad=True), codes, scale, "exact"))


@pytest.mark.parametrize("kind", ["group", "all"])
def test_compiled_equals_eager(kind):
    torch._dynamo.reset()
    layer = PackedLinear(cases.make(kind), torch.randn(24), norm_in="rms", norm_out="layer")
    x = torch.randn(3, 128)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(x), layer(x), atol=1e-6)
    codes, scale = Int8Embedding.quantize(torch.randn(5, 8))
    head = Int8Head(codes, scale)
    assert torch.equal(torch.compile(head, fullgraph=True, backend="aot_eager")(x[:, :8]), head(x[:, :8]))


def test_deterministic_and_arguments_unchanged():
    w = cases.make("all")
    copies = [t.clone() for t in w.operands() if isinstance(t, torch.Tensor)]
    x = torch.randn(4, 128)
    first = binary_linear(x, w.operands(), "int8")
    assert torch.equal(first, binary_linear(x, w.operands(), "int8"))
    assert all(torch.equal(a, b) for a, b in zip(copies, (t for t in w.operands() if torch.is_tensor(t)), strict=True))


@pytest.mark.parametrize("mode", ["exact", "int8"])
def test_autocast_changes_nothing(mode):
    w, x = cases.make("all"), torch.randn(4, 128)
    want = binary_linear(x, w.operands(), mode)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(binary_linear(x, w.operands(), mode), want)


# 9. Import.


def test_importing_signbit_touches_no_device_and_no_network():
    code = """
import socket, sys
def refuse(*a, **k): raise AssertionError("network")
socket.socket.connect = refuse
import signbit
assert "torch" not in sys.modules and "transformers" not in sys.modules
for name in signbit.__all__: getattr(signbit, name)
import torch
assert not torch.cuda.is_initialized()
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_ternary_is_two_planes_exactly():
    t = torch.randint(-1, 2, (9, 40)).float()
    first, second = (t >= 0).float() * 2 - 1, (t > 0).float() * 2 - 1
    w = BinaryWeight.from_signs(torch.stack([first, second]), torch.full((2, 1, 1), 0.5))
    assert torch.equal(w.to_dense(), t)
