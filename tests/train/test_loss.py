"""The trainer's loss on a batch beside its equation, written over whole logits, hidden states and attentions of both models.

L = kd_alpha·kd_loss_scale·L_logit + (1 − kd_alpha)·L_AR + kd_beta·L_hid + kd_gamma·L_att (methods.md 2.2).
"""

import pytest
import torch
import torch.nn.functional as F

from signbit.methods import METHODS
from signbit.ptq import Plan
from signbit.train import Budget, DistillTrainer, Head, Objective, Schedule, Trained, TrainOptions, start_training_
from tests import families

STEPS = 10


@pytest.fixture(autouse=True)
def _on_a_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def pair():
    """A student in training, and a teacher of its shape that would answer at random if it were in training mode."""
    student, teacher = families.llama(), families.llama(attention_dropout=0.5)
    with torch.no_grad():
        teacher.model.norm.weight.mul_(20)
        for layer in teacher.model.layers:
            layer.self_attn.q_proj.weight.mul_(50)
    for model in (student, teacher):
        model.set_attn_implementation("eager")
    start_training_(student, METHODS["onebit"], Plan(METHODS["onebit"].options()), Trained(train_embeddings=True))
    return student.train(), teacher.train()


def trainer(pair, objective, out, **options):
    options = TrainOptions(max_steps=STEPS, sequence_length=12, batch_size=3, **options)
    return DistillTrainer(*pair, objective, options, Schedule(), Budget(STEPS, None), [], None, out)


def equation(student, teacher, ids, objective, done):
    """The loss where the share `done` of the run is over."""
    how = {"output_hidden_states": True, "output_attentions": True}
    ours = student(ids, **how)
    with torch.no_grad():
        told = teacher(ids, **how)
    log_q, log_p = ((output.logits / objective.kd_temperature).log_softmax(-1).flatten(0, 1) for output in (ours, told))
    kl = F.kl_div(log_q, log_p, log_target=True, reduction="sum")
    back = F.kl_div(log_p, log_q, log_target=True, reduction="sum")
    summed = {"forward": kl, "reverse": back, "mixed": (kl + back) / 2}[objective.kd_direction]
    share = len(ids) if objective.kd_reduction == "sequence" else ids.numel()
    logit = summed * objective.kd_temperature**2 / share
    following = F.cross_entropy(ours.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    hidden = attention = 0.0
    for layer in range(student.config.num_hidden_layers):
        here, there = (output.hidden_states[layer] for output in (ours, told))
        apart = here / here.norm(dim=-1, keepdim=True) - there / there.norm(dim=-1, keepdim=True)
        hidden = hidden + apart.pow(2).sum() / ids.numel()
        here, there = (output.attentions[layer] for output in (ours, told))
        attention = attention + (here - there).pow(2).sum() / here[..., 0].numel()
    beta, last = objective.kd_beta, objective.kd_beta_last
    if last is not None:
        beta = (1 - done) * beta + done * last
    return (
        objective.kd_alpha * objective.kd_loss_scale * logit
        + (1 - objective.kd_alpha) * following
        + beta * hidden
        + objective.kd_gamma * attention
    )


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"kd_loss_scale": 0.01, "kd_reduction": "sequence", "kd_beta": 1.0},
        {"kd_alpha": 0.7, "kd_loss_scale": 3.0},
        {"kd_alpha": 0.0},
        {"kd_alpha": 0.0, "kd_beta": 0.3},
        {"kd_beta": 2.0, "kd_beta_last": 0.0},
        {"kd_beta_last": 5.0},
        {"kd_gamma": 30.0},
        {"kd_direction": "reverse", "kd_temperature": 2.0},
        {
            "kd_alpha": 0.6, "kd_loss_scale": 0.4, "kd_reduction": "sequence", "kd_direction": "mixed",
            "kd_beta": 0.5, "kd_beta_last": 1.5, "kd_gamma": 20.0, "kd_temperature": 3.0,
        },
    ],
    ids=lambda values: "-".join(name.removeprefix("kd_") for name in values) or "default",
)  # fmt: skip
def test_it_is_the_equation_and_so_is_its_gradient(pair, values, tmp_path):
    student, teacher = pair
    objective, ids = Objective(**values), torch.randint(3, 60, (3, 12))
    made = trainer(pair, objective, tmp_path)
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    for step in (0, 7):
        made.state.global_step = step
        got = made.compute_loss(student, {"input_ids": ids})
        want = equation(student, teacher.eval(), ids, objective, step / STEPS)
        assert got.item() == pytest.approx(want.item(), rel=1e-5)
        gradients = (torch.autograd.grad(loss, trained, allow_unused=True) for loss in (got, want))
        for one, other in zip(*gradients, strict=True):
            if other is not None:
                assert (one - other).abs().max() <= 1e-4 * other.abs().max() + 1e-7
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_bfloat16_is_what_blocks_and_heads_multiply_in(pair, tmp_path, monkeypatch):
    student, _ = pair
    ids, seen = torch.randint(3, 60, (3, 12)), []
    layer = student.model.layers[1].mlp.down_proj
    layer.register_forward_hook(lambda module, given, output: seen.extend([given[0].dtype, output.dtype]))
    call = Head.__call__
    monkeypatch.setattr(Head, "__call__", lambda head, hidden: seen.append(hidden.dtype) or call(head, hidden))
    losses = {}
    for precision in ("float32", "bfloat16"):
        made = trainer(pair, Objective(kd_alpha=0.5, kd_beta=0.5), tmp_path, precision=precision)
        del seen[:]
        losses[precision] = made.compute_loss(student, {"input_ids": ids})
        assert seen == 4 * [getattr(torch, precision)], "into a layer and out of it, and into both heads"
    assert losses["bfloat16"].dtype == torch.float32 and losses["bfloat16"] != losses["float32"]
    assert losses["bfloat16"].item() == pytest.approx(losses["float32"].item(), rel=0.02)
    losses["bfloat16"].backward()
    assert layer.weight.grad.dtype == torch.float32 and layer.weight.grad.abs().max() > 0
