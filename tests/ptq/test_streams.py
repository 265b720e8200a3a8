"""Each block gets what the model itself hands it."""

import pytest
import torch
from tests.families import DENSE, MIXTURES
from torch import nn

from signbit.errors import WeightError
from signbit.methods import PbGptqOptions, PbllmOptions
from signbit.models import find_structure, split_experts_
from signbit.ptq import Plan, quantize_
from signbit.ptq.moments import Meter, find_groups
from signbit.ptq.quantize import Blocks, Walk
from signbit.ptq.streams import Stream

FAMILIES = {name: make for name, (make, _) in DENSE.items()} | MIXTURES


def windows(samples=3, length=12):
    return torch.randint(3, 64, (samples, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("where", ["device", "cpu", "disk"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_block_sees_what_it_sees_in_a_whole_forward(family, where, tmp_path):
    model = FAMILIES[family]()
    blocks = model.get_submodule(find_structure(model).blocks)
    seen, want = [], []

    def note(store):
        return lambda _m, args, kwargs: store.append((args, kwargs))

    hooks = [block.register_forward_pre_hook(note(want), with_kwargs=True) for block in blocks]
    for window in windows():
        model(input_ids=window[None], use_cache=False)
    for hook in hooks:
        hook.remove()
    stream = Stream(model, blocks, windows(), "cpu", where, tmp_path / "stream")
    for index, block in enumerate(blocks):
        hook = block.register_forward_pre_hook(note(seen), with_kwargs=True)
        for window in range(3):
            stream.run(index, window, keep=True)
        hook.remove()
    order = [window * len(blocks) + index for index in range(len(blocks)) for window in range(3)]
    for (args, kwargs), place in zip(seen, order, strict=True):
        flat, spec = torch.utils._pytree.tree_flatten((args, kwargs))
        other, other_spec = torch.utils._pytree.tree_flatten(want[place])
        assert spec == other_spec
        for a, b in zip(flat, other, strict=True):
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b or type(a) is type(b)
    assert "forward" not in vars(blocks[0]), "nothing is left behind"


@torch.no_grad()
def test_groups_are_layers_of_one_input_in_the_order_of_the_forward():
    model = FAMILIES["llama"]()
    structure = find_structure(model)
    stream = Stream(model, model.model.layers, windows(), "cpu", "cpu", None)
    layers = {t.name: model.get_submodule(t.name) for t in structure.targets if t.block == 0}
    groups = find_groups(stream, 0, layers, sequential=True)
    short = [[name.rpartition(".")[2] for name in group.names] for group in groups]
    assert short == [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
    assert len(set(groups[0].inputs.values())) == 1
    assert len(find_groups(stream, 0, layers, sequential=False)) == 1


@torch.no_grad()
def test_experts_of_one_kind_are_one_group():
    model = MIXTURES["qwen3_moe"]()
    split_experts_(model)
    stream = Stream(model, model.model.layers, windows(), "cpu", "cpu", None)
    layers = {t.name: model.get_submodule(t.name) for t in find_structure(model).targets if t.block == 0}
    groups = find_groups(stream, 0, layers, sequential=True)
    assert [len(group.names) for group in groups] == [3, 1, 4, 4]


@torch.no_grad()
def test_moments_are_the_means_over_tokens():
    model = FAMILIES["opt"]()
    block = model.model.decoder.layers[0]
    stream = Stream(model, model.model.decoder.layers, windows(), "cpu", "cpu", None)
    name = "model.decoder.layers.0.fc2"
    layers = {name: block.fc2}
    xs = []
    hook = block.fc2.register_forward_pre_hook(lambda _m, args: xs.append(args[0].reshape(-1, 64).clone()))
    for window in range(3):
        stream.run(0, window)
    hook.remove()
    x = torch.cat(xs)
    from contextlib import ExitStack

    group = find_groups(stream, 0, layers, sequential=True)[0]
    meter = Meter(layers, group, [name])
    for window in range(3):
        for dense in (True, False):
            block.fc1.bias.data += 0.1 if dense else -0.1  # what the dense model has otherwise
            with ExitStack() as stack:
                meter.listen(stack, dense, stop=True)
                stream.run(0, window)
    moments = meter.moments(name)
    assert moments.tokens == 36
    assert torch.allclose(moments.hessian, x.T @ x / 36, atol=1e-5)
    assert moments.cross.abs().max() > 0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e38])
def test_activations_that_are_not_finite_name_the_layer(value):
    model = FAMILIES["llama"]()
    with torch.no_grad():
        model.model.layers[1].post_attention_layernorm.weight[3] = value
    if value != 1e38:
        # Such a weight is found before; here it comes in behind the check, as an overflow would.
        structure = find_structure(model)
        plan = Plan(PbGptqOptions())
        walk = Walk(Blocks(model, structure, plan), windows())
        with pytest.raises(WeightError, match=r"model\.layers\.1\.mlp\.(gate|up)_proj: its inputs overflow or are NaN"):
            walk.run()
    else:
        with pytest.raises(WeightError, match=r"model\.layers\.1"):
            quantize_(model, Plan(PbGptqOptions()), windows())


def test_an_output_that_overflows_names_the_block():
    model = FAMILIES["llama"]()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(1e30)
        model.model.layers[0].mlp.down_proj.weight.mul_(1e30)
    with pytest.raises(WeightError, match=r"model\.layers\.0"):
        quantize_(model, Plan(PbGptqOptions(scale_dtype="float32")), windows())


@pytest.mark.parametrize("options", [PbGptqOptions(), PbllmOptions(), PbllmOptions(match="prefix")])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_calibrated(family, options, ids):
    torch.manual_seed(3)
    model = FAMILIES[family]()
    dense_head = model.get_output_embeddings().weight.detach().clone()
    before = {name: p.dtype for name, p in model.named_parameters()}
    report = quantize_(model, Plan(options, allow_partial=True), windows(8, 32))
    assert all(d.error is not None and 0 < d.error < 1.5 for d in report.binarized)
    assert model(ids).logits.isfinite().all()
    assert torch.equal(model.get_output_embeddings().weight, dense_head)
    assert all(p.dtype is before[name] for name, p in model.named_parameters() if name in before)


def test_calibration_beats_rounding_in_what_the_model_says(ids):
    torch.manual_seed(0)
    model = FAMILIES["llama"]()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" not in name:
                p.mul_(6)
    import copy

    text = windows(16, 64)
    want = model(text).logits
    errors = {}
    for label, options in {
        "rounded": PbllmOptions(salient=0.3, gptq=False, saliency="magnitude"),
        "published": PbGptqOptions(salient=0.3),
        "default": PbllmOptions(salient=0.3),
    }.items():
        quantized = copy.deepcopy(model)
        quantize_(quantized, Plan(options), text if options.needs.moments else None)
        errors[label] = (quantized(text).logits - want).square().mean().item()
    assert errors["default"] < errors["published"] < errors["rounded"]


def test_low_precision_models_keep_their_dtype():
    model = FAMILIES["llama"]().to(torch.bfloat16)
    norm = model.model.layers[0].input_layernorm.weight.detach().clone()
    quantize_(model, Plan(PbllmOptions()), windows())
    assert model.model.layers[0].input_layernorm.weight.dtype is torch.bfloat16
    assert torch.equal(model.model.layers[0].input_layernorm.weight, norm)
    assert model.model.embed_tokens.weight.dtype is torch.bfloat16


def test_an_expert_that_saw_too_few_tokens_is_rounded_and_listed():
    torch.manual_seed(0)
    model = MIXTURES["qwen3_moe"]()
    with torch.no_grad():
        model.model.layers[0].mlp.gate.weight.zero_()
        model.model.layers[0].mlp.gate.weight[:2] += 1.0  # two of four experts get nearly every token
    report = quantize_(model, Plan(PbllmOptions(), allow_partial=True), windows(2, 32))
    few = [d for d in report.binarized if "too few calibration tokens" in d.why]
    assert few
    assert all(".experts." in d.name for d in few)
    assert all("rounded to nearest" in d.why for d in few)
    enough = [d for d in report.binarized if ".experts." in d.name and d not in few]
    assert enough
    assert any("too few" in line.why for line in report.summary())


def test_linears_that_are_no_target_stay():
    model = FAMILIES["llama"]()
    from signbit.models import Selection

    report = quantize_(model, Plan(PbllmOptions(), Selection(only=("mlp",))), windows())
    assert isinstance(model.model.layers[0].self_attn.q_proj, nn.Linear)
    assert {d.why for d in report.decisions if "self_attn" in d.name} == {"not selected"}


def test_rules_that_match_one_layer_are_taken_together():
    """What must be measured follows from a layer's merged options, not from each rule alone."""
    plan = Plan(
        PbllmOptions(gptq=False, saliency="magnitude", match="prefix"),
        rules={"mlp": {"gptq": True}, "down_proj": {"match": "dense"}},
    )
    assert not plan.needs(["a.self_attn.q_proj"]).moments
    assert plan.needs(["a.mlp.up_proj"]).moments
    assert not plan.needs(["a.mlp.up_proj"]).cross
    assert plan.needs(["a.mlp.down_proj"]).cross


def test_dropout_is_off_while_inputs_are_measured():
    outputs = []
    for seed in (0, 1):
        torch.manual_seed(0)
        model = FAMILIES["opt"]()
        model.config.dropout = 0.5
        for module in model.modules():
            if hasattr(module, "dropout") and isinstance(module.dropout, float):
                module.dropout = 0.5
        model.train()
        torch.manual_seed(seed)
        quantize_(model, Plan(PbllmOptions()), windows())
        assert model.training
        outputs.append(model.eval()(windows()).logits)
    assert torch.equal(*outputs)


def test_a_linear_whose_input_is_named():
    model = FAMILIES["llama"]()
    mlp = type(model.model.layers[0].mlp)

    class Named(mlp):
        def forward(self, x):
            return self.down_proj(input=self.act_fn(self.gate_proj(input=x)) * self.up_proj(input=x))

    for layer in model.model.layers:
        layer.mlp.__class__ = Named
    report = quantize_(model, Plan(PbllmOptions()), windows())
    assert report.share > 0.9


def test_a_failed_cholesky_names_the_layer():
    model = FAMILIES["llama"]()
    from signbit.ptq import moments as measured

    def indefinite(self, name):
        found = real(self, name)
        found.hessian[0, 0] = -100 if name.endswith("1.mlp.down_proj") else found.hessian[0, 0]
        return found

    real = measured.Meter.moments
    try:
        measured.Meter.moments = indefinite
        with pytest.raises(WeightError, match=r"model\.layers\.1\.mlp\.down_proj: the Hessian .* use --damping 0\.1"):
            quantize_(model, Plan(PbllmOptions()), windows())
    finally:
        measured.Meter.moments = real


def test_windows_that_are_not_needed_are_refused():
    from signbit.errors import OptionError
    from signbit.methods import AbsmeanOptions

    with pytest.raises(OptionError, match="measures no inputs"):
        quantize_(FAMILIES["llama"](), Plan(AbsmeanOptions()), windows())
