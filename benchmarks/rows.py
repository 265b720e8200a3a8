"""What every benchmark gives: a table for people, and with --json FILE a list of rows for machines."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Row:
    """One comparison; `ratio` above 1 means that signbit is better."""

    work: str
    ours: float
    peer: str
    theirs: float
    ratio: float
    unit: str


def lower_is_better(work: str, ours: float, peer: str, theirs: float, unit: str) -> Row:
    """A row for a time, a size or a perplexity."""
    return Row(work, ours, peer, theirs, theirs / ours, unit)


def show(rows: list[Row], json_path: str | None) -> None:
    """Prints the rows and writes them as JSON if asked."""
    width = max(len(row.work) for row in rows)
    peers = max(len(row.peer) for row in rows)
    print(f"{'work':{width}}  {'signbit':>12}  {'peer':{peers}}  {'theirs':>12}  {'ratio':>8}  unit")
    for row in rows:
        print(
            f"{row.work:{width}}  {row.ours:12.5g}  {row.peer:{peers}}  {row.theirs:12.5g}  {row.ratio:8.3g}  {row.unit}"
        )
    if json_path is not None:
        Path(json_path).write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")
