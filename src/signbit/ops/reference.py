"""The reference: plain torch, any device, the meaning that every faster backend is held to."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from signbit import bits
from signbit.bits import Operands


def quantize_activations(u: Tensor, activations: str) -> tuple[Tensor, Tensor]:
    """One token's activations as integers and the step that scales them back, u ≈ q · step.

    int8: a = max(max|u|, 1e-5), q = clamp(round_half_even(127·u/a), −127, 127), step = a/127, per token in float32.
    sign: q = sign(u) with sign(0) = +1 and step = 1 (Bi-Real's binary activations, arXiv 1808.00278).
    `u` is float [B, K]; returns float32 q [B, K] holding integers, and float32 step [B, 1].
    """
    u = u.float()
    if activations == "sign":
        return torch.where(u >= 0, 1.0, -1.0), torch.ones_like(u[:, :1])
    a = u.abs().amax(dim=-1, keepdim=True).clamp_min(1e-5)
    return (127.0 * u / a).round().clamp(-127, 127), a / 127.0


def binary_linear(x: Tensor, w: Operands, activations: str) -> Tensor:
    """x · Wᵀ for a binarized W, by making W dense: `x` float [..., K] to the same dtype [..., N].

    exact: the matmul of torch with `bits.dense` in the dtype of x. int8 and sign: the activations of each plane are
    quantized after its in_scale, integers meet integers exactly, scales act in float32; shift and salient values meet
    the quantized x itself, in_shift the float x (design: two activation modes).
    """
    if activations == "exact":
        wide = torch.float64 if x.dtype is torch.float64 else torch.float32
        return F.linear(x, bits.dense(w, wide).to(x.dtype))
    flat = x.reshape(-1, w.in_features).float()
    return _quantized_linear(flat, w, activations).to(x.dtype).reshape(*x.shape[:-1], w.signs.shape[1])


def _quantized_linear(x: Tensor, w: Operands, activations: str) -> Tensor:
    rows, columns, groups = w.signs.shape[1], w.in_features, w.scale.shape[2]
    width = columns // groups
    q, step = quantize_activations(x, activations)
    # Salient values replace what stands at their positions, so planes and shifts skip those.
    kept = torch.ones(rows, columns, device=x.device, dtype=torch.float32)
    integers = None
    if w.salient_codes is not None:
        index, _, values = bits.salient_integers(w)
        kept.view(-1)[index] = 0.0
        integers = torch.zeros(rows, columns, device=x.device, dtype=torch.float64)
        integers.view(-1)[index] = values.double()

    y = torch.zeros(x.shape[0], rows, device=x.device, dtype=torch.float32)
    for plane in range(w.scale.shape[0]):
        q_plane, step_plane = q, step
        if w.in_scale is not None:
            in_scale = w.in_scale[min(plane, w.in_scale.shape[0] - 1)].float()
            q_plane, step_plane = quantize_activations(x * in_scale, activations)
        signs = bits.unpack_signs(w.signs[min(plane, w.signs.shape[0] - 1)], columns) * kept
        for group in range(groups):
            part = slice(group * width, (group + 1) * width)
            y += (q_plane[:, part] @ signs[:, part].T) * (w.scale[plane, :, group].float() * step_plane)
    if w.shift is not None:
        for group in range(groups):
            part = slice(group * width, (group + 1) * width)
            y += (q[:, part] @ kept[:, part].T) * (w.shift[:, group].float() * step)
    if integers is not None:
        assert w.salient_scale is not None
        # float64: a sum of (code − zero)·q passes 2²⁴ already at K = 519.
        y += (q.double() @ integers.T).float() * (w.salient_scale.float() * step)
    if w.in_shift is not None:
        y += x @ (w.in_shift.float() * kept).T
    return y


def int8_linear(x: Tensor, codes: Tensor, scale: Tensor, activations: str) -> Tensor:
    """x · (codes ∘ scale)ᵀ: `x` float [..., K], `codes` int8 [N, K], `scale` float [N]; the dtype of x, [..., N]."""
    if activations == "exact":
        return F.linear(x, codes.to(x.dtype)) * scale.to(x.dtype)
    flat = x.reshape(-1, codes.shape[1])
    q, step = quantize_activations(flat, activations)
    y = (q.double() @ codes.double().T).float() * (scale.float() * step)
    return y.to(x.dtype).reshape(*x.shape[:-1], codes.shape[0])
