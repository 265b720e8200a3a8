"""The losses beside plain formulas, their gradients beside autograd's, and the published reductions."""

import math

import pytest
import torch
import torch.nn.functional as F

from signbit.errors import OptionError
from signbit.train import (
    Head,
    Objective,
    Top,
    attention_distance,
    hidden_distance,
    kl_divergence,
    output_loss,
    soft_cross_entropy,
    top_kl_divergence,
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
        ({"kd_temperature": math.inf}, "a positive number"),
        ({"kd_loss_scale": math.nan}, "a weight is 0 or more"),
        ({"kd_beta": math.inf}, "a weight is 0 or more"),
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


def top_of(teacher, count):
    values, ids = teacher.topk(count, dim=-1)
    return Top(ids, values - teacher.logsumexp(-1, keepdim=True))


def top_kl_in_doubles(student, teacher, count):
    """The formula as it is written, of float64 logits."""
    p, q = teacher.double().softmax(-1), student.double().softmax(-1)
    ids = p.topk(count, dim=-1).indices
    p, q = p.gather(1, ids), q.gather(1, ids)
    kl = (p * (p / q).log()).sum(-1)
    if count == student.shape[1]:
        return kl
    p_r, q_r = 1 - p.sum(-1), 1 - q.sum(-1)
    return kl + p_r * (p_r / q_r).log()


@pytest.mark.parametrize("count", [1, 5, 49, 50])
def test_top_kl_is_its_formula(count):
    student, teacher = 2 * torch.randn(2, 7, 50)
    got = top_kl_divergence(student, top_of(teacher, count))
    assert got.dtype == torch.float32
    assert torch.allclose(got.double(), top_kl_in_doubles(student, teacher, count), rtol=1e-5, atol=1e-6)


def test_the_top_of_everything_is_kl():
    student, teacher = 2 * torch.randn(2, 7, 50)
    student.requires_grad_()
    ours, want = top_kl_divergence(student, top_of(teacher, 50)), kl_divergence(student, teacher)
    assert (ours - want).abs().max() <= 1e-5
    (one,) = torch.autograd.grad(ours.sum(), student)
    (other,) = torch.autograd.grad(want.sum(), student)
    assert (one - other).abs().max() <= 1e-5


def test_more_of_the_top_is_more_of_kl():
    student, teacher = 2 * torch.randn(2, 200, 50)
    kl = kl_divergence(student, teacher)
    bounds = torch.stack([top_kl_divergence(student, top_of(teacher, count)) for count in range(1, 51)])
    assert bounds.min() >= -1e-6 and bool((bounds <= kl + 1e-5).all())
    assert bool((bounds.diff(dim=0) >= -1e-5).all())
    means = bounds.mean(-1)
    assert bool((means[:40].diff() > 1e-3).all()), "what each token adds is seen"
    # A student that gives the others their shares of the rest loses nothing by their being one outcome.
    apart = teacher.scatter_add(1, teacher.topk(5).indices, 3 * torch.randn(200, 5))
    assert torch.allclose(top_kl_divergence(apart, top_of(teacher, 5)), kl_divergence(apart, teacher), atol=1e-5)


@pytest.mark.parametrize("count", [1, 5, 50])
@pytest.mark.parametrize("cap", [None, 5.0])
@pytest.mark.parametrize("chunk", [10, 100])
def test_chunks_give_the_loss_and_gradient_of_the_top(count, cap, chunk):
    tokens, hidden, vocabulary = 37, 16, 50
    student = torch.randn(tokens, hidden, requires_grad=True)
    weight, bias = torch.randn(vocabulary, hidden, requires_grad=True), torch.randn(vocabulary, requires_grad=True)
    teacher = 3 * torch.randn(tokens, vocabulary)
    labels = torch.randint(0, vocabulary, (tokens,))
    labels[::5] = -100
    head, top = Head(weight, bias, 0.7, cap), top_of(teacher, count)
    top = Top(top.ids.int(), top.log_p)
    found = output_loss(student, head, None, None, labels, 0.6, 0.4, Objective(), chunk, top=top)
    logits = head(student)
    kl, cross = top_kl_in_doubles(logits, teacher, count).mean(), F.cross_entropy(logits, labels)
    assert found.kl.item() == pytest.approx(kl.item(), rel=1e-5)
    assert found.total.item() == pytest.approx(0.6 * kl.item() + 0.4 * cross.item(), rel=1e-5)
    ours = torch.autograd.grad(2 * found.total, (student, weight, bias))
    want = torch.autograd.grad(2 * (0.6 * kl + 0.4 * cross), (student, weight, bias))
    for one, other in zip(ours, want, strict=True):
        assert (one - other).abs().max() <= 2e-6 * other.abs().max() + 1e-7


@pytest.mark.slow
def test_the_top_compiled_is_the_top():
    student, head = torch.randn(6, 8, requires_grad=True), Head(torch.randn(12, 8))
    top, found = top_of(torch.randn(6, 12), 4), []
    for compiled in (False, True):
        loss = output_loss(student, head, None, None, None, 1.0, 0.0, Objective(), compiled=compiled, top=top)
        found.append((loss.total, *torch.autograd.grad(loss.total, student)))
    assert all(torch.allclose(one, other, atol=1e-6) for one, other in zip(*found, strict=True))


def test_a_rest_of_almost_nothing_gives_numbers():
    """Where 1 − Σ of float32 probabilities is 0 or rounding: a sure student, a sure teacher, both."""
    sure = torch.zeros(1, 20)
    sure[:, :3] = torch.tensor([60.0, 59.0, 58.0])
    unsure = torch.randn(1, 20).sort(descending=True).values
    for student, teacher in ((sure, unsure), (unsure, sure), (sure, 0.9 * sure), (sure, sure)):
        student, head = student.clone().requires_grad_(), Head(torch.eye(20))
        found = output_loss(student, head, None, None, None, 1.0, 0.0, Objective(), top=top_of(teacher, 3))
        (grad,) = torch.autograd.grad(found.total, student)
        p, q = teacher.double().softmax(-1), student.detach().double().softmax(-1)
        p_r, q_r = p[:, 3:].sum(), q[:, 3:].sum()
        want = (p * (p / q).log())[:, :3].sum() + p_r * (p_r / q_r).log()
        of_rest = torch.where(torch.arange(20) < 3, p, p_r * q / q_r)
        assert found.kl.item() == pytest.approx(want.item(), rel=1e-5, abs=1e-6)
        assert (grad - (q - of_rest)).abs().max() <= 1e-6
        assert torch.autograd.grad(top_kl_divergence(student, top_of(teacher, 3)).sum(), student)[0].isfinite().all()


@pytest.mark.parametrize("count", [3, 20])
def test_rounded_probabilities_that_sum_to_more_than_one(count):
    """Float16's log p of a sure teacher: no rest, and no gradient for a student that answers alike."""
    teacher = torch.randn(64, 20)
    teacher[:, :3] += 25
    top = top_of(teacher, count)
    top = Top(top.ids, top.log_p.half())
    assert top.log_p.float().exp().sum(-1).max() > 1 + 1e-5 > 1 > top.log_p.float().exp().sum(-1).min()
    student, head = teacher.clone().requires_grad_(), Head(torch.eye(20))
    found = output_loss(student, head, None, None, None, 64.0, 0.0, Objective(), top=top)
    assert found.kl.abs() <= 1e-3
    (grad,) = torch.autograd.grad(found.total, student)
    assert grad.abs().max() <= 1e-3 and grad.sum(-1).abs().max() <= 1e-6, "what is learnt from sums to 1"
    assert top_kl_divergence(teacher, top).min() >= -1e-5


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kd_beta": 0.5}, r"--kd-beta 0\.5 needs the teacher itself: .* leave out --teacher-logits"),
        ({"kd_beta_last": 0.5}, r"--kd-beta-last 0\.5 needs the teacher itself"),
        ({"kd_gamma": 1.0}, r"--kd-gamma 1\.0 needs the teacher itself"),
        ({"kd_direction": "reverse"}, "--kd-direction reverse needs the teacher itself"),
        ({"kd_direction": "mixed"}, "--kd-direction mixed needs the teacher itself"),
        ({"kd_temperature": 2.0}, r"--kd-temperature 2\.0 needs the teacher itself"),
        ({"kd_alpha": 0.0}, r"looks at no teacher .* leave out --teacher-logits"),
        ({"kd_loss_scale": 0.0}, r"looks at no teacher .* leave out --teacher-logits"),
    ],
)
def test_what_the_top_does_not_tell_is_refused(values, message):
    with pytest.raises(OptionError, match=message):
        Objective(**values).check_top()
    head = Head(torch.randn(12, 8))
    with pytest.raises(OptionError, match=message):
        output_loss(
            torch.randn(4, 8), head, None, None, None, 1, 0, Objective(**values), top=top_of(torch.randn(4, 12), 2)
        )


def test_what_the_top_tells_is_not_refused():
    Objective(kd_alpha=0.3, kd_loss_scale=0.01, kd_beta_last=0.0, kd_reduction="sequence").check_top()
