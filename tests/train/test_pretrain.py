"""Training from scratch: what a student starts from and learns from, dense and binary, and what is refused."""

import json
import math
import shlex
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

import signbit
from signbit.cli import main
from signbit.cli.parsing import parse
from signbit.cli.training import PackOptions
from signbit.errors import OptionError
from signbit.hub.load import load_any
from signbit.hub.subject import Subject, Where
from signbit.linear import PackedLinear
from signbit.methods import METHODS
from signbit.models import Shape
from signbit.ops import cpu
from signbit.train import Schedule, Trained, start_training_
from tests import families
from tests.train.runs import metrics, trainer_of

SHAPE = "--hidden-size 32 --intermediate-size 64 --num-hidden-layers 2 --num-attention-heads 4"
METHOD_WORDS = {
    "none": "--method none",
    "fbi": "--method fbi",
    "fbi-row": "--method fbi --pattern row --optim adamw_torch",
    "bitnet": "--method bitnet",
    "bitnet-paper": "--method bitnet --norm layer --ste sign --groups 2 --optim adamw_torch --max-grad-norm 0",
    "ternary": "--method bitnet --weights ternary",
    "bitnet-transformers": "--method bitnet-transformers --signs trained",
    "onebit": "--method onebit",
    "bnn": "--method bnn",
    "xnor": "--method xnor --center --optim adamw_torch",
    "bireal": "--method bireal --act-bits 1",
    "irnet": "--method irnet",
    "fda": "--method fda --optim adamw_torch",
    "recu": "--method recu",
}


def pretrain(text, out, words, shape=SHAPE, steps=8):
    return main(
        f"pretrain {shape} -o {out} --data {text} --max-steps {steps} --sequence-length 16 --batch-size 4 --log-every 2 "
        f"--save-every 4 --validation-blocks 2 --learning-rate 0.01 {words}".split()
    )


@pytest.mark.parametrize("kind", METHOD_WORDS)
def test_a_run_resumes_exactly_and_packs_without_a_loss(kind, llama_dir, text, tmp_path, capsys, monkeypatch):
    whole, cut, words = tmp_path / "whole", tmp_path / "cut", f"--tokenizer {llama_dir} {METHOD_WORDS[kind]}"
    assert pretrain(text, whole, words) == 0, capsys.readouterr().err
    assert "the student starts from random weights" in capsys.readouterr().err
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "checkpoint-8")
    assert pretrain(text, cut, f"{words} --resume") == 0, capsys.readouterr().err
    assert metrics(cut) == metrics(whole)
    lines = [line for line in metrics(whole) if "loss" in line]
    assert all(line["loss"] == pytest.approx(line["cross_entropy"]) and line["kl"] == 0 for line in lines)
    assert all(("flips" in line) == (kind != "none") for line in lines)
    assert (whole / "flips.png").exists() == (kind != "none")
    if kind != "none":
        assert sum(line["flips"] for line in lines) > 0
    # Packed logits beside those of the model as it was trained: equal, integers and all, by the reference.
    monkeypatch.setattr(cpu, "selected", lambda: (None, "a test asks for plain torch"))
    assert main(f"pack {whole} -o {tmp_path}/out".split()) == 0, capsys.readouterr().err
    settings = json.loads((whole / "run.json").read_text())
    state = load_file(whole / "checkpoint-8" / "model.safetensors")
    before = load_file(whole / "checkpoint-4" / "model.safetensors")
    assert all(not torch.equal(tensor, before[name]) for name, tensor in state.items()), "all of it is trained"
    model = LlamaForCausalLM(Shape(32, 64, 2, 4).config(64))
    packed = load_any(str(tmp_path / "out"), "float32")
    assert sum(isinstance(module, PackedLinear) for module in packed.modules()) == (0 if kind == "none" else 14)
    if kind != "none":
        config = signbit.SignbitConfig(settings["config"]["method"], **settings["config"]["options"])
        start_training_(model, METHODS[config.method], config.plan, Trained())
    model.load_state_dict(state)
    ids = torch.randint(3, 60, (2, 12))
    got, want = packed(ids).logits, model.eval()(ids).logits
    if kind in ("none", "bitnet", "bitnet-paper", "fbi", "bnn", "xnor", "bireal", "irnet", "fda", "recu"):
        assert torch.equal(got, want)
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()


