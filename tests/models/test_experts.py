"""Mixtures of experts, whose fused matrices are taken apart."""

import pytest
import torch
from tests.families import MIXTURES, qwen3_moe
from torch import nn

import signbit
from signbit.errors import StructureError
from signbit.linear import PackedLinear
from signbit.methods import AbsmeanOptions
from signbit.models import Experts, Selection, find_structure, split_experts_
from signbit.ptq import Plan, quantize_


@pytest.mark.parametrize("family", MIXTURES)
def test_taking_experts_apart_changes_no_output(family, ids):
    model = MIXTURES[family]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    want = model(ids).logits
    split_experts_(model)
    assert sum(isinstance(m, Experts) for m in model.modules()) == 2
    assert torch.allclose(model(ids).logits, want, atol=1e-5)
    names = [target.name for target in find_structure(model).targets]
    assert "model.layers.0.mlp.experts.down_proj.3" in names


@pytest.mark.parametrize("family", MIXTURES)
def test_every_expert_is_packed_alone(family, ids):
    model = MIXTURES[family]()
    report = quantize_(model, Plan(AbsmeanOptions(), allow_partial=True))
    experts = [d for d in report.binarized if ".experts." in d.name]
    assert len(experts) == 2 * 2 * 4  # blocks × matrices × experts
    layer = model.get_submodule("model.layers.1.mlp.experts.down_proj.2")
    assert isinstance(layer, PackedLinear)
    packed = model(ids).logits
    for name, module in list(model.named_modules()):
        if isinstance(module, PackedLinear):
            dense = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
            dense.weight = nn.Parameter(module.to_dense())
            dense.bias = module.bias
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, dense)
    assert torch.allclose(model(ids).logits, packed, atol=1e-5)


@pytest.mark.parametrize("keep", [(), ("mlp.experts",), ("experts.down_proj.1",)])
@pytest.mark.parametrize("family", MIXTURES)
def test_saved_and_loaded(family, keep, ids, tmp_path):
    from transformers import AutoModelForCausalLM

    model = MIXTURES[family]()
    signbit.quantize_(model, signbit.SignbitConfig(group=8, keep=keep, allow_partial=True))
    want = model(ids).logits
    path = signbit.save(model, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(path)
    # Dense experts that were kept lie elsewhere in memory after loading, and BLAS may sum by another path there.
    assert (loaded(ids).logits - want).abs().max() <= (1e-6 if keep else 0)
    loaded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (path / "model.safetensors").read_bytes()


def test_a_mixture_that_is_kept_whole_stays_fused():
    model = qwen3_moe()
    split_experts_(model, Selection(keep=("mlp.experts",)))
    assert not any(isinstance(m, Experts) for m in model.modules())
    kept = [d for d in find_structure(model, Selection(keep=("mlp.experts",))).kept if d.why == "all experts kept"]
    assert len(kept) == 2
    assert all(d.asked for d in kept)


def test_a_fused_module_outside_of_the_interface_is_refused():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.w1 = nn.Parameter(torch.zeros(4, 8, 8))

    with pytest.raises(StructureError, match=r"model\.experts is a Odd with the 3-D parameters w1.*--keep"):
        Experts("model.experts", Odd())
