"""What a student is taught by: losses between its outputs and a teacher's, as functions of tensors.

T tokens (all positions of all sequences), V vocabulary, H hidden size. p is the teacher's distribution and q the student's,
softmax(z/τ) of their logits z.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from signbit.errors import OptionError
from signbit.methods.base import check_choice
from signbit.train.compiling import compiled_once

#: Tokens whose logits are in memory at a time.
CHUNK_TOKENS = 8192


@dataclass(frozen=True)
class Objective:
    """L = kd_alpha·kd_loss_scale·L_logit + (1 − kd_alpha)·L_AR + kd_beta·L_hid + kd_gamma·L_att.

    The names and weights are OneBit's (arXiv 2402.11295; its code's kd.py).
    """

    kd_alpha: float = 1.0
    """Share of the teacher's distribution in the loss on the output; the rest is the data's next token (L_AR)."""
    kd_loss_scale: float = 1.0
    """Weight of the loss on the teacher's distribution (OneBit: 0.01 with --kd-reduction sequence)."""
    kd_beta: float = 0.0
    """Weight of the loss on hidden states: sum over layers of the squared distance of normalized states."""
    kd_beta_last: float | None = None
    """Weight of the same at the end of the budget, to which it falls (or rises) linearly; kd_beta itself if not given."""
    kd_gamma: float = 0.0
    """Weight of the loss on attention probabilities; the paper found that it gives NaN. Needs eager attention."""
    kd_reduction: Literal["token", "sequence"] = "token"
    """token: mean over tokens. sequence: sum over tokens, mean over sequences, as OneBit's code."""
    kd_direction: Literal["forward", "reverse", "mixed"] = "forward"
    """KL(p ‖ q), KL(q ‖ p), or half of each; p is the teacher's distribution."""
    kd_temperature: float = 1.0
    """τ by which logits are divided; the loss is multiplied by τ²."""

    def __post_init__(self) -> None:
        check_choice("kd_reduction", self.kd_reduction, ("token", "sequence"))
        check_choice("kd_direction", self.kd_direction, ("forward", "reverse", "mixed"))
        if not 0 <= self.kd_alpha <= 1:
            raise OptionError(f"kd_alpha is {self.kd_alpha}; it is a share, from 0 to 1")
        for name in ("kd_loss_scale", "kd_beta", "kd_beta_last", "kd_gamma"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise OptionError(f"{name} is {value}; a weight is 0 or more")
        if not 0 < self.kd_temperature < math.inf:
            raise OptionError(f"kd_temperature is {self.kd_temperature}; a positive number is needed")

    @property
    def needs_teacher(self) -> bool:
        """Whether any part of the loss looks at a teacher."""
        return self.kd_alpha * self.kd_loss_scale > 0 or self.looks_at_hidden or self.kd_gamma > 0

    @property
    def looks_at_hidden(self) -> bool:
        """Whether hidden states are compared at any time of a run."""
        return self.kd_beta > 0 or bool(self.kd_beta_last)

    def check_top(self) -> None:
        """Raises OptionError unless a teacher's likeliest tokens are all that the loss looks at of it."""
        looks_at = {
            "kd_beta": self.kd_beta > 0,
            "kd_beta_last": bool(self.kd_beta_last),
            "kd_gamma": self.kd_gamma > 0,
            "kd_direction": self.kd_direction != "forward",
            "kd_temperature": self.kd_temperature != 1,
        }
        for name, there in looks_at.items():
            if there:
                raise OptionError(
                    f"--{name.replace('_', '-')} {getattr(self, name)} needs the teacher itself: its logits on the disk give "
                    "the forward KL at temperature 1. Leave it out, or leave out --teacher-logits"
                )
        if not self.needs_teacher:
            raise OptionError(
                "the objective looks at no teacher (kd_alpha · kd_loss_scale is 0); leave out --teacher-logits"
            )

    def hidden_weight(self, done: float) -> float:
        """kd_beta where the share `done` of the budget is used."""
        last = self.kd_beta if self.kd_beta_last is None else self.kd_beta_last
        return self.kd_beta + (last - self.kd_beta) * min(done, 1.0)


def kl_divergence(student: Tensor, teacher: Tensor, direction: str = "forward", temperature: float = 1.0) -> Tensor:
    """KL(p ‖ q) = Σᵥ pᵥ·(log pᵥ − log qᵥ) of each token; "reverse" is KL(q ‖ p), "mixed" the mean of both.

    `student` and `teacher` are logits [T, V], the result float32 [T]; times τ² (Hinton et al., arXiv 1503.02531), so that
    its gradient does not shrink with the temperature.
    """
    log_q = F.log_softmax(student.float() / temperature, dim=-1)
    log_p = F.log_softmax(teacher.float() / temperature, dim=-1)
    ahead = (log_p.exp() * (log_p - log_q)).sum(-1)
    if direction == "forward":
        return ahead * temperature**2
    back = (log_q.exp() * (log_q - log_p)).sum(-1)
    return (back if direction == "reverse" else (ahead + back) / 2) * temperature**2


def soft_cross_entropy(student: Tensor, teacher: Tensor) -> Tensor:
    """−Σᵥ pᵥ·log qᵥ of each token: KL(p ‖ q) and the teacher's entropy, which no gradient sees (FBI-LLM, arXiv 2407.07093).

    `student` and `teacher` are logits [T, V]; the result is float32 [T].
    """
    return -(F.softmax(teacher.float(), dim=-1) * F.log_softmax(student.float(), dim=-1)).sum(-1)


class Top(NamedTuple):
    """A teacher's K likeliest next tokens: `ids` integers [T, K], no id twice, and `log_p` [T, K], their log-probabilities."""

    ids: Tensor
    log_p: Tensor


def top_kl_divergence(student: Tensor, top: Top) -> Tensor:
    """Σᵢ pᵢ·(log pᵢ − log qᵢ) + p_r·(log p_r − log q_r) of each token: KL over the K tokens i of `top` and "any other".

    p_r = 1 − Σᵢ pᵢ and q_r = 1 − Σᵢ qᵢ. Calling several tokens one outcome never raises a divergence (data-processing
    inequality; Cover and Thomas, Elements of Information Theory, theorem 2.7.1), so this is at most KL(p ‖ q), and equal to it
    at K = V. `student` is logits [T, V], the result float32 [T]. Probabilities whose rounding leaves Σᵢ pᵢ over 1, or at
    K = V other than 1, are divided by their sum.
    """
    return _with_rest(student.float(), top).kl


class _Merged(NamedTuple):
    kl: Tensor
    p: Tensor
    """[T, K]."""
    rest: Tensor | None
    """p_r·q_v/q_r of each token v outside of the top, 0 in it [T, V]; None where nothing is left, K = V."""


def _with_rest(logits: Tensor, top: Top) -> _Merged:
    ids, log_p = top.ids.long(), top.log_p.float()
    everything = ids.shape[1] == logits.shape[1]
    mass = log_p.logsumexp(-1, keepdim=True)
    over = mass if everything else mass.clamp_min(0)
    log_p = log_p - over
    p = log_p.exp()
    total = logits.logsumexp(-1, keepdim=True)
    kl = (p * (log_p - logits.gather(1, ids) + total)).sum(-1)
    if everything:
        return _Merged(kl, p, None)
    # q_r is summed over the others: 1 − Σ qᵢ would be rounding, or 0, for a student that is sure.
    others = logits.scatter(1, ids, -math.inf)
    others_total = others.logsumexp(-1, keepdim=True)
    p_r = -torch.expm1(mass - over)
    kl = kl + (torch.xlogy(p_r, p_r) - p_r * (others_total - total))[:, 0]
    return _Merged(kl, p, p_r * (others - others_total).exp())


def hidden_distance(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Σ over layers of the mean over tokens of ‖h_T/‖h_T‖ − h_S/‖h_S‖‖² (OneBit, arXiv 2402.11295, eq. 9).

    Each is one tensor [..., H] a layer: the embeddings' output first, the last block's not among them. Float32 scalar.
    """
    total = student[0].new_zeros((), dtype=torch.float32)
    for ours, theirs in zip(student, teacher, strict=True):
        apart = F.normalize(ours.float(), dim=-1) - F.normalize(theirs.float(), dim=-1)
        total = total + apart.square().sum(-1).mean()
    return total


def attention_distance(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Σ over layers of the mean over rows of ‖A_T − A_S‖², A the attention probabilities [B, heads, T, T] of a layer."""
    total = student[0].new_zeros((), dtype=torch.float32)
    for ours, theirs in zip(student, teacher, strict=True):
        total = total + (ours.float() - theirs.float()).square().sum(-1).mean()
    return total


class Head(NamedTuple):
    """How a model makes logits of its last hidden states: cap·tanh((h·Wᵀ + b)·multiplier/cap)."""

    weight: Tensor
    bias: Tensor | None = None
    multiplier: float = 1.0
    cap: float | None = None

    def __call__(self, hidden: Tensor) -> Tensor:
        """Logits float32 [T, V] of `hidden` [T, H]."""
        logits = F.linear(
            hidden, self.weight.to(hidden.dtype), None if self.bias is None else self.bias.to(hidden.dtype)
        )
        logits = logits.float() * self.multiplier
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)


class OutputLoss(NamedTuple):
    """`total` with its gradient; `kl` and `cross_entropy`, means over tokens, to be looked at."""

    total: Tensor
    kl: Tensor
    cross_entropy: Tensor


def output_loss(
    student: Tensor,
    head: Head,
    teacher: Tensor | None,
    teacher_head: Head | None,
    labels: Tensor | None,
    kl_weight: float,
    ar_weight: float,
    objective: Objective,
    chunk: int = CHUNK_TOKENS,
    compiled: bool = False,
    dtype: torch.dtype | None = None,
    top: Top | None = None,
) -> OutputLoss:
    """kl_weight · mean KL + ar_weight · mean cross-entropy, the logits of at most `chunk` tokens in memory at a time.

    `student` and `teacher` are last hidden states [T, H]; `labels` int64 [T], −100 where there is none. The gradient for
    hidden states and, if it is trained, the head's weight is formed with the loss, chunk by chunk. Logits are multiplied in
    `dtype` (None: that of the hidden states), their softmax is float32. `top` in the place of `teacher`: the KL is
    `top_kl_divergence`. Raises OptionError if `objective` asks for more of the teacher (`Objective.check_top`).
    """
    if top is not None:
        objective.check_top()
    step = compiled_once(_chunk) if compiled else _chunk
    total, kl, cross = _ChunkedLoss.apply(
        student, head.weight, head.bias, head, teacher, teacher_head, labels, kl_weight, ar_weight, objective, chunk, step,
        dtype or student.dtype, top,
    )  # fmt: skip
    return OutputLoss(total, kl, cross)


def _chunk(
    hidden: Tensor, head: Head, teacher: Tensor | None, teacher_head: Head | None, top: Top | None, labels: Tensor | None,
    kl_weight: Tensor, ar_weight: Tensor, direction: str, temperature: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Of a chunk: Σ KL, Σ cross-entropy, and the gradient of their weighted sum for the logits."""
    logits = head(hidden)
    zero = logits.new_zeros(())
    grad = torch.zeros_like(logits)
    kl = cross = zero
    if teacher is not None and teacher_head is not None:
        log_q = F.log_softmax(logits / temperature, dim=-1)
        log_p = F.log_softmax(teacher_head(teacher) / temperature, dim=-1)
        q, p, ahead = log_q.exp(), log_p.exp(), log_p - log_q
        forward = (p * ahead).sum(-1)
        reverse = -(q * ahead).sum(-1)
        of_forward = q - p
        of_reverse = q * (-ahead - reverse[:, None])
        if direction == "forward":
            kl, own = forward.sum(), of_forward
        elif direction == "reverse":
            kl, own = reverse.sum(), of_reverse
        else:
            kl, own = (forward + reverse).sum() / 2, (of_forward + of_reverse) / 2
        kl = kl * temperature**2
        grad = grad + own * (kl_weight * temperature)
    elif top is not None:
        merged = _with_rest(logits, top)
        # The gradient for z_v: q_v − [v in the top]·p_v − [v outside]·p_r·q_v/q_r.
        own = F.softmax(logits, dim=-1).scatter_add(1, top.ids.long(), -merged.p)
        kl = merged.kl.sum()
        grad = grad + (own if merged.rest is None else own - merged.rest) * kl_weight
    if labels is not None:
        log_q = F.log_softmax(logits, dim=-1)
        there = (labels >= 0).float()
        picked = log_q.gather(1, labels.clamp_min(0)[:, None])[:, 0]
        cross = -(picked * there).sum()
        mine = log_q.exp()
        mine = mine.scatter_add(1, labels.clamp_min(0)[:, None], -torch.ones_like(picked)[:, None])
        grad = grad + mine * (there * ar_weight)[:, None]
    if head.cap is not None:
        grad = grad * (1 - (logits / head.cap).square())
    return kl, cross, grad * head.multiplier


_Chunk = Callable[..., tuple[Tensor, Tensor, Tensor]]


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, student: Tensor, weight: Tensor, bias: Tensor | None, head: Head, teacher: Tensor | None,
        teacher_head: Head | None, labels: Tensor | None, kl_weight: float, ar_weight: float, objective: Objective,
        chunk: int, step: _Chunk, dtype: torch.dtype, top: Top | None,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        device = student.device.type
        tokens = student.shape[0]
        with torch.autocast(device, enabled=False):
            matrix = weight.detach().to(dtype)
            ours = Head(matrix, None if bias is None else bias.detach(), head.multiplier, head.cap)
            theirs = None if teacher_head is None else teacher_head._replace(weight=teacher_head.weight.to(dtype))
            of_hidden = torch.empty_like(student)
            of_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
            of_bias = (
                torch.zeros_like(bias, dtype=torch.float32) if bias is not None and ctx.needs_input_grad[2] else None
            )
            kl = cross = student.new_zeros((), dtype=torch.float32)
            # Tensors on its device: numbers would be compiled in, or copied at each step.
            one = torch.ones((), dtype=torch.float32, device=student.device)
            counted = one if labels is None else (labels >= 0).sum().clamp_min(1).float()
            factors = one * (kl_weight / max(tokens, 1)), ar_weight / counted
            for begin in range(0, tokens, chunk):
                part = slice(begin, begin + chunk)
                hidden = student[part].detach().to(dtype)
                some, more, grad = step(
                    hidden, ours, None if teacher is None else teacher[part].to(dtype), theirs,
                    None if top is None else Top(*(values[part] for values in top)),
                    None if labels is None else labels[part], *factors, objective.kd_direction, objective.kd_temperature,
                )  # fmt: skip
                kl, cross = kl + some, cross + more
                grad = grad.to(dtype)
                of_hidden[part] = grad @ matrix
                if of_weight is not None:
                    of_weight += grad.T @ hidden
                if of_bias is not None:
                    of_bias += grad.sum(0)
        ctx.save_for_backward(of_hidden, of_weight, of_bias)
        ctx.dtypes = weight.dtype, None if bias is None else bias.dtype
        kl, cross = kl / max(tokens, 1), cross / counted
        ctx.mark_non_differentiable(kl, cross)
        return kl_weight * kl + ar_weight * cross, kl.clone(), cross.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        of_hidden, of_weight, of_bias = ctx.saved_tensors
        weight = None if of_weight is None else (of_weight * grads[0]).to(ctx.dtypes[0])
        bias = None if of_bias is None else (of_bias * grads[0]).to(ctx.dtypes[1])
        return of_hidden * grads[0].to(of_hidden.dtype), weight, bias, *(None,) * 11
