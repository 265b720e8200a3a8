"""Runs that learn from a teacher's logits on the disk: beside the live teacher, resumed, and what is refused."""

import copy
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from signbit.cli import main
from signbit.errors import OptionError
from signbit.hub import distill as distill_module
from signbit.hub.config import SignbitConfig
from signbit.hub.distill import RUN, Recipe, Start
from signbit.methods import METHODS
from signbit.ptq import Plan
from signbit.train import Budget, DistillTrainer, Objective, Schedule, Trained, TrainOptions, start_training_
from tests import families

#: What a line of metrics says of the machine and not of the run.
TIME = ("tokens_per_s", "used_s")


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(" ".join(f"w{i}" for i in torch.randint(61, (1500,)).tolist()))
    return path


@pytest.fixture
def teacher(llama_dir):
    """A teacher that has something to say: the logits of a random model are almost the same for all tokens."""
    weights = load_file(f"{llama_dir}/model.safetensors")
    weights["model.norm.weight"] *= 20
    save_file(weights, f"{llama_dir}/model.safetensors", {"format": "pt"})
    return llama_dir


def ask(teacher, text, out, *more, top=64, length=16):
    words = f"data teacher-logits {teacher} -o {out} --data {text} --sequence-length {length} --top {top} --batch 7"
    return main(words.split() + list(more))


def run(teacher, text, out, *more, steps=8):
    return main(
        f"distill {teacher} -o {out} --data {text} --max-steps {steps} --sequence-length 16 --batch-size 4 --log-every 2 "
        "--save-every 4 --validation-blocks 2 --learning-rate 0.02".split()
        + list(more)
    )


def metrics(out):
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIME} for line in lines]


# --- beside the live teacher


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("alpha", [1.0, 0.7])
def test_all_of_the_logits_train_as_the_live_teacher(tmp_path, alpha, accumulation):
    base, teacher = families.llama(), families.llama()
    with torch.no_grad():
        teacher.model.norm.weight.mul_(20)
        blocks = torch.randint(3, 60, (20, 8))
        log_p, top_ids = teacher(blocks).logits.log_softmax(-1).topk(64)
    plain = [{"input_ids": ids} for ids in blocks]
    taught = [{"input_ids": i, "top_ids": t, "top_log_p": p} for i, t, p in zip(blocks, top_ids, log_p, strict=True)]
    lines = []
    for name, data in (("live", plain), ("logits", taught)):
        student = families.llama()
        student.load_state_dict(base.state_dict())
        start_training_(student, METHODS["onebit"], Plan(METHODS["onebit"].options()), Trained())
        options = TrainOptions(
            max_steps=4, sequence_length=8, batch_size=4, accumulation=accumulation, log_every=1, save_every=2,
            learning_rate=0.003,
        )  # fmt: skip
        live = (teacher, None) if name == "live" else (None, 64)
        DistillTrainer(
            student, live[0], Objective(kd_alpha=alpha), options, Schedule(), Budget(4, None), data[:16], data[16:],
            tmp_path / name, live[1],
        ).run()  # fmt: skip
        lines.append(metrics(tmp_path / name))
    assert len(lines[0]) == len(lines[1]) == 6 and lines[0][0]["kl"] > 0.5
    assert (lines[0][0]["cross_entropy"] > 0) == (alpha < 1) and sum(line.get("flips", 0) for line in lines[0]) > 0.001
    for one, other in zip(*lines, strict=True):
        for name, value in one.items():
            assert other[name] == pytest.approx(value, rel=1e-5, abs=1e-7), (one["step"], name)


def test_a_run_from_the_file_is_near_the_live_one(teacher, text, tmp_path, capsys, monkeypatch):
    """All of the vocabulary, rounded to float16; the weights, the blocks and what is held out are the same ones."""
    logits, loaded = tmp_path / "all.logits", []
    assert ask(teacher, text, logits) == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    assert "the 64 likeliest of 64 tokens behind each of 1,488, 380.9 kB" in said
    assert f"--teacher-logits {logits} --sequence-length 16" in said
    inner = distill_module._dense
    monkeypatch.setattr(distill_module, "_dense", lambda *args, **more: loaded.append(args) or inner(*args, **more))
    assert run(teacher, text, tmp_path / "live", "--kd-alpha", "0.8") == 0
    assert len(loaded) == 2
    assert run(teacher, text, tmp_path / "taught", "--kd-alpha", "0.8", "--teacher-logits", str(logits)) == 0
    assert len(loaded) == 3, "the student alone"
    live, taught = metrics(tmp_path / "live"), metrics(tmp_path / "taught")
    assert [line["step"] for line in taught] == [2, 4, 4, 6, 8, 8]
    for one, other in zip(live, taught, strict=True):
        for name in ("loss", "kl", "cross_entropy", "validation_loss"):
            if name in one:
                assert other[name] == pytest.approx(one[name], rel=1e-3 if one["step"] <= 2 else 1e-2), (
                    one["step"],
                    name,
                )


