"""What a run keeps in its directory: checkpoints, complete or absent, and lines of metrics."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from signbit.errors import TrainingError

#: Everything that decided the run, and what was measured on the way.
RUN, METRICS = "run.json", "metrics.jsonl"
#: What a checkpoint has when it is complete: how much of the budget was used, which data was left out, its files' sizes.
STATE = "signbit.json"
UNFINISHED = ".unfinished"
_PREFIX = "checkpoint-"


def read_json(path: Path) -> Any:
    """What the file holds; raises TrainingError for one that cannot be read or is no JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _damaged(path, str(error)) from error


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl; the last one is none if a kill cut it short.

    Raises TrainingError for a line that is no JSON, and for a file that cannot be read.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines(keepends=True)
    except (OSError, ValueError) as error:
        raise _damaged(Path(path), str(error)) from error
    found = []
    for number, line in enumerate(lines, 1):
        try:
            found += [json.loads(line)] if line.endswith("\n") else []
        except ValueError as error:
            raise _damaged(Path(path), f"line {number}: {error}") from error
    return found


def _damaged(path: Path, why: str) -> TrainingError:
    if path.parent.name.startswith(_PREFIX):
        instead = f"take {path.parent} away: the checkpoint before it is used then, if one is kept"
    else:
        instead = "mend it or put a copy back, or begin anew in another directory"
    return TrainingError(f"{path} is damaged ({why}); {instead}")


def write_whole(path: Path, text: str) -> None:
    """Writes a file that is all there or as it was before."""
    made = path.with_name(f"{path.name}{UNFINISHED}")
    made.write_text(text, encoding="utf-8")
    os.replace(made, path)


def checkpoints(out: Path) -> list[Path]:
    """The complete checkpoints of a run, the newest first."""
    steps = {path: path.name.removeprefix(_PREFIX) for path in out.glob(f"{_PREFIX}*")}
    found = [path for path, step in steps.items() if step.isdecimal() and (path / STATE).is_file()]
    return sorted(found, key=lambda path: -int(steps[path]))


def last_checkpoint(out: Path) -> Path | None:
    """The newest complete checkpoint of a run, or None."""
    return next(iter(checkpoints(out)), None)


def check_checkpoint(path: Path) -> None:
    """Raises TrainingError if a file of a checkpoint is missing, or has another size than when it was written."""
    for name, size in read_json(path / STATE).get("files", {}).items():
        file = path / name
        there = file.stat().st_size if file.is_file() else None
        if there != size:
            raise _damaged(file, "it is missing" if there is None else f"{there} bytes of {size}")


def remove_checkpoint(path: Path) -> None:
    """Takes a checkpoint away, which is incomplete from the first moment on."""
    (path / STATE).unlink(missing_ok=True)
    shutil.rmtree(path)


def finish_checkpoint(out: Path, step: int, state: dict[str, Any]) -> None:
    """Gives the checkpoint of `step`, written under UNFINISHED, its name, when all of it is on the disk."""
    made, final = out / UNFINISHED / f"{_PREFIX}{step}", out / f"{_PREFIX}{step}"
    files = {str(path.relative_to(made)): path.stat().st_size for path in sorted(made.rglob("*")) if path.is_file()}
    (made / STATE).write_text(json.dumps({**state, "files": files}), encoding="utf-8")
    for path in made.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    if final.exists():
        remove_checkpoint(final)
    os.replace(made, final)
    shutil.rmtree(out / UNFINISHED, ignore_errors=True)