def test_the_card_s_command_packs_the_run_again(llama_dir, text, tmp_path, capsys):
    run, out = tmp_path / "my run", tmp_path / "my out"
    words = shlex.split(f"{SHAPE} --data {text} --tokenizer {llama_dir} --max-steps 1 --sequence-length 16")
    assert main(["pretrain", *words, "-o", str(run), "--validation-blocks", "2"]) == 0, capsys.readouterr().err
    assert main(["pack", str(run), "-o", str(out), "--dtype", "float16"]) == 0, capsys.readouterr().err
    program, verb, *flags = shlex.split(Subject("out", str(out), Where()).facts().command)
    assert (program, verb) == ("signbit", "pack")
    options = parse(verb, flags, PackOptions)
    assert (options.run, options.out, options.dtype) == (str(run), str(out), "float16")


def start_of(out):
    return load_file(out / "checkpoint-1" / "model.safetensors")


def test_a_teacher_teaches_and_lends_its_tokenizer_and_vocabulary(text, tokenizer, tmp_path, capsys):
    teacher = families.llama(vocab_size=80, hidden_size=48, intermediate_size=32, num_hidden_layers=3)
    teacher.save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")
    assert pretrain(text, tmp_path / "run", f"--teacher {tmp_path}/teacher --kd-alpha 0.5", steps=2) == 0
    assert "a vocabulary of 80" in capsys.readouterr().err
    line = metrics(tmp_path / "run")[0]
    assert line["loss"] == pytest.approx(0.5 * line["kl"] + 0.5 * line["cross_entropy"]) and line["kl"] > 0
    assert pretrain(text, tmp_path / "other", f"--teacher {tmp_path}/teacher", steps=2) == 0
    line = metrics(tmp_path / "other")[0]
    assert line["loss"] == pytest.approx(line["kl"])
    families.llama(vocab_size=64).save_pretrained(tmp_path / "model")
    words = f"--teacher {tmp_path}/teacher --model {tmp_path}/model"
    assert pretrain(text, tmp_path / "random", f"{words} --random", shape="", steps=2) == 0, (
        "its shape, not its vocabulary"
    )
    assert pretrain(text, tmp_path / "own", words, shape="", steps=2) == 1
    assert "the teacher has 80 tokens in its vocabulary and the student 64" in capsys.readouterr().err


def test_a_student_starts_from_weights_or_from_random_ones(llama_dir, text, tmp_path):
    """The one is the model itself, the other one drawn by the seed; both in its shape."""
    words = "--learning-rate 0 --save-every 1"
    for name, more in {
        "own": "",
        "random": "--random --seed 7",
        "again": "--random --seed 7",
        "other": "--random",
    }.items():
        assert pretrain(text, tmp_path / name, f"--model {llama_dir} {more} {words}", shape="", steps=1) == 0
    name = "model.layers.1.mlp.up_proj.weight"
    states = {name: start_of(tmp_path / name) for name in ("own", "random", "again", "other")}
    assert torch.equal(states["own"][name], load_file(f"{llama_dir}/model.safetensors")[name])
    assert states["random"].keys() == states["own"].keys()
    assert torch.equal(states["random"][name], states["again"][name])
    assert not torch.equal(states["random"][name], states["own"][name])
    assert not torch.equal(states["random"][name], states["other"][name])


