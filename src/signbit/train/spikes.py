"""Loss spikes: how one is told, and how the data that led to it is left out."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset

from signbit.errors import TrainingError
from signbit.train.checkpoints import METRICS, STATE, checkpoints, read_json, read_metrics

#: Lines of metrics whose median a loss is held against, and how many there are at least.
_LINES, _LEAST = 20, 5
#: Chunks behind one checkpoint that are given up one after another.
_MOST_IN_A_ROW = 3


@dataclass(frozen=True)
class Spike:
    """A line of metrics whose loss is out of the ordinary, and the chunk of data that is skipped for it."""

    step: int
    loss: float | None
    """None where it is no number."""
    usual: float | None
    """What it is held against (`usual_loss`)."""
    skipped_chunk: int


def usual_loss(before: Sequence[float]) -> float | None:
    """The median of the last 20 losses of `before`; None if there are fewer than 5."""
    return median(before[-_LINES:]) if len(before) >= _LEAST else None


def recorded(lines: Sequence[dict[str, Any]]) -> list[int]:
    """The chunks that the lines of a run's metrics say are skipped."""
    return [line["spike"]["skipped_chunk"] for line in lines if "spike" in line]


def check_in_a_row(lines: Sequence[dict[str, Any]], step: int) -> None:
    """Raises TrainingError if too many chunks behind the checkpoint of `step` were skipped in a row."""
    chunks = [line["spike"]["skipped_chunk"] for line in lines if "spike" in line and line["step"] == step]
    if len(chunks) >= _MOST_IN_A_ROW:
        raise TrainingError(
            f"the loss spiked behind step {step} with each of the chunks {', '.join(map(str, chunks))}: it is not the data. "
            "Lower --learning-rate in a new run, or go back further: --resume, with --skip-chunks also naming the chunk "
            "before"
        )


def chunk_at(place: int, skipped: Collection[int]) -> int:
    """The number of the chunk that is taken at `place`, counted from 0, where `skipped` are left out."""
    for chunk in sorted(skipped):
        place += chunk <= place
    return place


class Unskipped(Dataset[dict[str, Tensor]]):
    """The items of `data` from the `start`-th on, of those that remain where chunks of `size` items are left out."""

    def __init__(self, data: Any, start: int, size: int, skipped: Collection[int]) -> None:
        self.data, self.start, self.size, self.skipped = data, start, size, tuple(skipped)

    def __len__(self) -> int:
        there = sum(chunk * self.size < len(self.data) for chunk in self.skipped)
        return max(0, len(self.data) - self.start - there * self.size)

    def __getitem__(self, index: int) -> Any:
        place, within = divmod(self.start + index, self.size)
        return self.data[chunk_at(place, self.skipped) * self.size + within]


def checkpoint_without(out: Path, skip_chunks: Collection[int], chunk_steps: int) -> Path | None:
    """The newest checkpoint of a run that fits to the chunks that are left out: those named, and those its metrics name.

    None if there is no checkpoint. Raises TrainingError if all of them have learnt from a chunk that is named.
    """
    lines = read_metrics(out / METRICS) if (out / METRICS).is_file() else []
    found = checkpoints(out)
    for path in found:
        state = read_json(path / STATE)
        wanted = {*skip_chunks, *recorded(lines)}
        places = range(-(-state["step"] // chunk_steps))
        learnt = [chunk_at(place, state["skipped"]) for place in places]
        if learnt == [chunk_at(place, wanted) for place in places]:
            return path
    if found:
        raise TrainingError(
            f"{found[-1]}, the oldest checkpoint that is kept, has learnt from a chunk of --skip-chunks "
            f"{' '.join(map(str, skip_chunks))} already; begin anew in another directory "
            "(--keep-checkpoints keeps more)"
        )
    return None
