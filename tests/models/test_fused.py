"""Projections that share a launch: who is found, that results stay, and what undoes it."""

import copy
import io

import pytest
import torch
from tests import families
from torch import nn

import signbit
from signbit.errors import StructureError
from signbit.linear import PackedLinear
from signbit.models import find_siblings, fuse_, fused

gpu = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
BLOCK = "model.layers.0."


def packed(build, **options):
    model = build()
    signbit.quantize_(model, signbit.SignbitConfig("absmean", **options))
    return model.eval()


@pytest.mark.parametrize("family", families.DENSE)
def test_siblings_are_the_layers_with_one_input(family):
    """Beside what a hook on a real forward sees: an input's identity is the definition."""
    model, given = packed(families.DENSE[family][0]), {}
    kept = []

    def hook(name):
        def note(module, arguments):
            kept.append(arguments[0])
            given.setdefault(id(arguments[0]), []).append(name)

        return note

    for name, module in model.named_modules():
        if isinstance(module, PackedLinear):
            module.register_forward_pre_hook(hook(name))
    model(torch.tensor([[1]]), use_cache=False)
    want = [names for names in given.values() if len(names) > 1]
    assert find_siblings(model) == want


def test_llama_has_two_groups_a_block():
    q, k, v, gate, up = (
        BLOCK + name
        for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
    )
    assert find_siblings(packed(families.llama))[:2] == [[q, k, v], [gate, up]]


def test_a_tensor_that_changed_in_between_is_another():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (PackedLinear(signbit_weight()) for _ in range(3))
            self.embedding = nn.Embedding(4, 128)

        def forward(self, input_ids, use_cache):
            x = self.embedding(input_ids)
            first = self.a(x)
            x += 1
            return first + self.b(x) + self.c(x)

    assert find_siblings(Block()) == [["b", "c"]]


def test_a_model_that_cannot_be_followed_has_none():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = PackedLinear(signbit_weight()), PackedLinear(signbit_weight())
            self.embedding = nn.Embedding(4, 128)

        def forward(self, input_ids, use_cache):
            x = self.embedding(input_ids)
            return self.a(x) + self.b(x) if x.sum().item() > 0 else x

    with pytest.raises(StructureError, match=r"cannot be followed .*: no projections share a launch \(.*\w"):
        find_siblings(Block())


def signbit_weight(rows=16, groups=1):
    return signbit.BinaryWeight.from_signs(torch.randn(rows, 128), torch.rand(1, rows, groups) + 0.5)


class Siblings(nn.Module):
    """Three projections of one input, of other sizes, one with a bias."""

    def __init__(self, device="cpu"):
        super().__init__()
        self.q = PackedLinear(signbit_weight(48), torch.randn(48))
        self.k, self.v = PackedLinear(signbit_weight(16)), PackedLinear(signbit_weight(24))
        self.embedding = nn.Embedding(4, 128)
        self.to(device).eval().requires_grad_(False)

    def forward(self, input_ids=None, use_cache=False, x=None):
        x = self.embedding(input_ids) if x is None else x
        return torch.cat([self.q(x), self.k(x), self.v(x)], dim=-1)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=[gpu, needs_gpu])])
def siblings(request, monkeypatch):
    """Twins: for themselves, and fused; on the CPU as its order allows for up to 1024 columns."""
    monkeypatch.setattr(fused, "DEVICE", request.param)
    plain = Siblings(request.param)
    shared = copy.deepcopy(plain)
    for module in (plain.q, plain.k, plain.v, shared.q, shared.k, shared.v):
        if (reason := module.prepare()) is not None:
            pytest.skip(f"no kernels: {reason}")
    fuse_(shared)
    assert shared.q.fused is shared.k.fused is shared.v.fused is not None
    return plain, shared


def launches(shared, monkeypatch):
    """Counts how often all of the group's matrices are multiplied at once."""
    calls, whole = [], shared.q.fused._multiply
    monkeypatch.setattr(shared.q.fused, "_multiply", lambda *a: calls.append(1) or whole(*a))
    return calls


@pytest.mark.parametrize("tokens", [1, 3, 16, 17])
@pytest.mark.parametrize("mode", ["exact", "int8"])
def test_one_launch_gives_what_three_do(siblings, mode, tokens, monkeypatch):
    plain, shared = siblings
    x = torch.randn(1, tokens, 128, device=plain.embedding.weight.device)
    for model in siblings:
        signbit.set_activations(model, mode)
    calls = launches(shared, monkeypatch)
    want = plain(x=x)
    for _ in range(2):
        assert (shared(x=x) - want).abs().max() <= 1e-5 * want.abs().max()
    assert len(calls) == (0 if tokens > fused.MOST_TOKENS else 2)
    assert shared.q.fused._last is None


