"""Token ids of texts, and windows drawn from documents."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from signbit.errors import DataError


def tokens(tokenizer: Any, text: str) -> Tensor:
    """The ids int64 [T] of `text`, without special tokens."""
    # The tokenizer warns that a whole corpus is longer than the model's context; it is cut into windows later.
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt", verbose=False).input_ids[0]
    result: Tensor = ids.long()
    return result


def document_windows(
    tokenizer: Any, documents: Sequence[str], count: int, length: int, generator: random.Random
) -> list[Tensor]:
    """`count` windows [length], each at a random offset of a random document longer than one, with repetition.

    The order of draws is that of the published loaders (a document, again while it is too short, then the offset).
    Raises DataError if no document is longer than a window.
    """
    # A token is at least one byte, so that most documents need not be tokenized.
    long = {index for index, document in enumerate(documents) if len(document.encode()) > length}
    cache: dict[int, Tensor] = {}

    def ids_of(index: int) -> Tensor:
        if index not in cache:
            cache[index] = tokens(tokenizer, documents[index])
        return cache[index]

    if not any(len(ids_of(index)) > length for index in sorted(long)):
        raise DataError(f"no document is longer than one window of {length} tokens")
    windows: list[Tensor] = []
    while len(windows) < count:
        index = generator.randint(0, len(documents) - 1)
        if index in long and len(ids_of(index)) > length:
            start = generator.randint(0, len(ids_of(index)) - length - 1)
            windows.append(ids_of(index)[start : start + length])
    return windows


def running_windows(ids: Tensor, count: int, length: int, generator: random.Random) -> Tensor:
    """`count` windows int64 [count, length] at random offsets of one text; raises DataError if it is too short."""
    if len(ids) <= length:
        raise DataError(f"{len(ids)} tokens are not more than one window of {length}")
    starts = [generator.randint(0, len(ids) - length - 1) for _ in range(count)]
    return torch.stack([ids[start : start + length] for start in starts])
