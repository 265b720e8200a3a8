"""A packed layer whose weights lie in the kernels' order is, from outside, the layer that it was."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import signbit
from signbit.linear import PackedLinear
from signbit.ops import native, prepare
from signbit.ops.schema import _prepared_linear, _prepared_linear_input_grad
from tests.laws import cases

pytestmark = pytest.mark.skipif(isinstance(native.library(), str), reason=f"no CPU kernels: {native.library()}")


def twins(kind="all", **changes):
    """A layer as stored, never used, and the same prepared."""
    stored = PackedLinear(cases.make(kind), torch.randn(24), **changes)
    prepared = copy.deepcopy(stored)
    assert prepared.prepare() is None
    return stored, prepared


def same_state(one, other):
    one, other = one.state_dict(), other.state_dict()
    assert set(one) == set(other)
    for name, tensor in one.items():
        assert tensor.dtype is other[name].dtype and torch.equal(tensor, other[name]), name


@pytest.mark.parametrize("kind", cases.KINDS)
def test_state_weights_and_tensors_are_those_stored(kind):
    stored, prepared = twins(kind)
    same_state(stored, prepared)
    assert prepared.spec == stored.spec and prepared.nbytes == stored.nbytes
    assert torch.equal(prepared.to_dense(), stored.to_dense())
    assert torch.equal(prepared.weight, stored.weight) and torch.equal(prepared.scale, stored.scale)
    with pytest.raises(AttributeError, match="no attribute 'weight_1'"):
        _ = prepared.weight_1


def test_nothing_is_kept_twice():
    stored, prepared = twins("row")
    sizes = [sum(b.numel() * b.element_size() for b in layer.buffers()) for layer in (stored, prepared)]
    rows_of_blocks = 32 / 24  # 24 rows take two blocks of 16
    assert sizes[1] == sizes[0] * rows_of_blocks


@pytest.mark.parametrize("how", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_are_independent(how):
    _, layer = twins()
    x = torch.randn(3, 128)
    want = layer(x)
    again = how(layer)
    for buffer in layer.buffers():
        buffer.zero_()
    assert torch.equal(again(x), want)


def test_loading_and_moving_go_through_the_stored_form():
    stored, prepared = twins()
    other = PackedLinear(cases.make("all"), torch.randn(24))
    lengths = {n: stored.state_dict()[n].shape[0] for n in ("salient_codes", "salient_positions")}
    target = PackedLinear.from_spec(stored.spec, lengths, torch.float32, "cpu")
    target.load_state_dict(stored.state_dict())
    x = torch.randn(3, 128)
    assert torch.equal(target(x), prepared(x))
    assert not torch.equal(other(x), prepared(x))
    target.load_state_dict(prepared.state_dict())
    assert torch.equal(target(x), prepared(x))
    cast = copy.deepcopy(prepared).to(torch.bfloat16)
    assert cast.scale.dtype is torch.float16 and cast.bias.dtype is torch.bfloat16
    assert cast(x.bfloat16()).dtype is torch.bfloat16
    assert prepared.to("meta").weight.is_meta


def test_a_new_bias_is_taken():
    _, layer = twins("row")
    x = torch.randn(3, 128)
    before = layer(x)
    layer.bias = torch.nn.Parameter(layer.bias + 1, requires_grad=False)
    assert torch.allclose(layer(x), before + 1, atol=1e-5)


@pytest.mark.parametrize("norm_out", ["none", "layer", "batch_absmax"])
@pytest.mark.parametrize("norm_in", ["none", "rms", "layer"])
def test_gradients_and_fused_results_agree(norm_in, norm_out):
    _, layer = twins("group", norm_in=norm_in, norm_out=norm_out)
    x = torch.randn(3, 128)
    fused = layer(x)
    needs = x.clone().requires_grad_()
    y = layer(needs)
    assert torch.allclose(y, fused, atol=1e-4)
    upstream = torch.randn_like(y)
    y.backward(upstream)
    dense = copy.deepcopy(x).requires_grad_()
    u = dense
    if norm_in == "rms":
        u = torch.nn.functional.rms_norm(u, (128,), eps=1e-5)
    elif norm_in == "layer":
        u = torch.nn.functional.layer_norm(u, (128,), eps=1e-5)
    v = u @ layer.to_dense().T
    if norm_out == "layer":
        v = torch.nn.functional.layer_norm(v, (24,), eps=1e-5)
    elif norm_out == "batch_absmax":
        v = (v * (128 / (v.abs().max() + 1e-5))).clamp(-128 + 1e-5, 128 - 1e-5)
    v.backward(upstream)
    assert torch.allclose(needs.grad, dense.grad, rtol=1e-3, atol=1e-3 * float(dense.grad.abs().max()))


@pytest.mark.parametrize("mode", ["exact", "int8"])
@pytest.mark.parametrize("kind", ["group", "all"])
@pytest.mark.parametrize("prepared_first", [True, False])
def test_compiled_whole_equals_eager(kind, mode, prepared_first):
    torch._dynamo.reset()
    layer, prepared = twins(kind, norm_in="rms", norm_out="layer")
    for one in (layer, prepared):
        one.activations = mode
    x = torch.randn(2, 3, 128)
    want = prepared(x)
    compiled = torch.compile(prepared if prepared_first else layer, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(x), want, atol=1e-4 if mode == "exact" else 0.05)
    with torch.inference_mode():
        assert torch.allclose(compiled(x), want, atol=1e-4 if mode == "exact" else 0.05)


@pytest.mark.parametrize("kind", ["row", "salient_offsets", "salient_bitmap", "all"])
@pytest.mark.parametrize("mode", ["exact", "int8"])
def test_opcheck(kind, mode):
    w = prepare(cases.make(kind).operands(), torch.device("cpu"))
    x = torch.randn(3, 128, requires_grad=True)
    torch.library.opcheck(_prepared_linear, (x, *w, mode, None, "none", 0.0, "none", 0.0))
    torch.library.opcheck(
        _prepared_linear, (torch.randn(3, 128), *w, mode, torch.randn(24), "rms", 1e-5, "layer", 1e-5)
    )
    torch.library.opcheck(_prepared_linear_input_grad, (torch.randn(3, 24), *w))


def test_threads_that_meet_in_the_first_inference():
    x = torch.randn(2, 128)
    for _ in range(20):
        layer = PackedLinear(cases.make("all"))
        with ThreadPoolExecutor(8) as pool, torch.inference_mode():
            results = list(pool.map(lambda _, own=layer: own(x), range(16)))
        assert all(torch.equal(result, results[0]) for result in results)


def test_what_the_kernels_do_not_take_says_why():
    assert "signs of activations" in PackedLinear(cases.make("row"), act_bits=1).prepare()
    odd = PackedLinear(cases.make("group", 24, 96))
    assert "no multiple of 32" in odd.prepare()
    x = torch.randn(2, 96)
    assert torch.allclose(odd(x), x @ odd.to_dense().T, atol=1e-4)
    wide = PackedLinear(cases.make("row"))
    wide.prepare()
    x = torch.randn(2, 128, dtype=torch.float64)
    assert torch.allclose(wide(x), x @ wide.to_dense(torch.float64).T)


def test_a_packed_model_takes_the_memory_of_its_file(tmp_path):
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=128, intermediate_size=352, num_hidden_layers=2, num_attention_heads=4, vocab_size=512,
        tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    signbit.quantize_(model, signbit.SignbitConfig(method="absmean", group=32, head="int8"))
    out = signbit.save(model, tmp_path / "packed")
    loaded = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    layers = [m for m in loaded.modules() if isinstance(m, PackedLinear)]
    assert all(layer._multiplies == "kernels" for layer in layers)
    tensors = {id(t): t for t in (*loaded.parameters(), *loaded.buffers())}.values()
    held = sum(t.untyped_storage().nbytes() for t in tensors)
    assert held <= 1.05 * (tmp_path / "packed" / "model.safetensors").stat().st_size
