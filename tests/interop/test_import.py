"""`signbit import`: each form against an independent implementation of the original's forward, and what it refuses."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitNetConfig, BitNetForCausalLM, LlamaForCausalLM

import signbit
from signbit.cli import main
from signbit.errors import FormatError, OptionError, WeightError
from signbit.format import read_description
from signbit.interop.convert import convert
from signbit.interop.recognise import open_checkpoint
from signbit.linear import PackedLinear
from tests.conftest import tiny_llama_config
from tests.interop import originals

#: Of the largest logit: what float32 rounding leaves through two blocks.
ROUNDING = 2e-5
#: BitNet-Transformers' layers bring their outputs to ±128 by the largest, and the last bits with them: by the reference and by
#: some kernels, which add up in another order than its own product does, 4.4e-5 are left.
ROUNDING_MAGNIFIED = 1e-4


def llama(make=None, **changes):
    """The reference: transformers' LLaMA with the original's layers in it."""
    torch.manual_seed(1)
    model = LlamaForCausalLM(tiny_llama_config(tie_word_embeddings=False, **changes)).eval()
    return model if make is None else originals.replaced(model, make)


def fbi(folder, flip=None, pattern="column", **how):
    model = llama(lambda n, k: originals.Fbi(n, k, pattern))
    tensors = model.state_dict()
    if flip == "sign":
        tensors = {n: -t if n.endswith("proj.weight") else t for n, t in tensors.items()}
    if flip == "scale and shift":
        other = {"wscale": "wbias", "wbias": "wscale"}
        tensors = {n.replace(n.rpartition(".")[2], other.get(n.rpartition(".")[2], n.rpartition(".")[2])): t
                   for n, t in tensors.items()}  # fmt: skip
    tensors = {**tensors, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    return model, originals.write(folder, tensors, model.config, **how)


def onebit(folder, flip=None, **how):
    model = llama(originals.OneBit)
    tensors = model.state_dict()
    if flip == "vectors":  # square matrices only, where shapes do not tell
        for name, layer in originals.linears(model):
            if name.endswith(("q_proj", "o_proj")):
                tensors[f"{name}.weight_scale"], tensors[f"{name}.input_factor"] = (
                    layer.input_factor,
                    layer.weight_scale,
                )
    return model, originals.write(folder, tensors, model.config, model_type="bitllama", pretraining_tp=1,
                                  architectures=["BitLlamaForCausalLM"], **how)  # fmt: skip


def onebit_packed(folder, flip=None, **how):
    model = llama(originals.OneBit)
    tensors = model.state_dict()
    for name, layer in originals.linears(model):
        weight = layer.weight.detach()
        if flip == "order of bits":
            weight = weight.reshape(len(weight), -1, 8).flip(-1).reshape(weight.shape)
        packed = originals.onebit_bytes(weight)
        tensors[f"{name}.weight"] = ~packed if flip == "1 is +1" else packed
    return model, originals.write(folder, tensors, model.config, model_type="bitllama",
                                  architectures=["BitLlamaForCausalLMInf"], **how)  # fmt: skip


def beomi(folder, flip=None, **how):
    model = llama(originals.Beomi)
    tensors = model.state_dict()
    for name, layer in originals.linears(model):
        q = layer.quantized_weights
        tensors[f"{name}.weight"] = (q * q.float().mean().sign()).bfloat16()  # the copy that nothing reads
        if flip == "rows and columns" and len(q) == q.shape[1]:  # of −q for q the layer makes the same
            tensors[f"{name}.quantized_weights"] = q.T
    return model, originals.write(folder, tensors, model.config, **how)


def ternary(folder, flip=None, kind="bitlinear", norm=False, **how):
    model = llama(lambda n, k: originals.Ternary(n, k, norm))
    tensors = model.state_dict()
    for name, layer in originals.linears(model):
        values = layer.ternary
        if flip == "packed along columns":
            values = values.reshape(-1, 4, values.shape[1]).transpose(0, 1).reshape(values.shape)
        if flip == "codes":
            values = -values
        scale = 1 / layer.scale if (kind == "bitlinear") != (flip == "reciprocal") else layer.scale
        tensors |= {f"{name}.weight": originals.ternary_bytes(values), f"{name}.weight_scale": torch.tensor([scale])}
        if norm:
            tensors[f"{name}.rms_norm.weight"] = layer.norm
    quantization = {"quant_method": "bitnet", "linear_class": kind, "quantization_mode": "offline",
                    "use_rms_norm": norm, "rms_norm_eps": 1e-6, "modules_to_not_convert": ["lm_head"]}  # fmt: skip
    return model, originals.write(folder, tensors, model.config, quantization_config=quantization, **how)


FORMS = {
    "fbi column": fbi,
    "fbi row": lambda folder, **how: fbi(folder, pattern="row", **how),
    "fbi single": lambda folder, **how: fbi(folder, pattern="single", **how),
    "onebit training": onebit,
    "onebit packed": onebit_packed,
    "bitnet-transformers": beomi,
    "bitnet ternary": ternary,
    "bitnet ternary, autobitlinear": lambda folder, **how: ternary(folder, kind="autobitlinear", **how),
    "bitnet ternary, norm": lambda folder, **how: ternary(folder, norm=True, **how),
}
FLIPS = [
    (fbi, "sign"), (fbi, "scale and shift"), (onebit, "vectors"), (onebit_packed, "1 is +1"),
    (onebit_packed, "order of bits"), (beomi, "rows and columns"), (ternary, "packed along columns"), (ternary, "codes"),
    (ternary, "reciprocal"),
]  # fmt: skip


@torch.inference_mode()
def difference(model, out, ids):
    """The largest difference of two models' logits, over the largest logit."""
    loaded = signbit.load(out, dtype=torch.float32)
    want = model(ids).logits
    return float((loaded(ids).logits - want).abs().max() / want.abs().max())


