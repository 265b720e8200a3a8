import pytest
import torch
from tests.families import gemma3, opt, phi
from tests.families import llama as make_llama

from signbit.errors import OptionError, StructureError, WeightError
from signbit.linear import Int8Embedding, Int8Head, PackedLinear
from signbit.methods import AbsmeanOptions, PbllmOptions
from signbit.methods.base import Needs
from signbit.ptq import Plan, estimate, memory, plan_head, quantize_, quantize_head_
from signbit.ptq.head import embedding_multiplier


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_infinity_name_the_layer(llama, bad):
    with torch.no_grad():
        llama.model.layers[1].mlp.down_proj.weight[3, 5] = bad
    with pytest.raises(WeightError, match=r"model\.layers\.1\.mlp\.down_proj: 1 of its 2304 weights"):
        quantize_(llama, Plan(AbsmeanOptions()))
    assert not any(isinstance(m, PackedLinear) for m in llama.modules()), "nothing was changed"


def test_scales_outside_their_dtype_name_the_layer(llama):
    with torch.no_grad():
        llama.model.layers[0].mlp.up_proj.weight.mul_(1e9)
    with pytest.raises(WeightError, match=r"up_proj: scales up to .* do not fit float16; use float32"):
        quantize_(llama, Plan(AbsmeanOptions()))
    tiny = make_llama()
    with torch.no_grad():
        tiny.model.layers[0].mlp.up_proj.weight.mul_(1e-9)
    with pytest.raises(WeightError, match="do not fit float16"):
        quantize_(tiny, Plan(AbsmeanOptions()))
    assert quantize_(make_llama(), Plan(AbsmeanOptions(scale_dtype="float32"))).share > 0.9


def test_a_group_that_does_not_divide_is_an_error_before_anything_changes(llama):
    with pytest.raises(OptionError, match=r"q_proj: a group of 48 columns does not divide 32; use one of 32"):
        quantize_(llama, Plan(AbsmeanOptions(group=48)))
    with pytest.raises(OptionError, match=r"down_proj: a group of 32 columns does not divide 72"):
        quantize_(llama, Plan(AbsmeanOptions(group=32)))
    assert not any(isinstance(m, PackedLinear) for m in llama.modules())


def test_progress_counts_layers(llama):
    seen = []
    quantize_(llama, Plan(AbsmeanOptions()), progress=lambda done, total, name: seen.append((done, total, name)))
    assert [done for done, _, _ in seen] == list(range(1, 15))
    assert {total for _, total, _ in seen} == {14}
    assert seen[-1][2] == "model.layers.1.mlp.down_proj"


def test_bias_stays_in_full_precision():
    model = opt()
    with torch.no_grad():
        model.model.decoder.layers[0].fc1.bias.normal_()
    bias = model.model.decoder.layers[0].fc1.bias.detach().clone()
    quantize_(model, Plan(AbsmeanOptions()))
    assert torch.equal(model.model.decoder.layers[0].fc1.bias, bias)


def test_low_no_stays_dense_and_is_reported(llama):
    options = PbllmOptions(low="no", salient=0.3, gptq=False, saliency="magnitude")
    with pytest.raises(StructureError, match=r"only 0\.0%.*leaves its matrix dense"):
        quantize_(llama, Plan(options))
    before = llama.model.layers[0].mlp.up_proj.weight.detach().clone()
    report = quantize_(llama, Plan(options, allow_partial=True))
    after = llama.model.layers[0].mlp.up_proj.weight
    assert report.binarized == []
    assert 0 < int((before != after).sum()) <= 0.3 * before.numel()
    assert (before - after).abs().max() < 0.01


def test_the_head_of_a_tied_pair_stays_one_tensor(llama, ids):
    weight = llama.lm_head.weight.detach().clone()
    want = llama(ids).logits
    decisions = quantize_head_(llama)
    assert [d.action for d in decisions] == ["int8", "int8"]
    assert decisions[0].nbytes == 64 * 32 + 4 * 64
    assert decisions[1].nbytes == 0
    assert isinstance(llama.lm_head, Int8Head)
    assert isinstance(llama.model.embed_tokens, Int8Embedding)
    assert llama.lm_head.weight is llama.model.embed_tokens.weight
    assert llama.lm_head.scale is llama.model.embed_tokens.scale
    assert (llama.lm_head.to_dense() - weight).abs().max() <= weight.abs().amax() / 127 / 2 * 1.01
    assert (llama(ids).logits - want).abs().max() < 0.05 * want.abs().max()


def test_an_untied_head_with_bias():
    model = phi()
    head = model.lm_head.weight.detach().clone()
    assert model.lm_head.bias is not None
    quantize_head_(model)
    assert model.lm_head.bias is not None
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert (model.lm_head.to_dense() - head).abs().max() <= head.abs().amax() / 127 / 2 * 1.01


def test_gemma_embedding_keeps_its_multiplier(ids):
    model = gemma3()
    want = model.model.embed_tokens(ids)
    assert embedding_multiplier(model.model.embed_tokens) == pytest.approx(32**0.5, rel=1e-6)
    quantize_head_(model)
    assert (model.model.embed_tokens(ids) - want).abs().max() <= want.abs().max() / 127


def test_an_embedding_that_does_more_than_look_up_is_refused(llama):
    class Odd(torch.nn.Embedding):
        def forward(self, x):
            return super().forward(x).cumsum(-1)

    llama.model.embed_tokens = Odd(64, 32)
    with pytest.raises(StructureError, match="no scaled look-up"):
        quantize_head_(llama)


def test_plan_of_the_head_and_memory(llama):
    with torch.device("meta"):
        skeleton = type(llama)(llama.config)
    assert plan_head(skeleton) == plan_head(llama)
    report = estimate(skeleton, Plan(AbsmeanOptions()), int8_head=True)
    need = memory(llama, report, Needs(), 0)
    assert need.dense_bytes == sum(p.numel() * 4 for p in llama.parameters())
    quantize_(llama, Plan(AbsmeanOptions()))
    quantize_head_(llama)
    now = sum(p.numel() * p.element_size() for p in llama.parameters())
    now += sum(b.numel() * b.element_size() for n, b in llama.named_buffers() if "inv_freq" not in n)
    assert need.packed_bytes == now
    assert need.peak_bytes > need.dense_bytes
