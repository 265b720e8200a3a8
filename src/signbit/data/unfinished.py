"""Files that a model fills batch by batch: complete or absent, and the same call after a kill goes on with them."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from signbit.data.tokenfile import description, write_json
from signbit.errors import DataError

#: Parts of a recipe whose values say nothing to a reader.
_UNTOLD = ("model", "teacher", "tokenizer", "files")


class Unfinished:
    """PATH.partial and the .json beside it, which says of which recipe it is and how many rows stand in it."""

    def __init__(self, path: Path, recipe: Mapping[str, Any], stream: BinaryIO, done: int) -> None:
        self._path, self._recipe, self._stream = path, recipe, stream
        #: Rows that are on the disk.
        self.done = done

    def add(self, content: bytes, rows: int) -> None:
        """Appends a batch, which from now on no kill takes away; raises DataError if it cannot be written."""
        with _explained(self._path):
            self._stream.write(content)
            self._stream.flush()
            os.fsync(self._stream.fileno())
        self.done += rows
        write_json(description(_partial(self._path)), {**self._recipe, "done": self.done})


@contextmanager
def unfinished(path: Path, recipe: Mapping[str, Any], row_bytes: int) -> Iterator[Unfinished]:
    """PATH.partial of this recipe (JSON values), locked; becomes `path` when the block ends well.

    Raises DataError if it is of another recipe, in use, or cannot be written.
    """
    partial = _partial(path)
    state = description(partial)
    with ExitStack() as stack:
        with _explained(partial):
            path.parent.mkdir(parents=True, exist_ok=True)
            stream = stack.enter_context(partial.open("ab"))
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise DataError(f"another process writes {partial}; wait for it, or give another path") from None
            size = partial.stat().st_size
            done = _rows_done(partial, recipe) if size else 0
        if size < done * row_bytes:
            raise DataError(f"{partial} is shorter than {state} says: it is damaged; delete both to begin anew")
        if not done:
            write_json(state, {**recipe, "done": 0})
        # What a kill left of a batch is not looked at.
        stream.truncate(done * row_bytes)
        yield Unfinished(path, recipe, stream, done)
        with _explained(partial):
            partial.replace(path)
            state.unlink()


def check_same(path: Path, found: Mapping[str, Any], recipe: Mapping[str, Any]) -> None:
    """Raises DataError, with what differs, if `path` is of the recipe `found` and not of `recipe`."""
    other = [name for name, value in recipe.items() if found.get(name) != value]
    if other:
        differ = ", ".join(
            name if name in _UNTOLD else f"{name} {found.get(name)}, not {recipe[name]}" for name in other
        )
        raise DataError(f"{path} is another run's ({differ}); give another path, or delete it to begin anew")


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Without dropout, whose draws a resumed run would not repeat; each module's own mode comes back."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _rows_done(partial: Path, recipe: Mapping[str, Any]) -> int:
    try:
        found = json.loads(description(partial).read_bytes())
        done = int(found.pop("done"))
    except (ValueError, KeyError, AttributeError, FileNotFoundError):
        raise DataError(
            f"{description(partial)} does not say what {partial} holds; delete both to begin anew"
        ) from None
    check_same(partial, found, recipe)
    return done


def _partial(path: Path) -> Path:
    return path.with_name(f"{path.name}.partial")


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(f"{path} cannot be written ({error.strerror or error}); give another path") from error