def continued(model, out, prompt, tokens):
    """The words with which `model` itself goes on, by the tokenizer in `out`."""
    tokenizer = AutoTokenizer.from_pretrained(out)
    encoded = tokenizer(prompt, return_tensors="pt")
    ids, mask = encoded["input_ids"], encoded["attention_mask"]
    written = model.generate(ids, attention_mask=mask, max_new_tokens=tokens, do_sample=False)[0, ids.shape[1] :]
    assert len(written)
    return tokenizer.decode(written, skip_special_tokens=True).split()


@pytest.fixture
def text(tokenizer, tmp_path):
    """A directory that holds a tokenizer alone."""
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    return str(tmp_path / "tokenizer")


@pytest.mark.parametrize("form", FORMS)
def test_logits_are_the_originals_and_it_generates(form, tmp_path, ids, text, capsys):
    model, folder = FORMS[form](tmp_path / "source")
    out = str(tmp_path / "out")
    assert main(["import", str(folder), "-o", out, "--tokenizer", text]) == 0
    loaded = signbit.load(out)
    packed = [m for m in loaded.modules() if isinstance(m, PackedLinear)]
    assert len(packed) == len(originals.linears(model))
    assert all(w.signs.shape[0] <= 2 for m in packed for w in m.weights)
    assert difference(model, out, ids) < (ROUNDING_MAGNIFIED if form == "bitnet-transformers" else ROUNDING)
    capsys.readouterr()
    assert main(["generate", out, "w3 w5", "--max-new-tokens", "4"]) == 0
    prompt = torch.tensor([[6, 8]])  # w3 w5
    want = model.generate(prompt, max_new_tokens=4, do_sample=False, attention_mask=torch.ones_like(prompt))
    words = [f"w{i - 3}" for i in want[0, 2:].tolist() if i > 2]
    assert capsys.readouterr().out.removeprefix("w3 w5").split() == words


@pytest.mark.parametrize(("form", "flip"), FLIPS, ids=lambda value: getattr(value, "__name__", value))
def test_one_convention_flipped_is_seen(form, flip, tmp_path, ids, text):
    model, folder = form(tmp_path / "source", flip=flip)
    convert(str(folder), tmp_path / "out", tokenizer=text)
    assert difference(model, tmp_path / "out", ids) > 100 * ROUNDING


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("form", ["fbi column", "onebit packed"])
def test_files_of_all_kinds_give_equal_bytes(form, kind, shards, tmp_path, text):
    made = []
    for name, how in (("one", {}), ("other", {"kind": kind, "shards": shards})):
        _, folder = FORMS[form](tmp_path / name, **how)
        convert(str(folder), tmp_path / f"{name}-out", tokenizer=text)
        made.append((tmp_path / f"{name}-out" / "model.safetensors").read_bytes())
    assert made[0] == made[1]


