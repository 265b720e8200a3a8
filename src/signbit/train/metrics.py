"""What is measured while a student is trained: a line of JSON now and then, and a progress bar."""

from __future__ import annotations

import json
import math
import sys
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from accelerate.utils import broadcast_object_list
from tqdm import tqdm
from transformers import TrainerCallback

from signbit.errors import TrainingError
from signbit.train.checkpoints import METRICS, STATE, last_checkpoint, read_json, read_metrics, write_whole
from signbit.train.spikes import Spike, chunk_at, usual_loss
from signbit.train.students import latents

if TYPE_CHECKING:
    from signbit.train.trainer import DistillTrainer


class Metrics(TrainerCallback):
    """Stops at the end of the budget, and writes what is measured: one JSON object a line, and a progress bar.

    What does not depend on the machine's speed comes first in a line and is the same when a run is resumed.
    """

    def __init__(self, trainer: DistillTrainer) -> None:
        self._trainer = trainer
        self._path = trainer.out / METRICS
        self._bar: Any = None
        self._last: tuple[int, float] | None = None
        self._warned = self._looked = self._stepped = False
        self._losses: list[float] = []
        #: Why the run has stopped, if it is to go back.
        self.spike: Spike | None = None

    def forget_after(self, step: int) -> None:
        """Takes the lines of steps after `step` away, which will be made again."""
        if self._path.exists():
            lines = [line for line in read_metrics(self._path) if line["step"] <= step]
            write_whole(self._path, "".join(f"{json.dumps(line)}\n" for line in lines))

    def remember(self, lines: list[dict[str, Any]]) -> None:
        """Begins with the lines that there are, against whose losses new ones are held."""
        self._losses = [line["loss"] for line in lines if "loss" in line]
        self.spike = None

    def _go_back(self, step: int, loss: float | None, control: Any) -> bool:
        """Stops and writes of it if the loss of `step` (None: no number) is a spike for which the run can go back."""
        trainer, factor, usual = self._trainer, self._trainer.options.spike, usual_loss(self._losses)
        if factor is None or (loss is not None and (usual is None or loss <= factor * usual)):
            return False
        told = f"the loss spiked at step {step} ({'no number' if loss is None else f'{loss:.4g}'}"
        told += ")" if usual is None else f", usually {usual:.4g})"
        last = last_checkpoint(trainer.out)
        if last is None:
            print(f"WARNING: {told}, and there is no checkpoint to go back to", file=sys.stderr)
            return False
        begin = read_json(last / STATE)["step"]
        chunk = chunk_at(begin // trainer.options.save_every, trainer.skipped)
        self.spike = Spike(step, loss, usual, chunk)
        control.should_training_stop, control.should_save, control.should_evaluate = True, False, False
        if trainer.is_world_process_zero():
            self.forget_after(begin)
            self._write({"step": begin, "spike": asdict(self.spike)})
            print(f"\nWARNING: {told}; back to {last}, without chunk {chunk} of the data", file=sys.stderr)
        return True

    def _write(self, line: dict[str, Any]) -> None:
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            last = last_checkpoint(self._trainer.out)
            kept = f"{last} is the last good checkpoint" if last else "there is no checkpoint yet"
            raise TrainingError(
                f"{self._path} could not be written ({error.strerror}); {kept}. Free space, then go on with --resume"
            ) from error

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        budget = self._trainer.budget
        self._trainer.check_wrapped()
        self._trainer.flips.begin()  # from the signs on that a checkpoint brought
        self._last = (state.global_step, time.monotonic())
        if state.is_world_process_zero:
            total = budget.max_steps if budget.max_minutes is None else round(60 * budget.max_minutes)
            unit = "step" if budget.max_minutes is None else "s"
            self._bar = tqdm(total=total, unit=unit, file=sys.stderr, disable=None, initial=self._done(state))
            self._bar.set_description("training")

    def _done(self, state: Any) -> int:
        budget = self._trainer.budget
        if budget.max_minutes is None:
            return int(state.global_step)
        return min(round(budget.used_s), round(60 * budget.max_minutes))

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ends a run at its first step if nothing reaches the latents, whose signs would never change."""
        if self._looked or self._trainer.engine["kind"] == "DEEPSPEED":  # which has taken the gradients away by then
            return
        self._looked = True
        matrices = [parameter for parameter in latents(self._trainer.model) if parameter.requires_grad]
        if matrices and not any(p.grad is not None and bool((p.grad != 0).any()) for p in matrices):
            raise TrainingError(
                "no gradient reaches the latent matrices, so that no sign would ever change; without --compile it may "
                "(torch 2.11 loses gradients of compiled autograd functions), or the loss looks at nothing"
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        budget = self._trainer.budget
        self._trainer.flips.step()
        if not self._stepped:
            # What torch.compile takes at the first step is not training.
            self._stepped = True
            budget.begin(budget.before_s)
            self._last = (state.global_step, time.monotonic())
        used = [budget.measured_s()]
        if self._trainer.accelerator.num_processes > 1:
            broadcast_object_list(used)  # all go by one clock, or they would not stop together
        budget.used_s = used[0]
        if self._trainer.budget.done(state.global_step) >= 1:
            control.should_training_stop = control.should_save = True
            control.should_evaluate = self._trainer.eval_dataset is not None
        if control.should_save:
            control.should_log = True  # so that the means begin anew there, resumed or not
        if self._bar is not None:
            self._bar.update(self._done(state) - self._bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if not logs or "loss" not in logs:
            return
        trainer, now = self._trainer, time.monotonic()
        flip_steps, by_layer = trainer.flips.steps, trainer.flips.take()
        parts = trainer.take_parts()
        finite = all(map(math.isfinite, (logs["loss"], *parts.values())))
        if self._go_back(state.global_step, logs["loss"] if finite else None, control):
            return
        if not finite:
            last = last_checkpoint(trainer.out)
            kept = f"{last} is the last good checkpoint" if last else "there is no checkpoint yet"
            raise TrainingError(
                f"the loss of step {state.global_step} is no number; {kept}. Lower --learning-rate or --kd-gamma, then go "
                "on with --resume"
            )
        step, began = self._last or (0, now)
        tokens = trainer.options.batch_size * trainer.options.sequence_length
        rate = (state.global_step - step) * tokens / max(now - began, 1e-9)
        self._last = (state.global_step, now)
        line: dict[str, Any] = {"step": state.global_step, "loss": logs["loss"], **parts}
        line["learning_rate"] = logs["learning_rate"]
        if by_layer:
            line["flips"] = logs["flips"] = trainer.flips.share(by_layer)
            line["flip_steps"] = flip_steps
        norm = getattr(trainer.optimizer, "grad_norm", None) if trainer.optimizer is not None else None
        optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
        norm = logs.get("grad_norm", getattr(optimizer, "grad_norm", norm))
        if norm is not None:
            line["grad_norm"] = float(norm)
        line["tokens"] = state.global_step * tokens
        if by_layer:
            line["flips_by_layer"] = by_layer
        line |= {"tokens_per_s": rate, "used_s": trainer.budget.used_s}
        logs |= {"tokens_per_s": rate, **parts}
        if state.is_world_process_zero:
            self._write(line)
        self._losses.append(logs["loss"])
        if self._bar is not None:
            flips = f", flips {line['flips']:.2%}" if by_layer else ""
            self._bar.set_postfix_str(f"loss {line['loss']:.4g}{flips}, {rate:,.0f} tokens/s")
        late = state.global_step >= 5 * trainer.options.log_every
        learns = logs["learning_rate"] > 0 and any(latent.requires_grad for latent in latents(trainer.model))
        if late and learns and not self._warned and line["flips"] == 0:
            self._warned = True
            print(
                f"WARNING: not one sign changed in the last {trainer.options.log_every} steps; what is trained will pack to "
                "the start. Raise --learning-rate, or give smaller latents to start from",
                file=sys.stderr,
            )

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        if not metrics:
            return
        line = {"validation_loss": metrics["eval_loss"], "validation_cross_entropy": self._trainer.take_held_out()}
        if state.is_world_process_zero:
            self._write({"step": state.global_step, **line})

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._bar is not None:
            self._bar.close()
