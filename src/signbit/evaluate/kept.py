"""What was measured, kept on the disk under the model's hash and the protocol, so that it is not measured again."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from signbit.errors import OptionError


def cache_folder() -> Path:
    """Where measurements are kept: SIGNBIT_CACHE, else ~/.cache/signbit."""
    named = os.environ.get("SIGNBIT_CACHE")
    return Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "signbit"


def digest(value: Any) -> str:
    """The SHA-256, in hex, of JSON values, keys in order."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _path(model_sha256: str, protocol: dict[str, Any]) -> Path:
    return cache_folder() / "measured" / model_sha256[:32] / f"{digest(protocol)[:32]}.json"


def recall(model_sha256: str, protocol: dict[str, Any]) -> tuple[Any, dict[str, str]] | None:
    """What was kept for a model under a protocol (JSON values), and the machine that found it ({}: not recorded), or None.

    A damaged file counts as none.
    """
    try:
        kept = json.loads(_path(model_sha256, protocol).read_text(encoding="utf-8"))
        return kept["found"], dict(kept.get("measured_on", {}))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def keep(model_sha256: str, protocol: dict[str, Any], found: Any, machine: dict[str, str]) -> None:
    """Keeps what was found on a machine (JSON values), in place of its parts.

    Raises OptionError where it cannot be written.
    """
    path = _path(model_sha256, protocol)
    made = path.with_name(f"{path.name}.{os.getpid()}")
    kept = {"model_sha256": model_sha256, "protocol": protocol, "found": found, "measured_on": machine}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        made.write_text(json.dumps(kept), encoding="utf-8")
        made.replace(path)
    except OSError as error:
        raise _unwritten("measurements", path.parent, error) from error
    drop_parts(model_sha256, protocol)


def _unwritten(what: str, place: Path, error: OSError) -> OptionError:
    return OptionError(f"{what} cannot be kept in {place} ({error.strerror}); name another place with SIGNBIT_CACHE")


def drop_parts(model_sha256: str, protocol: dict[str, Any]) -> None:
    """Forgets what `KeptWindows` have of a measurement."""
    path = _path(model_sha256, protocol)
    for file in path.parent.glob(f"{path.stem}-*.jsonl"):
        file.unlink(missing_ok=True)


def append_lines(path: Path, values: Iterable[Any], what: str) -> None:
    """Adds JSON values to a file, a line each, at once; raises OptionError where `what` they are cannot be written.

    Each begins with the end of the line before it, so that it stands alone whatever a killed run left there.
    """
    lines = "".join("\n" + json.dumps(value) for value in values).encode()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as stream:
            stream.write(lines)
    except OSError as error:
        raise _unwritten(what, path, error) from error


def read_lines(path: Path) -> Iterator[Any]:
    """The JSON values that `append_lines` wrote; a line that a killed run did not finish is left out."""
    for line in path.read_bytes().split(b"\n"):
        try:
            yield json.loads(line)
        except ValueError:
            continue


class KeptWindows:
    """What a machine found in each window of a text, on the disk as it comes, until the whole perplexity is kept.

    Several processes write to files of their own (`place`), and all of them are read.
    """

    def __init__(self, model_sha256: str, protocol: dict[str, Any], machine: dict[str, str], place: int = 0) -> None:
        whole = _path(model_sha256, protocol)
        # One perplexity is not put together from the windows of several machines.
        name = f"{whole.stem}-{digest(machine)[:8]}"
        self._file = whole.with_name(f"{name}-{place}.jsonl")
        self.known: dict[int, tuple[float, int]] = {}
        """Window → sum of −ln p over its predicted tokens in nats, and their number."""
        for file in sorted(whole.parent.glob(f"{name}-*.jsonl")):
            for found in read_lines(file):
                match found:
                    case [int(window), float(nll), int(tokens)]:
                        self.known[window] = nll, tokens

    def add(self, window: int, nll: float, tokens: int) -> None:
        """Keeps a window; raises OptionError where it cannot be written."""
        self.known[window] = nll, tokens
        append_lines(self._file, [[window, nll, tokens]], "measurements")