def test_dense_and_binary_students_of_one_seed_start_alike_and_see_the_same(llama_dir, text, tmp_path, monkeypatch):
    from signbit.hub import distill as module

    seen = {}
    for method in ("none", "fbi", "bitnet"):
        inner = module.DistillTrainer.compute_loss

        def compute_loss(self, model, inputs, *args, inner=inner, method=method, **kwargs):
            seen.setdefault(method, []).append(inputs["input_ids"].clone())
            return inner(self, model, inputs, *args, **kwargs)

        monkeypatch.setattr(module.DistillTrainer, "compute_loss", compute_loss)
        words = f"--tokenizer {llama_dir} --method {method} --learning-rate 0 --save-every 1"
        assert pretrain(text, tmp_path / method, words, steps=1) == 0
        monkeypatch.setattr(module.DistillTrainer, "compute_loss", inner)
    starts = {method: start_of(tmp_path / method) for method in seen}
    for name, tensor in starts["none"].items():
        assert all(torch.equal(tensor, starts[method][name]) for method in ("fbi", "bitnet")), name
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(*seen.values(), strict=True))


@pytest.mark.parametrize("optim", ["muon", "adamw_torch"])
@pytest.mark.parametrize("cut", [0.0, 1e-3])
def test_the_norm_of_gradients_is_that_of_all(optim, cut, llama_dir, text, tmp_path, monkeypatch):
    """Over every parameter, before it is cut, and whether or not it is."""
    from signbit.hub import distill as module

    norms, inner = [], module.DistillTrainer.training_step

    def training_step(self, model, *args, **kwargs):
        loss = inner(self, model, *args, **kwargs)
        squares = [p.grad.double().square().sum() for p in model.parameters() if p.grad is not None]
        norms.append(math.sqrt(sum(squares)))
        return loss

    monkeypatch.setattr(module.DistillTrainer, "training_step", training_step)
    words = f"--tokenizer {llama_dir} --optim {optim} --max-grad-norm {cut} --log-every 1"
    assert pretrain(text, tmp_path / "run", words, steps=3) == 0
    logged = [line["grad_norm"] for line in metrics(tmp_path / "run") if "loss" in line]
    assert logged == pytest.approx(norms, rel=1e-5) and max(norms) > 1e-3


def test_runs_of_all_objectives_are_compared_by_the_next_token(llama_dir, text, tmp_path):
    """With learning rate 0 taught and untaught runs hold the same model, also over a last batch that is not full."""
    held = {}
    for name, words in {"ar": f"--tokenizer {llama_dir}", "ad": f"--teacher {llama_dir} --kd-alpha 1"}.items():
        assert pretrain(text, tmp_path / name, f"{words} --learning-rate 0 --validation-blocks 5", steps=4) == 0
        (held[name],) = (line for line in metrics(tmp_path / name) if "validation_loss" in line)
    expected = held["ar"]["validation_loss"]
    assert held["ar"]["validation_cross_entropy"] == pytest.approx(expected, rel=1e-5)
    assert held["ad"]["validation_cross_entropy"] == pytest.approx(expected, rel=1e-5)
    assert held["ad"]["validation_loss"] != pytest.approx(expected, rel=1e-3)


