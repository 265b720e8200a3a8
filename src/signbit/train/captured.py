"""A training step's forward and backward pass as one CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

#: Passes before the capture, in which what is compiled or chosen at the first call is.
_WARM_UP = 3
Losses = Callable[[Tensor, Tensor], tuple[Tensor, dict[str, Tensor]]]


class CapturedStep:
    """`losses` and its gradients, captured at the first call and replayed from then on.

    A small model's kernels are shorter than what Python takes to launch them: 30 blocks twice forward and once backward.
    `losses` takes token ids [B, T] and the hidden states' weight (float32 scalar), and gives the loss and its parts; it must
    wait for nothing on the GPU. Gradients stand in the same tensors at each step, and parameters must stay where they are.
    """

    def __init__(self, losses: Losses, parameters: Iterable[nn.Parameter], ids: Tensor) -> None:
        self._ids = ids.clone()
        self._weight = torch.zeros((), device=ids.device)
        self._parameters = [parameter for parameter in parameters if parameter.requires_grad]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(_WARM_UP):
                losses(self._ids, self._weight)[0].backward()
                self._forget()
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self._loss, self._parts = losses(self._ids, self._weight)
            self._loss.backward()
        self._grads = [parameter.grad for parameter in self._parameters]
        self._loss = self._loss.detach()
        self._forget()

    def _forget(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None

    def __call__(self, ids: Tensor, weight: float) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and parts for `ids`, and gradients in the parameters, in the place of any that were there."""
        self._ids.copy_(ids)
        self._weight.fill_(weight)
        self._graph.replay()
        for parameter, grad in zip(self._parameters, self._grads, strict=True):
            parameter.grad = grad
        return self._loss.clone(), self._parts
