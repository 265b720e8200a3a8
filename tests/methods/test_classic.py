"""The classic binarizers beside the formulas of their papers, written out entry by entry, and what annealing does to them."""

import math
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from tests import families
from tests.train.runs import metrics

from signbit.cli import main
from signbit.errors import OptionError
from signbit.hub.load import load_any
from signbit.linear import PackedLinear
from signbit.methods import METHODS
from signbit.methods.base import make_options
from signbit.ops import cpu
from signbit.ptq import Plan
from signbit.train import (
    Budget,
    DistillTrainer,
    Objective,
    Schedule,
    Trained,
    TrainOptions,
    binary_layers,
    latents,
    pack_training_,
    start_training_,
)
from signbit.train.annealing import Annealing

NAMES = ("bnn", "xnor", "bireal", "irnet", "fda", "recu")
FORMS = {
    "bnn": ("bnn", {}),
    "bnn-identity": ("bnn", {"ste": "identity", "norm": "none"}),
    "xnor": ("xnor", {}),
    "xnor-centred": ("xnor", {"center": True}),
    "xnor-pbllm": ("xnor", {"center": True, "ste": "detached"}),
    "bireal": ("bireal", {}),
    "irnet": ("irnet", {}),
    "irnet-published": ("irnet", {"scale": "standardised", "norm": "layer"}),
    "fda": ("fda", {}),
    "recu": ("recu", {}),
    "recu-published": ("recu", {"scale": "standardised", "norm": "layer"}),
}
#: Beside which latents slopes change: 0, the clip at 1 and beyond it.
EDGES = (0.0, 1.0, -1.0, 1.5, -2.0, 0.999, -0.0)


@pytest.fixture
def by_the_reference(monkeypatch):
    monkeypatch.setattr(cpu, "selected", lambda: (None, "a test asks for plain torch"))


def weight(n=6, k=16):
    w = torch.randn(n, k) * 0.7 + 0.1
    w[0, : len(EDGES)] = torch.tensor(EDGES)
    return w


def layer(form, w=None, bias=None, done=0.0):
    name, values = FORMS[form]
    made = METHODS[name].layer.start(weight() if w is None else w, bias, make_options(METHODS, name, values))
    made.set_progress(done)
    return made


# What the papers say, for a matrix of rows of Python numbers: W̃, and the slope of each entry's surrogate.


def mean(values):
    return sum(values) / len(values)


def sign(value):
    return 1.0 if value >= 0 else -1.0


def standard(row):
    mu = mean(row)
    sigma = math.sqrt(sum((w - mu) ** 2 for w in row) / (len(row) - 1))
    return [(w - mu) / sigma for w in row], sigma


def kt(done):
    t = 0.1 * 10 ** (done * math.log10(10 / 0.1))
    return max(1 / t, 1), t


def tau(done):
    a = (0.99 - 0.85) / (math.e - 1)
    return a * math.e**done + 0.85 - a


def laplace_quantile(rows, done):
    b = mean([abs(z) for row in rows for z in standard(row)[0]])
    return -b * math.log(2 - 2 * tau(done))


def written_out(form, rows, done):
    """W̃ and dW̃ᵢⱼ/d(what stands under the sign) as lists of rows."""
    dense, slopes = [], []
    for row in rows:
        size = mean([abs(w) for w in row])
        if form.startswith("xnor-"):
            row = [w - mean(row) for w in row]
            size = mean([abs(w) for w in row])
        if form.startswith(("bnn", "fda")):
            dense.append([sign(w) for w in row])
        elif form.startswith(("xnor", "bireal")):
            dense.append([size * sign(w) for w in row])
        if form == "bnn":
            slopes.append([float(abs(w) <= 1) for w in row])
        elif form == "bnn-identity":
            slopes.append([1.0 for _ in row])
        elif form == "xnor-pbllm":
            slopes.append([size for _ in row])
        elif form.startswith("xnor"):
            slopes.append([1 / len(row) + size * (abs(w) <= 1) for w in row])
        elif form == "bireal":
            slopes.append([size * (abs(w) < 1) for w in row])
        elif form == "fda":
            n = round(9 + 9 * done)
            series = [sum(math.cos((2 * i + 1) * 0.1 * w) for i in range(n + 1)) for w in row]
            slopes.append([4 * 0.1 / math.pi * s * (abs(w) <= 1) for s, w in zip(series, row, strict=True)])
        elif form.startswith("irnet"):
            z, sigma = standard(row)
            k, t = kt(done)
            size = mean([abs(v) for v in z]) * (sigma if form == "irnet" else 1)
            power = 2 ** round(math.log2(size))
            dense.append([power * sign(v) for v in z])
            slopes.append([power * k * t * (1 - math.tanh(t * v) ** 2) for v in z])
        elif form.startswith("recu"):
            z, sigma = standard(row)
            q = laplace_quantile(rows, done)
            alpha = mean([abs(min(max(v, -q), q)) for v in z]) * (sigma if form == "recu" else 1)
            dense.append([alpha * sign(v) for v in z])
            slopes.append([alpha * (abs(v) <= q) for v in z])
    return torch.tensor(dense, dtype=torch.float64), torch.tensor(slopes, dtype=torch.float64)


