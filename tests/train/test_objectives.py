"""The losses beside plain formulas, their gradients beside autograd's, and the published reductions."""

import math

import pytest
import torch
import torch.nn.functional as F

from signbit.errors import OptionError
from signbit.train import (
    Head,
    Objective,
    attention_distance,
    hidden_distance,
    kl_divergence,
    output_loss,
    soft_cross_entropy,
)


def test_kl_is_torchs():
    student, teacher = torch.randn(2, 7, 11)
    want = F.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="none").sum(-1)
    assert torch.allclose(kl_divergence(student, teacher), want, atol=1e-6)
    assert torch.allclose(
        kl_divergence(student, teacher, "reverse"), kl_divergence(teacher, student, "forward"), atol=1e-6
    )
    mixed = (kl_divergence(student, teacher) + kl_divergence(teacher, student)) / 2
    assert torch.allclose(kl_divergence(student, teacher, "mixed"), mixed, atol=1e-6)
    assert torch.allclose(kl_divergence(student, teacher, temperature=2.0), 4 * kl_divergence(student / 2, teacher / 2))
    assert kl_divergence(teacher, teacher).abs().max() < 1e-6


def test_soft_cross_entropy_has_kls_gradient_and_the_teachers_entropy():
    student, teacher = torch.randn(5, 9, requires_grad=True), torch.randn(5, 9)
    entropy = -(teacher.softmax(-1) * teacher.log_softmax(-1)).sum(-1)
    ours = soft_cross_entropy(student, teacher)
    assert torch.allclose(ours, kl_divergence(student, teacher) + entropy, atol=1e-6)
    (one,) = torch.autograd.grad(ours.sum(), student, retain_graph=True)
    (other,) = torch.autograd.grad(kl_divergence(student, teacher).sum(), student)
    assert torch.allclose(one, other, atol=1e-6)


def test_hidden_distance_is_between_directions():
    student, teacher = [torch.randn(2, 3, 8) for _ in range(4)], [torch.randn(2, 3, 8) for _ in range(4)]
    want = sum((2 - 2 * F.cosine_similarity(s, t, dim=-1)).mean() for s, t in zip(student, teacher, strict=True))
    assert torch.allclose(hidden_distance(student, teacher), want, atol=1e-5)
    assert hidden_distance([3 * t for t in teacher], teacher) < 1e-10


def test_attention_distance_is_not_normalized():
    one, other = torch.rand(2, 2, 3, 4, 4)
    want = ((one - other) ** 2).sum(-1).mean()
    assert torch.allclose(attention_distance([one], [other]), want)


@pytest.mark.parametrize("direction", ["forward", "reverse", "mixed"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("cap", [None, 5.0])
@pytest.mark.parametrize("chunk", [10, 100])
def test_chunks_give_the_loss_and_gradient_of_the_whole(direction, temperature, cap, chunk):
    tokens, hidden, vocabulary = 37, 16, 50
    objective = Objective(kd_direction=direction, kd_temperature=temperature)
    student = torch.randn(tokens, hidden, requires_grad=True)
    weight, bias = torch.randn(vocabulary, hidden, requires_grad=True), torch.randn(vocabulary, requires_grad=True)
    teacher, teacher_head = torch.randn(tokens, hidden), Head(torch.randn(vocabulary, hidden))
    labels = torch.randint(0, vocabulary, (tokens,))
    labels[::5] = -100
    head = Head(weight, bias, 0.7, cap)
    found = output_loss(student, head, teacher, teacher_head, labels, 0.6, 0.4, objective, chunk)
    logits = head(student)
    kl = kl_divergence(logits, teacher_head(teacher), direction, temperature).mean()
    cross = F.cross_entropy(logits, labels)
    assert torch.allclose(found.kl, kl, rtol=1e-5) and torch.allclose(found.cross_entropy, cross, rtol=1e-5)
    assert torch.allclose(found.total, 0.6 * kl + 0.4 * cross, rtol=1e-5)
    ours = torch.autograd.grad(2 * found.total, (student, weight, bias))
    want = torch.autograd.grad(2 * (0.6 * kl + 0.4 * cross), (student, weight, bias))
    for one, other in zip(ours, want, strict=True):
        assert (one - other).abs().max() <= 2e-6 * other.abs().max() + 1e-7


def test_a_frozen_head_gets_no_gradient():
    student, head = torch.randn(4, 8, requires_grad=True), Head(torch.randn(12, 8))
    output_loss(student, head, torch.randn(4, 8), head, None, 1.0, 0.0, Objective()).total.backward()
    assert head.weight.grad is None and student.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kd_alpha": 1.5}, "it is a share, from 0 to 1"),
        ({"kd_temperature": 0.0}, "a positive number"),
        ({"kd_direction": "sideways"}, "allowed: forward, reverse, mixed"),
    ],
)
def test_wrong_values_are_refused(values, message):
    with pytest.raises(OptionError, match=message):
        Objective(**values)


def test_what_looks_at_a_teacher():
    assert Objective().needs_teacher and not Objective(kd_alpha=0.0).needs_teacher
    assert Objective(kd_alpha=0.0, kd_beta=1.0).needs_teacher
    assert math.isclose(Objective().kd_loss_scale, 1.0)
