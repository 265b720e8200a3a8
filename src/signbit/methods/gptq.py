"""Quantizing a matrix against the second moments of its inputs: GPTQ's sweep, and coordinate descent after it.

Notation: W [N, K] the matrix, H = mean of xᵀx over calibration tokens [K, K], Q the quantized matrix. What is
minimized is the mean squared error of the layer's output, E(Q) = tr((W − Q) H (W − Q)ᵀ); rows are independent.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from signbit.errors import WeightError


@dataclass(frozen=True)
class Grid:
    """The values that each entry of a matrix [N, K] may hold, all float32 as they are stored.

    Salient entries (`salient` bool [N, K]) take code_step·(code − code_zero), code from 0 to `code_top`, step and zero
    [N, 1]. The others, by `kind`: "two" shift ± scale, divided at shift; "above" shift ± scale, divided at 0; "codes"
    scale·(code − zero), code from 0 to `low_top`; "zero" 0; "free" anything. scale, shift and zero are [N, 1], or
    [N, K] where groups of columns differ.
    """

    salient: Tensor
    code_step: Tensor
    code_zero: Tensor
    code_top: int
    kind: Literal["two", "above", "codes", "zero", "free"]
    scale: Tensor
    shift: Tensor
    zero: Tensor | None = None
    low_top: int = 0

    def nearest(self, values: Tensor, where: slice) -> Tensor:
        """The value that each of `values` [N, n] in the columns `where` would take."""
        codes = (values / self.code_step).round_().add_(self.code_zero).clamp_(0, self.code_top)
        high = codes.sub_(self.code_zero).mul_(self.code_step)
        return torch.where(self.salient[:, where], high, self._low(values, where))

    def _low(self, values: Tensor, where: slice) -> Tensor:
        if self.kind == "free":
            return values
        if self.kind == "zero":
            return torch.zeros_like(values)
        columns = where if self.scale.shape[1] > 1 else slice(None)
        scale, shift = self.scale[:, columns], self.shift[:, columns]
        if self.kind == "codes":
            assert self.zero is not None
            zero = self.zero[:, columns]
            divisor = torch.where(scale == 0, 1.0, scale)
            return ((values / divisor).round() + zero).clamp(0, self.low_top).sub_(zero).mul_(scale)
        return torch.where(self.positive(values, where), shift + scale, shift - scale)

    def positive(self, values: Tensor, where: slice = slice(None)) -> Tensor:
        """Which of `values` take the upper of two levels; the published {0, s} divides at 0, not half way."""
        columns = where if self.scale.shape[1] > 1 else slice(None)
        return values > 0 if self.kind == "above" else values >= self.shift[:, columns]


@dataclass(frozen=True)
class Factor:
    """H made positive definite, and what is derived of it: all float32.

    `hessian` is H + damping·mean(diag H)·I with 1 on the diagonal of `dead` inputs (always 0 in calibration);
    `inverse_diagonal` [K] is diag(H⁻¹) and `upper` [K, K] the upper Cholesky factor U of H⁻¹ = UᵀU.
    """

    hessian: Tensor
    inverse_diagonal: Tensor
    upper: Tensor
    dead: Tensor


@dataclass(frozen=True)
class Moments:
    """What calibration measured at the input of one or more linear layers.

    `hessian` float32 [K, K] is the mean of xᵀx over `tokens` inputs x of the model quantized so far; `cross` [K, K] the
    mean of (x° − x)ᵀx with x° the inputs of the dense model at the same places, or None where it was not measured.
    """

    hessian: Tensor
    tokens: int
    cross: Tensor | None = None
    _factors: dict[float, Factor] = field(default_factory=dict, repr=False, compare=False)

    def factor(self, damping: float) -> Factor:
        """`factorize(hessian, damping)`, computed once: layers of one input share it."""
        if damping not in self._factors:
            self._factors[damping] = factorize(self.hessian, damping)
        return self._factors[damping]


def factorize(hessian: Tensor, damping: float) -> Factor:
    """The factor of `hessian` float [K, K], computed in float64; raises WeightError if it is not positive definite."""
    damped = hessian.double().clone()
    diagonal = damped.diagonal()
    dead = diagonal == 0
    diagonal[dead] = 1
    diagonal += damping * diagonal.mean()
    lower, failed = torch.linalg.cholesky_ex(damped)
    if not int(failed):
        inverse = torch.cholesky_inverse(lower)
        upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
    if int(failed):
        raise WeightError(
            f"the Hessian of its inputs is not positive definite with a damping of {damping:g}; "
            "use --damping 0.1, or more calibration text (--samples)"
        )
    # Row-major: LAPACK's and cuSOLVER's factors are not always.
    return Factor(damped.float(), inverse.diagonal().float(), upper.float().contiguous(), dead)


def matched_to_dense(weight: Tensor, moments: Moments, factor: Factor) -> Tensor:
    """The matrix that on the inputs x of the quantized prefix comes closest to W on the dense model's inputs x°.

    W' = W + W·C·H⁻¹, C the mean of (x° − x)ᵀx: so the error of the layers before is taken back where x still tells it.
    Source: asymmetric calibration, GPTAQ (arXiv 2504.02692), as least squares. `weight` float32 [N, K].
    """
    if moments.cross is None:
        return weight
    upper = factor.upper.double()
    return weight + (weight.double() @ moments.cross.double() @ upper.T @ upper).float()


def sweep(weight: Tensor, factor: Factor, grid: Grid, block: int) -> Tensor:
    """GPTQ: quantizes column after column and takes each one's error back in those after it; returns Q [N, K].

    e = (wⱼ − qⱼ)/Uⱼⱼ, then W[:, j:] −= e·U[j, j:]; columns after a block of `block` are updated once a block.
    Source: GPTQ (arXiv 2210.17323), algorithm 1.
    """
    left = weight.clone(memory_format=torch.contiguous_format)
    quantized = torch.empty_like(left)
    columns = weight.shape[1]
    for begin in range(0, columns, block):
        end = min(begin + block, columns)
        inner = factor.upper[begin:end, begin:end]
        errors = _columns(left[:, begin:end], quantized[:, begin:end], inner, grid, begin, descend=False)
        left[:, end:] -= errors @ factor.upper[begin:end, end:]
    return quantized


def descend(weight: Tensor, quantized: Tensor, hessian: Tensor, grid: Grid, block: int) -> Tensor:
    """One pass of coordinate descent on E(Q) over all columns; returns the new Q, whose error is never larger.

    Column j alone is best at qⱼ − ((Q − W)·H)ⱼ/Hⱼⱼ; it takes the nearest value that it may hold.
    Source: QuantEase (arXiv 2309.01885), section 3. float32 [N, K], `hessian` [K, K].
    """
    result = quantized.clone(memory_format=torch.contiguous_format)
    slope = (quantized - weight) @ hessian
    columns = weight.shape[1]
    for begin in range(0, columns, block):
        end = min(begin + block, columns)
        inner = hessian[begin:end, begin:end]
        changes = _columns(slope[:, begin:end], result[:, begin:end], inner, grid, begin, descend=True)
        slope[:, end:] += changes @ hessian[begin:end, end:]
    return result


def _columns(part: Tensor, quantized: Tensor, matrix: Tensor, grid: Grid, begin: int, descend: bool) -> Tensor:
    """The columns [N, n] of one block, one after another; Q goes into `quantized`, errors or changes are returned.

    Sweep: v = partⱼ, q nearest to it, e = (v − q)/Uⱼⱼ, part −= e·Uⱼ. Descent: v = qⱼ − partⱼ/Hⱼⱼ, q' nearest to it,
    e = q' − qⱼ, part += e·Hⱼ. `matrix` [n, n] is the block of U or of H.
    """
    if part.is_cuda:
        from signbit.methods import columns_triton

        return columns_triton.columns(part, quantized, matrix, grid, begin, descend)
    return _columns_by_torch(part, quantized, matrix, grid, begin, descend)


def _columns_by_torch(part: Tensor, quantized: Tensor, matrix: Tensor, grid: Grid, begin: int, descend: bool) -> Tensor:
    changes = torch.empty_like(part)
    diagonal = matrix.diagonal()
    for j in range(part.shape[1]):
        here, where = slice(j, j + 1), slice(begin + j, begin + j + 1)
        value = part[:, here]
        if descend:
            old = quantized[:, here]
            new = grid.nearest(old - value / diagonal[j], where)
            change = new - old
        else:
            new = grid.nearest(value, where)
            change = (value - new) / diagonal[j]
        quantized[:, here] = new
        changes[:, here] = change
        part.addmm_(change, matrix[here], alpha=1 if descend else -1)
    return changes


def output_error(weight: Tensor, quantized: Tensor, hessian: Tensor | None = None) -> float:
    """E(Q)/E(0): the share of the layer's output energy that is error; without `hessian` that of the weights alone."""
    difference = weight - quantized
    if hessian is None:
        error, whole = difference.square().sum(), weight.square().sum()
    else:
        error, whole = ((difference @ hessian) * difference).sum(), ((weight @ hessian) * weight).sum()
    return (error / whole).item() if whole > 0 else 0.0
