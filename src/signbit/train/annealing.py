"""Tells layers how far the training is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from signbit.linear import BinaryLinear
from signbit.train.students import binary_layers

if TYPE_CHECKING:
    from signbit.train.trainer import DistillTrainer


class Annealing(TrainerCallback):
    """Tells every binary layer the share of the budget that is done, as the learning rate's schedule counts it.

    After a step, so that what is then saved, measured and packed is of that share, and the next step learns with it; and
    at the beginning, for a run that goes on. Must come behind what counts the minutes of a budget.
    """

    def __init__(self, trainer: DistillTrainer) -> None:
        self._trainer = trainer
        self._layers: list[BinaryLinear] = []

    def _tell(self, step: int) -> None:
        done = min(self._trainer.budget.done(step), 1.0)  # the last step of a budget of minutes ends beyond it
        for layer in self._layers:
            layer.set_progress(done)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._layers = [layer for _, layer in binary_layers(self._trainer.model)]
        self._tell(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._tell(state.global_step)