def test_another_input_or_mode_is_not_taken_for_the_same(siblings):
    plain, shared = siblings
    x, other = torch.randn(2, 1, 128, device=plain.embedding.weight.device)
    for layer, twin in ((shared.q, plain.q), (shared.k, plain.k)):
        for value in (x, other, x):
            assert torch.allclose(layer(value), twin(value), atol=1e-4)
    shared.q(x)
    signbit.set_activations(shared, "int8")
    signbit.set_activations(plain, "int8")
    assert torch.allclose(shared.k(x), plain.k(x), atol=1e-4)


def test_an_input_that_changed_in_between_is_multiplied_anew(siblings):
    plain, shared = siblings
    x = torch.randn(1, 128, device=plain.embedding.weight.device)
    shared.q(x)
    x.add_(1)
    assert torch.allclose(shared.k(x), plain.k(x), atol=1e-4)
    with torch.inference_mode():
        x = torch.randn(1, 128, device=x.device)
        shared.q(x)
        x.add_(1)
        assert torch.allclose(shared.k(x), plain.k(x), atol=1e-4)


def test_the_same_order_of_calls_is_not_needed(siblings):
    plain, shared = siblings
    x = torch.randn(1, 128, device=plain.embedding.weight.device)
    for name in ("v", "q", "k", "q", "v", "v"):
        got, want = shared.get_submodule(name)(x), plain.get_submodule(name)(x)
        assert torch.allclose(got, want, atol=1e-4)


def test_compiled_without_a_break(siblings):
    plain, shared = siblings
    x = torch.randn(1, 128, device=plain.embedding.weight.device)
    seen = []

    def backend(graph, example):
        seen.append(sum("prepared_linear" in str(node.target) for node in graph.graph.nodes))
        return graph

    compiled = torch.compile(shared, fullgraph=True, backend=backend)
    for _ in range(2):
        x = torch.randn(1, 128, device=x.device)
        assert torch.allclose(compiled(x=x), plain(x=x), atol=1e-4)
    assert seen == [1]


def test_the_stored_form_is_the_same_and_no_memory_is_held_twice(siblings):
    plain, shared = siblings
    state = shared.state_dict()
    assert state.keys() == plain.state_dict().keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in plain.state_dict().items())
    signs = [shared.get_submodule(name).prepared[0].signs for name in "qkv"]
    assert len({tensor.untyped_storage().data_ptr() for tensor in signs}) == 1
    assert signs[0].untyped_storage().nbytes() == sum(tensor.numel() * tensor.element_size() for tensor in signs)


def test_moving_parts_and_preparing_joins_again(siblings, monkeypatch):
    plain, shared = siblings
    x = torch.randn(1, 128, device=plain.embedding.weight.device)
    shared.double()
    assert shared.q.fused._whole is None
    shared.float()
    want = plain(x=x)
    assert torch.allclose(shared(x=x), want, atol=1e-4)  # prepares, one by one
    calls = launches(shared, monkeypatch)
    assert torch.allclose(shared(x=x), want, atol=1e-4)
    assert calls == [1]


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_has_a_group_of_its_own(siblings, how):
    plain, shared = siblings
    x = torch.randn(1, 128, device=plain.embedding.weight.device)
    if how == "deepcopy":
        again = copy.deepcopy(shared)
    else:
        file = io.BytesIO()
        torch.save(shared, file)
        file.seek(0)
        again = torch.load(file, weights_only=False)
    assert again.q.fused is again.v.fused is not shared.q.fused
    for model in (shared, again):
        assert torch.allclose(model(x=x), plain(x=x), atol=1e-4)
    assert again.q.fused._whole is not None


@pytest.mark.parametrize("change", ["planes", "group", "dtype", "rows"])
def test_what_does_not_lie_together_stays_apart(change, monkeypatch):
    monkeypatch.setattr(fused, "DEVICE", "cpu")
    model = Siblings()
    w = {
        "planes": lambda: signbit.BinaryWeight.from_signs(torch.randn(2, 16, 128), torch.rand(2, 16, 1)),
        "group": lambda: signbit_weight(16, groups=4),
        "dtype": lambda: signbit.BinaryWeight.from_signs(torch.randn(16, 128), torch.rand(1, 16, 1).half()),
        "rows": lambda: signbit_weight(17),
    }[change]()
    model.k = PackedLinear(w).eval()
    x = torch.randn(1, 128)
    want = model(x=x)
    fuse_(model)
    assert model.q.fused is None or model.q.fused._whole is None
    assert torch.equal(model(x=x), want)
