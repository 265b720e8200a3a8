"""Training text that a model writes itself, in a file of tokens that a killed run goes on with."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from signbit.data.calibration import Progress
from signbit.data.corpus import TOKENS
from signbit.data.tokenfile import (
    TokenFile,
    as_bytes,
    boundary_id,
    id_type,
    read_token_file,
    tokenizer_digest,
    vocabulary_size,
    write_description,
)
from signbit.data.unfinished import check_same, evaluating, unfinished
from signbit.data.writing import continued
from signbit.errors import OptionError


@torch.no_grad()
def self_generate(
    model: Any,
    tokenizer: Any,
    path: str | Path,
    sequences: int,
    length: int,
    batch: int = 16,
    seed: int = 0,
    progress: Progress | None = None,
) -> TokenFile:
    """Writes `sequences` rows of `length` tokens that `model` makes up to `path` (.tokens): what OneBit is distilled on.

    As `self_generated`: a first token uniform over the vocabulary, the 3 to 5 likeliest next ones, then sampling; a row
    goes on behind an end of text. Batch n is drawn from a generator seeded by (seed, n) and stands in PATH.partial once
    it is done, so that the same call after a kill goes on there and ends with the same bytes (where the model's own
    arithmetic repeats itself). If `path` is there already, of the same model and options, it is opened.
    Source: LLM-QAT (arXiv 2305.17888), section 3.1, as OneBit (arXiv 2402.11295) uses it.

    Raises DataError if `path` or PATH.partial is of another model or other options, in use, or cannot be written;
    OptionError for numbers that are not positive, a length over the model's positions, and another ending than .tokens;
    WeightError if the model's logits are not finite.
    """
    path = Path(path)
    _check(model, path, sequences, length, batch)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    dtype = id_type(max(vocabulary, vocabulary_size(tokenizer)))
    digest = tokenizer_digest(tokenizer)
    recipe = {
        "sequences": sequences, "length": length, "batch": batch, "seed": seed, "model": _model_digest(model),
        "tokenizer": digest, "dtype": dtype,
    }  # fmt: skip
    if path.exists():
        found = read_token_file(path)
        check_same(path, found.recipe, recipe)
        return found
    with unfinished(path, recipe, length * np.dtype(dtype).itemsize) as file:
        while file.done < sequences:
            rows = _batch(model, min(batch, sequences - file.done), length, vocabulary, seed, file.done // batch)
            file.add(as_bytes(rows, dtype), len(rows))
            if progress is not None:
                progress(file.done, sequences)
        source, boundary = "written by the model", boundary_id(tokenizer)
        made = TokenFile(path, source, sequences, sequences * length, dtype, boundary, digest, length, recipe)
        write_description(made)
    return made


def _batch(model: Any, count: int, length: int, vocabulary: int, seed: int, number: int) -> np.ndarray:
    """Rows [count, length] of batch `number`, which depend on no other batch."""
    mixed = hashlib.sha256(f"{seed} {number}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(mixed[:8], "little"))
    first = torch.randint(vocabulary, (count, 1), generator=generator)
    greedy = int(torch.randint(3, 6, (1,), generator=generator))
    with evaluating(model):
        rows = continued(model, first.to(next(model.parameters()).device), greedy, length, generator)
    return torch.stack(rows).numpy()


def _check(model: Any, path: Path, sequences: int, length: int, batch: int) -> None:
    if path.suffix != TOKENS:
        raise OptionError(f"{path} is to hold tokens; give it a name that ends in {TOKENS}")
    for name, value in (("sequences", sequences), ("tokens a sequence", length), ("sequences a batch", batch)):
        if value < 1:
            raise OptionError(f"{value} {name} are asked for; a positive number is needed")
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and length > limit:
        raise OptionError(
            f"{length} tokens a sequence are asked for, but the model has {limit} positions; give at most those"
        )


def _model_digest(model: Any) -> str:
    """SHA-256 over names, types, shapes and some 64 values of each tensor, spread over it: it tells models apart."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, Tensor):
            some = tensor.flatten()[:: max(1, tensor.numel() // 64)].cpu().contiguous()
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(some.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
