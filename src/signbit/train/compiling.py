"""torch.compile and torch's algorithms, as they are used for training."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch

#: A fusion of row and column sums whose results lose a dimension of size 1, which autograd then refuses: the gradients of
#: value vectors are such sums (pytorch issue 178080; met in 2.11).
_BROKEN_FUSION = "triton.mix_order_reduction"


def compiled(function: Callable[..., Any], **how: Any) -> Callable[..., Any]:
    """`function` by torch.compile, without what is known to be broken in it."""
    known = torch._inductor.list_options()
    return torch.compile(function, options={_BROKEN_FUSION: False} if _BROKEN_FUSION in known else None, **how)


@functools.cache
def compiled_once(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same of a function of tensors, kept for all who call it."""
    return compiled(function, dynamic=False)


@contextlib.contextmanager
def repeatable(wanted: bool) -> Iterator[None]:
    """If `wanted`, only algorithms that give the same bits at every run, in torch and in what torch.compile makes."""
    if not wanted:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # torch asks for it; cuBLAS reads it once
    before = torch.are_deterministic_algorithms_enabled()
    # Else inductor takes what was the fastest of several sums, which may be another one after a resume.
    known = "deterministic" in torch._inductor.list_options()
    chosen = torch._inductor.config.patch(deterministic=True) if known else contextlib.nullcontext()
    try:
        with chosen:
            torch.use_deterministic_algorithms(True)
            yield
    finally:
        torch.use_deterministic_algorithms(before)
