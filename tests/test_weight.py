import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from signbit import bits
from signbit.errors import OptionError, ShapeError
from signbit.linear import Int8Embedding, Int8Head, LayerSpec, PackedLinear, set_activations
from signbit.weight import BinaryWeight, Salient
from tests.laws import cases


def make(**changes):
    parts = {"signs": torch.zeros(1, 4, 3, dtype=torch.uint8), "scale": torch.ones(1, 4, 1), "in_features": 20}
    return BinaryWeight(**{**parts, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"signs": torch.zeros(1, 4, 3)}, "packed in uint8"),
        ({"signs": torch.zeros(4, 3, dtype=torch.uint8)}, r"signs are \[P or 1, N"),
        ({"scale": torch.ones(4)}, r"scale is \[P, N or 1, G\]"),
        ({"in_features": 25}, "25 signs a row lie in 4 bytes, not in 3"),
        ({"scale": torch.ones(1, 3, 1)}, "3 rows: 1 or 4"),
        ({"scale": torch.ones(1, 4, 3)}, "3 groups do not divide 20"),
        ({"scale": torch.ones(1, 4, 1, dtype=torch.int32)}, "scale is float"),
        ({"signs": torch.zeros(2, 4, 3, dtype=torch.uint8)}, "2 sign planes cannot serve 1"),
        ({"shift": torch.ones(4)}, r"shift is \[4\]: \[4, 1\] is allowed"),
        ({"in_scale": torch.ones(20)}, r"in_scale is \[20\]"),
        ({"in_shift": torch.ones(1, 20)}, r"in_shift is \[1, 20\]"),
    ],
)
def test_parts_that_do_not_fit(changes, message):
    make()
    with pytest.raises(ShapeError, match=message):
        make(**changes)


def salient(**changes):
    mask = torch.zeros(4, 20, dtype=torch.bool)
    mask[1, 3] = mask[2, 19] = True
    made = Salient.from_mask(mask, torch.full((4, 20), 9), torch.ones(4), torch.zeros(4), 8)
    return Salient(**{**{n: getattr(made, n) for n in made.__dataclass_fields__}, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"codes": torch.zeros(5, dtype=torch.uint8)}, "2 salient codes of 8 bits lie in 2 bytes, not in 5"),
        ({"counts": torch.full((4, 1), 2, dtype=torch.uint8)}, "counts add up to 8, but there are 2 offsets"),
        (
            {"positions": torch.tensor([3, 255], dtype=torch.uint8), "counts": torch.tensor([[0], [0], [0], [2]])},
            "uint8",
        ),
        (
            {
                "positions": torch.tensor([9, 3], dtype=torch.uint8),
                "counts": torch.tensor([[0], [0], [2], [0]], dtype=torch.uint8),
            },
            "do not ascend",
        ),
        (
            {
                "positions": torch.tensor([3, 200], dtype=torch.uint8),
                "counts": torch.tensor([[0], [0], [0], [2]], dtype=torch.uint8),
            },
            "inside the matrix",
        ),
        ({"bits": 9}, "1 to 8 bits"),
    ],
)
def test_salient_parts_that_do_not_fit(changes, message):
    make(salient=salient()).check()
    with pytest.raises(ShapeError, match=message):
        make(salient=salient(**changes)).check()


def test_pad_bits_are_checked():
    signs = torch.zeros(1, 4, 3, dtype=torch.uint8)
    signs[0, 2, 2] = 1 << 4
    with pytest.raises(ShapeError, match="pad bits"):
        make(signs=signs).check()


