"""Packed token blocks: what a training run sees, in which order, and what is held out from it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from signbit.data.tokenfile import TokenFile
from signbit.errors import DataError, OptionError

#: Seed of the choice of blocks that are held out, which a run's own seed must not change.
_HELD_OUT_SEED = 0


@dataclass(frozen=True)
class SourceUse:
    """What a `Blocks` takes from one of its files."""

    source: str
    tokens: int
    """Tokens of the text."""
    blocks: int
    """Whole blocks in this part of it."""
    drawn: int
    """Items that are blocks of this text."""

    @property
    def passes(self) -> float:
        """How often each of its blocks is seen, on average."""
        return self.drawn / self.blocks


class Blocks(Dataset[dict[str, Tensor]]):
    """`count` blocks of `length` tokens from one or several files, in an order that the seed fixes.

    Item i is {"input_ids": int64 [length]}, and "learnt": bool [length], which tokens are learnt from, if one of the files
    says it; the same whenever it is asked for, so that a resumed run goes on with the
    data that it would have seen. The order is shuffled already: take the items one after another. Among the first i
    items, each text's share is its weight's to within one or two blocks (weights are relative; equal if not given). A
    text is walked through a permutation of its blocks, another one at each pass. Blocks lie end to end from the start
    of a text, whatever documents they cut; less than a block at its end is left out. Of rows of `length` + 1 tokens, the
    last of which is a label only (LLM360's chunks), a block is the first `length`.

    `part` "validation" holds `validation_blocks` blocks of each text, the texts in turn, that `part` "train" never
    sees if both have this number and `length` in common. They are chosen by a permutation that no seed changes.
    `count` is one pass over as many blocks as there are if not given.

    Raises DataError if a text has less than one block left, if the files are of different tokenizers, or if a file has
    rows that `length` fits in none of these ways; OptionError for a length under 2, counts
    or weights that are not positive, and a seed outside of 0 … 2³² − 1.
    """

    def __init__(
        self,
        files: Sequence[TokenFile],
        length: int,
        count: int | None = None,
        weights: Sequence[float] | None = None,
        seed: int = 0,
        part: Literal["train", "validation"] = "train",
        validation_blocks: int = 0,
    ) -> None:
        self.files, self.length, self.seed = tuple(files), length, seed
        self.part, self.validation_blocks = part, validation_blocks
        weights = [1.0] * len(self.files) if weights is None else list(weights)
        _check(self.files, length, count, weights, seed, part, validation_blocks)
        self._strides = [length + (file.row_tokens == length + 1) for file in self.files]
        totals = [file.tokens // stride for file, stride in zip(self.files, self._strides, strict=True)]
        for file, total in zip(self.files, totals, strict=True):
            if total <= validation_blocks:
                raise DataError(_too_short(file, length, total, validation_blocks))
        if part == "validation":
            # Every text alike, so that each block is seen once.
            weights = [1.0] * len(self.files)
            self._sizes = [validation_blocks] * len(self.files)
        else:
            self._sizes = [total - validation_blocks for total in totals]
        self._totals = totals
        self.count = sum(self._sizes) if count is None else count
        # As they were written (0.7 is 7/10), and as whole numbers, so that shares are exact however long a run is.
        shares = [Fraction(str(float(weight))) for weight in weights]
        whole = math.lcm(*(share.denominator for share in shares))
        self._weights = [int(share * whole) for share in shares]
        # Opened and computed in each process when they are needed. Of the orders, only a text's last one is kept.
        self._arrays: dict[int, np.ndarray] = {}
        self._marks: dict[int, np.ndarray] = {}
        self._orders: dict[int, tuple[int, np.ndarray]] = {}
        self._parts: dict[int, np.ndarray] = {}

    def __getstate__(self) -> dict[str, Any]:
        # A mapped file would be pickled as an array of all its tokens.
        return {**self.__dict__, "_arrays": {}, "_marks": {}, "_orders": {}, "_parts": {}}

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        source, block = self.locate(index)
        item = {"input_ids": self.ids(source, block)}
        return {**item, "learnt": self._learnt(source, block)} if self.learnt else item

    @property
    def learnt(self) -> bool:
        """Whether only some of the tokens are learnt from."""
        return any(file.learnt for file in self.files)

    def _learnt(self, source: int, block: int) -> Tensor:
        if not self.files[source].learnt:
            return torch.ones(self.length, dtype=torch.bool)
        if source not in self._marks:
            self._marks[source] = self.files[source].open_learnt()
        begin = block * self._strides[source]
        return torch.from_numpy(self._marks[source][begin : begin + self.length] != 0)

    def ids(self, source: int, block: int) -> Tensor:
        """Token ids int64 [length] of a block of a file."""
        if source not in self._arrays:
            self._arrays[source] = self.files[source].open()
        begin = block * self._strides[source]
        ids = self._arrays[source][begin : begin + self.length]
        return torch.from_numpy(ids.astype(np.int64))

    def locate(self, index: int) -> tuple[int, int]:
        """Which file, and which block of it, item `index` is; raises IndexError outside of the `count` items."""
        if not -self.count <= index < self.count:
            raise IndexError(f"item {index} of {self.count} blocks")
        index %= self.count
        # The first text has floor(i w / Σ w) of the first i items; the next has its own among those that remain, and
        # so on, so that place and share follow from i alone.
        rest = sum(self._weights)
        for source, weight in enumerate(self._weights):
            before = index * weight // rest
            if (index + 1) * weight // rest > before:
                return source, self._block(source, before)
            index -= before
            rest -= weight
        raise AssertionError("the last text takes what remains")

    def _drawn(self) -> list[int]:
        """How many of the items are blocks of each text."""
        left, rest, drawn = self.count, sum(self._weights), []
        for weight in self._weights:
            drawn.append(left * weight // rest)
            left -= drawn[-1]
            rest -= weight
        return drawn

    def _block(self, source: int, rank: int) -> int:
        """The block that is the `rank`-th one drawn from a text."""
        turn, place = divmod(rank, self._sizes[source])
        if source not in self._orders or self._orders[source][0] != turn:
            self._orders[source] = turn, _permutation([self.seed, source, turn], self._sizes[source])
        place = int(self._orders[source][1][place])
        if not self.validation_blocks:
            return place
        if source not in self._parts:
            order = _permutation([_HELD_OUT_SEED], self._totals[source])
            held_out = self.part == "validation"
            chosen = order[-self.validation_blocks :] if held_out else order[: -self.validation_blocks]
            self._parts[source] = np.sort(chosen)
        return int(self._parts[source][place])

    @property
    def one_pass(self) -> int:
        """Blocks of all texts, each once."""
        return sum(self._sizes)

    @property
    def uses(self) -> tuple[SourceUse, ...]:
        """What is taken from each file, in their order."""
        return tuple(
            SourceUse(file.source, file.tokens, size, drawn)
            for file, size, drawn in zip(self.files, self._sizes, self._drawn(), strict=True)
        )


def _permutation(seed: list[int], size: int) -> np.ndarray:
    # RandomState is frozen: it draws the same in every version of numpy, which the newer generators do not promise.
    return np.random.RandomState(seed).permutation(size).astype(np.uint32)


def _check(
    files: Sequence[TokenFile],
    length: int,
    count: int | None,
    weights: Sequence[float],
    seed: int,
    part: str,
    validation_blocks: int,
) -> None:
    if not files:
        raise OptionError("blocks are cut from at least one file of tokens")
    if part not in ("train", "validation"):
        raise OptionError(f"part is {part}; it is train or validation")
    if length < 2:
        raise OptionError(f"the length of a block is {length}; at least 2 tokens are needed (512, 2048 …)")
    if count is not None and count < 1:
        raise OptionError(f"{count} blocks are asked for; a positive number is needed")
    if validation_blocks < (part == "validation"):
        raise OptionError(f"{validation_blocks} blocks are held out; a positive number is needed to validate")
    if len(weights) != len(files) or not all(0 < weight < float("inf") for weight in weights):
        raise OptionError(f"weights are {list(weights)}; each of {len(files)} files has one, and they are positive")
    if not 0 <= seed < 1 << 32:
        raise OptionError(f"the seed is {seed}; it is a number of 0 … 4294967295")
    for file in files:
        if file.tokenizer != files[0].tokenizer:
            raise DataError(
                f"{file.path} and {files[0].path} hold tokens of different tokenizers; make one of them anew"
            )
        row = file.row_tokens
        if row is not None and row % length and length % row and row != length + 1:
            raise DataError(
                f"{file.path} holds rows of {row} tokens that do not run on into each other; "
                f"a block of {length} is neither a whole part of one nor whole rows. Give a length that divides "
                f"{row}, a multiple of it, or {row - 1}"
            )


def _too_short(file: TokenFile, length: int, blocks: int, held_out: int) -> str:
    fits = file.tokens // (held_out + 1)
    most = f"a length of at most {fits}" if fits > 1 else "another text"
    if not blocks:
        what = f"fewer than one block of {length}"
    else:
        what = f"{blocks} blocks of {length}, and {held_out} are to be held out"
        most += " or fewer to hold out"
    return f"{file.source} has {file.tokens} tokens, {what}; give more text, or {most}"
