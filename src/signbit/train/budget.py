"""How long a run lasts, in steps or minutes, and the learning rate over it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from signbit.errors import OptionError
from signbit.methods.base import check_choice


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up, then a cosine or a line from the learning rate down to a share of it, over the whole budget."""

    warmup_share: float = 0.04
    """Share of the budget in which the learning rate rises."""
    warmup_steps: int | None = None
    """The same in steps, which goes before the share."""
    last_share: float = 0.02
    """What the learning rate ends at, as a share of its peak."""
    lr_decay: Literal["cosine", "linear"] = "cosine"
    """How the learning rate falls."""

    def __post_init__(self) -> None:
        if not 0 <= self.warmup_share < 1:
            raise OptionError(f"warmup_share is {self.warmup_share}; it is a share, from 0 to below 1")
        if not 0 <= self.last_share <= 1:
            raise OptionError(f"last_share is {self.last_share}; it is a share, from 0 to 1")
        if self.warmup_steps is not None and self.warmup_steps < 0:
            raise OptionError(f"warmup_steps is {self.warmup_steps}; it is a number of steps, 0 or more")
        check_choice("lr_decay", self.lr_decay, ("cosine", "linear"))

    def factor(self, done: float, step: int) -> float:
        """The learning rate as a share of its peak, where `done` of the budget is used and `step` steps are made."""
        if self.warmup_steps is not None:
            if step < self.warmup_steps:
                return (step + 1) / self.warmup_steps
        elif done < self.warmup_share:
            return max(done / self.warmup_share, 0.01)  # of a budget of minutes nothing is used at the first step
        # Of warm-up steps the share that they took: exact in a budget of steps, as long as the later ones in one of minutes.
        start = self.warmup_share if self.warmup_steps is None else done * self.warmup_steps / (step + 1)
        along = min(max((done - start) / max(1 - start, 1e-9), 0.0), 1.0)
        left = 1 - along if self.lr_decay == "linear" else (1 + math.cos(math.pi * along)) / 2
        return self.last_share + (1 - self.last_share) * left


def check_length(max_steps: int | None, max_minutes: float | None, max_passes: float | None = None) -> None:
    """Raises OptionError unless exactly one length of a run is given, and it is positive."""
    if sum(length is not None for length in (max_steps, max_minutes, max_passes)) != 1:
        raise OptionError("how long? give either --max-steps N, --max-minutes M or --max-passes P")
    if max_steps is not None and max_steps < 1:
        raise OptionError(f"--max-steps is {max_steps}; at least one step is needed")
    for name, value in (("minutes", max_minutes), ("passes", max_passes)):
        if value is not None and not 0 < value < math.inf:
            raise OptionError(f"--max-{name} is {value}; a positive number is needed")


class Budget:
    """Steps, or minutes of training; of minutes those count that runs before a resumption used.

    Raises OptionError unless exactly one of both is given.
    """

    def __init__(
        self, max_steps: int | None, max_minutes: float | None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        check_length(max_steps, max_minutes)
        self.max_steps, self.max_minutes, self._clock = max_steps, max_minutes, clock
        self._began = clock()
        #: Seconds that were used before `begin`, and those that are used by now, as they were last told.
        self.before_s = self.used_s = 0.0

    def begin(self, before_s: float = 0.0) -> None:
        """From here on time counts, after the seconds that were used before."""
        self.before_s = self.used_s = before_s
        self._began = self._clock()

    def measured_s(self) -> float:
        """Seconds of training by this process's clock, those before a resumption included."""
        return self.before_s + self._clock() - self._began

    def done(self, step: int) -> float:
        """Share of the budget that is used after `step` steps."""
        if self.max_steps is not None:
            return step / self.max_steps
        assert self.max_minutes is not None
        return self.used_s / (60 * self.max_minutes)