def test_nbytes_counts_every_tensor_as_stored():
    w = cases.make("all", 24, 96)
    tensors = [t for t in w.operands() if isinstance(t, torch.Tensor)]
    assert w.nbytes == sum(t.numel() * t.element_size() for t in tensors)
    assert w.bits_per_weight == 8 * w.nbytes / (24 * 96)
    padded = BinaryWeight.from_signs(torch.randn(3, 9), torch.ones(1, 1, 1))
    assert padded.nbytes == 3 * 2 + 4


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 300), st.floats(0, 1), st.integers(1, 8), st.integers(0, 2**31))
def test_salient_values_replace_and_the_rest_stays(n, k, share, code_bits, seed):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(n, k, generator=generator) < share
    mask[0, 0] = True
    codes = torch.randint(0, 2**code_bits, (n, k), generator=generator)
    zero = torch.randint(0, 2**code_bits, (n,), generator=generator)
    part = Salient.from_mask(mask, codes, torch.rand(n, generator=generator), zero, code_bits)
    signs = torch.randn(n, k, generator=generator)
    w = BinaryWeight.from_signs(signs, torch.ones(1, 1, 1), salient=part)
    w.check()
    assert part.count == int(mask.sum())
    want = torch.where(mask, part.scale[:, None] * (codes - zero[:, None]), torch.where(signs >= 0, 1.0, -1.0))
    assert torch.equal(w.to_dense(), want)


def test_dense_is_the_sum_of_its_terms():
    w = cases.make("all", 24, 96, torch.float32)
    total = torch.zeros(24, 96, dtype=torch.float64)
    for p in range(2):
        sign = bits.unpack_signs(w.signs[p], 96).double()
        total += sign * w.scale[p].double().repeat_interleave(96 // w.groups, 1) * w.in_scale[p].double()
    total += w.shift.double().repeat_interleave(96 // w.groups, 1) + w.in_shift.double()
    index, row, integers = bits.salient_integers(w.operands())
    total.view(-1)[index] = w.salient.scale.double()[row] * integers.double()
    assert torch.allclose(w.to_dense(torch.float64), total, atol=1e-12)


# The layers.


def reference_norm(x, norm, eps):
    if norm == "rms":
        return x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
    if norm == "layer":
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + eps).sqrt()
    return x


@pytest.mark.parametrize("norm_in", ["none", "rms", "layer"])
@pytest.mark.parametrize("norm_out", ["none", "layer", "batch_absmax"])
def test_the_layer_is_norm_weight_norm_bias(norm_in, norm_out):
    w, bias = cases.make("group"), torch.randn(24)
    layer = PackedLinear(w, bias, norm_in, 1e-3, 0, norm_out, 1e-4)
    x = torch.randn(2, 3, 128)
    y = reference_norm(x, norm_in, 1e-3) @ w.to_dense().T
    if norm_out == "batch_absmax":
        y = (y * 128 / (y.abs().max() + 1e-5)).clamp(-128 + 1e-5, 128 - 1e-5)
    else:
        y = reference_norm(y, norm_out, 1e-4)
    assert torch.allclose(layer(x), y + bias, rtol=1e-4, atol=1e-4)


def test_onebit_rows_have_mean_0_and_variance_1():
    y = PackedLinear(cases.make("in_scale"), norm_out="layer")(torch.randn(7, 128))
    assert y.mean(-1).abs().max() < 1e-5
    assert (y.var(-1, unbiased=False) - 1).abs().max() < 1e-3


def test_activation_bits():
    w = cases.make("row")
    x = torch.randn(4, 128)
    exact = PackedLinear(w)(x)
    eight = PackedLinear(w, act_bits=8)
    one = PackedLinear(w, act_bits=1)
    assert 0 < (eight(x) - exact).abs().max() < 0.1 * exact.abs().max()
    assert torch.allclose(one(x), torch.where(x >= 0, 1.0, -1.0) @ w.to_dense().T, atol=1e-4)
    by_mode = PackedLinear(w)
    for layer in (by_mode, one):
        set_activations(layer, "int8")
    assert torch.equal(by_mode(x), eight(x))
    assert torch.allclose(one(x), torch.where(x >= 0, 1.0, -1.0) @ w.to_dense().T, atol=1e-4), "act_bits = 1 stays"
    with pytest.raises(OptionError, match="allowed: exact, int8"):
        set_activations(one, "int4")


def test_zeros_and_tiny_inputs_in_int8():
    layer = PackedLinear(cases.make("all"))
    set_activations(layer, "int8")
    assert torch.equal(layer(torch.zeros(2, 128)), torch.zeros(2, 24))
    assert torch.isfinite(layer(torch.full((2, 128), 1e-30))).all()


def test_a_chain_of_two_is_their_product():
    first = BinaryWeight.from_signs(torch.randn(8, 96), torch.rand(1, 8, 1))
    second = BinaryWeight.from_signs(torch.randn(24, 8), torch.rand(1, 24, 1))
    layer = PackedLinear((first, second))
    x = torch.randn(3, 96)
    assert torch.allclose(layer.to_dense(), second.to_dense() @ first.to_dense())
    assert torch.allclose(layer(x), x @ layer.to_dense().T, atol=1e-3)
    assert {"weight", "scale", "weight_1", "scale_1"} == set(layer.state_dict())
    again = PackedLinear.from_spec(layer.spec, {}, torch.float32, "cpu")
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again(x), layer(x))
    with pytest.raises(ShapeError, match="8 rows cannot feed one of 96"):
        PackedLinear((first, first))


