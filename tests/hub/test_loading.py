"""Every way of loading a packed directory, with signbit and without it."""

import copy
import filecmp
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from tests.families import DENSE
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, pipeline

import signbit
from signbit.errors import FormatError, OptionError
from signbit.hub.card import count_parameters
from signbit.linear import Int8Embedding, PackedLinear

RTN = {"gptq": False, "saliency": "magnitude"}
SETTINGS = {
    "absmean": {"method": "absmean", "group": 8},
    "absmean_int8_head": {"method": "absmean", "head": "int8"},
    "pbllm_10": {"method": "pbllm", "salient": 0.1, **RTN},
    "pbllm_4bit_30": {"method": "pbllm", "salient": 0.3, "salient_bits": 5, "low": "4bit", **RTN},
}


def quantized(model, **settings):
    signbit.quantize_(model, signbit.SignbitConfig(**settings))
    return model


@pytest.fixture
def packed(llama, tokenizer, tmp_path):
    """A packed directory and the model it was saved from."""
    model = quantized(llama, method="absmean", group=8)
    return str(signbit.save(model, tmp_path / "packed", tokenizer)), model


@pytest.mark.parametrize("family", DENSE)
@pytest.mark.parametrize("setting", SETTINGS)
def test_save_load_gives_equal_logits_and_saving_again_equal_bytes(family, setting, tmp_path, ids):
    make, _ = DENSE[family]
    model = quantized(make(), **SETTINGS[setting])
    out = signbit.save(model, tmp_path / "packed")
    loaded = AutoModelForCausalLM.from_pretrained(out)
    assert type(loaded) is type(model)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert not any(m.requires_grad for m in loaded.buffers())
    loaded.save_pretrained(tmp_path / "again")
    names = sorted(os.listdir(tmp_path / "again"))
    assert {"config.json", "model.safetensors"} <= set(names)
    for name in names:
        assert filecmp.cmp(out / name, tmp_path / "again" / name, shallow=False), name
    third = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(third(ids).logits, model(ids).logits)


def test_a_tied_int8_pair_is_one_tensor_after_loading(llama, tmp_path):
    out = signbit.save(quantized(llama, method="absmean", head="int8"), tmp_path / "packed")
    loaded = signbit.load(out)
    assert isinstance(loaded.model.embed_tokens, Int8Embedding)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert loaded.lm_head.scale is loaded.model.embed_tokens.scale
    assert not any(p.requires_grad for p in (loaded.lm_head.weight, loaded.lm_head.scale))


def test_the_native_class_and_its_subclass_and_the_bare_decoder(packed, ids):
    out, model = packed
    want = model(ids).logits
    assert torch.equal(LlamaForCausalLM.from_pretrained(out)(ids).logits, want)
    bare = AutoModel.from_pretrained(out)
    assert type(bare).__name__ == "LlamaModel"
    assert isinstance(bare.layers[0].mlp.up_proj, PackedLinear)
    assert torch.allclose(bare(ids).last_hidden_state @ model.lm_head.weight.T, want, atol=1e-5)


def test_a_pipeline(packed):
    out, _ = packed
    made = pipeline("text-generation", model=out)
    assert made("w3 w4", max_new_tokens=2, do_sample=False)[0]["generated_text"].startswith("w3 w4")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtype(packed, dtype, ids):
    out, model = packed
    loaded = AutoModelForCausalLM.from_pretrained(out, dtype=dtype)
    assert loaded.dtype is dtype
    layer = loaded.model.layers[0].mlp.up_proj
    assert layer.scale.dtype is torch.float16, "scales keep the dtype that the file has"
    error = (loaded(ids).logits.float() - model(ids).logits).abs().max()
    assert error <= 40 * torch.finfo(dtype).eps * model(ids).logits.abs().max()


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}], ids=str)
def test_device_map(packed, device_map, ids):
    out, model = packed
    loaded = AutoModelForCausalLM.from_pretrained(out, device_map=device_map)
    assert torch.allclose(loaded(ids).logits.cpu(), model(ids).logits, atol=1e-4)


def test_device_map_with_blocks_on_disk(packed, ids, tmp_path):
    out, model = packed
    device_map = {
        "model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu",
        "model.rotary_emb": "cpu", "lm_head": "cpu",
    }  # fmt: skip
    loaded = AutoModelForCausalLM.from_pretrained(
        out, device_map=device_map, offload_folder=tmp_path / "offload", offload_buffers=True
    )
    assert torch.equal(loaded(ids).logits, model(ids).logits)


