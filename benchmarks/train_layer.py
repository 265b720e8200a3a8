"""Forward and backward of a latent binary layer beside those of nn.Linear, on one GPU, multiplied in bfloat16.

    python -m benchmarks.train_layer --json train_layer.json

Both are compiled by torch.compile and keep float32 parameters, as in training (autocast), at the shapes of a 1.3B model.
The forms alternate, and each figure is the median of many times; nothing is timed unless the gradient that the latents get
is what the dense gradient and the layer's formula give.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.rows import Row, lower_is_better, show
from signbit.methods.onebit import OnebitLinear, OnebitOptions
from signbit.train.compiling import compiled

#: [N, K] of FBI-LLM 1.3B's linears (hidden 2048, ffn 5632).
SHAPES = ((2048, 2048), (5632, 2048), (2048, 5632))


def passes(layer: nn.Module, x: Tensor, upstream: Tensor) -> Callable[[], None]:
    """One forward and backward pass as a call."""
    forward = compiled(layer.forward, dynamic=False)

    def once() -> None:
        layer.zero_grad(set_to_none=True)
        x.grad = None
        with torch.autocast(x.device.type, torch.bfloat16):
            y = forward(x)
        y.backward(upstream)

    return once


def milliseconds(forms: list[Callable[[], None]], repeats: int) -> list[float]:
    """Medians of the forms, timed in turn."""
    times: list[list[float]] = [[] for _ in forms]
    for turn in range(repeats + 5):
        for form, found in zip(forms, times, strict=True):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            form()
            end.record()
            torch.cuda.synchronize()
            if turn >= 5:
                found.append(start.elapsed_time(end))
    return [statistics.median(found) for found in times]


def check(layer: OnebitLinear, dense: nn.Linear, name: str) -> None:
    """dW = G ∘ h gᵀ, where G is the dense layer's gradient (its weight is the layer's effective one)."""
    assert layer.weight.grad is not None and dense.weight.grad is not None and layer.in_scale is not None
    want = dense.weight.grad * layer.scale[0].detach()[:, None] * layer.in_scale[0].detach()
    apart = float((layer.weight.grad - want).norm() / want.norm())
    if not apart < 0.02:
        raise SystemExit(f"{name}: the latents' gradient is {apart:.3f} of its size away from the formula's")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--json")
    args = parser.parse_args()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    rows: list[Row] = []
    for out_features, in_features in SHAPES:
        torch.manual_seed(0)
        dense = nn.Linear(in_features, out_features, bias=False).cuda()
        layer = OnebitLinear.start(dense.weight, None, OnebitOptions())
        dense.weight.data = layer.effective_weight().detach()
        x = torch.randn(args.tokens, in_features, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        upstream = torch.randn(args.tokens, out_features, device="cuda", dtype=torch.bfloat16)
        forms = [passes(layer, x, upstream), passes(dense, x, upstream)]
        for form in forms:
            form()
        name = f"{in_features} → {out_features}, {args.tokens} tokens, forward and backward"
        check(layer, dense, name)
        ours, theirs = milliseconds(forms, args.repeats)
        rows.append(lower_is_better(name, ours, "nn.Linear", theirs, "ms"))
    show(rows, args.json)


if __name__ == "__main__":
    main()
