"""Runs of a tiny model: what is written, what resuming gives, what is refused, and that packing loses nothing."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, TrainerCallback
from transformers.integrations import INTEGRATION_TO_CALLBACK

import signbit
from signbit.cli import main
from signbit.errors import OptionError, SignbitError, TrainingError, WeightError
from signbit.hub import distill as distill_module
from signbit.hub.distill import pack
from signbit.hub.load import load_any
from signbit.linear import Int8Head
from signbit.methods import METHODS
from signbit.ptq import Plan
from signbit.train import (
    Budget,
    DistillTrainer,
    Flips,
    Objective,
    Schedule,
    States,
    Trained,
    TrainOptions,
    binary_layers,
    head_of,
    last_checkpoint,
    latents,
    pack_training_,
    start_training_,
)
from signbit.train import trainer as trainer_module
from signbit.train.checkpoints import METRICS, checkpoints, read_metrics
from tests import families
from tests.train.runs import metrics, trainer_of


def run(llama_dir, text, out, *more, method="onebit", steps=8):
    return main(
        f"distill {llama_dir} -o {out} --method {method} --data {text} --max-steps {steps} --sequence-length 16 "
        f"--batch-size 4 --log-every 2 --save-every 4 --validation-blocks 2 --learning-rate 0.02".split()
        + list(more)
    )


def test_a_run_writes_checkpoints_metrics_and_pictures(llama_dir, text, tmp_path, capsys):
    out = tmp_path / "run"
    assert run(llama_dir, text, out) == 0, capsys.readouterr().err
    lines = metrics(out)
    assert [line["step"] for line in lines] == [2, 4, 4, 6, 8, 8]
    held, lines = [line for line in lines if "validation_loss" in line], [line for line in lines if "loss" in line]
    assert [line["step"] for line in held] == [4, 8]
    assert lines[3]["kl"] == pytest.approx(lines[3]["loss"])
    assert sum(line["flips"] for line in lines[:4]) > 0.005 and lines[3]["tokens"] == 8 * 4 * 16
    assert len(lines[0]["flips_by_layer"]) == 14
    names = {path.name for path in out.iterdir()}
    assert {"checkpoint-4", "checkpoint-8", "run.json", "metrics.jsonl", "loss.png", "flips.png", "tokenizer"} <= names
    assert ".unfinished" not in names
    assert (out / "loss.png").read_bytes()[:4] == b"\x89PNG"


def test_resuming_gives_the_same_metrics(llama_dir, text, tmp_path, capsys):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert run(llama_dir, text, whole) == 0
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "checkpoint-8")
    # As kills leave them that come while they are written.
    (cut / ".unfinished" / "checkpoint-6").mkdir(parents=True)
    with (cut / "metrics.jsonl").open("a") as file:
        file.write('{"step": 10, "lo')
    assert run(llama_dir, text, cut, "--resume") == 0, capsys.readouterr().err
    assert metrics(cut) == metrics(whole)
    one, other = (load_file(out / "checkpoint-8" / "model.safetensors") for out in (whole, cut))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert run(llama_dir, text, cut, "--resume") == 0, "one that is finished already"
    assert metrics(cut) == metrics(whole)


def test_deterministic_algorithms_are_used_for_the_run_alone(tmp_path, monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    made = trainer(tmp_path, families.llama(), families.llama(), deterministic=True)
    inner, seen = made.training_step, []

    def training_step(*args, **kwargs):
        seen.append(torch.are_deterministic_algorithms_enabled())
        return inner(*args, **kwargs)

    made.training_step = training_step
    made.run()
    assert seen == [True] * 4 and not torch.are_deterministic_algorithms_enabled()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("more", [(), ("--compile", "--optim", "adamw_torch"), ("--compile", "--cuda-graph")])
def test_resuming_on_a_gpu_gives_the_same_metrics(llama_dir, text, tmp_path, capsys, more):
    more = ("--deterministic", "--kd-beta", "0.5", "--kd-alpha", "0.9", "--train-embeddings", *more)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert run(llama_dir, text, whole, *more) == 0, capsys.readouterr().err
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "checkpoint-8")
    assert run(llama_dir, text, cut, *more, "--resume") == 0, capsys.readouterr().err
    assert metrics(cut) == metrics(whole)
    one, other = (load_file(out / "checkpoint-8" / "model.safetensors") for out in (whole, cut))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
def test_a_killed_run_goes_on(llama_dir, text, tmp_path):
    whole = tmp_path / "whole"
    command = (
        f"-m signbit distill {llama_dir} --data {text} --max-steps 30 --sequence-length 16 --batch-size 4 --log-every 1 "
        "--save-every 3 --validation-blocks 2 --learning-rate 0.02"
    ).split()
    assert subprocess.run([sys.executable, *command, "-o", str(whole)], capture_output=True).returncode == 0
    for steps in (5, 12, 20):  # after some checkpoints, while one is written
        cut = tmp_path / f"cut{steps}"
        process = subprocess.Popen([sys.executable, *command, "-o", str(cut)], stderr=subprocess.DEVNULL)
        while process.poll() is None and (not (cut / METRICS).exists() or len(read_metrics(cut / METRICS)) < steps):
            time.sleep(0.01)
        process.kill()
        assert process.wait() == -signal.SIGKILL
        done = subprocess.run([sys.executable, *command, "-o", str(cut), "--resume"], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert metrics(cut) == metrics(whole)


def test_nothing_flips_without_a_learning_rate(llama_dir, text, tmp_path, capsys):
    assert run(llama_dir, text, tmp_path / "run", "--learning-rate", "0") == 0
    assert all(line["flips"] == 0 for line in metrics(tmp_path / "run") if "flips" in line)
    assert "WARNING" not in capsys.readouterr().err, "it was asked for"


def test_a_run_in_which_nothing_flips_warns(llama_dir, text, tmp_path, capsys):
    assert run(llama_dir, text, tmp_path / "run", "--learning-rate", "1e-9", steps=12) == 0
    assert "WARNING: not one sign changed in the last 2 steps" in capsys.readouterr().err


def test_packing_loses_nothing(llama_dir, text, tmp_path, capsys):
    out = tmp_path / "run"
    assert run(llama_dir, text, out, "--kd-beta", "0.5", "--norm", "layer") == 0
    assert main(f"pack {out} -o {tmp_path}/packed".split()) == 0, capsys.readouterr().err
    student = load_any(str(llama_dir), "float32")
    config = signbit.SignbitConfig("onebit", norm="layer")
    start_training_(student, METHODS["onebit"], config.plan, Trained())
    student.load_state_dict(load_file(out / "checkpoint-8" / "model.safetensors"), strict=False)
    packed = load_any(str(tmp_path / "packed"), "float32")
    ids = torch.randint(3, 60, (2, 12))
    want = student.eval()(ids).logits
    assert (packed(ids).logits - want).abs().max() <= 2e-5 * want.abs().max()
    assert main(f"pack {out} -o {tmp_path}/packed".split()) == 1
    assert "exists" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_scales_are_packed_in_the_dtype_asked_for(llama_dir, text, tmp_path, dtype, capsys):
    out = tmp_path / "run"
    assert run(llama_dir, text, out, steps=2) == 0
    for kind in ("float32", dtype):
        assert main(f"pack {out} -o {tmp_path}/{kind} --dtype {kind}".split()) == 0, capsys.readouterr().err
    stored = load_file(tmp_path / dtype / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {getattr(torch, dtype), torch.uint8}
    ids = torch.randint(3, 60, (2, 12))
    want, got = (load_any(str(tmp_path / kind), "float32")(ids).logits for kind in ("float32", dtype))
    assert 0 < (got - want).abs().max() < 0.05 * want.abs().max()
    state = load_file(last_checkpoint(out) / "model.safetensors")
    name = next(n for n in state if n.endswith("q_proj.scale"))
    state[name][:] = 1e6
    save_file(state, last_checkpoint(out) / "model.safetensors", {"format": "pt"})
    with pytest.raises(WeightError, match=r"q_proj: scales up to 1e\+06 do not fit float16; use float32"):
        pack(out, tmp_path / "large", dtype="float16")


def test_zeros_are_counted_and_pack_to_plus_one(llama_dir, text, tmp_path, capsys):
    out = tmp_path / "run"
    assert run(llama_dir, text, out, steps=2) == 0
    file = last_checkpoint(out) / "model.safetensors"
    state = load_file(file)
    name = next(n for n in state if n.endswith("q_proj.weight"))
    state[name][0, :5] = 0.0
    save_file(state, file, {"format": "pt"})
    _, zeros = pack(out, tmp_path / "packed")
    assert zeros == 5
    packed = load_any(str(tmp_path / "packed"), "float32")
    layer = packed.get_submodule(name.removesuffix(".weight"))
    assert bool((layer.to_dense()[0, :5] > 0).all())


def test_the_teacher_is_no_part_of_the_student(llama_dir, text, tmp_path):
    """What the original got wrong: it was saved with the student, deleted by saving, and trained along."""
    out = tmp_path / "run"
    assert run(llama_dir, text, out, "--train-embeddings") == 0
    state = load_file(out / "checkpoint-4" / "model.safetensors")
    assert not [name for name in state if "teacher" in name]
    lines = metrics(out)
    assert all(line["kl"] > 0 for line in lines if "kl" in line), "it still teaches after the first checkpoint"


@pytest.mark.parametrize("family", families.DENSE)
def test_the_head_of_every_family_is_known(family):
    model = families.DENSE[family][0]()
    states = States(model)
    head_of(model, states)
    ids = torch.tensor([[3, 5, 7, 11]])
    with states.listening():
        want = model(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states
    blocks, last = states.take()
    assert len(blocks) == len(want) - 1 and torch.equal(last, want[-1])
    assert all(torch.equal(one, other) for one, other in zip(blocks, want, strict=False))


@pytest.mark.parametrize("family", families.DENSE)
def test_every_family_trains_and_packs(family):
    model = families.DENSE[family][0]()
    report = start_training_(model, METHODS["onebit"], Plan(METHODS["onebit"].options(), allow_partial=True), Trained())
    assert not model.get_input_embeddings().weight.requires_grad
    ids = torch.randint(3, 60, (2, 8))
    loss = model(ids).logits.square().mean()
    loss.backward()
    for name, layer in binary_layers(model):
        assert layer.weight.grad is not None and layer.scale.grad is not None, name
    want = model.eval()(ids).logits
    found = pack_training_(model, report)
    assert found.report.share > 0.5 and (model(ids).logits - want).abs().max() <= 1e-4 * want.abs().max()


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("onebit", {}),
        ("fbi", {}),
        ("bitnet", {}),
        ("bitnet", {"norm": "layer", "ste": "sign"}),
        ("bitnet", {"weights": "ternary"}),
    ],
)
def test_compiled_training_trains_the_latents(method, options):
    """Under torch.compile (here inductor on a CPU) the gradients are those of eager."""
    layer = METHODS[method].layer.start(torch.randn(8, 16), None, METHODS[method].options(**options))
    x, grads = torch.randn(4, 16), []
    for forward in (layer.forward, torch.compile(layer.forward)):
        layer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            forward(x).float().square().sum().backward()
        grads.append({name: parameter.grad.clone() for name, parameter in layer.named_parameters()})
    assert grads[0]["weight"].abs().min() > 0
    for name, grad in grads[0].items():
        assert (grad - grads[1][name]).abs().max() <= 0.05 * grad.abs().max(), name


def trainer(tmp_path, student=None, teacher=None, objective=None, data=None, **options):
    student = student or families.llama()
    start_training_(student, METHODS["onebit"], Plan(METHODS["onebit"].options()), Trained())
    options = TrainOptions(**{"max_steps": 4, "sequence_length": 8, "batch_size": 2, "log_every": 1, **options})
    data = data or [{"input_ids": torch.randint(3, 60, (8,))} for _ in range(16)]
    return DistillTrainer(
        student,
        teacher,
        objective or Objective(),
        options,
        Schedule(),
        Budget(options.max_steps, None),
        data,
        None,
        tmp_path,
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("optim", ["muon", "adamw_torch"])
def test_signs_flip_on_a_gpu(tmp_path, optim, compiled):
    student, teacher = families.llama().cuda(), families.llama().cuda().bfloat16()
    made = trainer(
        tmp_path, student, teacher, Objective(kd_beta=0.5), learning_rate=0.02, optim=optim, compile=compiled
    )
    made.run()
    assert sum(line["flips"] for line in metrics(tmp_path) if "flips" in line) > 0.005


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("compiled", [False, True])
def test_a_captured_step_is_the_step(tmp_path, compiled):
    """In float32 and with a weight that changes, so that a graph that kept the first one would differ."""
    data = [{"input_ids": torch.randint(3, 60, (8,))} for _ in range(16)]
    lines = []
    for cuda_graph in (False, True):
        out = tmp_path / str(cuda_graph)
        out.mkdir()
        torch.manual_seed(1)
        student, teacher = families.llama().cuda(), families.llama().cuda()
        objective = Objective(kd_alpha=0.9, kd_beta=2.0, kd_beta_last=0.0)
        how = {"learning_rate": 0.005, "precision": "float32", "compile": compiled, "max_steps": 8}
        trainer(out, student, teacher, objective, data, cuda_graph=cuda_graph, **how).run()
        lines.append([line for line in metrics(out) if "loss" in line])
    assert len(lines[0]) == len(lines[1]) == 8
    for plain, captured in zip(*lines, strict=True):
        for name in ("loss", "kl", "cross_entropy", "hidden", "flips", "grad_norm"):
            # A sum in another order may flip a sign of 9216.
            assert captured[name] == pytest.approx(plain[name], rel=0.01, abs=5e-4), (plain["step"], name)
    assert sum(line["flips"] for line in lines[1]) > 0.005


def test_no_gradient_for_the_latents_ends_a_run_at_its_first_step(tmp_path, monkeypatch):
    """As torch.compile 2.11 did to an autograd function: nothing would ever flip."""
    made = trainer(tmp_path, families.llama(), families.llama())
    for _, layer in binary_layers(made.model):
        monkeypatch.setattr(layer, "effective_weight", lambda layer=layer: layer.weight.detach().sign() * layer.scale.T)
    with pytest.raises(TrainingError, match="no gradient reaches the latent matrices"):
        made.run()


def test_methods_have_no_autograd_function_of_their_own():
    """torch 2.11 loses gradients of some that it compiles (pytorch issue 180642)."""
    for path in (Path(signbit.__file__).parent / "methods").glob("*.py"):
        assert "autograd.Function)" not in path.read_text(), path


def test_a_parameter_that_is_no_number_is_not_saved(tmp_path):
    made = trainer(tmp_path, families.llama(), families.llama(), save_every=2)
    inner = made.training_step

    def training_step(*args, **kwargs):
        loss = inner(*args, **kwargs)
        if made.state.global_step == 3:
            next(iter(binary_layers(made.model)))[1].weight.grad.fill_(float("nan"))
        return loss

    made.training_step = training_step
    with pytest.raises(TrainingError, match=r"after step 4 a parameter is no number; .*checkpoint-2 is the last good"):
        made.run()


def test_an_optimizer_that_is_not_installed_is_told(tmp_path):
    with pytest.raises(OptionError, match=r"--optim adamw_torch_xla cannot be had here \(.*torch_xla.*\); muon and"):
        trainer(tmp_path, families.llama(), families.llama(), optim="adamw_torch_xla").run()


def test_text_that_changed_is_not_gone_on_with(llama_dir, text, tmp_path, capsys):
    out = tmp_path / "run"
    assert run(llama_dir, text, out, steps=2) == 0
    text.write_text(text.read_text()[::-1].replace("w", "") + " w1 w2")
    assert run(llama_dir, text, out, "--resume", steps=2) == 1
    assert "is another run: the text has changed since" in capsys.readouterr().err


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_anew(llama_dir, text, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert run(llama_dir, text, whole) == 0
    shutil.copytree(whole, cut)
    for path in cut.glob("checkpoint-*"):
        shutil.rmtree(path)
    assert run(llama_dir, text, cut, "--resume") == 0
    assert metrics(cut) == metrics(whole)


def test_a_budget_of_minutes_ends_the_run_and_goes_on_where_it_was(tmp_path):
    """The first step of each start, in which torch.compile works, does not count."""
    clock, rates = [0.0], {}
    data = [{"input_ids": torch.randint(3, 60, (8,))} for _ in range(200)]

    def run(checkpoint=None):
        made = trainer(tmp_path, families.llama(), families.llama(), data=data, save_every=4)
        made.args.max_steps = 100
        made.budget = Budget(None, 1.0, clock=lambda: clock[0])
        inner = made.training_step

        def training_step(*args, **kwargs):
            clock[0] += 10.0
            rates[made.state.global_step] = made.optimizer.param_groups[0]["lr"]
            return inner(*args, **kwargs)

        made.training_step = training_step
        made.run(checkpoint)
        return made.state.global_step

    def state(step):
        found = json.loads((tmp_path / f"checkpoint-{step}" / "signbit.json").read_text())
        assert found.pop("files")["model.safetensors"] > 0
        return found

    assert run() == 7 and state(7) == {"used_s": 60.0, "step": 7, "skipped": []}
    assert rates[0] == pytest.approx(0.01 * 1e-3) and max(rates.values()) <= 1e-3 and rates[6] < rates[3]
    before = dict(rates)
    clock[0] = 5000.0
    assert state(4)["used_s"] == 30.0
    assert run(tmp_path / "checkpoint-4") == 8 and state(8) == {"used_s": 60.0, "step": 8, "skipped": []}
    assert [rates[step] for step in (4, 5, 6, 7)] == [before[step] for step in (4, 5, 5, 6)], "used minutes count"


def test_another_vocabulary_is_refused(tmp_path):
    with pytest.raises(OptionError, match="the teacher has 80 tokens in its vocabulary and the student 64"):
        trainer(tmp_path, teacher=families.llama(vocab_size=80))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kd_beta": 1.0}, r"--kd-beta compares hidden states .* teacher has 3 layers of hidden_size 32, .* 2 of 32"),
        ({"kd_beta_last": 1.0}, "--kd-beta compares hidden states"),
        ({"kd_gamma": 1.0}, "--kd-gamma compares attentions .* layers of num_attention_heads 4, .*; leave it out"),
    ],
)
def test_layers_that_the_other_model_has_not_are_not_compared(values, message, tmp_path):
    with pytest.raises(OptionError, match=message):
        trainer(tmp_path, families.llama(), families.llama(num_hidden_layers=3), Objective(**values))
    trainer(tmp_path, families.llama(), families.llama(num_hidden_layers=3))


def test_sequences_longer_than_a_model_has_positions(tmp_path, capsys):
    """Learned ones end; others were only not trained."""
    with pytest.raises(
        OptionError, match=r"the student has 128 positions, and --sequence-length is 129; give .* 128 or"
    ):
        trainer(tmp_path, families.opt(), families.llama(), sequence_length=129)
    trainer(tmp_path, families.opt(), families.opt(), sequence_length=128)
    assert "note" not in capsys.readouterr().err
    trainer(tmp_path, families.llama(), families.llama(), sequence_length=129)
    assert "note: the teacher was made for 128 positions, and --sequence-length is 129" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"learning_rate": -1.0}, r"--learning-rate is -1\.0; a number of 0 or more"),
        ({"learning_rate": float("nan")}, "--learning-rate is nan"),
        ({"weight_decay": float("inf")}, "--weight-decay is inf"),
        ({"beta2": 1.0}, r"--beta2 is 1\.0; it is a share, from 0 to below 1"),
        ({"max_grad_norm": -1.0}, r"--max-grad-norm is -1\.0; it is a norm, or 0"),
        ({"report_to": ("paper",)}, "--report-to is 'paper'; tensorboard, trackio and wandb are allowed"),
        ({"report_to": ("swanlab",)}, "--report-to swanlab needs a package that is not installed: pip install swanlab"),
    ],
)
def test_values_that_no_run_can_have_are_refused(values, message):
    with pytest.raises(OptionError, match=message):
        TrainOptions(**values)


def test_more_processes_than_gpus_are_refused(llama_dir, text, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert run(llama_dir, text, tmp_path / "run") == 1
    assert "process 3 of this machine has no GPU, for there are 2; launch at most 2" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_an_objective_without_a_teacher_is_refused(tmp_path):
    with pytest.raises(OptionError, match="the objective looks at a teacher, and there is none"):
        trainer(tmp_path)


def test_a_batch_that_does_not_divide_is_refused(tmp_path):
    with pytest.raises(OptionError, match=r"--batch-size is 3, which 1 devices × 2 parts do not divide"):
        trainer(tmp_path, teacher=families.llama(), batch_size=3, accumulation=2)


def test_parts_of_a_batch_add_up_to_it(tmp_path):
    """Gradient accumulation: the same steps, and lines of metrics, as with the whole batch at once."""
    data = [{"input_ids": torch.randint(3, 60, (8,))} for _ in range(16)]
    base, teacher, objective = families.llama(), families.llama(), Objective(kd_alpha=0.5, kd_beta=0.5)
    how = {"data": data, "batch_size": 4, "optim": "adamw_torch", "log_every": 2}
    states, lines = [], []
    for parts in (1, 2):
        student, out = families.llama(), tmp_path / str(parts)
        student.load_state_dict(base.state_dict())
        trainer(out, student, teacher, objective, accumulation=parts, **how).run()
        states.append({name: p.detach().clone() for name, p in student.named_parameters()})
        lines.append(metrics(out))
    assert all((states[0][n] - states[1][n]).abs().max() <= 1e-5 for n in states[0])
    for one, other in zip(*lines, strict=True):
        for name in ("loss", "kl", "cross_entropy", "hidden", "grad_norm"):
            assert other[name] == pytest.approx(one[name], rel=1e-4), name


def test_blocks_are_computed_again_for_the_gradient(tmp_path):
    """Gradient checkpointing: each block twice a step, and the run of one that kept what it computed."""
    data = [{"input_ids": torch.randint(3, 60, (8,))} for _ in range(4)]
    base, teacher, objective = families.llama(), families.llama(), Objective(kd_beta=0.5)
    lines, passes = [], []
    for again in (False, True):
        student, out, calls = families.llama(), tmp_path / str(again), []
        student.load_state_dict(base.state_dict())
        made = trainer(out, student, teacher, objective, data, max_steps=2, gradient_checkpointing=again)
        made.model.model.layers[1].mlp.act_fn.register_forward_hook(lambda *given, calls=calls: calls.append(given))
        made.run()
        lines.append(metrics(out))
        passes.append(len(calls))
    assert passes == [2, 4] and lines[0] == lines[1]


def test_lines_and_checkpoints_are_as_many_as_asked_for(tmp_path):
    """There is a line at each checkpoint too, at which a resumed run can begin to count; a copy of one is left alone."""
    (tmp_path / "checkpoint-2-copy").mkdir()
    made = trainer(
        tmp_path, families.llama(), families.llama(), max_steps=5, log_every=3, save_every=2, keep_checkpoints=2
    )
    made.run()
    assert [line["step"] for line in metrics(tmp_path)] == [2, 3, 4, 5]
    kept = {path.name for path in tmp_path.glob("checkpoint-*")}
    assert kept == {"checkpoint-4", "checkpoint-5", "checkpoint-2-copy"}


def test_reports_have_what_a_line_of_metrics_has(tmp_path, monkeypatch):
    told = []

    class Reporter(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            told.append({"step": state.global_step, **logs})

    monkeypatch.setitem(INTEGRATION_TO_CALLBACK, "swanlab", Reporter)
    monkeypatch.setattr(trainer_module, "get_available_reporting_integrations", lambda: ["swanlab"])
    how = {"max_steps": 2, "learning_rate": 0.02, "report_to": ("swanlab",)}
    trainer(tmp_path, families.llama(), families.llama(), Objective(kd_beta=1.0), **how).run()
    for line, report in zip(metrics(tmp_path), told, strict=False):
        for name in ("step", "loss", "kl", "hidden", "flips", "grad_norm", "learning_rate"):
            assert report[name] == line[name], name
        assert "tokens_per_s" in report


def test_the_newest_complete_checkpoint_is_that_of_the_most_steps(tmp_path):
    for step in (9, 10, 100, 1000):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if step < 1000:
            (tmp_path / f"checkpoint-{step}" / "signbit.json").touch()
    for name in (".unfinished/checkpoint-2000", "checkpoint-100-copy", "checkpoint-best"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "signbit.json").touch()
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-100", "checkpoint-10", "checkpoint-9"]
    assert last_checkpoint(tmp_path).name == "checkpoint-100"


@pytest.mark.parametrize(
    ("kind", "wrapper"),
    [("FSDP", "FSDPModule"), ("DEEPSPEED", "DeepSpeedEngine"), ("MULTI_GPU", "DistributedDataParallel")],
)
def test_what_stands_around_the_student_is_what_the_launch_asked_for(kind, wrapper, tmp_path):
    made = trainer(tmp_path, families.llama(), families.llama())
    made.engine = {"kind": kind, "processes": 2}
    with pytest.raises(TrainingError, match=f"accelerate was to give {wrapper} for {kind}, and gave LlamaForCausalLM"):
        made.run()
    made.model_wrapped = type(wrapper, (torch.nn.Module,), {})()
    made.check_wrapped()


def test_a_loss_that_is_no_number_stops_with_the_last_good_checkpoint(tmp_path):
    student, teacher = families.llama(), families.llama()
    made = trainer(tmp_path, student, teacher, save_every=2)
    inner, calls = made.compute_loss, []

    def compute_loss(*args, **kwargs):
        calls.append(1)
        loss = inner(*args, **kwargs)
        return loss * float("nan") if len(calls) > 3 else loss

    made.compute_loss = compute_loss
    with pytest.raises(
        TrainingError, match=r"the loss of step 4 is no number; .*checkpoint-2 is the last good checkpoint"
    ):
        made.run()


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    made = trainer(tmp_path, families.llama(), families.llama(), save_every=2)
    inner = made.save_model

    def save_model(folder, **kwargs):
        inner(folder, **kwargs)
        if made.state.global_step > 2:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(made, "save_model", save_model)
    with pytest.raises(TrainingError, match=r"step 4 could not be written .*No space left.*checkpoint-2 is complete"):
        made.run()
    assert last_checkpoint(tmp_path).name == "checkpoint-2" and not (tmp_path / ".unfinished").exists()


def test_metrics_that_cannot_be_written_end_the_run(tmp_path):
    made = trainer(tmp_path, families.llama(), families.llama(), save_every=2)
    inner = made.training_step

    def training_step(*args, **kwargs):
        if made.state.global_step == 2:
            made.metrics._path = tmp_path
        return inner(*args, **kwargs)

    made.training_step = training_step
    with pytest.raises(
        TrainingError, match=r"could not be written \(Is a directory\); .*checkpoint-2 is the last good"
    ):
        made.run()


def test_flips_are_counted_layer_by_layer():
    model = families.llama()
    start_training_(model, METHODS["onebit"], Plan(METHODS["onebit"].options()), Trained())
    flips = Flips(model)
    flips.begin()
    name, layer = next(iter(binary_layers(model)))
    for _ in range(2):  # there and back: two changes of which a look at the end shows none
        layer.weight.data[:2] *= -1
        flips.step()
    assert flips.steps == 2
    shares = flips.take()
    assert flips.share(shares) == pytest.approx(2 * layer.weight.shape[1] / sum(p.numel() for p in latents(model)))
    assert shares.pop(name) == 2 / layer.weight.shape[0] and not any(shares.values())
    flips.step()
    assert not any(flips.take().values()), "counted anew"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("--resume", "holds no run to go on with; leave --resume out to begin one"),
        ("--data NOWHERE.txt", "NOWHERE.txt"),
        ("--sequence-length 100000", "length"),
        ("--method pb-gptq", "this method has no layer that is trained"),
        ("--recipe none-such", "there is no recipe 'none-such'"),
        ("--max-minutes 1", "give either --max-steps N, --max-minutes M or --max-passes P"),
    ],
)
def test_bad_input_is_refused_in_words(llama_dir, text, tmp_path, capsys, change, message):
    flag, _, value = change.partition(" ")
    words = (
        f"distill {llama_dir} -o {tmp_path}/run --max-steps 2 --sequence-length 16 --batch-size 4 --data {text}".split()
    )
    if flag in words:
        words[words.index(flag) + 1] = value
    else:
        words += change.split()
    code = main(words)
    err = capsys.readouterr().err
    assert code == 1 and message in err and "Traceback" not in err, err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("--kd-alpha 2", "it is a share, from 0 to 1"),
        (
            "--optim no_such_optimizer",
            "--optim is 'no_such_optimizer'; muon and transformers' are allowed: adamw_torch",
        ),
        ("--batch-size 0", "--batch-size is 0; at least 1 is needed"),
    ],
)
def test_values_out_of_range_are_refused_while_parsing(change, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(f"distill TEACHER -o RUN {change}".split())
    words = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert stopped.value.code == 2 and message in words


def test_a_directory_of_another_run_is_not_gone_on_with(llama_dir, text, tmp_path, capsys):
    out = tmp_path / "run"
    assert run(llama_dir, text, out, steps=2) == 0
    assert run(llama_dir, text, out, steps=2) == 1
    assert "holds a run already; go on with it by --resume" in capsys.readouterr().err
    assert run(llama_dir, text, out, "--resume", method="absmean", steps=2) == 1
    assert "is another run: method ('onebit' there, 'absmean' here) differs" in capsys.readouterr().err
    assert run(llama_dir, text, out, "--resume", "--kd-beta", "1", steps=2) == 1
    assert "kd_beta (0.0 there, 1.0 here) differs" in capsys.readouterr().err


def test_a_packed_teacher_may_teach(llama_dir, text, tmp_path, capsys):
    """And be the start; its head and embeddings, in 8 bits, stay one tensor."""
    packed = f"{tmp_path}/packed"
    assert main(f"quantize {llama_dir} -o {packed} --method absmean --head int8".split()) == 0
    assert run(packed, text, tmp_path / "run", "--train-embeddings", steps=2) == 0, capsys.readouterr().err
    assert main(f"pack {tmp_path}/run -o {tmp_path}/again".split()) == 0, capsys.readouterr().err
    model, ids = distill_module._dense(packed, "cpu", torch.float32), torch.randint(3, 60, (2, 12))
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    want = load_any(packed, "float32")(ids).logits
    assert (model(ids).logits - want).abs().max() <= 1e-5 * want.abs().max()


def test_a_packed_teacher_with_norms_of_its_own_may_teach_and_is_no_start(llama_dir, text, tmp_path, capsys):
    packed = f"{tmp_path}/packed"
    assert main(f"quantize {llama_dir} -o {packed} --method onebit --norm layer".split()) == 0
    assert run(packed, text, tmp_path / "run", steps=2) == 1
    assert "q_proj has norms, quantized activations or a multiplier of its own; it cannot" in capsys.readouterr().err
    made = trainer_of(
        f"pretrain --model {llama_dir} --teacher {packed} -o {tmp_path}/taught --data {text} --max-steps 2 "
        "--sequence-length 16 --batch-size 4"
    )
    ids = torch.randint(3, 60, (4, 16), device=made.args.device)
    want = load_any(packed, "float32", str(made.args.device))(ids).logits
    with torch.no_grad():
        assert torch.allclose(made.teacher(ids).logits.float(), want, rtol=0.02, atol=0.02 * float(want.abs().max()))


def test_a_teacher_in_eight_bits_teaches_nearly_the_same(llama_dir, text, tmp_path, monkeypatch):
    seen = []
    made = distill_module._teacher
    monkeypatch.setattr(distill_module, "_teacher", lambda *given: seen.append(made(*given)) or seen[-1])
    for kept in ("float32", "int8"):
        assert run(llama_dir, text, tmp_path / kept, "--teacher-dtype", kept, "--kd-beta", "1") == 0
    assert sum(isinstance(module, Int8Head) for module in seen[1].modules()) == 14
    assert not any(isinstance(module, Int8Head) for module in seen[0].modules())
    for line, other in zip(metrics(tmp_path / "float32"), metrics(tmp_path / "int8"), strict=True):
        if "hidden" in line:
            assert other["hidden"] == pytest.approx(line["hidden"], rel=0.25)
    assert metrics(tmp_path / "int8")[0]["hidden"] != metrics(tmp_path / "float32")[0]["hidden"]


def test_a_teacher_that_cannot_be_divided_is_refused(llama_dir, text, tmp_path, capsys):
    assert run(llama_dir, text, tmp_path / "run", "--teacher-sharded") == 1
    assert "--teacher-sharded is for several processes, and this launch has one" in capsys.readouterr().err
    for other in ({"teacher_dtype": "int8"}, {"teacher_device": "cpu"}):
        with pytest.raises(OptionError, match="leave out --teacher-device and --teacher-dtype int8"):
            TrainOptions(max_steps=1, teacher_sharded=True, **other)


def test_a_teacher_that_is_to_be_divided_is(llama_dir, text, tmp_path, monkeypatch):
    """Its blocks, all of them, and none of the student's; the losses are the same either way (test_engines.py)."""
    from accelerate import Accelerator

    from signbit.models.structure import find_blocks
    from signbit.train import trainer as module

    divided = []
    monkeypatch.setattr(Accelerator, "num_processes", property(lambda self: 2))
    monkeypatch.setattr(module, "divide_", divided.extend)
    words = f"distill {llama_dir} -o {tmp_path}/run --data {text} --max-steps 1 --sequence-length 16 --batch-size 4"
    blocks = list(find_blocks(trainer_of(f"{words} --teacher-sharded").teacher)[1])
    assert len(divided) == 2 and all(one is other for one, other in zip(divided, blocks, strict=True))
    divided.clear()
    trainer_of(words.replace("/run", "/other"))
    assert not divided