@pytest.mark.parametrize("kind", ["bitlinear", "autobitlinear"])
def test_logits_are_those_of_transformers_own_bitnet(kind, tmp_path, ids, text):
    sizes = tiny_llama_config().to_dict()
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    config = BitNetConfig(**{name: sizes[name] for name in (*names, "vocab_size", "bos_token_id", "eos_token_id")})
    tensors = originals.replaced(BitNetForCausalLM(config), originals.Ternary)
    made = tensors.state_dict()
    for name, layer in originals.linears(tensors):
        scale = layer.scale if kind == "autobitlinear" else 1 / layer.scale
        made |= {
            f"{name}.weight": originals.ternary_bytes(layer.ternary),
            f"{name}.weight_scale": torch.tensor([scale]),
        }
    quantization = {"quant_method": "bitnet", "linear_class": kind, "quantization_mode": "offline"}
    folder = originals.write(tmp_path / "source", made, config, quantization_config=quantization, dtype="float32")
    convert(str(folder), tmp_path / "out", tokenizer=text)
    with torch.compiler.set_stance("force_eager"):  # its functions are compiled, which takes minutes
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        assert difference(model, tmp_path / "out", ids) < ROUNDING


def test_literal_bytes_of_onebit():
    from signbit.interop.onebit import layer

    plus = torch.ones(7)
    for signs, byte in (([-1.0, *plus], 1), ([*plus, -1.0], -128)):
        parts = {"weight": torch.tensor([[byte]], dtype=torch.int8), "weight_scale": torch.tensor([2.0])}
        packed = layer({**parts, "input_factor": torch.ones(8)}, {}).packed
        assert packed.to_dense().tolist() == [[2.0 * s for s in signs]]
        assert int(originals.onebit_bytes(torch.tensor([signs]))) == byte


def test_literal_bytes_of_ternary():
    from signbit.interop.ternary import layer

    values = {"quantization_config": {"quant_method": "bitnet"}}
    parts = {
        "weight": torch.tensor([[0b10_01_00_10, 0b00_00_01_10]], dtype=torch.uint8),
        "weight_scale": torch.tensor([4.0]),
    }
    dense = layer(parts, values).packed.to_dense()
    assert dense.tolist() == [[0.25, 0.25], [-0.25, 0.0], [0.0, -0.25], [0.25, -0.25]]
    parts["weight"] = torch.tensor([[0b11, 0]], dtype=torch.uint8)
    with pytest.raises(FormatError, match="code of 3"):
        layer(parts, values)


def test_literal_values_of_fbi_and_bitnet_transformers():
    from signbit.interop import bitnet_transformers
    from signbit.interop import fbi as fbi_form

    latents = torch.tensor([[0.5, -0.5], [-0.1, 0.0]])
    column = {"weight": latents, "wscale": torch.tensor([[2.0, 3.0]]), "wbias": torch.tensor([[0.5, 0.25]])}
    made = fbi_form.layer(column, {})
    assert made.packed.to_dense().tolist() == [[2.5, -2.75], [-1.5, 3.25]]
    assert made.zeros == 1
    q = torch.tensor([[1, -1, -1], [-1, -1, 0]], dtype=torch.int8)  # mean −1/2: signs turn; a 0 is −1
    made = bitnet_transformers.layer({"quantized_weights": q}, {})
    assert made.packed.to_dense().tolist() == [[-1, 1, 1], [1, 1, -1]]
    assert made.zeros == 1
    balanced = torch.tensor([[1, -1]], dtype=torch.int8)  # mean 0: all of its weights are 0
    assert bitnet_transformers.layer({"quantized_weights": balanced}, {}).packed(torch.ones(1, 2)).tolist() == [[0.0]]


