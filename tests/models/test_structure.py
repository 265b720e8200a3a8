import pytest
import torch
from tests.families import DENSE
from torch import nn

from signbit.errors import OptionError, StructureError
from signbit.linear import PackedLinear
from signbit.methods import AbsmeanOptions
from signbit.models import Selection, find_structure, linear_parts, matches
from signbit.ptq import Plan, estimate, quantize_


@pytest.mark.parametrize("family", DENSE)
def test_every_linear_of_every_block_is_found(family):
    make, per_block = DENSE[family]
    model = make()
    structure = find_structure(model)
    assert structure.block_count == 2
    assert len(structure.targets) == 2 * per_block
    assert [t.block for t in structure.targets] == [0] * per_block + [1] * per_block
    for target in structure.targets:
        weight, _ = linear_parts(model.get_submodule(target.name))
        assert weight.shape == (target.out_features, target.in_features)
    head = model.get_output_embeddings()
    outside = {d.name for d in structure.kept}
    assert {name for name, module in model.named_modules() if module is head} <= outside
    assert all(d.why == "outside the repeated block" for d in structure.kept)


@pytest.mark.parametrize("family", DENSE)
def test_quantized_families_run_and_nothing_else_changed(family, ids):
    make, _ = DENSE[family]
    model = make()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    dense = {t.name: linear_parts(model.get_submodule(t.name))[0].clone() for t in find_structure(model).targets}
    report = quantize_(model, Plan(AbsmeanOptions()))
    assert report.share > 0.9
    assert len(report.binarized) == len(dense)
    for name, weight in dense.items():
        layer = model.get_submodule(name)
        assert isinstance(layer, PackedLinear)
        want = torch.where(weight >= 0, 1.0, -1.0) * weight.abs().mean(1, keepdim=True).half().float()
        assert torch.equal(layer.to_dense(), want)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
    assert torch.isfinite(model(ids).logits).all()


def test_conv1d_is_transposed(ids):
    """A GPT-2 whose weights are binary already is the same model after quantizing."""
    from tests.families import gpt2

    model = gpt2()
    with torch.no_grad():
        for target in find_structure(model).targets:
            weight = model.get_submodule(target.name).weight
            weight.copy_(torch.where(weight >= 0, 0.25, -0.25))
    want = model(ids).logits
    quantize_(model, Plan(AbsmeanOptions(scale_dtype="float32")))
    assert torch.allclose(model(ids).logits, want, atol=1e-5)


def test_a_model_without_a_block_is_refused():
    with pytest.raises(StructureError, match="no repeated block"):
        find_structure(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))


def test_a_model_that_is_packed_already_is_refused(llama):
    quantize_(llama, Plan(AbsmeanOptions()))
    with pytest.raises(StructureError, match=r"layers\.0.* binarized already"):
        find_structure(llama)


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("layers.1", "model.layers.1.mlp.up_proj", True),
        ("layers.1", "model.layers.10.mlp.up_proj", False),
        ("mlp.*_proj", "model.layers.0.mlp.up_proj", True),
        ("mlp.*_proj", "model.layers.0.self_attn.q_proj", False),
        ("down_proj", "model.layers.0.mlp.down_proj", True),
        ("down", "model.layers.0.mlp.down_proj", False),
        ("model.layers.0.mlp.down_proj.x", "model.layers.0.mlp.down_proj", False),
    ],
)
def test_patterns_are_whole_dotted_parts(pattern, name, expected):
    assert matches(pattern, name) is expected


def test_what_is_kept_on_request_does_not_count(llama):
    report = quantize_(llama, Plan(AbsmeanOptions(), Selection(keep=("mlp", "layers.0"))))
    assert report.share > 0.9
    assert isinstance(llama.model.layers[1].self_attn.q_proj, PackedLinear)
    assert not isinstance(llama.model.layers[0].self_attn.q_proj, PackedLinear)
    assert not isinstance(llama.model.layers[1].mlp.up_proj, PackedLinear)
    kept = [d for d in report.decisions if d.asked]
    assert {d.why for d in kept} == {"--keep mlp", "--keep layers.0"}


def test_a_keep_pattern_that_matches_nothing_is_an_error(llama):
    with pytest.raises(OptionError, match=r"layers\.7 matches no linear layer.*model\.layers\.0"):
        find_structure(llama, Selection(keep=("layers.7",)))


def test_a_subclass_of_linear_is_kept_and_too_much_of_it_is_an_error(llama):
    class Odd(nn.Linear):
        pass

    for block in llama.model.layers:
        block.mlp.up_proj = Odd(32, 72, bias=False)
    with pytest.raises(StructureError, match=r"only .*%.*up_proj \(a Odd.*--allow-partial"):
        quantize_(llama, Plan(AbsmeanOptions()))
    assert not any(isinstance(m, PackedLinear) for m in llama.modules()), "nothing was changed"
    report = quantize_(llama, Plan(AbsmeanOptions(), allow_partial=True))
    assert 0.5 < report.share < 0.9


def test_plan_predicts_the_bytes_of_a_model_on_meta(llama):
    with torch.device("meta"):
        skeleton = type(llama)(llama.config)
    planned = estimate(skeleton, Plan(AbsmeanOptions(group=8)))
    done = quantize_(llama, Plan(AbsmeanOptions(group=8)))
    assert [(d.name, d.nbytes) for d in planned.binarized] == [(d.name, d.nbytes) for d in done.binarized]
    assert planned.share == done.share
    assert planned.bits_per_weight == done.bits_per_weight


def test_summary_groups_blocks(llama):
    lines = {line.name: line for line in quantize_(llama, Plan(AbsmeanOptions())).summary()}
    assert lines["model.layers.*.mlp.up_proj"].layers == 2
    assert lines["model.layers.*.mlp.up_proj"].bits == "1.500"  # 4 bytes of signs and 2 of scale for 32 columns
    assert lines["lm_head"].action == "kept"