def test_the_loss_without_a_teacher_is_that_of_the_next_token(llama_dir, text, tmp_path, monkeypatch):
    """As transformers has it, on the very batch."""
    from signbit.hub import distill as module

    seen, inner = [], module.DistillTrainer.compute_loss

    def compute_loss(self, model, inputs, *args, **kwargs):
        ids = inputs["input_ids"]
        seen.append(float(model(input_ids=ids, labels=ids).loss))
        return inner(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(module.DistillTrainer, "compute_loss", compute_loss)
    words = f"--tokenizer {llama_dir} --learning-rate 0 --log-every 1"
    assert pretrain(text, tmp_path / "run", words, steps=2) == 0
    assert [line["loss"] for line in metrics(tmp_path / "run") if "loss" in line] == pytest.approx(seen[:2], rel=1e-5)


@pytest.mark.parametrize("start", ["shape", "random"])
def test_the_padding_token_is_a_token_like_others(start, llama_dir, text, tmp_path):
    """It often stands between documents; transformers makes it 0 and gives it no gradient."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(llama_dir), AutoTokenizer.from_pretrained(llama_dir)
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(7)
    model.config.pad_token_id = 7
    model.save_pretrained(tmp_path / "padded")
    tokenizer.save_pretrained(tmp_path / "padded")
    shape = SHAPE if start == "shape" else f"--model {tmp_path}/padded --random"
    trainer = trainer_of(
        f"pretrain {shape} -o {tmp_path}/run --tokenizer {tmp_path}/padded --data {text} --max-steps 1 "
        "--sequence-length 16 --batch-size 4"
    )
    assert trainer.model.config.pad_token_id == 7
    embedding = trainer.model.get_input_embeddings()
    sizes = embedding.weight.detach().norm(dim=1)
    assert 0.5 * sizes.mean() < sizes[7] < 2 * sizes.mean()
    embedding(torch.tensor([7])).sum().backward()
    assert embedding.weight.grad[7].abs().min() > 0


def test_passes_are_steps(llama_dir, text, tmp_path):
    """6000 words and a boundary are 375 blocks of 16, of which 2 are held out: two passes are 746 blocks, 186 steps of 4."""
    command = (
        f"pretrain {SHAPE} -o {tmp_path}/run --tokenizer {llama_dir} --data {text} --max-passes 2 --sequence-length 16 "
        "--batch-size 4 --validation-blocks 2"
    )
    assert trainer_of(command).budget.max_steps == 186


def test_decay_reaches_norms_and_scales_if_told_to(llama_dir, text, tmp_path):
    """Without a gradient's step (a tiny learning rate times a huge decay) only what decays moves."""
    state = {}
    for name, more in {"some": "", "all": "--decay-all"}.items():
        words = f"--tokenizer {llama_dir} --optim sgd --learning-rate 1e-9 --weight-decay 5e8 --last-share 1 {more}"
        assert pretrain(text, tmp_path / name, words, steps=1) == 0
        state[name] = start_of(tmp_path / name)
    for key in ("model.layers.0.input_layernorm.weight", "model.norm.weight"):
        assert float(state["some"][key].mean()) == pytest.approx(1.0, abs=1e-3)
        assert float(state["all"][key].mean()) == pytest.approx(0.5, abs=1e-3)
    for name in state:
        assert float(state[name]["model.layers.0.mlp.up_proj.scale"].mean()) < 0.015


def test_a_line_falls_in_a_line_and_a_cosine_in_a_cosine():
    """Ten steps, four of warm-up: then as transformers' schedules, one step ahead."""
    line = [Schedule(warmup_steps=4, last_share=0.0, lr_decay="linear").factor((s + 1) / 10, s) for s in range(10)]
    assert line == pytest.approx([0.25, 0.5, 0.75, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6, 0])
    cosine = [Schedule(warmup_steps=4, last_share=0.1).factor((s + 1) / 10, s) for s in range(10)]
    want = [0.1 + 0.9 * (1 + math.cos(math.pi * i / 6)) / 2 for i in range(1, 7)]
    assert cosine == pytest.approx([0.25, 0.5, 0.75, 1, *want])


def test_a_warm_up_is_not_shorter_than_none():
    with pytest.raises(OptionError, match="warmup_steps is -1; it is a number of steps, 0 or more"):
        Schedule(warmup_steps=-1)
    assert Schedule(warmup_steps=0).factor(0.0, 0) == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "whose tokenizer? give --tokenizer, or --teacher or --model"),
        ("--tokenizer DIR --kd-alpha 1", "the objective looks at a teacher, and there is none"),
        ("--tokenizer DIR --random", "--random takes the shape of --model"),
        ("--model DIR --num-hidden-layers 3", "--num-hidden-layers is for a student without --model"),
        ("--tokenizer DIR --method none --keep q_proj", "are for binary layers, of which --method none has none"),
        ("--tokenizer DIR --method two", "there is no method 'two'"),
        ("--tokenizer DIR --method bitnet --groups 5", "5 groups do not divide"),
        ("--tokenizer DIR --method pb-gptq", "this method has no layer that is trained"),
        (
            "--tokenizer DIR --teacher-dtype int8",
            "are for a teacher beside the student; leave them out, or give --teacher",
        ),
        ("--teacher DIR --kd-alpha 0 --teacher-sharded", "are for a teacher beside the student; leave them out"),
        ("--tokenizer DIR --max-passes 1", "give either --max-steps N, --max-minutes M or --max-passes P"),
    ],
)
def test_bad_input_is_refused_in_words(words, message, llama_dir, text, tmp_path, capsys):
    command = f"pretrain -o {tmp_path}/run --data {text} --max-steps 2 --sequence-length 16 --batch-size 4 {words}"
    if "--model" not in words:
        command += f" {SHAPE}"
    assert main(command.replace("DIR", llama_dir).split()) == 1
    err = capsys.readouterr().err
    assert message in err and "Traceback" not in err, err


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_key_value_heads": 0}, "--num-key-value-heads is 0; at least 1 is needed"),
        ({"num_key_value_heads": -2}, "--num-key-value-heads is -2"),
        ({"max_position_embeddings": 0}, "--max-position-embeddings is 0"),
        ({"rms_norm_eps": -1.0}, "--rms-norm-eps is -1.0; a small number is needed"),
        ({"initializer_range": 0.0}, "--initializer-range is 0.0; above 0, where all signs would be one"),
        ({"initializer_range": float("nan")}, "--initializer-range is nan"),
        ({"hidden_size": 40}, "have no even part each"),
    ],
)
def test_shapes_that_no_model_has_are_refused(values, message):
    with pytest.raises(OptionError, match=message):
        Shape(**values)