def test_less_of_the_top_is_less_of_the_loss(teacher, text, tmp_path, capsys):
    first, held = [], []
    for top in (1, 8, 64):
        assert ask(teacher, text, tmp_path / f"{top}.logits", top=top) == 0, capsys.readouterr().err
        out = tmp_path / str(top)
        assert run(teacher, text, out, "--teacher-logits", f"{tmp_path}/{top}.logits", "--log-every", "1", steps=1) == 0
        lines = metrics(out)
        first.append(lines[0]["kl"])
        held.append(lines[1]["validation_loss"])
    for one, eight, all_of_it in (first, held):
        assert 0 < one < 0.9 * eight < 0.9 * 0.98 * all_of_it


def test_a_resumed_run_gives_the_same_metrics(teacher, text, tmp_path, capsys):
    logits = ["--teacher-logits", f"{tmp_path}/some.logits"]
    assert ask(teacher, text, logits[1], top=8) == 0
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert run(teacher, text, whole, *logits) == 0
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "checkpoint-8")
    # The same answers at another place are the same ones.
    for end in (".logits", ".logits.json"):
        (tmp_path / f"some{end}").rename(tmp_path / f"moved{end}")
    assert run(teacher, text, cut, "--teacher-logits", f"{tmp_path}/moved.logits", "--resume") == 0, (
        capsys.readouterr().err
    )
    assert metrics(cut) == metrics(whole)
    one, other = (load_file(out / "checkpoint-8" / "model.safetensors") for out in (whole, cut))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_run_says_what_it_learnt_from_and_goes_on_with_nothing_else(teacher, text, tmp_path, capsys):
    for top in (8, 9):
        assert ask(teacher, text, tmp_path / f"{top}.logits", top=top) == 0
    taught, live = tmp_path / "taught", tmp_path / "live"
    assert run(teacher, text, taught, "--teacher-logits", f"{tmp_path}/8.logits", steps=2) == 0
    assert run(teacher, text, live, steps=2) == 0
    told = json.loads((taught / RUN).read_text())["teacher_logits"]
    assert (told["file"], told["top"], told["length"]) == (f"{tmp_path}/8.logits", 8, 16)
    assert [file["name"] for file in told["files"]] == json.loads((taught / RUN).read_text())["tokens"]
    assert json.loads((live / RUN).read_text())["teacher_logits"] is None
    capsys.readouterr()
    for out, more, message in (
        (
            taught,
            f"--teacher-logits {tmp_path}/9.logits",
            rf"differ (top); give --teacher-logits {tmp_path}/8.logits as it",
        ),
        (taught, "", f"give --teacher-logits {tmp_path}/8.logits as it was, or give another directory"),
        (live, f"--teacher-logits {tmp_path}/8.logits", "leave out --teacher-logits, or give another directory"),
    ):
        assert run(teacher, text, out, "--resume", *more.split(), steps=2) == 1
        err = capsys.readouterr().err
        assert "is another run: the teacher's logits differ" in err and message in err, err
    # A run that an older signbit began has learnt from the live teacher.
    values = json.loads((live / RUN).read_text())
    del values["teacher_logits"]
    (live / RUN).write_text(json.dumps(values))
    assert run(teacher, text, live, "--resume", steps=2) == 0, capsys.readouterr().err


