"""What was measured, kept on the disk under the model's hash and the protocol, so that it is not measured again."""

from __future__ import annotations

import hashlib
import json
import os
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
    """Keeps what was found on a machine (JSON values); raises OptionError where it cannot be written."""
    path = _path(model_sha256, protocol)
    made = path.with_name(f"{path.name}.{os.getpid()}")
    kept = {"model_sha256": model_sha256, "protocol": protocol, "found": found, "measured_on": machine}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        made.write_text(json.dumps(kept), encoding="utf-8")
        made.replace(path)
    except OSError as error:
        raise OptionError(
            f"measurements cannot be kept in {path.parent} ({error.strerror}); name another place with SIGNBIT_CACHE"
        ) from error