@pytest.mark.parametrize("setting", SETTINGS)
def test_quantize_while_loading(llama_dir, setting, ids, tmp_path):
    loaded = AutoModelForCausalLM.from_pretrained(
        llama_dir, quantization_config=signbit.SignbitConfig(**SETTINGS[setting])
    )
    by_hand = quantized(AutoModelForCausalLM.from_pretrained(llama_dir), **SETTINGS[setting])
    assert torch.equal(loaded(ids).logits, by_hand(ids).logits)
    assert loaded.is_quantized
    loaded.save_pretrained(tmp_path / "saved")
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "saved")(ids).logits, loaded(ids).logits)


def test_quantize_while_loading_keeps_its_report_for_the_card(llama_dir, tmp_path):
    loaded = AutoModelForCausalLM.from_pretrained(llama_dir, quantization_config=signbit.SignbitConfig(group=8))
    assert len(loaded.hf_quantizer.report.binarized) == 14
    assert (
        "| model.layers.*.mlp.up_proj | 2 | binarized |"
        in (signbit.save(loaded, tmp_path / "p") / "README.md").read_text()
    )


def test_quantize_while_loading_refuses_offloading(llama_dir, tmp_path):
    device_map = {"model": "cpu", "lm_head": "disk"}
    with pytest.raises(OptionError, match="quantize it first"):
        AutoModelForCausalLM.from_pretrained(
            llama_dir, quantization_config=signbit.SignbitConfig(), device_map=device_map, offload_folder=tmp_path
        )


def test_a_plain_dict_as_quantization_config(llama_dir):
    config = {"quant_method": "signbit", "method": "absmean", "group": 8}
    loaded = AutoModelForCausalLM.from_pretrained(llama_dir, quantization_config=config)
    assert loaded.model.layers[0].mlp.up_proj.weights[0].groups == 4


def test_dequantize_is_the_twin(llama_dir, tmp_path, ids):
    for setting in SETTINGS.values():
        out = signbit.save(
            quantized(AutoModelForCausalLM.from_pretrained(llama_dir), **setting), tmp_path / "p", overwrite=True
        )
        loaded = signbit.load(out)
        want = loaded(ids).logits
        twin = loaded.dequantize()
        assert not any(isinstance(m, (PackedLinear, Int8Embedding)) for m in twin.modules())
        assert (twin(ids).logits - want).abs().max() <= 1e-5
        twin.save_pretrained(tmp_path / "twin")
        assert torch.equal(LlamaForCausalLM.from_pretrained(tmp_path / "twin")(ids).logits, twin(ids).logits)


def test_generate_with_a_static_cache(packed, ids):
    loaded = AutoModelForCausalLM.from_pretrained(packed[0])
    plain = loaded.generate(ids, max_new_tokens=5, do_sample=False)
    static = loaded.generate(
        ids, max_new_tokens=5, do_sample=False, cache_implementation="static", disable_compile=True
    )
    assert torch.equal(plain, static)


# Without signbit: never random weights.


def run_python(code, *arguments, without_signbit=False):
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    if without_signbit:
        # None in sys.modules makes `import signbit` fail as if it were not installed.
        code = "import sys; sys.modules['signbit'] = None\n" + code
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=env)


PLAIN = {
    "AutoModelForCausalLM": "transformers.AutoModelForCausalLM.from_pretrained(out)",
    "AutoModel": "transformers.AutoModel.from_pretrained(out)",
    "the class itself": "transformers.LlamaForCausalLM.from_pretrained(out)",
    "device_map": "transformers.AutoModelForCausalLM.from_pretrained(out, device_map='cpu')",
    "pipeline": "transformers.pipeline('text-generation', model=out)",
    "trust_remote_code": "transformers.AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)",
}
EVERY_WAY = """
import json, sys, transformers
said = {}
for out in sys.argv[2:]:
    for way, code in json.loads(sys.argv[1]).items():
        try:
            eval(code)
            said[f"{out} {way}"] = "LOADED"
        except Exception as error:
            said[f"{out} {way}"] = str(error)
print(json.dumps(said))
"""


def test_without_signbit_every_way_of_loading_raises(llama, tokenizer, tmp_path):
    outs = [
        str(signbit.save(quantized(copy.deepcopy(llama), **SETTINGS[name]), tmp_path / name, tokenizer))
        for name in ("absmean", "absmean_int8_head")
    ]
    done = run_python(EVERY_WAY, json.dumps(PLAIN), *outs, without_signbit=True)
    assert done.returncode == 0, done.stderr[-2000:]
    said = json.loads(done.stdout.splitlines()[-1])
    assert len(said) == 2 * len(PLAIN)
    for what, text in said.items():
        assert ("signbit" if what.endswith("trust_remote_code") else "mismatch") in text, (what, text)


