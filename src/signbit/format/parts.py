"""The unfinished directory: finished parts of a model on disk, from which a killed run goes on."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from signbit.errors import FormatError
from signbit.format.reader import StoredTensors, read_headers

#: The file that tells an unfinished run from any other directory.
_SETTINGS = "signbit-run.json"


class Parts:
    """Tensors and a record for each finished part of a model, in a directory beside OUT.

    A part counts once its record is there, which is renamed into place after its tensors are on the disk: whatever
    kills the process, a part is whole or absent. Made by `opened`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    @contextlib.contextmanager
    def opened(cls, folder: Path, settings: Mapping[str, Any], restart: bool = False) -> Iterator[Parts]:
        """The parts of a run with `settings` (JSON values), those of an earlier run that had the same included.

        Raises FormatError if the directory is another run's (the message names the settings that differ), no run's at
        all, in use, or cannot be written; `restart` deletes what an earlier run left.
        """
        parts = cls(folder)
        with contextlib.ExitStack() as stack:
            with parts._explained():
                parts._check_own()
                folder.mkdir(parents=True, exist_ok=True)
                lock = stack.enter_context((folder / "lock").open("w"))
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError:
                    raise FormatError(
                        f"another process is at work in {folder}; wait for it, or give another -o"
                    ) from None
                if restart:
                    parts._clear()
                parts._begin(settings)
            try:
                yield parts
            finally:
                if not parts._records():  # nothing to go on from
                    parts.remove()

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except (OSError, SafetensorError) as error:
            raise FormatError(
                f"{self.folder} could not be written ({error}); the finished blocks in it stay. Free space, then "
                "repeat the command"
            ) from error

    def _check_own(self) -> None:
        """Raises FormatError if the directory is something else's: what stands in it is never signbit's to delete."""
        if self.folder.is_symlink() or (self.folder.exists() and not self.folder.is_dir()):
            raise FormatError(f"{self.folder} is a file or a link; finished blocks are kept there: give another -o")
        names = {entry.name for entry in self.folder.iterdir()} if self.folder.exists() else set()
        # A kill while the run began leaves no more than these two.
        strange = names - {"lock", Path(_SETTINGS).with_suffix(".tmp").name}
        if strange and _SETTINGS not in names:
            raise FormatError(
                f"{self.folder} holds {min(strange)}, so it is no unfinished run of signbit; finished blocks are "
                "kept there: give another -o"
            )

    def _begin(self, settings: Mapping[str, Any]) -> None:
        path = self.folder / _SETTINGS
        text = json.dumps(settings, indent=2, sort_keys=True) + "\n"
        if not path.exists() or not self._records():
            self._clear()
            self._write(path, text)
            return
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise FormatError(f"{path} is damaged ({error}); begin anew with --restart") from error
        if differences := _differences(before, json.loads(text)):
            raise FormatError(
                f"{self.folder} holds an unfinished run with other settings ({'; '.join(differences)}); repeat that "
                "command to finish it, give another -o, or --restart to throw its blocks away"
            )

    def _records(self) -> list[Path]:
        return [path for path in self.folder.glob("*.json") if path.name != _SETTINGS]

    def _clear(self) -> None:
        # The settings go last: a kill half way leaves a directory that is still known as a run's.
        for entry in sorted(self.folder.iterdir(), key=lambda entry: entry.name == _SETTINGS):
            if entry.is_dir():
                shutil.rmtree(entry)
            elif entry.name != "lock":
                entry.unlink()

    @staticmethod
    def _write(path: Path, text: str) -> None:
        temporary = path.with_suffix(".tmp")
        with temporary.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)

    def record(self, name: str) -> Any:
        """The record of a finished part (JSON values), or None."""
        path = self.folder / f"{name}.json"
        try:
            return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
        except ValueError as error:
            raise FormatError(f"{path} is damaged ({error}); begin anew with --restart") from error

    def put(self, name: str, tensors: Mapping[str, Tensor], record: Any) -> None:
        """Writes a part."""
        path = self.folder / f"{name}.safetensors"
        with self._explained():
            save_file({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}, path)
            with path.open("rb") as stream:
                os.fsync(stream.fileno())
            self._write(self.folder / f"{name}.json", json.dumps(record) + "\n")

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors of a finished part."""
        loaded: dict[str, Tensor] = load_file(self.folder / f"{name}.safetensors")
        return loaded

    def stored(self, names: list[str]) -> StoredTensors:
        """The tensors of finished parts, each read when it is asked for."""
        return StoredTensors(read_headers(self.folder / f"{name}.safetensors" for name in names))

    def remove(self) -> None:
        """Deletes the directory: the run is finished."""
        with contextlib.suppress(OSError):
            self._clear()
        shutil.rmtree(self.folder, ignore_errors=True)


def _differences(before: Any, now: Any, path: str = "") -> list[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        keys = sorted({*before, *now})
        return [
            d for key in keys for d in _differences(before.get(key), now.get(key), f"{path}.{key}" if path else key)
        ]
    if before == now:
        return []
    if path.startswith("source"):
        return [f"the source model's {path.partition('.')[2] or 'files'} changed since"]
    return [f"{path}: {before!r} there, {now!r} here"]