def through_the_start(form, w, g):
    """The gradient for W, from `g` for what stands under the sign: W itself, W − μ or (W − μ)/σ."""
    if form in ("bnn", "bnn-identity", "xnor", "bireal", "fda"):
        return g
    centred = w - w.mean(1, keepdim=True)
    if form.startswith("xnor"):
        return g - g.mean(1, keepdim=True)
    ways = w.shape[1] - 1
    sigma = (centred.square().sum(1, keepdim=True) / ways).sqrt()
    along = (g * centred).sum(1, keepdim=True) / (ways * sigma**2)
    return (g - g.mean(1, keepdim=True) - along * centred) / sigma


@pytest.mark.parametrize("done", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("form", FORMS)
def test_the_effective_weight_is_the_papers(form, done):
    w = weight().double()
    made = layer(form, w, done=done).double()
    made.weight.data.copy_(w)
    made.set_progress(done)
    dense, _ = written_out(form, w.tolist(), done)
    assert torch.allclose(made.effective_weight(), dense, rtol=1e-6, atol=0)
    x, bias = torch.randn(2, 5, 16).double(), torch.randn(6).double()
    made.bias = torch.nn.Parameter(bias)
    y = x @ dense.T
    if made.options.norm == "layer":
        y = (y - y.mean(-1, keepdim=True)) / (y.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    assert torch.allclose(made(x), y + bias, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("done", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("form", FORMS)
def test_the_gradient_is_the_papers(form, done):
    """Of a loss that is linear in W̃, so that G is the loss's own factors; random latents and those at the edges."""
    w, g = weight().double(), torch.randn(6, 16).double()
    made = layer(form, w).double()
    made.weight.data.copy_(w)
    made.set_progress(done)
    (made.effective_weight() * g).sum().backward()
    _, slopes = written_out(form, w.tolist(), done)
    assert torch.allclose(made.weight.grad, through_the_start(form, w, slopes * g), rtol=1e-5, atol=1e-9)


def test_gradients_at_the_edges_are_as_said():
    """0, 1, −1, 1.5, −2, 0.999, −0: the clip of BNN, XNOR and FDA has its bounds inside, Bi-Real's outside."""
    for form, inside in (("bnn", True), ("fda", True), ("bireal", False)):
        made = layer(form)
        made.effective_weight().sum().backward()
        reached = (made.weight.grad[0, : len(EDGES)] != 0).tolist()
        assert reached == [True, inside, inside, False, False, True, True], form
    made = layer("xnor")
    made.effective_weight().sum().backward()
    alpha = made.weight.detach()[0].abs().mean()
    got = made.weight.grad[0, : len(EDGES)] - 1 / 16
    assert torch.allclose(got, alpha * torch.tensor([1.0, 1, 1, 0, 0, 1, 1])), "1/K is left of it beyond"


@pytest.mark.parametrize("form", FORMS)
def test_the_sign_of_zero_is_plus_one(form):
    w = weight()
    made = layer(form, w)
    if form.startswith(("bnn", "fda", "bireal")) or form == "xnor":
        assert bool((made.effective_weight()[0, [0, 6]] > 0).all())
    even = torch.tensor([[1.0, -1.0, 0.0, 0.0]])  # the mean is 0
    assert layer(form, even).effective_weight().sign().tolist() == [[1, -1, 1, 1]]


@pytest.mark.parametrize("form", FORMS)
def test_a_row_that_is_constant_or_zero_is_no_trouble(form):
    w = weight()
    w[1], w[2] = 0.0, 0.5
    made = layer(form, w, done=0.5)
    made(torch.randn(3, 16)).square().sum().backward()
    assert bool(torch.isfinite(made.effective_weight()).all() and torch.isfinite(made.weight.grad).all())
    alone = layer(form, torch.tensor([[0.3], [-0.2]]))  # a single column
    assert bool(torch.isfinite(alone.effective_weight()).all())


def test_binary_activations_are_bi_reals():
    """sign(x) forward; backward the slope of its piecewise quadratic: 2 + 2x, 2 − 2x, and 0 from 1 on."""
    x = torch.tensor([[-2.0, -1.0, -0.75, -0.25, 0.0, 0.25, 1.0, 3.0]], requires_grad=True)
    w = torch.randn(3, 8)
    w[0, 0] = 1.5
    made = METHODS["bireal"].layer.start(w, torch.randn(3), make_options(METHODS, "bireal", {"act_bits": 1}))
    alpha = w.abs().mean(1)
    q = torch.tensor([[-1.0, -1, -1, -1, 1, 1, 1, 1]])
    dense = alpha[:, None] * torch.where(w >= 0, 1.0, -1.0)
    out = torch.randn(1, 3)
    y = made(x)
    assert torch.allclose(y, q @ dense.T + made.bias, atol=1e-6)
    (y * out).sum().backward()
    slope = torch.tensor([0.0, 0, 0.5, 1.5, 2, 1.5, 0, 0])
    assert torch.allclose(x.grad, (out @ dense) * slope, atol=1e-6)
    want = alpha[:, None] * (out.T @ q) * (w.abs() < 1)
    assert torch.allclose(made.weight.grad, want, atol=1e-6)


# Annealing.


def test_ir_nets_estimator_goes_from_the_identity_to_the_sign():
    options = make_options(METHODS, "irnet", {})
    for done, k, t in ((0.0, 10, 0.1), (0.5, 1, 1), (1.0, 1, 10)):
        got = options.estimator(torch.tensor(done))
        assert [float(v) for v in got] == pytest.approx([k, t], rel=1e-5)
    w = torch.linspace(-2, 2, 16)[None]
    slopes = []
    for done in (0.0, 1.0):
        z = (w - w.mean()) / w.std()
        value, scale, through = options.form(w, torch.tensor(done))
        assert torch.allclose(value, z)
        slopes.append(through / (z * scale))  # through = Z ∘ scale ∘ slope
    near, far = z.abs() < 0.2, z.abs() > 1
    assert bool((slopes[0] > 0.9).all() and (slopes[0] <= 1).all()), "at the start nothing is held back"
    assert bool((slopes[1][near] > 1).all() and (slopes[1][far] < 1e-6).all()), "at the end what is about to flip moves"


def test_recus_quantile_rises_as_the_exponential_function_and_clamps_less_and_less():
    options = make_options(METHODS, "recu", {})
    share = torch.linspace(0, 1, 11)
    got = options.quantile(share)
    assert [float(got[0]), float(got[-1])] == pytest.approx([0.85, 0.99])
    assert got.tolist() == pytest.approx([tau(float(p)) for p in share], rel=1e-6)
    assert bool((got.diff() > 0).all() and (got.diff().diff() > 0).all()), "ever faster"
    w = torch.distributions.Laplace(0.0, 0.02).sample((64, 512))
    for done, beyond in ((0.0, 0.30), (1.0, 0.02)):
        z = (w - w.mean(1, keepdim=True)) / w.std(1, keepdim=True)
        clamped = options.form(w, torch.tensor(done)).values
        share = float(((clamped - z).abs() > 1e-4).float().mean())
        assert share == pytest.approx(beyond, abs=0.02), "2·(1 − τ) of Laplace's weights lie beyond τ and 1 − τ"


def test_fdas_series_gets_its_terms():
    options = make_options(METHODS, "fda", {})
    counts = [int(options.terms(torch.tensor(done))) for done in (0.0, 0.25, 0.5, 1.0)]
    assert counts[0] == 9 and counts[-1] == 18 and counts == sorted(counts)
    w = torch.tensor([[0.0, 1e-8, 1e-3, -0.5, 1.0]])
    options = make_options(METHODS, "fda", {"omega": 2.9, "n_start": 40, "n_end": 40})
    through = METHODS["fda"].layer.start(w, None, options)
    through.effective_weight().sum().backward()
    angle = 2.9 * w.double()
    want = 4 * 2.9 / math.pi * sum(torch.cos((2 * i + 1) * angle) for i in range(41))
    assert torch.allclose(through.weight.grad.double(), want, rtol=1e-4, atol=1e-3), "in closed form"


def test_progress_is_a_buffer_that_is_raised_in_place_where_it_is_needed():
    for form in FORMS:
        made = layer(form)
        anneals = form.startswith(("irnet", "fda", "recu"))
        assert ("progress" in made.state_dict()) == anneals
        if anneals:
            before = made.progress
            made.set_progress(0.25)
            assert made.progress is before and float(before) == 0.25
            made.set_progress(0.0)
            assert float(before) == 0.25, "what goes on does not anneal anew"


def test_a_budget_of_minutes_is_followed_to_its_end_and_not_beyond():
    model, _ = model_of("recu")
    budget = Budget(None, 2.0)
    callback, state = Annealing(SimpleNamespace(model=model, budget=budget)), SimpleNamespace(global_step=7)
    for used_s, told, tell in ((30.0, 0.25, callback.on_train_begin), (90.0, 0.75, callback.on_step_end)):
        budget.used_s = used_s
        tell(None, state, None)
        assert {float(made.progress) for _, made in binary_layers(model)} == {told}
    budget.used_s = 120.5
    callback.on_step_end(None, state, None)
    assert {float(made.progress) for _, made in binary_layers(model)} == {1.0}


@pytest.mark.parametrize("form", FORMS)
def test_compiled_code_follows_the_progress_without_being_made_again(form):
    made = layer(form)
    x = torch.randn(4, 16)
    torch._dynamo.reset()  # other forms share the code
    compiled = torch.compile(made.forward, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for done in (0.0, 0.4, 1.0):
            made.set_progress(done)
            found = []
            for forward in (made.forward, compiled):
                made.zero_grad()
                y = forward(x)
                y.square().sum().backward()
                found.append((y.detach(), made.weight.grad.clone()))
            (y, grad), (y_compiled, grad_compiled) = found
            assert torch.allclose(y, y_compiled, atol=1e-5)
            assert (grad - grad_compiled).abs().max() <= 1e-4 * grad.abs().max()


# Packing.


@pytest.mark.parametrize("done", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("form", FORMS)
def test_it_packs_to_itself(form, done, by_the_reference):
    made = layer(form, bias=torch.randn(6), done=done)
    assert torch.equal(made.binary().to_dense(), made.effective_weight())
    packed, x = made.pack(), torch.randn(7, 16)
    assert torch.equal(packed(x), made(x)), "bit for bit by the reference"
    binary = packed.weights[0]
    assert binary.planes == 1 and binary.shift is None and binary.in_scale is None
    assert packed.norm_out == made.options.norm and packed.act_bits == 0


@pytest.mark.parametrize("norm", ["none", "layer"])
def test_binary_activations_pack_to_themselves(norm, by_the_reference):
    options = make_options(METHODS, "bireal", {"act_bits": 1, "norm": norm})
    made = METHODS["bireal"].layer.start(weight(), torch.randn(6), options)
    x = torch.randn(64, 16) * torch.logspace(-3, 3, 64)[:, None]
    x[0, :2] = torch.tensor([0.0, -0.0])
    packed = made.pack()
    assert packed.act_bits == 1 and torch.equal(packed(x), made(x)), "signs meet signs"


@pytest.mark.parametrize("form", FORMS)
def test_what_is_quantized_is_what_training_starts_with(form):
    name, values = FORMS[form]
    w = weight()
    binary = make_options(METHODS, name, values).binarize(w)
    start = layer(form, w).effective_weight().detach()
    assert torch.allclose(binary.to_dense(), start, rtol=1e-3)
    assert torch.equal(binary.to_dense().sign(), start.sign())


@pytest.mark.parametrize("name", NAMES)
def test_a_packed_row_costs_a_bit_an_entry_and_at_most_one_scale(name):
    binary = make_options(METHODS, name, {}).binarize(torch.randn(64, 1024))
    assert binary.bits_per_weight <= 1 + 16 / 1024 + 1e-6


def model_of(form):
    name, values = FORMS[form]
    model = families.llama()
    report = start_training_(model, METHODS[name], Plan(make_options(METHODS, name, values)), Trained())
    return model, report


@pytest.mark.parametrize("form", FORMS)
def test_a_whole_model_packs_to_its_logits(form, by_the_reference):
    model, report = model_of(form)
    for _, made in binary_layers(model):
        made.set_progress(0.7)
    ids = torch.randint(3, 60, (2, 12))
    want = model.eval()(ids).logits
    pack_training_(model, report)
    assert torch.equal(model(ids).logits, want)


@pytest.mark.parametrize("name", NAMES)
def test_signbit_quantize_writes_it(name, llama_dir, tmp_path, capsys):
    words = "--act-bits 1" if name == "bireal" else ""
    out = tmp_path / "out"
    assert main(f"quantize {llama_dir} -o {out} --method {name} {words}".split()) == 0, capsys.readouterr().err
    packed = load_any(str(out), "float32")
    layers = [module for module in packed.modules() if isinstance(module, PackedLinear)]
    assert len(layers) == 14
    assert {made.act_bits for made in layers} == {1 if name == "bireal" else 0}
    assert {made.norm_out for made in layers} == {"layer" if name in ("bnn", "fda") else "none"}
    assert bool(torch.isfinite(packed(torch.randint(3, 60, (2, 12))).logits).all())


# Training.

LEARNERS = FORMS | {"bireal-signs": ("bireal", {"act_bits": 1})}


def rows(count=64):
    """Sequences in which each token follows from the one before."""
    return [{"input_ids": (torch.arange(16) * 7 + 3 * place) % 60} for place in range(count)]


def trainer(form, out, model=None, steps=30, **options):
    name, values = LEARNERS[form]
    if model is None:
        model = families.llama()
        for part in (model.lm_head, model.get_input_embeddings()):
            torch.nn.init.normal_(part.weight)
    trained = Trained(train_norms=False)
    start_training_(model, METHODS[name], Plan(make_options(METHODS, name, values)), trained)
    how = {"learning_rate": 0.005, "optim": "adamw_torch", "log_every": 1, "save_every": 10**6, **options}
    how = TrainOptions(max_steps=steps, sequence_length=16, batch_size=8, **how)
    budget = Budget(steps, None)
    data = rows(8) * steps
    return DistillTrainer(model, None, Objective(kd_alpha=0.0), how, Schedule(), budget, data, None, out)


@pytest.mark.parametrize("form", LEARNERS)
def test_a_tiny_model_learns_by_its_signs_alone(form, tmp_path):
    """Embeddings, head and norms are as random as they were: nothing but latents is trained."""
    made = trainer(form, tmp_path)
    before = {name: p.clone() for name, p in made.model.named_parameters() if not p.requires_grad}
    assert len(latents(made.model)) == sum(p.requires_grad for p in made.model.parameters()) == 14
    made.run()
    lines = [line for line in metrics(tmp_path) if "loss" in line]
    # ReCU's and IR-Net's slopes for latents of 0.02 are small to begin with; Adam's steps take a while.
    assert lines[-1]["loss"] < 0.95 * lines[0]["loss"], [line["loss"] for line in lines]
    assert sum(line["flips"] for line in lines) > 0.05
    assert all(torch.equal(p, before[name]) for name, p in made.model.named_parameters() if name in before)


@pytest.mark.parametrize("form", ["irnet", "fda", "recu"])
def test_layers_are_told_at_each_step_and_checkpoints_keep_it(form, tmp_path):
    made = trainer(form, tmp_path, steps=4, save_every=2)
    name, first = next(iter(binary_layers(made.model)))
    seen = []
    first.register_forward_hook(lambda module, x, y: seen.append(float(module.progress)))
    made.run()
    assert seen == pytest.approx([0, 0.25, 0.5, 0.75])
    assert {float(part.progress) for _, part in binary_layers(made.model)} == {1.0}
    for step, done in ((2, 0.5), (4, 1.0)):
        state = load_file(tmp_path / f"checkpoint-{step}" / "model.safetensors")
        assert float(state[f"{name}.progress"]) == done


@pytest.mark.parametrize("name", ["xnor", "irnet"])
def test_signbit_distill_trains_it(name, llama_dir, tmp_path, capsys):
    """From its teacher's weights; a run that is resumed is in test_pretrain."""
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{7 * i % 61}" for i in range(2000)))
    command = (
        f"distill {llama_dir} -o {tmp_path}/run --method {name} --data {text} --max-steps 4 --sequence-length 16 "
        "--batch-size 4 --log-every 2 --validation-blocks 2"
    )
    assert main(command.split()) == 0, capsys.readouterr().err
    assert all(line["kl"] > 0 for line in metrics(tmp_path / "run") if "loss" in line)
    assert main(f"pack {tmp_path}/run -o {tmp_path}/out".split()) == 0, capsys.readouterr().err
    packed = load_any(str(tmp_path / "out"), "float32")
    assert sum(isinstance(module, PackedLinear) for module in packed.modules()) == 14


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("form", ["irnet", "fda", "recu"])
def test_a_captured_step_follows_the_progress(form, compiled, tmp_path):
    """A graph that kept the first step's t, n or τ would part from the plain run."""
    lines = []
    for cuda_graph in (False, True):
        out = tmp_path / str(cuda_graph)
        out.mkdir()
        torch.manual_seed(1)
        how = {"precision": "float32", "compile": compiled, "cuda_graph": cuda_graph}
        made = trainer(form, out, families.llama().cuda(), steps=8, **how)
        made.run()
        assert {float(part.progress) for _, part in binary_layers(made.model)} == {1.0}
        lines.append([line for line in metrics(out) if "loss" in line])
    assert len(lines[0]) == len(lines[1]) == 8
    for plain, captured in zip(*lines, strict=True):
        for name in ("loss", "flips", "grad_norm"):
            assert captured[name] == pytest.approx(plain[name], rel=0.01, abs=5e-4), (plain["step"], name)


# What is refused.


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("bnn", {"norm": "batch"}, "norm is 'batch'; allowed: none, layer"),
        ("bnn", {"norm_eps": 0.0}, "norm_eps is 0.0; a positive number is needed"),
        ("bnn", {"ste": "tanh"}, "ste is 'tanh'; allowed: clipped, identity"),
        ("bnn", {"scale_dtype": "float16"}, "'scale_dtype' is no option of the method bnn"),
        ("xnor", {"ste": "clipped"}, "allowed: paper, detached"),
        ("xnor", {"scale_dtype": "int8"}, "scale_dtype is 'int8'"),
        ("bireal", {"act_bits": 8}, "act_bits is 8; allowed: 0, 1"),
        ("irnet", {"scale": "row"}, "allowed: latent, standardised"),
        ("irnet", {"t_min": 0.0}, "t rises, from a positive number on"),
        ("irnet", {"t_min": 5.0, "t_max": 1.0}, "t_min is 5.0 and t_max 1.0; t rises"),
        ("fda", {"omega": 4.0}, "omega is 4.0; a number above 0 and below 3 is needed"),
        ("fda", {"n_start": 1.5}, "n_start is 1.5; a whole number is needed"),
        ("fda", {"n_start": 5, "n_end": 4}, "n_start is 5 and n_end 4; n rises"),
        ("recu", {"tau_end": 1.0}, "tau_end is 1.0; a number above 0.5 and below 1 is needed"),
        ("recu", {"tau_start": 0.99, "tau_end": 0.9}, "tau_start is 0.99 and tau_end 0.9; τ rises"),
    ],
)
def test_wrong_options_are_refused(name, values, message):
    with pytest.raises(OptionError, match=message):
        make_options(METHODS, name, values)