def test_a_teachers_device_that_is_not_there_is_refused(llama_dir, text, tmp_path, capsys):
    assert run(llama_dir, text, tmp_path / "run", "--teacher-device", "cuda:7") == 1
    assert "the device 'cuda:7' cannot be used here" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_teacher_may_stand_elsewhere(llama_dir, text, tmp_path, capsys):
    more = (
        "--kd-beta",
        "1",
        "--precision",
        "float32",
        "--learning-rate",
        "0",
    )  # else rounding would flip signs in time
    assert run(llama_dir, text, tmp_path / "here", *more) == 0
    assert run(llama_dir, text, tmp_path / "there", "--teacher-device", "cpu", *more) == 0
    for line, other in zip(metrics(tmp_path / "here"), metrics(tmp_path / "there"), strict=True):
        for key in {"hidden", "kl", "validation_loss"} & line.keys():
            assert other[key] == pytest.approx(line[key], rel=1e-3)
    assert run(llama_dir, text, tmp_path / "graph", "--teacher-device", "cpu", "--cuda-graph") == 1
    assert "needs the teacher on the student's device" in capsys.readouterr().err


def test_a_student_learns_from_what_its_teacher_wrote(llama_dir, tmp_path, capsys):
    words = f"data self-generate {llama_dir} -o {tmp_path}/own.tokens --sequences 12 --sequence-length 16 --batch 5"
    assert main(words.split()) == 0, capsys.readouterr().err
    assert "own.tokens: 12 sequences, 192 tokens" in capsys.readouterr().out
    assert run(llama_dir, f"{tmp_path}/own.tokens", tmp_path / "run", steps=2) == 0, capsys.readouterr().err
    assert main(["data", "copy"]) == 1
    assert "signbit data self-generate MODEL -o DATA.tokens" in capsys.readouterr().err


