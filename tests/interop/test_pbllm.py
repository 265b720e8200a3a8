"""PB-LLM's dense saves: written here by its formulas, taken apart by their mask files."""

import pytest
import torch
from transformers import LlamaForCausalLM

import signbit
from signbit.cli import main
from signbit.errors import FormatError
from signbit.interop.convert import convert
from signbit.interop.pbllm import layer
from signbit.linear import PackedLinear
from signbit.models import find_structure
from tests.conftest import tiny_llama_config
from tests.families import opt
from tests.interop import originals
from tests.interop.test_import import ROUNDING, _Malicious, continued, difference

SHARE = 0.8


def published(w, method="xnor", group=-1, share=SHARE):
    """PB-LLM's rounding to nearest: the dense matrix, and the mask (True: binarized)."""
    width = w.shape[1] if group == -1 else group
    top, bottom = w.amax(1, keepdim=True).clamp_min(0), w.amin(1, keepdim=True).clamp_max(0)
    step = (top - bottom) / 255
    zero = (-bottom / step).round()
    high = step * (((w / step).round() + zero).clamp(0, 255) - zero)
    mask, low = torch.zeros_like(w, dtype=torch.bool), torch.zeros_like(w)
    for begin in range(0, w.shape[1], width):
        columns = slice(begin, begin + width)
        part = w[:, columns]
        size = part.abs()
        mask[:, columns] = inside = size <= size.flatten().sort().values[int(size.numel() * share)]
        kept = part * inside
        if method == "xnor":
            mean = kept.mean(1, keepdim=True)
            low[:, columns] = (kept - mean).abs().mean(1, keepdim=True) * (part - mean).sign() + mean
        elif method == "sign":
            low[:, columns] = kept.clamp_min(0).mean(1, keepdim=True) * (part > 0)
        elif method == "2bit":
            span = (kept.amax(1, keepdim=True) - kept.amin(1, keepdim=True)) / 3
            low[:, columns] = span * (part / span).round().clamp(-1, 2)
    return torch.where(mask, low, high), mask


def saved(folder, method="xnor", group=-1, dtype=torch.float32, flip=None, skip=()):
    """A quantized model, its directory, and the directory of its masks."""
    model = LlamaForCausalLM(tiny_llama_config(tie_word_embeddings=False)).eval()
    masks = folder.parent / "masks"
    masks.mkdir()
    for name, linear in originals.linears(model):
        if name.endswith(skip):
            continue
        dense, mask = published(linear.weight.data, method, group)
        linear.weight.data = dense
        torch.save(~mask if flip else mask, masks / f"mask_{SHARE}_huggyllama_llama-7b{name}.pkl")
    model = model.to(dtype)
    originals.write(folder, model.state_dict(), model.config)
    return model.float(), folder, masks


