"""Adapters beside packed layers: trained, saved, loaded, resumed; never merged. The packed layers stay as they are."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import signbit
from signbit.cli import main
from signbit.errors import FormatError, OptionError
from signbit.hub.load import load_any, load_tokenizer
from signbit.linear import PackedLinear
from signbit.models import find_structure
from tests.train.runs import metrics, trainer_of

peft = pytest.importorskip("peft")

SHORT = "--sequence-length 16 --batch-size 4 --log-every 1 --validation-blocks 2 --lora-rank 4 --lora-alpha 8"
IDS = torch.tensor([[3, 5, 7, 11, 13, 17]])


@pytest.fixture
def packed_dir(llama_dir, tmp_path):
    """Every form that salient weights, shifts and groups take, and an int8 head."""
    words = "--method pbllm --salient 0.1 --group 8 --no-gptq --saliency magnitude --head int8"
    assert main(f"quantize {llama_dir} -o {tmp_path}/packed {words}".split()) == 0
    return str(tmp_path / "packed")


def finetune(start, out, text, more="", steps=3):
    return main(f"finetune {start} -o {out} --lora --data {text} --max-steps {steps} {SHORT} {more}".split())


def packed_layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}


def test_nothing_but_adapters_is_trained(packed_dir, text, tmp_path):
    trainer = trainer_of(f"finetune {packed_dir} -o {tmp_path}/run --lora --data {text} --max-steps 2 {SHORT}")
    trained = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    names = packed_layers(load_any(packed_dir))
    assert trained == {f"{name}.lora_{part}.default.weight" for name in names for part in "AB"} and len(names) == 14
    assert trainer.options.optim == "adamw_torch"


def test_a_run_is_trained_saved_and_loaded(packed_dir, text, tmp_path, capsys):
    run = tmp_path / "run"
    assert finetune(packed_dir, run, text, "--learning-rate 0.02") == 0, capsys.readouterr().err
    adapter = run / "checkpoint-3"
    assert f"signbit generate {adapter} PROMPT" in capsys.readouterr().out
    assert all(".lora_" in name for name in load_file(adapter / "adapter_model.safetensors")), "adapters, nothing else"
    base = load_any(packed_dir, "float32")
    before = {name: {k: v.clone() for k, v in m.state_dict().items()} for name, m in packed_layers(base).items()}
    want = base(IDS).logits
    model = signbit.load_adapter(load_any(packed_dir, "float32"), adapter)
    got = model(IDS).logits
    assert (got - want).abs().max() > 0.01 * want.abs().max()
    # Off, the outputs are the base's to the bit, and on again they are what they were.
    model.disable_adapters()
    assert torch.equal(model(IDS).logits, want)
    model.enable_adapters()
    assert torch.equal(model(IDS).logits, got)
    for name, layer in packed_layers(model).items():
        state = layer.state_dict()
        assert all(torch.equal(state[k], v) for k, v in before[name.removesuffix(".base_layer")].items())
    # By the formula: W·x + (α/r)·B·A·x with the dense W.
    tensors = load_file(adapter / "adapter_model.safetensors")
    layer = model.get_submodule("model.layers.1.mlp.down_proj")
    a, b = (tensors[f"base_model.model.model.layers.1.mlp.down_proj.lora_{part}.weight"] for part in "AB")
    x = torch.randn(3, layer.base_layer.in_features)
    expected = x @ (layer.base_layer.to_dense() + 2 * b @ a).T
    assert torch.allclose(layer(x), expected, atol=1e-5 * expected.abs().max())
    # The directory alone is enough for every command, and so is PEFT's own class with our configuration.
    assert torch.equal(load_any(str(adapter), "float32")(IDS).logits, got)
    assert len(load_tokenizer(str(adapter))) == len(load_tokenizer(packed_dir))
    from signbit.models.lora import read_lora

    other = peft.PeftModel.from_pretrained(load_any(packed_dir, "float32"), adapter, config=read_lora(adapter))
    assert torch.equal(other(IDS).logits, got)
    capsys.readouterr()
    assert main(f"generate {adapter} w3 --max-new-tokens 2".split()) == 0, capsys.readouterr().err
    assert main(f"eval {adapter} --ppl {text} --window 32 --against {packed_dir} --json {tmp_path}/e.json".split()) == 0
    one, other = json.loads((tmp_path / "e.json").read_text())["results"]
    assert one["perplexity"] != other["perplexity"] and one["saved"] == other["saved"] is not None


def test_merging_is_refused_with_the_reason(packed_dir, text, tmp_path, capsys):
    run = tmp_path / "run"
    assert finetune(packed_dir, run, text) == 0
    capsys.readouterr()
    assert main(f"pack {run} -o {tmp_path}/out".split()) == 1
    assert "cannot be merged into packed layers: the sum has more than a bit a weight" in capsys.readouterr().err
    model = peft.get_peft_model(base := load_any(packed_dir), signbit.lora_config(base, r=2))
    with pytest.raises(OptionError, match="more than a bit a weight"):
        model.merge_and_unload()
    assert main(f"finetune {run} -o {tmp_path}/on --data {text} --max-steps 1".split()) == 1
    assert "is a run of adapters" in capsys.readouterr().err
    checkpoint = next(run.glob("checkpoint-*"))
    words = "--max-steps 1 --sequence-length 16 --batch-size 4 --validation-blocks 2"
    assert main(f"finetune {checkpoint} -o {tmp_path}/on --data {text} {words}".split()) == 1
    assert f"is an adapter, from which no student starts; give the model beside which it stands: {packed_dir}" in (
        capsys.readouterr().err
    )


def test_a_run_killed_in_its_middle_ends_as_one_that_was_not(packed_dir, text, tmp_path, capsys):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert finetune(packed_dir, whole, text, "--save-every 2 --lora-dropout 0.1", 4) == 0, capsys.readouterr().err
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "checkpoint-4")
    assert finetune(packed_dir, cut, text, "--save-every 2 --lora-dropout 0.1 --resume", 4) == 0, (
        capsys.readouterr().err
    )
    assert metrics(cut) == metrics(whole)
    one, other = (load_file(run / "checkpoint-4" / "adapter_model.safetensors") for run in (whole, cut))
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    assert finetune(packed_dir, cut, text, "--save-every 2 --resume", 4) == 1
    assert "lora_dropout (0.1 there, 0.0 here) differs" in capsys.readouterr().err


@pytest.mark.slow
def test_compiled_blocks_learn_as_eager_ones(packed_dir, text, tmp_path, capsys):
    lines = []
    for more in ("", "--compile"):
        torch._dynamo.reset()
        out = tmp_path / f"run{more}"
        assert finetune(packed_dir, out, text, f"{more} --learning-rate 0.02") == 0, capsys.readouterr().err
        lines.append([line["loss"] for line in metrics(out) if "loss" in line])
    assert lines[0] == pytest.approx(lines[1], rel=1e-5) and len(lines[0]) == 3


def test_held_out_loss_falls_on_a_trained_model(stories, shared, tmp_path, capsys):
    """By a quarter in 20 steps, from what rounding left of it."""
    story = (shared / "data" / "tinystories" / "tinystories_train_first_2MiB.txt").read_text(errors="ignore")[:150_000]
    (tmp_path / "stories.txt").write_text(story)
    rtn = "--method pbllm --salient 0.1 --no-gptq --saliency magnitude"
    assert main(f"quantize {stories} -o {tmp_path}/packed {rtn}".split()) == 0
    held_out = []
    for steps, rate in ((1, 0.0), (20, 3e-3)):
        out = tmp_path / str(steps)
        words = (
            f"finetune {tmp_path}/packed -o {out} --lora --data {tmp_path}/stories.txt --max-steps {steps} "
            f"--learning-rate {rate} --sequence-length 64 --batch-size 8 --validation-blocks 16"
        )
        assert main(words.split()) == 0, capsys.readouterr().err
        held_out += [line["validation_cross_entropy"] for line in metrics(out) if "validation_cross_entropy" in line]
    assert len(held_out) == 2 and held_out[1] < 0.75 * held_out[0], held_out


def test_plain_transformers_trains_a_peft_model(packed_dir, tmp_path):
    """As TRL does too: our configuration is all that PEFT needs; a packed model without adapters is still refused."""
    from transformers import Trainer, TrainingArguments

    base = load_any(packed_dir, "float32")
    data = [{"input_ids": IDS[0], "labels": IDS[0]}] * 4
    arguments = TrainingArguments(
        str(tmp_path / "out"), max_steps=2, learning_rate=0.1, report_to="none", use_cpu=True, disable_tqdm=True
    )
    with pytest.raises(ValueError, match="purely quantized"):
        Trainer(base, arguments, train_dataset=data)
    model = peft.get_peft_model(base, signbit.lora_config(base, r=2))
    before = model(IDS, labels=IDS).loss
    Trainer(model, arguments, train_dataset=data).train()
    assert model.cpu().eval()(IDS, labels=IDS).loss < before
    assert find_structure(load_any(packed_dir).dequantize()).targets, "the base is whole"


def test_bad_input_is_refused_in_words(packed_dir, llama_dir, text, tmp_path, capsys):
    for words, message in (
        (f"{llama_dir}", "is no packed directory"),
        (f"{packed_dir} --method onebit", "leave out --method"),
        (f"{packed_dir} --source {llama_dir}", "leave out --source"),
        (f"{packed_dir} --train-norms", "nothing but the adapters is trained"),
        (f"{packed_dir} --lora-rank 0", None),
        (f"{packed_dir} --lora-alpha 0", None),
        (f"{packed_dir} --lora-dropout 1", None),
        (f"{packed_dir} --kd-alpha 0.5", "has no teacher"),
    ):
        command = f"finetune {words} -o {tmp_path}/no --lora --data {text} --max-steps 2 --sequence-length 16"
        if message is None:
            with pytest.raises(SystemExit):
                main(command.split())
            assert words.split()[1] in capsys.readouterr().err.replace("│", " "), words
            continue
        assert main(command.split()) == 1, words
        err = capsys.readouterr().err
        assert message in err and "Traceback" not in err, (words, err)
        shutil.rmtree(tmp_path / "no", ignore_errors=True)


def test_a_damaged_or_foreign_adapter_is_refused(packed_dir, llama_dir, text, tmp_path, capsys):
    assert finetune(packed_dir, tmp_path / "run", text) == 0
    adapter = tmp_path / "run" / "checkpoint-3"
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(iter(tensors))

    def load():
        return signbit.load_adapter(load_any(packed_dir), adapter)

    save_file({k: v for k, v in tensors.items() if k != name}, path)
    with pytest.raises(FormatError, match="is missing"):
        load()
    save_file({**tensors, "base_model.model.model.layers.9.mlp.up_proj.lora_A.weight": tensors[name].clone()}, path)
    with pytest.raises(FormatError, match="not one of this model's"):
        load()
    save_file({**tensors, name: tensors[name][:, :-1].contiguous()}, path)
    with pytest.raises(FormatError, match="is not of this model"):
        load()
    path.write_bytes(b"no")
    with pytest.raises(FormatError, match="cannot be read"):
        load()
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": f"{tmp_path}/gone"}))
    with pytest.raises(FormatError, match="there is no directory"):
        load_any(str(adapter))
    with pytest.raises(OptionError, match="no packed layer"):
        signbit.lora_config(load_any(llama_dir))
    base = load_any(packed_dir)
    for values, message in (
        ({"use_dora": True}, "plain LoRA alone"),
        ({"init_lora_weights": "pissa"}, "allowed: True"),
    ):
        with pytest.raises(OptionError, match=message):
            peft.get_peft_model(base, signbit.lora_config(base, **values))
