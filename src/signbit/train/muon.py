"""Muon for matrices of latents, and one optimizer made of several."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from signbit.errors import OptionError

#: Coefficients of the quintic Newton–Schulz step, as published.
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalized(matrices: Tensor, steps: int = 5) -> Tensor:
    """Matrices whose singular values are brought near 1: X ← aX + (bXXᵀ + c(XXᵀ)²)X, from X/‖X‖.

    `matrices` is float [B, N, K]; the work and the result are bfloat16 on a GPU, float32 on a CPU, where that is faster.
    Source: Muon (Jordan et al., 2024, kellerjordan.github.io/posts/muon).
    """
    a, b, c = _COEFFICIENTS
    x = matrices.bfloat16() if matrices.is_cuda else matrices.float()
    turned = x.shape[-2] > x.shape[-1]
    x = x.mT if turned else x
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if turned else x


class Muon(torch.optim.Optimizer):
    """W ← W − 0.2·√max(N, K)·lr·orthogonalized(G + μM), M ← μM + (1 − μ)G: an update of root mean square 0.2·lr.

    As torch.optim.Muon (torch 2.9) with adjust_lr_fn="match_rms_adamw" and without decay, but all matrices of one shape at
    once: one by one, those of a small model take longer to launch than a step to compute. Parameters are matrices
    [N, K]; raises OptionError for others.
    Source: Muon is scalable for LLM training (arXiv 2502.16982), eq. 4.
    """

    def __init__(self, params: Iterable[Any], lr: float = 1e-3, momentum: float = 0.95, steps: int = 5) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "steps": steps})
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.ndim != 2:
                    raise OptionError(f"Muon takes matrices, not a tensor of shape {list(parameter.shape)}")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            same: dict[Any, list[nn.Parameter]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    same[parameter.shape, parameter.device].append(parameter)
            for (shape, _), some in same.items():
                for parameter in some:
                    if not self.state[parameter]:
                        self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
                buffers = [self.state[parameter]["momentum_buffer"] for parameter in some]
                grads = [parameter.grad for parameter in some if parameter.grad is not None]
                momentum = group["momentum"]
                # Not lerp, which DTensors know since torch 2.13 only.
                torch._foreach_mul_(buffers, momentum)
                torch._foreach_add_(buffers, grads, alpha=1 - momentum)
                ahead = torch._foreach_mul(grads, 1 - momentum)
                torch._foreach_add_(ahead, buffers, alpha=momentum)
                size = -0.2 * max(shape) ** 0.5 * group["lr"]
                updates = orthogonalized(torch.stack([_whole(part) for part in ahead]), group["steps"])
                for parameter, update in zip(some, updates.unbind(), strict=True):
                    parameter.add_(_divided(update.to(parameter.dtype), parameter), alpha=size)
        return loss


def _whole(tensor: Any) -> Tensor:
    """A tensor that FSDP2 divides, gathered: what a matrix is orthogonal to is not seen in parts."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # type: ignore[no-any-return]


def _divided(update: Tensor, parameter: Any) -> Tensor:
    if not hasattr(parameter, "placements"):
        return update
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(update, parameter.device_mesh, parameter.placements, src_data_rank=None)


class Together(torch.optim.Optimizer):
    """Several optimizers, each with its own parameters, as one: what a trainer and a schedule take for an optimizer.

    Gradients of the last one's parameters are cut to the norm `max_norm` before its step, if that is not 0; those of
    Muon need not be, whose updates have a size of their own. `grad_norm` is what the norm of all gradients was.
    """

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer], max_norm: float = 0.0) -> None:
        self.optimizers, self.max_norm = tuple(optimizers), max_norm
        self.grad_norm: Tensor | None = None
        super().__init__([p for o in self.optimizers for g in o.param_groups for p in g["params"]], {})
        self.param_groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        self._share()

    def _share(self) -> None:
        """The very groups and state of this are those of the parts: what a schedule, a checkpoint or an engine that divides
        parameters puts here is there."""
        groups = iter(self.param_groups)
        for optimizer in self.optimizers:
            optimizer.param_groups = [next(groups) for _ in optimizer.param_groups]
            optimizer.state = self.state

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None if closure is None else closure()
        norms = []
        for optimizer in self.optimizers:
            some = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            if not some:
                continue
            norm = nn.utils.get_total_norm([p.grad for p in some])
            norms.append(_whole(norm))
            if self.max_norm > 0 and optimizer is self.optimizers[-1]:
                nn.utils.clip_grads_with_norm_(some, self.max_norm, norm)
        self.grad_norm = torch.stack(norms).norm() if norms else None
        for optimizer in self.optimizers:
            optimizer.step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._share()