@pytest.mark.parametrize(
    ("method", "group"), [("xnor", -1), ("xnor", 8), ("sign", -1), ("prune", -1)], ids=lambda value: str(value)
)
def test_logits_are_the_dense_ones_and_it_generates(method, group, tmp_path, ids, tokenizer, capsys):
    model, folder, masks = saved(tmp_path / "source", method, group)
    tokenizer.save_pretrained(folder)
    out = str(tmp_path / "out")
    assert main(["import", str(folder), "-o", out, "--masks", str(masks)]) == 0
    assert difference(model, out, ids) < ROUNDING
    for name, linear in originals.linears(model):
        (weight,) = signbit.load(out).get_submodule(name).weights
        assert weight.groups == (1 if group == -1 or method == "prune" else linear.in_features // group)
        count = linear.weight.numel() // weight.groups
        assert weight.salient.count == weight.groups * (count - int(count * SHARE) - 1)
        assert torch.allclose(weight.to_dense(), linear.weight, rtol=1e-6, atol=1e-9)
    capsys.readouterr()
    assert main(["generate", out, "w3 w5", "--max-new-tokens", "3"]) == 0
    assert capsys.readouterr().out.removeprefix("w3 w5").split() == continued(model, out, "w3 w5", 3)


def test_half_precision_is_undone_to_its_rounding(tmp_path, ids):
    model, folder, masks = saved(tmp_path / "source", dtype=torch.float16)
    convert(str(folder), tmp_path / "out", masks=masks)
    loaded = signbit.load(tmp_path / "out", dtype=torch.float32)
    for name, linear in originals.linears(model):
        assert torch.equal(loaded.get_submodule(name).to_dense().half().float(), linear.weight)
    assert difference(model, tmp_path / "out", ids) < 0.01


@pytest.mark.parametrize("group", [-1, 128])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_wide_rows_of_many_codes(dtype, group):
    dense, mask = published(torch.randn(64, 1024), group=group, share=0.9)
    (made,) = layer(dense.to(dtype), mask).packed.weights
    assert made.groups == (1 if group == -1 else 8)
    assert made.salient.bits == 8
    if dtype is torch.float16:
        assert torch.equal(made.to_dense().half(), dense.half())
    else:
        assert torch.allclose(made.to_dense(), dense, rtol=1e-6, atol=0)


def test_bfloat16_is_refused():
    dense, mask = published(torch.randn(8, 32))
    with pytest.raises(FormatError, match="bfloat16 has rounded"):
        layer(dense.bfloat16(), mask)


def test_layers_without_a_mask_stay_dense(tmp_path, ids):
    model, folder, masks = saved(tmp_path / "source", skip=("down_proj",))
    convert(str(folder), tmp_path / "out", masks=masks)
    assert difference(model, tmp_path / "out", ids) < ROUNDING
    assert isinstance(signbit.load(tmp_path / "out").model.layers[0].mlp.down_proj, torch.nn.Linear)


def test_opt_with_biases_and_tied_embeddings(tmp_path, ids):
    model, masks = opt().eval(), tmp_path / "masks"
    masks.mkdir()
    for target in find_structure(model).targets:
        linear = model.get_submodule(target.name)
        linear.bias.data.normal_()
        linear.weight.data, mask = published(linear.weight.data)
        torch.save(mask, masks / f"mask_{SHARE}_facebook_opt-350m{target.name}.pkl")
    model.save_pretrained(tmp_path / "source")
    convert(str(tmp_path / "source"), tmp_path / "out", masks=masks)
    assert difference(model, tmp_path / "out", ids) < ROUNDING
    assert isinstance(signbit.load(tmp_path / "out").model.decoder.layers[0].fc1, PackedLinear)


def test_a_mask_that_is_turned_round_is_refused(tmp_path):
    _, folder, masks = saved(tmp_path / "source", flip=True)
    with pytest.raises(FormatError, match=r"q_proj with mask_.*more than two values"):
        convert(str(folder), tmp_path / "out", masks=masks)


def test_other_methods_and_masks_are_refused(tmp_path):
    _, folder, masks = saved(tmp_path / "source", "2bit")
    with pytest.raises(FormatError, match="xnor, sign and prune are read"):
        convert(str(folder), tmp_path / "out", masks=masks)
    with pytest.raises(FormatError, match="holds no mask file"):
        convert(str(folder), tmp_path / "out", masks=tmp_path / "nowhere")
    first = next(masks.glob("*layers.0.self_attn.q_proj.pkl"))
    with pytest.raises(FormatError, match=rf"q_proj\.pkl is a file; give the directory of all masks: --masks {masks}$"):
        convert(str(folder), tmp_path / "out", masks=first)
    torch.save(torch.zeros(2, 2, dtype=torch.bool), first)
    with pytest.raises(FormatError, match=r"mask is torch.bool \[2, 2\]"):
        convert(str(folder), tmp_path / "out", masks=masks)
    twice = first.with_name(first.name.replace(str(SHARE), "0.5"))
    twice.write_bytes(first.read_bytes())
    with pytest.raises(FormatError, match="are both masks of"):
        convert(str(folder), tmp_path / "out", masks=masks)
    twice.rename(masks / "mask_0.9_model.layers.7.mlp.up_proj.pkl")
    with pytest.raises(FormatError, match="ends with the name of no layer"):
        convert(str(folder), tmp_path / "out", masks=masks)


def test_a_malicious_mask_does_not_run(tmp_path):
    _, folder, masks = saved(tmp_path / "source")
    witness = tmp_path / "it ran"
    torch.save(_Malicious(witness), min(masks.glob("*.pkl")))
    with pytest.raises(FormatError, match="runs nothing out of a pickle"):
        convert(str(folder), tmp_path / "out", masks=masks)
    assert not witness.exists()


def test_literal_values():
    weight = torch.tensor([[0.5, -0.25, 0.5, -3.0, 0.125, 1.0]])
    mask = torch.tensor([[True, True, True, False, True, False]])
    weight[0, 4] = 0.5
    made = layer(weight, mask)
    (w,) = made.packed.weights
    assert w.scale.tolist() == [[[0.375]]]
    assert w.shift.tolist() == [[0.125]]
    assert w.signs.tolist() == [[[0b010101]]]
    assert w.salient.scale.tolist() == [1.0]
    assert w.salient.zero.tolist() == [3]
    assert made.packed.to_dense().tolist() == weight.tolist()


def test_a_weight_on_the_mean_is_counted():
    weight = torch.tensor([[0.5, -0.5]]).repeat(1, 200)
    weight[0, 7] = 0.0
    made = layer(weight, torch.ones_like(weight, dtype=torch.bool))
    assert made.zeros == 1
    assert made.packed.to_dense()[0, 7] == 0.5
