"""Quantizing a matrix against the second moments of its inputs: GPTQ's sweep, and coordinate descent after it.

Notation: W [N, K] the matrix, H = mean of xᵀx over calibration tokens [K, K], Q the quantized matrix. What is
minimized is the mean squared error of the layer's output, E(Q) = tr((W − Q) H (W − Q)ᵀ); rows are independent.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from signbit.errors import WeightError

#: The value nearest to each of `values` [N, n] that the columns `where` may hold.
Nearest = Callable[[Tensor, slice], Tensor]


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
    return Factor(damped.float(), inverse.diagonal().float(), upper.float(), dead)


def matched_to_dense(weight: Tensor, moments: Moments, factor: Factor) -> Tensor:
    """The matrix that on the inputs x of the quantized prefix comes closest to W on the dense model's inputs x°.

    W' = W + W·C·H⁻¹, C the mean of (x° − x)ᵀx: so the error of the layers before is taken back where x still tells it.
    Source: asymmetric calibration, GPTAQ (arXiv 2504.02692), as least squares. `weight` float32 [N, K].
    """
    if moments.cross is None:
        return weight
    upper = factor.upper.double()
    return weight + (weight.double() @ moments.cross.double() @ upper.T @ upper).float()


def sweep(weight: Tensor, factor: Factor, nearest: Nearest, block: int) -> Tensor:
    """GPTQ: quantizes column after column and takes each one's error back in those after it; returns Q [N, K].

    e = (wⱼ − qⱼ)/Uⱼⱼ, then W[:, j:] −= e·U[j, j:]; columns after a block of `block` are updated once a block.
    Source: GPTQ (arXiv 2210.17323), algorithm 1.
    """
    left, quantized = weight.clone(), torch.empty_like(weight)
    columns = weight.shape[1]
    for begin in range(0, columns, block):
        end = min(begin + block, columns)
        part = left[:, begin:end]
        errors = torch.empty_like(part)
        for j in range(begin, end):
            value = part[:, j - begin : j - begin + 1]
            q = nearest(value, slice(j, j + 1))
            quantized[:, j : j + 1] = q
            error = (value - q) / factor.upper[j, j]
            errors[:, j - begin : j - begin + 1] = error
            part[:, j - begin :].addmm_(error, factor.upper[j : j + 1, j:end], alpha=-1)
        left[:, end:] -= errors @ factor.upper[begin:end, end:]
    return quantized


def descend(weight: Tensor, quantized: Tensor, hessian: Tensor, nearest: Nearest, block: int) -> Tensor:
    """One pass of coordinate descent on E(Q) over all columns; returns the new Q, whose error is never larger.

    Column j alone is best at qⱼ − ((Q − W)·H)ⱼ/Hⱼⱼ; it takes the nearest value that it may hold.
    Source: QuantEase (arXiv 2309.01885), section 3. float32 [N, K], `hessian` [K, K].
    """
    result = quantized.clone()
    slope = (quantized - weight) @ hessian
    diagonal = hessian.diagonal()
    columns = weight.shape[1]
    for begin in range(0, columns, block):
        end = min(begin + block, columns)
        part = slope[:, begin:end]
        changes = torch.empty_like(part)
        for j in range(begin, end):
            old = result[:, j : j + 1]
            new = nearest(old - part[:, j - begin : j - begin + 1] / diagonal[j], slice(j, j + 1))
            change = new - old
            result[:, j : j + 1] = new
            changes[:, j - begin : j - begin + 1] = change
            part.addmm_(change, hessian[j : j + 1, begin:end])
        slope[:, end:] += changes @ hessian[begin:end, end:]
    return result


def output_error(weight: Tensor, quantized: Tensor, hessian: Tensor | None = None) -> float:
    """E(Q)/E(0): the share of the layer's output energy that is error; without `hessian` that of the weights alone."""
    difference = weight - quantized
    if hessian is None:
        error, whole = difference.square().sum(), weight.square().sum()
    else:
        error, whole = ((difference @ hessian) * difference).sum(), ((weight @ hessian) * weight).sum()
    return (error / whole).item() if whole > 0 else 0.0