@pytest.mark.parametrize("form", ["fbi column", "onebit training"])
def test_zeros_are_counted_and_reported(form, tmp_path, text, capsys):
    _, folder = FORMS[form](tmp_path / "source")
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, :5] = 0
    save_file(tensors, folder / "model.safetensors")
    assert main(["import", str(folder), "-o", str(tmp_path / "out"), "--tokenizer", text]) == 0
    assert "5 stored weights are exactly 0: their sign was 0" in capsys.readouterr().err
    assert read_description(tmp_path / "out")[1].settings["options"]["zeros"] == 5
    layer = signbit.load(tmp_path / "out").model.layers[1].mlp.up_proj
    assert int(layer.weights[0].signs[0, 3, 0]) & 0b11111 == 0b11111


class _Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("old", [False, True])
def test_a_malicious_pickle_does_not_run(old, tmp_path, text):
    model, folder = fbi(tmp_path / "source", kind="bin")
    witness = tmp_path / "it ran"
    content = {**model.state_dict(), "extra": _Malicious(witness)}
    torch.save(content, folder / "pytorch_model.bin", _use_new_zipfile_serialization=not old)
    with pytest.raises(FormatError, match="runs nothing out of a pickle"):
        convert(str(folder), tmp_path / "out", tokenizer=text)
    assert not witness.exists()
    assert not (tmp_path / "out").exists()
    torch.load(folder / "pytorch_model.bin", weights_only=False)  # the file is what it is meant to be
    assert witness.exists()


def _changed(folder, change):
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


UP = "model.layers.1.mlp.up_proj"


def _without(*names):
    return lambda tensors: [tensors.pop(name) for name in names]


@pytest.mark.parametrize(
    ("form", "change", "said"),
    [
        ("fbi column", _without(f"{UP}.wbias"), f"{UP}.wbias is missing"),
        ("fbi column", _without(f"{UP}.wscale"), f"{UP}.wscale is missing"),
        ("fbi column", _without(f"{UP}.wscale", f"{UP}.wbias"), f"{UP} is not binarized as in FBI-LLM"),
        ("fbi column", _without("model.norm.weight"), "model.norm.weight is missing"),
        ("fbi column", lambda t: t.update({"model.extra": torch.ones(2)}), "model.extra is not one of"),
        ("fbi column", lambda t: t.update({f"{UP}.wscale": torch.ones(3, 1)}), f"{UP}: wscale is \\[3, 1\\]"),
        ("fbi column", lambda t: t.update({"model.norm.weight": torch.ones(3)}), "model.norm.weight is \\[3\\]"),
        ("onebit packed", _without(f"{UP}.input_factor"), f"{UP}.input_factor is missing"),
        ("onebit packed", _without(f"{UP}.weight"), f"{UP}.weight is missing"),
        ("onebit packed", lambda t: t.update({f"{UP}.weight": t[f"{UP}.weight"][:, 1:].clone()}), f"{UP}: weight is int8"),
        ("bitnet-transformers", _without(f"{UP}.quantized_weights"), f"{UP} is not binarized as in BitNet-Trans"),
        ("bitnet-transformers", lambda t: t[f"{UP}.quantized_weights"].fill_(2), f"{UP}: quantized_weights is"),
        ("bitnet ternary", _without(f"{UP}.weight_scale"), f"{UP} is not binarized as in transformers' bitnet"),
        ("bitnet ternary, norm", _without(f"{UP}.rms_norm.weight"), f"{UP}: rms_norm.weight is missing"),
    ],
)  # fmt: skip
def test_what_is_missing_or_too_many_is_named(form, change, said, tmp_path, text):
    _, folder = FORMS[form](tmp_path / "source")
    _changed(folder, change)
    with pytest.raises(FormatError, match=said):
        convert(str(folder), tmp_path / "out", tokenizer=text)
    assert not (tmp_path / "out").exists()


def test_sources_that_are_none(tmp_path, llama_dir, text):
    with pytest.raises(FormatError, match="there is no"):
        open_checkpoint(tmp_path / "nowhere")
    (tmp_path / "file").write_bytes(b"no gguf")
    with pytest.raises(FormatError, match="no GGUF file"):
        open_checkpoint(tmp_path / "file")
    with pytest.raises(FormatError, match=r"dense model(.|\n)*--masks DIR"):
        open_checkpoint(llama_dir)
    _, folder = fbi(tmp_path / "fbi", shards=2)
    with pytest.raises(OptionError, match=r"--masks .* would not be used"):
        open_checkpoint(folder, masks=tmp_path)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FormatError, match=r"00002-of-00002\.safetensors is missing"):
        open_checkpoint(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "awq"}}))
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(FormatError, match="quantized by awq"):
        open_checkpoint(folder)
    _, folder = fbi(tmp_path / "other")
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "nonsense"}))
    with pytest.raises(
        FormatError, match="model_type 'nonsense', which transformers does not know; one that it knows is"
    ):
        open_checkpoint(folder)
    (folder / "config.json").unlink()
    with pytest.raises(FormatError, match=r"other has no config\.json: it is no Hugging Face directory"):
        open_checkpoint(folder)