# --- refused


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("--kd-beta 0.5", "--kd-beta 0.5 needs the teacher itself"),
        ("--kd-beta-last 0.5", "--kd-beta-last 0.5 needs the teacher itself"),
        ("--kd-gamma 1", "--kd-gamma 1.0 needs the teacher itself"),
        ("--kd-direction reverse", "--kd-direction reverse needs the teacher itself"),
        ("--kd-temperature 2", "--kd-temperature 2.0 needs the teacher itself"),
        ("--kd-alpha 0", "looks at no teacher (kd_alpha · kd_loss_scale is 0); leave out --teacher-logits"),
        ("--teacher-dtype int8", "--teacher-dtype, --teacher-device and --teacher-sharded are for a teacher beside"),
        ("--teacher-sharded", "--teacher-dtype, --teacher-device and --teacher-sharded are for a teacher beside"),
        ("--teacher-logits NOWHERE.logits", "NOWHERE.logits.json: No such file"),
        (
            "--teacher-logits some.bin",
            "some.bin is no name of a file of teacher's logits; give one that ends in .logits",
        ),
        ("--sequence-length 8", "answers blocks of 16 tokens, and --sequence-length is 8; give --sequence-length 16"),
    ],
)
def test_what_the_logits_cannot_teach_is_refused(change, message, teacher, text, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert ask(teacher, text, "some.logits", top=4) == 0
    (tmp_path / "data").rename(tmp_path / "elsewhere")  # what is refused is refused before text is tokenized
    words = ["--teacher-logits", "some.logits", *change.split()]
    assert run(teacher, text, tmp_path / "run", *words) == 1
    err = capsys.readouterr().err
    assert message in err and "Traceback" not in err, err
    assert not (tmp_path / "run" / "data").exists()


def test_logits_of_something_else_are_refused(teacher, text, tokenizer, tmp_path, capsys):
    def refused(message, *data):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        assert run(teacher, text, tmp_path / "run", *data, "--teacher-logits", f"{tmp_path}/some.logits") == 1
        err = capsys.readouterr().err
        assert message in err and "Traceback" not in err, err

    assert ask(teacher, text, tmp_path / "some.logits", top=4) == 0
    (tmp_path / "more.txt").write_text(text.read_text()[::-1].replace("w", " w"))
    refused("has no answers to", "--data", str(tmp_path / "more.txt"))
    words = text.read_text()
    text.write_text(words.replace("w1 ", "w2 ", 1))
    refused("has no answers to")
    text.write_text(words)
    weights = load_file(f"{teacher}/model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][3, 5] += 1e-3
    save_file(weights, f"{teacher}/model.safetensors", {"format": "pt"})
    refused("some.logits holds what another model answers; make it anew with signbit data teacher-logits")
    another = copy.deepcopy(tokenizer)  # that of all tests stays as it is
    another.add_tokens(["w3x"])
    another.save_pretrained(teacher)
    refused("some.logits was made with another tokenizer than the model's")


def test_what_lies_beside_a_model_is_no_part_of_it(teacher, text, tmp_path, capsys):
    """The file may be written into the model's directory, and a card added."""
    assert ask(teacher, text, f"{teacher}/some.logits", top=4) == 0
    (tmp_path / "llama" / "notes.json").write_text("{}")
    words = ["--teacher-logits", f"{teacher}/some.logits"]
    assert run(teacher, text, tmp_path / "run", *words, steps=1) == 0, capsys.readouterr().err


def test_the_vocabulary_is_the_students(tmp_path):
    student = families.llama()
    start_training_(student, METHODS["onebit"], Plan(METHODS["onebit"].options()), Trained())
    rest = (Objective(), TrainOptions(max_steps=2), Schedule(), Budget(2, None), [], None, tmp_path)
    with pytest.raises(OptionError, match="the teacher has 80 tokens in its vocabulary and the student 64"):
        DistillTrainer(student, None, *rest, 80)


def test_a_captured_step_is_refused(tmp_path, monkeypatch):
    with monkeypatch.context() as gpu:
        gpu.setattr(torch.cuda, "is_available", lambda: True)
        options = TrainOptions(max_steps=2, cuda_graph=True)
    message = "--cuda-graph gives its step token ids alone.* leave out --teacher-logits"
    with pytest.raises(OptionError, match=message):
        Recipe(
            Start("x"),
            "x",
            "x",
            SignbitConfig("onebit"),
            ("x",),
            Objective(),
            options,
            Schedule(),
            Trained(),
            "some.logits",
        )
    with pytest.raises(OptionError, match=message):
        DistillTrainer(
            families.llama(), None, Objective(), options, Schedule(), Budget(2, None), [], None, tmp_path, 64
        )


def test_the_trainer_refuses_what_the_logits_cannot_teach(tmp_path):
    rest = (TrainOptions(max_steps=2), Schedule(), Budget(2, None), [], None, tmp_path, 64)
    with pytest.raises(OptionError, match=r"--kd-beta 0\.5 needs the teacher itself"):
        DistillTrainer(families.llama(), None, Objective(kd_beta=0.5), *rest)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("-o some.bin", "some.bin is no name of a file of teacher's logits; give one that ends in .logits"),
        ("--top 0", "the top 0 tokens are asked for, of a vocabulary of 64; give 1 … 64"),
        ("--top 65", "the top 65 tokens are asked for, of a vocabulary of 64; give 1 … 64"),
        ("--data NOWHERE.txt", "NOWHERE.txt: no such file"),
        ("--device cuda:99", "the device 'cuda:99' cannot be used here"),
    ],
)
def test_what_cannot_be_asked_is_refused(change, message, teacher, text, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert ask(teacher, text, "some.logits", *change.split()) == 1
    err = capsys.readouterr().err
    assert message in err and "Traceback" not in err, err
    assert not list(tmp_path.glob("some.*"))
    assert (tmp_path / "data").exists() == change.startswith("--top"), (
        "what needs no text is seen before text is tokenized"
    )
    assert main(f"data teacher-logits {teacher} -o some.logits".split()) == 1
    assert "what is the teacher asked about? give --data FILE" in capsys.readouterr().err


def test_a_packed_teacher_answers(teacher, text, tmp_path, capsys):
    assert main(f"quantize {teacher} -o {tmp_path}/packed --method absmean --head int8".split()) == 0
    assert ask(f"{tmp_path}/packed", text, tmp_path / "some.logits", top=4) == 0, capsys.readouterr().err
