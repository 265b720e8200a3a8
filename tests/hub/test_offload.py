"""Perplexity block by block: the whole model's number to the last digit, with one block in memory."""

import random

import pytest
import torch
from tests.conftest import tiny_llama_config
from tests.families import DENSE, MIXTURES
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import signbit
from signbit.cli import main
from signbit.errors import OptionError, WeightError
from signbit.evaluate.perplexity import TextOptions, perplexity
from signbit.evaluate.requests import Question, Requests, Task
from signbit.hub import offload
from signbit.hub.load import load_any
from signbit.hub.offload import offloaded_perplexities

FAMILIES = {name: make for name, (make, _) in DENSE.items()} | MIXTURES
OPTIONS = TextOptions(window=40, stride=30)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    generator = random.Random(0)
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(" ".join(f"w{generator.randint(0, 60)}" for _ in range(130)))
    return str(file)


def packed(model, folder, tokenizer, **options):
    config = signbit.SignbitConfig("pbllm", gptq=False, saliency="magnitude", allow_partial=True, **options)
    signbit.quantize_(model, config)
    signbit.save(model, folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def deep_dir(tokenizer, tmp_path):
    LlamaForCausalLM(tiny_llama_config(num_hidden_layers=4)).save_pretrained(tmp_path / "deep")
    tokenizer.save_pretrained(tmp_path / "deep")
    return str(tmp_path / "deep")


@pytest.mark.parametrize(
    ("family", "form"),
    [
        pytest.param(family, form, marks=pytest.mark.slow if family in MIXTURES and form == "packed" else ())
        for family in FAMILIES
        for form in ("dense", "packed")
    ],
)
def test_the_number_is_that_of_the_whole_model(family, form, tokenizer, text, tmp_path):
    torch.manual_seed(0)
    model = FAMILIES[family]().to(torch.bfloat16)
    if form == "packed":
        directory = packed(model, tmp_path / "model", tokenizer, head="int8")
    else:
        model.save_pretrained(tmp_path / "model")
        tokenizer.save_pretrained(tmp_path / "model")
        directory = str(tmp_path / "model")
    whole = perplexity(load_any(directory), tokenizer, text, options=OPTIONS)
    (found,) = offloaded_perplexities(directory, [text], options=OPTIONS)
    assert {**found.to_dict(), "seconds_s": 0} == {**whole.to_dict(), "seconds_s": 0}
    assert found.windows == 4


@pytest.mark.parametrize(
    ("dtype", "activations", "inputs_on"), [("bfloat16", "int8", "disk"), ("float16", "exact", "device")]
)
def test_dtypes_activations_and_where_inputs_wait_change_nothing(
    dtype, activations, inputs_on, llama, tokenizer, text, tmp_path
):
    directory = packed(llama, tmp_path / "out", tokenizer)
    model = load_any(directory, dtype)
    signbit.set_activations(model, activations)
    whole = perplexity(model, tokenizer, text, options=OPTIONS)
    (found,) = offloaded_perplexities(
        directory, [text], options=OPTIONS, dtype=dtype, activations=activations, inputs_on=inputs_on
    )
    assert (found.nll, found.dtype, found.activations) == (whole.nll, dtype, activations)


@pytest.mark.parametrize("form", ["dense", "packed"])
def test_one_block_is_in_memory_and_each_weight_is_read_once(form, deep_dir, tokenizer, text, tmp_path, monkeypatch):
    if form == "packed":
        deep_dir = packed(AutoModelForCausalLM.from_pretrained(deep_dir), tmp_path / "out", tokenizer)
    reads, most, models = [], [], []
    load, load_streamed, release = offload._load, offload.load_streamed, offload.release_memory

    class Counted(dict):
        def __getitem__(self, name):
            reads.append(name)
            return super().__getitem__(name)

    def streamed(*arguments):
        model, weights = load_streamed(*arguments)
        models.append(model)
        return model, Counted({name: weights[name] for name in weights})

    def real():
        return [
            index
            for index, block in enumerate(models[0].model.layers)
            if any(not t.is_meta for t in (*block.parameters(), *block.buffers()))
        ]

    def loaded(block, *arguments):
        assert real() == []
        load(block, *arguments)
        most.append(real())

    def released():
        assert real() == []
        release()

    monkeypatch.setattr(offload, "load_streamed", streamed)
    monkeypatch.setattr(offload, "_load", loaded)
    monkeypatch.setattr(offload, "release_memory", released)
    found = offloaded_perplexities(deep_dir, [text, text], options=OPTIONS)
    assert most == [[0], [1], [2], [3]]
    assert len(reads) == len(set(reads)) >= 4 * 9
    assert found[0].nll == found[1].nll


def test_a_block_that_overflows_is_named(llama, tokenizer, text, tmp_path):
    with torch.no_grad():
        llama.model.layers[1].mlp.down_proj.weight.fill_(float("inf"))
    llama.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    with pytest.raises(WeightError, match=r"model\.layers\.1 of .*: its output overflows or is NaN; repair"):
        offloaded_perplexities(str(tmp_path / "model"), [text], options=OPTIONS)


def test_an_adapter_is_refused(tmp_path, text):
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "x"}')
    with pytest.raises(OptionError, match="is an adapter, which stands beside a whole model: leave --offload out"):
        offloaded_perplexities(str(tmp_path), [text])


def test_the_command(deep_dir, text, tmp_path, capsys, monkeypatch):
    import json

    monkeypatch.setenv("SIGNBIT_CACHE", str(tmp_path / "cache"))
    command = ["eval", deep_dir, "--ppl", f"{text},{text}", "--window", "40", "--json", str(tmp_path / "found.json")]
    assert main(command) == 0
    whole = json.loads((tmp_path / "found.json").read_text())["results"]
    capsys.readouterr()
    assert main([*command, "--offload", "--inputs-on", "disk", "--again"]) == 0
    found = json.loads((tmp_path / "found.json").read_text())["results"]
    assert [r["nll"] for r in found] == [r["nll"] for r in whole]
    assert found[0]["offloaded"]
    assert "float32, exact, by blocks" in " ".join(capsys.readouterr().out.split())
    task, question = Task("t", "choice", ("acc",), 0, "1", 1, "here"), Question("t", 0, (("w1", " w2"),), (0,), (2,))
    Requests("h", None, (task,), (), (question,)).write(tmp_path / "asked.jsonl")
    assert main(["eval", deep_dir, "--offload", "--requests", str(tmp_path / "asked.jsonl")]) == 1
    assert "--offload is for --ppl: tasks need the whole model" in capsys.readouterr().err