def test_a_training_checkpoint_is_no_state_dict(tmp_path):
    model, folder = fbi(tmp_path / "source", kind="bin")
    torch.save({"state_dict": model.state_dict(), "step": 3}, folder / "pytorch_model.bin")
    with pytest.raises(FormatError, match=r"save state\['state_dict'\] alone"):
        open_checkpoint(folder)


def test_tokenizer_beside_it_and_none(tmp_path, tokenizer, capsys):
    _, folder = onebit(tmp_path / "source")
    assert main(["import", str(folder), "-o", str(tmp_path / "none")]) == 0
    said = capsys.readouterr().err
    assert "--tokenizer DIR" in said and "one of:" not in said
    tokenizer.save_pretrained(folder)
    assert main(["import", str(folder), "-o", str(tmp_path / "out")]) == 0
    assert main(["generate", str(tmp_path / "out"), "w3", "--max-new-tokens", "2"]) == 0


def test_dtype(tmp_path, ids, text):
    model, folder = fbi(tmp_path / "source")
    convert(str(folder), tmp_path / "out", tokenizer=text, dtype="float16")
    assert {t.dtype for t in signbit.load(tmp_path / "out").state_dict().values()} == {torch.float16, torch.uint8}
    assert ROUNDING < difference(model, tmp_path / "out", ids) < 1e-2
    _changed(folder, lambda t: t[f"{UP}.wscale"].fill_(1e6))
    with pytest.raises(WeightError, match="float32"):
        convert(str(folder), tmp_path / "other", tokenizer=text, dtype="float16")


def test_biases_stand_where_the_originals_have_them():
    from signbit.interop import bitnet_transformers
    from signbit.interop import fbi as fbi_form
    from signbit.interop import onebit as onebit_form

    x, bias = torch.randn(3, 16), torch.randn(8)
    for module, form in ((originals.Fbi(8, 16), fbi_form), (originals.OneBit(8, 16), onebit_form)):
        parts = {name: tensor.detach() for name, tensor in module.named_parameters()}
        want = module(x) + bias  # OneBit: behind the LayerNorm
        assert torch.allclose(form.layer({**parts, "bias": bias}, {}).packed(x), want, rtol=1e-5, atol=1e-5)
    q = torch.ones(8, 16, dtype=torch.int8)
    with pytest.raises(FormatError, match="adds before it takes the largest output"):
        bitnet_transformers.layer({"quantized_weights": q, "bias": bias}, {})


def test_copies_that_are_left_out_are_noted(tmp_path, text):
    notes = []
    _, folder = beomi(tmp_path / "source")
    convert(str(folder), tmp_path / "out", tokenizer=text, note=notes.append)
    assert any(line.startswith("14 tensors named weight beside quantized_weights") for line in notes)


def test_a_tied_head_that_differs_is_refused(tmp_path, text):
    _, folder = fbi(tmp_path / "source")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    with pytest.raises(FormatError, match=r"lm_head.weight and model.embed_tokens.weight differ"):
        convert(str(folder), tmp_path / "out", tokenizer=text)


def test_out_is_not_the_source_and_not_replaced_unasked(tmp_path, text):
    _, folder = fbi(tmp_path / "source")
    with pytest.raises(OptionError, match="is the source"):
        convert(str(folder), folder, overwrite=True)
    convert(str(folder), tmp_path / "out", tokenizer=text)
    with pytest.raises(FormatError, match="--overwrite to replace it"):
        convert(str(folder), tmp_path / "out", tokenizer=text)
    with pytest.raises(FormatError, match="packed by signbit already"):
        convert(str(tmp_path / "out"), tmp_path / "again")