@pytest.mark.parametrize("norm", ["none", "layer"])
def test_the_start_alone_is_packed(llama_dir, tmp_path, capsys, norm):
    """SVID without training: signs of the teacher, the best vectors for its magnitudes."""
    assert main(f"quantize {llama_dir} -o {tmp_path}/out --method onebit --norm {norm}".split()) == 0, (
        capsys.readouterr().err
    )
    packed, dense = load_any(f"{tmp_path}/out", "float32"), load_any(llama_dir, "float32")
    name = "model.layers.1.mlp.up_proj"
    layer, weight = packed.get_submodule(name), dense.get_submodule(name).weight
    assert layer.norm_out == norm and torch.equal(layer.to_dense() >= 0, weight >= 0)
    if norm == "none":
        u, s, v = torch.linalg.svd(weight.abs())
        best = (weight.abs() - s[0] * u[:, :1] @ v[:1]).norm()
        assert (layer.to_dense() - weight).norm() <= 1.01 * best


def test_a_run_that_has_no_checkpoint_is_not_packed(tmp_path):
    with pytest.raises(TrainingError, match="holds no complete checkpoint"):
        pack(tmp_path, tmp_path / "out")


@pytest.mark.slow
def test_a_trained_model_learns_flips_and_packs(stories, shared, tmp_path, capsys):
    """The KL falls to a third in 200 steps, at least 1 % of all signs flip, packing loses nothing."""
    data, out = shared / "data" / "tinystories" / "tinystories_train_first_2MiB.txt", tmp_path / "run"
    command = (
        f"distill {stories} -o {out} --data {data} --max-steps 200 --sequence-length 128 --batch-size 8 --log-every 5 "
        "--save-every 200 --learning-rate 0.003 --validation-blocks 4"
    )
    assert main(command.split()) == 0, capsys.readouterr().err
    lines = [line for line in metrics(out) if "kl" in line]
    assert lines[-1]["kl"] <= lines[0]["kl"] / 3
    student = AutoModelForCausalLM.from_pretrained(stories)
    start_training_(student, METHODS["onebit"], Plan(METHODS["onebit"].options()), Trained())
    start = {name: layer.weight.detach() >= 0 for name, layer in binary_layers(student)}
    student.load_state_dict(load_file(out / "checkpoint-200" / "model.safetensors"), strict=False)
    changed = sum(int((layer.weight >= 0).ne(start[name]).sum()) for name, layer in binary_layers(student))
    assert changed >= 0.01 * sum(signs.numel() for signs in start.values())
    pack(out, tmp_path / "packed")
    packed = load_any(str(tmp_path / "packed"), "float32")
    ids = torch.randint(3, 500, (2, 32))
    want = student.eval()(ids).logits
    assert (packed(ids).logits - want).abs().max() <= 2e-5 * want.abs().max()


def test_errors_are_signbits():
    assert issubclass(TrainingError, SignbitError)