def test_a_model_whose_decoder_is_a_part_of_it_may_lend_its_shape(text, tokenizer, tmp_path, capsys):
    """Its vocabulary is that of its text."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    words = {"vocab_size": 64, "head_dim": 8, "num_key_value_heads": 2}
    images = {"image_size": 28, "patch_size": 14, "vision_use_head": False}
    config = Gemma3Config(text_config={**sizes, **words}, vision_config={**sizes, **images})
    Gemma3ForConditionalGeneration(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    assert pretrain(text, tmp_path / "run", f"--model {tmp_path}/model --random", shape="", steps=1) in (0, 1)
    err = capsys.readouterr().err
    assert "a vocabulary of 64" in err and "Traceback" not in err, err


def test_a_tokenizer_of_more_tokens_than_the_model_is_refused(text, tokenizer, tmp_path, capsys):
    families.llama(vocab_size=40).save_pretrained(tmp_path / "small")
    tokenizer.save_pretrained(tmp_path / "words")
    words = f"--model {tmp_path}/small --tokenizer {tmp_path}/words"
    assert pretrain(text, tmp_path / "run", words, shape="") == 1
    assert "has 64 tokens, the student a vocabulary of 40" in capsys.readouterr().err


def test_another_run_is_not_gone_on_with(llama_dir, text, tmp_path, capsys):
    assert pretrain(text, tmp_path / "run", f"--tokenizer {llama_dir}", steps=2) == 0
    for words, message in (
        (f"--tokenizer {llama_dir} --num-hidden-layers 3", "shape ("),
        (f"--tokenizer {llama_dir} --method none", "config differs"),
        (f"--teacher {llama_dir}", "teacher differs"),
    ):
        assert pretrain(text, tmp_path / "run", f"{words} --resume", steps=2) == 1
        assert message in capsys.readouterr().err


def test_shifted_activations_train_and_are_not_packed(llama_dir, text, tmp_path, capsys):
    words = f"--tokenizer {llama_dir} --method bitnet"
    command = f"pretrain {SHAPE} -o {tmp_path}/run --data {text} --max-steps 1 --sequence-length 16 {words}"
    assert main([*command.split(), "--rule", "mlp.gate_proj: shifted=true"]) == 0, capsys.readouterr().err
    assert main(f"pack {tmp_path}/run -o {tmp_path}/out".split()) == 1
    assert "shifted activations cannot be packed" in capsys.readouterr().err