@pytest.mark.parametrize("kind", cases.KINDS)
def test_a_spec_builds_the_empty_layer(kind):
    layer = PackedLinear(cases.make(kind), torch.zeros(24), norm_in="rms", act_bits=8)
    spec = LayerSpec.from_dict(layer.spec.to_dict())
    assert spec == layer.spec
    state = layer.state_dict()
    lengths = {n: state[n].shape[0] for n in ("salient_codes", "salient_positions") if n in state}
    empty = PackedLinear.from_spec(spec, lengths, torch.float32, "meta")
    assert {n: (t.dtype, t.shape) for n, t in empty.state_dict().items()} == {
        n: (t.dtype, t.shape) for n, t in state.items()
    }


def test_casting_a_layer_keeps_what_is_stored():
    layer = PackedLinear(cases.make("all"), torch.randn(24))
    before = {n: b.clone() for n, b in layer.named_buffers()}
    layer.to(torch.bfloat16)
    assert layer.bias.dtype is torch.bfloat16
    for name, buffer in layer.named_buffers():
        assert torch.equal(buffer, before[name])
    assert layer(torch.randn(2, 128, dtype=torch.bfloat16)).dtype is torch.bfloat16
    assert layer.to("meta").scale.is_meta


def test_the_input_must_have_k_columns():
    with pytest.raises(ShapeError, match=r"\[2, 95\]; this layer takes \[\.\.\., 128\]"):
        PackedLinear(cases.make("row"))(torch.randn(2, 95))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"norm_in": "batch"}, "norm_in is 'batch'"),
        ({"act_bits": 4}, "allowed: 0, 1, 8"),
        ({"norm_out": "rms"}, "norm_out"),
    ],
)
def test_layer_options(arguments, message):
    with pytest.raises(OptionError, match=message):
        PackedLinear(cases.make("row"), **arguments)


def test_int8_codes():
    dense = torch.randn(5, 9)
    dense[2] = 0
    codes, scale = Int8Embedding.quantize(dense)
    assert scale[2] == 0
    assert codes.abs().amax(1).tolist() == [127, 127, 0, 127, 127]
    embedding = Int8Embedding(codes, scale, 3.0)
    rows = embedding(torch.tensor([[4, 0]]))
    assert (rows - 3 * dense[[4, 0]]).abs().max() <= 3 * scale.max() / 2 * 1.01
    assert embedding.half()(torch.tensor([1])).dtype is torch.float16
    with pytest.raises(ShapeError, match=r"int8 codes \[N, K\]"):
        Int8Head(codes.float(), scale)


def test_explain_says_which_backend_and_why():
    from signbit import explain
    from signbit.ops import BACKENDS

    choices = explain("cpu")
    assert {c.op for c in choices} == {"binary_linear", "int8_linear"}
    assert all(c.backend in BACKENDS and c.reason for c in choices)
