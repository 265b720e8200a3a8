"""torch.compile, as it is used for training."""

from __future__ import annotations

import functools
from collections.abc import Callable
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
