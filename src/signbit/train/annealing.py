"""Tells layers how far the training is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from signbit.train.students import set_progress

if TYPE_CHECKING:
    from signbit.train.trainer import DistillTrainer


class Annealing(TrainerCallback):
    """Tells every binary layer the share of the budget that is done, as the learning rate's schedule counts it.

    After a step, so that what is then saved, measured and packed is of that share, and the next step learns with it; and
    at the beginning, for a run that goes on. Must come behind what counts the minutes of a budget.
    """

    def __init__(self, trainer: DistillTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        set_progress(self._trainer.model, self._trainer.budget.done(state.global_step))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        set_progress(self._trainer.model, self._trainer.budget.done(state.global_step))