def test_remote_code_imports_signbit_and_gives_equal_logits(packed, ids):
    out, model = packed
    code = """
import json, sys, torch, transformers
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
print(json.dumps(model(torch.tensor([[3, 5, 7, 11, 13, 17]])).logits.tolist()), type(model).__mro__[1].__name__)
"""
    done = run_python(code, out)
    assert done.returncode == 0, done.stderr[-2000:]
    logits, native = done.stdout.rsplit(" ", 1)
    assert native.strip() == "LlamaForCausalLM"
    assert torch.allclose(torch.tensor(json.loads(logits)), model(ids).logits, atol=1e-6)


@pytest.mark.parametrize(
    "order",
    [
        "import signbit\nimport transformers",
        "import transformers\nimport signbit",
        pytest.param("import transformers.modeling_utils\nimport signbit", marks=pytest.mark.slow),
        pytest.param("import signbit.hub.quantizer\nimport transformers", marks=pytest.mark.slow),
    ],
)
def test_registration_in_any_order_of_imports(packed, order):
    load = "transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])"
    code = f"{order}\nimport sys\nprint(type({load}.model.layers[0].mlp.up_proj))"
    done = run_python(code, packed[0])
    assert done.returncode == 0, done.stderr[-2000:]
    assert "PackedLinear" in done.stdout


# Saving.


def test_the_directory_has_what_a_hub_repository_needs(packed):
    out, _ = packed
    assert {"config.json", "model.safetensors", "README.md", "modeling_signbit.py", "tokenizer.json"} <= set(
        os.listdir(out)
    )
    config = json.loads(Path(out, "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["auto_map"] == {
        "AutoConfig": "modeling_signbit.LlamaConfig",
        "AutoModelForCausalLM": "modeling_signbit.LlamaForCausalLM",
    }
    assert config["quantization_config"]["quant_method"] == "signbit"
    assert AutoTokenizer.from_pretrained(out)("w3").input_ids == [6]
    assert len(Path(out, "modeling_signbit.py").read_text().splitlines()) <= 10


def test_the_card_states_base_command_and_true_bits(llama, tmp_path):
    report = signbit.quantize_(llama, signbit.SignbitConfig("absmean", group=8))
    out = signbit.save(llama, tmp_path / "p", report=report, base_model="org/name", command="signbit quantize org/name")
    card = (out / "README.md").read_text()
    assert "base_model: org/name" in card
    assert "signbit quantize org/name" in card
    assert f"{report.bits_per_weight:.3f}" in card
    assert "| model.layers.*.mlp.up_proj | 2 | binarized |" in card


def test_saving_what_is_not_packed_or_where_something_is(llama, packed, tmp_path):
    from tests.families import llama as another

    with pytest.raises(OptionError, match="not quantized by signbit"):
        signbit.save(another(), tmp_path / "x")
    out, model = packed
    with pytest.raises(FormatError, match="exists; give another -o, or --overwrite"):
        signbit.save(model, out)
    signbit.save(model, out, overwrite=True)
    signbit.load(out)


def test_parameters_are_those_of_the_full_model(llama):
    from tests.families import phi

    for model in (llama, phi()):
        before = sum(p.numel() for p in model.parameters())
        quantized(model, method="absmean", head="int8")
        assert count_parameters(model) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "absmeen"}, "did you mean absmean"),
        ({"groups": 8}, "'groups' is no option of the method absmean"),
        ({"head": "int4"}, "head is 'int4'; allowed: keep, int8"),
    ],
)
def test_config_errors(arguments, message):
    with pytest.raises(OptionError, match=message):
        signbit.SignbitConfig(**arguments)


def test_transformers_still_loads_other_models(llama_dir):
    assert type(AutoModelForCausalLM.from_pretrained(llama_dir)).__name__ == "LlamaForCausalLM"
    assert "signbit" in transformers.quantizers.auto.AUTO_QUANTIZER_MAPPING


@pytest.mark.slow
def test_lm_eval_loads_it_as_any_hf_model(packed, tmp_path):
    pytest.importorskip("lm_eval")
    out, _ = packed
    rows = [{"question": f"w{i} w{i + 1}", "answers": ["w3", "w4"], "label": i % 2} for i in range(6)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "tiny.yaml").write_text(
        f"""task: tiny
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {tmp_path}/rows.jsonl}}}}
output_type: multiple_choice
validation_split: validation
doc_to_text: "{{{{question}}}}"
doc_to_target: label
doc_to_choice: answers
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
    )
    command = [
        sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args", f"pretrained={out},trust_remote_code=True",
        "--tasks", "tiny", "--include_path", str(tmp_path), "--device", "cpu", "--batch_size", "2",
    ]  # fmt: skip
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "|tiny" in done.stdout
    assert "acc" in done.stdout
