"""Training text that a model writes itself, in a file of tokens that a killed run goes on with."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from signbit.data.calibration import Progress
from signbit.data.corpus import TOKENS
from signbit.data.tokenfile import (
    TokenFile,
    as_bytes,
    boundary_id,
    description,
    id_type,
    read_token_file,
    tokenizer_digest,
    vocabulary_size,
    write_description,
    write_json,
)
from signbit.data.writing import continued
from signbit.errors import DataError, OptionError


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
        _check_same(path, dict(found.recipe), recipe)
        return found
    with _partial(path, recipe) as (stream, done):
        # What a kill left of a batch is not looked at.
        stream.truncate(done * length * np.dtype(dtype).itemsize)
        while done < sequences:
            rows = _batch(model, min(batch, sequences - done), length, vocabulary, seed, done // batch)
            with _explained(path):
                stream.write(as_bytes(rows, dtype))
                stream.flush()
                os.fsync(stream.fileno())
            done += len(rows)
            write_json(description(_partial_path(path)), {**recipe, "done": done})
            if progress is not None:
                progress(done, sequences)
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
    with _evaluating(model):
        rows = continued(model, first.to(next(model.parameters()).device), greedy, length, generator)
    return torch.stack(rows).numpy()


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Without dropout, whose draws a resumed run would not repeat; each module's own mode comes back."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


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


def _check_same(path: Path, found: dict[str, Any], recipe: dict[str, Any]) -> None:
    other = [name for name, value in recipe.items() if found.get(name) != value]
    if other:
        differ = ", ".join(
            name if name in ("model", "tokenizer") else f"{name} {found.get(name)}, not {recipe[name]}"
            for name in other
        )
        raise DataError(f"{path} is another run's ({differ}); give another path, or delete it to begin anew")


@contextmanager
def _partial(path: Path, recipe: dict[str, Any]) -> Iterator[tuple[BinaryIO, int]]:
    """PATH.partial, locked, and how many rows of this recipe stand in it; becomes `path` when the block ends well."""
    partial = _partial_path(path)
    state = description(partial)
    with ExitStack() as stack:
        with _explained(partial):
            path.parent.mkdir(parents=True, exist_ok=True)
            stream = stack.enter_context(partial.open("ab"))
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise DataError(f"another process writes {partial}; wait for it, or give another path") from None
            done = _rows_done(partial, recipe) if partial.stat().st_size else 0
        if not done:
            write_json(state, {**recipe, "done": 0})
        yield stream, done
        with _explained(partial):
            partial.replace(path)
            state.unlink()


def _rows_done(partial: Path, recipe: dict[str, Any]) -> int:
    try:
        found = json.loads(description(partial).read_bytes())
        done = int(found.pop("done"))
    except (ValueError, KeyError, AttributeError, FileNotFoundError):
        raise DataError(
            f"{description(partial)} does not say what {partial} holds; delete both to begin anew"
        ) from None
    _check_same(partial, found, recipe)
    return done


def _partial_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.partial")


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(f"{path} cannot be written ({error.strerror or error}); give another path") from error
