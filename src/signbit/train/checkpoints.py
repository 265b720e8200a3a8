"""What a run keeps in its directory: checkpoints, complete or absent, and lines of metrics."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

#: Everything that decided the run, and what was measured on the way.
RUN, METRICS = "run.json", "metrics.jsonl"
#: What a checkpoint has when it is complete: how much of the budget was used, and which data was left out.
STATE = "signbit.json"
UNFINISHED = ".unfinished"
_PREFIX = "checkpoint-"


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl; the last one is none if a kill cut it short."""
    lines = Path(path).read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


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


def remove_checkpoint(path: Path) -> None:
    """Takes a checkpoint away, which is incomplete from the first moment on."""
    (path / STATE).unlink(missing_ok=True)
    shutil.rmtree(path)


def finish_checkpoint(out: Path, step: int, state: dict[str, Any]) -> None:
    """Gives the checkpoint of `step`, written under UNFINISHED, its name, when all of it is on the disk."""
    made, final = out / UNFINISHED / f"{_PREFIX}{step}", out / f"{_PREFIX}{step}"
    (made / STATE).write_text(json.dumps(state), encoding="utf-8")
    for path in made.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    if final.exists():
        remove_checkpoint(final)
    os.replace(made, final)
    shutil.rmtree(out / UNFINISHED, ignore_errors=True)
