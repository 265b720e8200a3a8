"""Calibration text: token windows drawn as PB-LLM's and GPTQ's loaders draw them, from sets, files or the model."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from signbit.data.sources import SETS, Text, TextSet, read_set, read_text_file
from signbit.data.tokens import document_windows, running_windows, tokens
from signbit.data.writing import continued
from signbit.errors import DataError, OptionError

#: Called with (windows made, windows in all).
Progress = Callable[[int, int], None]
SELF = "self"


@dataclass(frozen=True)
class CalibrationOptions:
    """What the inputs of the layers are measured on."""

    calibration: str | None = None
    """Text: c4, wikitext2 or ptb (their train parts), a .txt, .jsonl or .parquet file, or self (the model writes it, for
    which it is loaded as a whole)."""
    samples: int = 128
    """Windows."""
    sequence_length: int = 2048
    """Tokens a window."""
    seed: int = 0
    """Seed of the draw, and of the model's own text."""

    def __post_init__(self) -> None:
        for name in ("samples", "sequence_length"):
            if getattr(self, name) < 1 + (name == "sequence_length"):
                flag = name.replace("_", "-")
                raise OptionError(f"--{flag} is {getattr(self, name)}; a positive number is needed (128, 2048 …)")


def check_calibration(options: CalibrationOptions, data_dir: str | Path | None = None) -> None:
    """Raises DataError, before a model is loaded, if the text is not to be had (a hub set apart)."""
    name = options.calibration
    if name is None or name == SELF:
        return
    if name in SETS:
        if data_dir is not None:
            read_set(SETS[name], data_dir)
    else:
        _read_file(name)


def check_length(options: CalibrationOptions, limit: int | None) -> None:
    """Raises OptionError for windows longer than `limit`, the positions of the model."""
    if limit is not None and options.sequence_length > limit:
        raise OptionError(
            f"--sequence-length is {options.sequence_length}, but the model has {limit} positions; give at most {limit}"
        )


def _read_file(name: str) -> Text:
    try:
        return read_text_file(name)
    except DataError as error:
        if Path(name).is_file():
            raise
        raise DataError(
            f"--calibration {name}: no such file; the sets with names are {', '.join(SETS)} and self"
        ) from error


def draw_windows(
    tokenizer: Any, options: CalibrationOptions, data_dir: str | Path | None = None, limit: int | None = None
) -> tuple[Tensor, str]:
    """Token windows int64 [samples, sequence_length], and where their text is from.

    A set of documents of its own (c4, and .jsonl or .parquet files whose documents are long enough): a random document
    that is longer than the window, a random offset in it, again for every window, as the published C4 loader does.
    Running text (wikitext2, ptb, .txt, and files of short documents, joined by blank lines): random offsets.
    `limit` is the longest window that the model's positions allow. Differs from the published loaders: no special token
    (a beginning of sequence, where a tokenizer has one) stands among the ids.

    Raises DataError if there is less text than one window, OptionError for windows longer than `limit`.
    """
    name, length = options.calibration, options.sequence_length
    assert name is not None
    check_length(options, limit)
    chosen: TextSet | None = SETS.get(name)
    text = _read_file(name) if chosen is None else read_set(chosen, data_dir)
    generator = random.Random(options.seed)
    separate = chosen.joiner is None if chosen is not None else len(text.documents) > 1
    try:
        if separate:
            try:
                drawn = document_windows(tokenizer, text.documents, options.samples, length, generator)
                return torch.stack(drawn), text.source
            except DataError:
                if chosen is not None:
                    raise
        joiner = "\n\n" if chosen is None else chosen.joiner or ""
        ids = tokens(tokenizer, joiner.join(text.documents))
        return running_windows(ids, options.samples, length, generator), text.source
    except DataError as error:
        raise DataError(f"{text.source}: {error}; give more text or a smaller --sequence-length") from error


@torch.no_grad()
def self_generated(
    model: Any, options: CalibrationOptions, batch: int = 16, progress: Progress | None = None
) -> Tensor:
    """Windows int64 [samples, sequence_length] that `model` writes: what OneBit was distilled on.

    The first token is uniform over the vocabulary, the next 3 to 5 are the likeliest, the rest is sampled; an end of
    text does not end a window (a new one begins behind it).
    Source: LLM-QAT (arXiv 2305.17888), section 3.1, as OneBit (arXiv 2402.11295) uses it.
    """
    vocabulary = model.get_input_embeddings().weight.shape[0]
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(options.seed)
    rows: list[Tensor] = []
    while len(rows) < options.samples:
        count = min(batch, options.samples - len(rows))
        first = torch.randint(vocabulary, (count, 1), generator=generator)
        greedy = int(torch.randint(3, 6, (1,), generator=generator))
        rows.extend(continued(model, first.to(device), greedy, options.sequence_length, generator))
        if progress is not None:
            progress(len(rows), options.samples)
    return torch.stack(rows)
