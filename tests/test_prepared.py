"""A packed layer whose weights lie in the kernels' order is, from outside, the layer that it was."""

import copy
import io
import os
import pickle
import warnings
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.reduction import ForkingPickler

import pytest
import torch
import torch.multiprocessing  # which teaches the ForkingPickler tensors

import signbit
from signbit.errors import OptionError, ShapeError
from signbit.linear import Int8Head, PackedLinear
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


@pytest.mark.parametrize("kind", cases.TERMS)
def test_a_tensor_that_is_assigned_is_taken_and_one_that_is_read_is_a_copy(kind):
    stored, prepared = twins(kind)
    x = torch.randn(3, 128)
    for change in (lambda layer: layer.scale.mul_(2), lambda layer: layer.weight.zero_()):
        change(prepared)
        same_state(stored, prepared)
    want = prepared(x)
    assert (stored(x) - want).abs().max() <= 1e-5 * want.abs().max()
    for layer in (stored, prepared):
        layer.scale = layer.scale * 2
    assert prepared.prepared == () and "scale" not in prepared.__dict__
    same_state(stored, prepared)
    again = prepared(x)
    assert prepared.prepared != () and not torch.equal(again, want)
    assert (stored(x) - again).abs().max() <= 1e-5 * again.abs().max()


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


def test_it_says_where_a_dense_matrix_is_faster():
    for kind, modes in (("row", ()), ("pbllm_4bit", ("exact",)), ("salient_bitmap", ("exact", "int8"))):
        stored, prepared = twins(kind)
        assert stored.better_dense == () and sorted(prepared.better_dense) == sorted(modes)


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


def test_a_pickle_holds_the_stored_form_and_leaves_the_layer_alone():
    _, layer = twins()
    x = torch.randn(3, 128)
    want = layer(x)
    written = io.BytesIO()
    ForkingPickler(written).dump(layer)  # as torch.multiprocessing does, which shares what it writes
    assert torch.equal(layer(x), want)
    again = pickle.loads(pickle.dumps(layer))
    assert again._multiplies == "undecided"
    same_state(again, layer)
    assert not [name for name, _ in again.named_buffers() if name.startswith("prepared")]


def test_another_storage_under_the_same_tensor_is_seen():
    _, layer = twins("row")
    x = torch.randn(3, 128)
    before = layer(x)
    layer.bias.data = torch.zeros(24)
    after = layer(x)
    assert not torch.equal(after, before)
    layer.bias.data = torch.ones(24, dtype=torch.bfloat16)
    assert torch.equal(layer(x), after + 1)


@pytest.mark.parametrize("bias_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_result_has_the_dtype_of_the_input(dtype, bias_dtype):
    stored = PackedLinear(cases.make("row", 24, 96), torch.randn(24).to(bias_dtype))
    odd = PackedLinear(cases.make("group", 24, 96), torch.randn(24).to(bias_dtype))  # by the reference
    head = Int8Head(*Int8Head.quantize(torch.randn(24, 96)), torch.randn(24).to(bias_dtype))
    for layer in (stored, odd, head):
        x = torch.randn(3, 96).to(dtype)
        plain = layer(x)
        trained = layer(x.requires_grad_())
        assert plain.dtype is dtype and trained.dtype is dtype
        assert torch.allclose(plain, trained, rtol=torch.finfo(dtype).eps, atol=1e-5)
        trained.sum().backward()
        assert x.grad.dtype is dtype


def test_integers_are_no_activations():
    _, layer = twins("row")
    for activations in ("exact", "int8"):
        layer.activations = activations
        with pytest.raises(ShapeError, match=r"the input is torch\.int64; this layer takes floats"):
            layer(torch.ones(3, 128, dtype=torch.int64))


def test_gradients_of_a_trained_bias_and_forward_mode():
    _, layer = twins("row")
    x = torch.randn(3, 128)
    layer.bias.requires_grad_()
    layer(x).sum().backward()
    assert torch.equal(layer.bias.grad, torch.full((24,), 3.0))
    tangent = torch.randn(3, 128)
    layer = PackedLinear(layer.weights)
    assert layer.prepare() is None
    _, derivative = torch.func.jvp(layer, (x,), (tangent,))
    assert torch.allclose(derivative, tangent @ layer.to_dense().T, atol=1e-5)
    layer.activations = "int8"
    with pytest.raises(OptionError, match="exact activations only"):
        torch.func.jvp(layer, (x,), (tangent,))


def test_a_trace_records_the_op():
    _, layer = twins("row")
    x = torch.randn(3, 128)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(layer, x)
        other = torch.randn(3, 128)
        assert torch.equal(traced(other), layer(other))


@pytest.mark.parametrize("tokens", [2, 300])
def test_an_autocast_changes_nothing(tokens):
    _, layer = twins("salient_bitmap")
    x = torch.randn(tokens, 128)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype is torch.float32 and torch.equal(y, layer(x))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_child_that_is_forked_while_another_thread_prepares():
    from signbit import linear

    stored, _ = twins("row")
    with linear._preparing:
        child = os.fork()
        if child == 0:
            os._exit(0 if stored.prepare() is None else 3)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.slow
def test_inductor_compiles_a_whole_model_of_any_length(tmp_path):
    from transformers import LlamaForCausalLM

    from tests.conftest import tiny_llama_config

    model = LlamaForCausalLM(tiny_llama_config()).eval()
    signbit.quantize_(model, signbit.SignbitConfig("absmean", head="int8"))
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for length in (3, 5, 8):
            ids = torch.randint(0, 64, (1, length))
            assert (compiled(ids, use_cache=False).logits - model(ids).logits).abs().max() <= 1e-4
