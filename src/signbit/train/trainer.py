"""The trainer of students: transformers' own, with a teacher beside it, our losses, optimizer and budget."""

from __future__ import annotations

import inspect
import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.data import Dataset, SequentialSampler, Subset
from tqdm import tqdm
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import rotate_checkpoints
from transformers.training_args import OptimizerNames

from signbit.errors import OptionError, StructureError, TrainingError
from signbit.methods.base import check_choice
from signbit.models.structure import find_blocks
from signbit.train.budget import Budget, Schedule
from signbit.train.muon import Muon, Together
from signbit.train.objectives import Head, Objective, attention_distance, hidden_distance, output_loss
from signbit.train.students import Flips, latents

METRICS, STATE = "metrics.jsonl", "signbit.json"
_CHECKPOINT = "checkpoint-"
_UNFINISHED = ".unfinished"


@dataclass(frozen=True)
class TrainOptions:
    """How a student is trained."""

    max_steps: int | None = None
    """Length of the run in optimizer steps."""
    max_minutes: float | None = None
    """Length of the run in minutes of training; the learning rate follows."""
    sequence_length: int = 1024
    """Tokens a sequence."""
    batch_size: int = 8
    """Sequences that one optimizer step sees, over all devices."""
    accumulation: int = 1
    """Parts in which each device takes its sequences of a step, one after another."""
    learning_rate: float = 1e-3
    """Peak learning rate."""
    optim: str = "muon"
    """muon: Muon for the latent matrices, AdamW for everything else; or any optimizer's name that transformers knows."""
    beta1: float = 0.9
    """First momentum of AdamW."""
    beta2: float = 0.95
    """Second momentum of AdamW."""
    weight_decay: float = 0.0
    """Decay of AdamW's parameters."""
    max_grad_norm: float = 1.0
    """Norm to which gradients are cut (with muon those of AdamW's parameters: Muon's updates have a size of their own)."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """What is multiplied in: auto is bfloat16 on a GPU, float32 on a CPU. Latents and optimizers stay float32."""
    compile: bool = False
    """Compile each block by torch.compile."""
    gradient_checkpointing: bool = False
    """Compute each block again in the backward pass instead of keeping what it computed."""
    log_every: int = 10
    """Steps between lines of metrics."""
    save_every: int = 500
    """Steps between checkpoints; there is one at the end too."""
    keep_checkpoints: int = 2
    """Checkpoints that are kept."""
    validation_blocks: int = 16
    """Sequences held out of each source; the loss on them is measured at each checkpoint."""
    seed: int = 0
    """Seed of the data's order and of everything random."""
    report_to: tuple[str, ...] = ()
    """Where else metrics go: tensorboard, trackio, wandb."""

    def __post_init__(self) -> None:
        check_choice("precision", self.precision, ("auto", "float32", "bfloat16"))
        for name, least in (
            ("sequence_length", 2), ("batch_size", 1), ("accumulation", 1), ("log_every", 1), ("save_every", 1),
            ("keep_checkpoints", 1), ("validation_blocks", 0),
        ):  # fmt: skip
            if getattr(self, name) < least:
                raise OptionError(f"--{name.replace('_', '-')} is {getattr(self, name)}; at least {least} is needed")
        if self.learning_rate < 0:
            raise OptionError(f"--learning-rate is {self.learning_rate}; it cannot be negative")
        known = [name.value for name in OptimizerNames]
        if self.optim != "muon" and self.optim not in known:
            raise OptionError(f"--optim is {self.optim!r}; muon and transformers' are allowed: {', '.join(known)}")
        if self.optim == "muon" and not hasattr(torch.optim, "Muon"):
            raise OptionError(f"muon needs torch 2.9 or newer, this is {torch.__version__}; use --optim adamw_torch")


def head_of(model: Any) -> Head:
    """How `model` makes logits of its last hidden states, checked on a few tokens.

    Raises StructureError where its output is something else than a head on those states.
    """
    module, config = model.get_output_embeddings(), model.config.get_text_config()
    if not isinstance(module, nn.Linear):
        raise StructureError(f"{type(model).__name__} has no plain linear output head, which distillation needs")
    multiplier = 1.0
    if getattr(config, "logit_scale", None) is not None:
        multiplier = float(config.logit_scale)
    elif getattr(config, "logits_scaling", None) is not None:
        multiplier = 1 / float(config.logits_scaling)
    head = Head(module.weight, module.bias, multiplier, getattr(config, "final_logit_softcapping", None))
    was_training = model.training
    model.eval()
    with torch.no_grad():
        ids = torch.arange(1, 5, device=module.weight.device)[None]
        output = model(input_ids=ids, output_hidden_states=True, use_cache=False)
        got = head(output.hidden_states[-1][0])
    model.train(was_training)
    want = output.logits[0].float()
    if not bool((got - want).abs().max() <= 0.02 * want.abs().max()):
        raise StructureError(
            f"{type(model).__name__} does not make its logits from its last hidden states in a way that is known here"
        )
    return head


class DistillTrainer(Trainer):
    """transformers' Trainer for a student of binary layers and, if the objective looks at one, a teacher beside it.

    The teacher stands beside the student and is no part of it: it is neither trained nor saved with it.
    """

    def __init__(
        self,
        student: Any,
        teacher: Any | None,
        objective: Objective,
        options: TrainOptions,
        schedule: Schedule,
        budget: Budget,
        data: Dataset,
        validation: Dataset | None,
        out: Path,
    ) -> None:
        if objective.needs_teacher and teacher is None:
            raise OptionError("the objective looks at a teacher, and there is none")
        self.optimizer: Any
        self.lr_scheduler: Any
        self.objective, self.options, self.schedule, self.budget = objective, options, schedule, budget
        self.teacher = teacher
        self.out = out
        self._data = data
        self._parts: dict[str, Tensor] = {}
        self._micro_steps = 0
        on_gpu = torch.cuda.is_available()
        muon = options.optim == "muon"
        #: Blocks and head multiply in bfloat16. Not by the trainer's own setting, with which accelerate turns every output
        #: into float32: all hidden states, here.
        self._halves = options.precision == "bfloat16" or (options.precision == "auto" and on_gpu)
        arguments = TrainingArguments(
            output_dir=str(out),
            max_steps=options.max_steps or _ENDLESS,
            learning_rate=options.learning_rate,
            per_device_train_batch_size=1,  # set below, when the number of processes is known
            gradient_accumulation_steps=options.accumulation,
            adam_beta1=options.beta1,
            adam_beta2=options.beta2,
            weight_decay=options.weight_decay,
            optim="adamw_torch" if muon else options.optim,
            max_grad_norm=0 if muon else options.max_grad_norm,
            **{_CHECKPOINTING: options.gradient_checkpointing},
            logging_steps=options.log_every,
            logging_nan_inf_filter=False,
            save_steps=options.save_every,
            eval_strategy="no" if validation is None else "steps",
            eval_steps=options.save_every,
            save_total_limit=None,  # old checkpoints go when a new one is complete
            seed=options.seed,
            report_to=list(options.report_to) or "none",
            disable_tqdm=True,
            remove_unused_columns=False,
            ignore_data_skip=True,  # the data begins where the checkpoint ended
            use_cpu=not on_gpu,
            ddp_find_unused_parameters=False,
            label_names=[],
        )
        arguments._n_gpu = min(arguments.n_gpu, 1)  # one process a device; never torch's DataParallel
        world = arguments.world_size
        share, rest = divmod(options.batch_size, options.accumulation * world)
        if rest or share < 1:
            raise OptionError(
                f"--batch-size is {options.batch_size}, which {world} devices × {options.accumulation} parts do not divide"
            )
        arguments.per_device_train_batch_size = arguments.per_device_eval_batch_size = share
        super().__init__(student, arguments, train_dataset=data, eval_dataset=validation, data_collator=_stack)
        self.model_accepts_loss_kwargs = False
        #: What divides the work, and over how many processes.
        self.engine = {"kind": self.accelerator.distributed_type.value, "processes": self.accelerator.num_processes}
        _check_engine(self.engine["kind"], options.optim)
        self.head = head_of(student)
        self.teacher_head: Head | None = None
        if teacher is not None:
            teacher.eval().requires_grad_(False)
            self.teacher_head = head_of(teacher)
            if self.teacher_head.weight.shape[0] != self.head.weight.shape[0]:
                raise OptionError(
                    f"the teacher has {self.teacher_head.weight.shape[0]} tokens in its vocabulary and the student "
                    f"{self.head.weight.shape[0]}; they must share one tokenizer"
                )
        if self._halves:
            # The stream that blocks add to is in the dtype that they multiply in; norms still compute in float32.
            student.get_input_embeddings().register_forward_hook(lambda module, given, out: out.bfloat16())
        if options.compile:
            for model in (student, teacher):
                if model is not None:
                    for block in find_blocks(model)[1]:
                        block.forward = torch.compile(block.forward)
        self.flips = Flips(student)
        self.metrics = Metrics(self)
        self.remove_callback(PrinterCallback)
        self.add_callback(self.metrics)

    # What is learnt from.

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The objective on a batch of token ids [B, T]."""
        objective, ids = self.objective, inputs["input_ids"]
        how = {"input_ids": ids, "output_hidden_states": True, "use_cache": False, **_ONE_LOGIT}
        if objective.kd_gamma > 0:
            how["output_attentions"] = True
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=self._halves):
            output = model(**how)
        taught: Any = None
        if self.teacher is not None and objective.needs_teacher:
            with torch.no_grad(), torch.autocast(ids.device.type, enabled=False):
                place = next(self.teacher.parameters()).device
                taught = self.teacher(**{**how, "input_ids": ids.to(place)})
        last = output.hidden_states[-1]
        labels = None
        if objective.kd_alpha < 1:
            labels = torch.full_like(ids, -100)
            labels[:, :-1] = ids[:, 1:]
            labels = labels.reshape(-1)
        kl_weight = objective.kd_alpha * objective.kd_loss_scale
        if objective.kd_reduction == "sequence":
            kl_weight *= ids.shape[1]
        told = taught is not None and kl_weight > 0
        found = output_loss(
            last.reshape(-1, last.shape[-1]), self._head(),
            taught.hidden_states[-1].reshape(-1, taught.hidden_states[-1].shape[-1]).to(last.device) if told else None,
            self.teacher_head if told else None, labels, kl_weight, 1 - objective.kd_alpha, objective,
            dtype=torch.bfloat16 if self._halves else None,
            compiled=self.options.compile,
        )  # fmt: skip
        loss, parts = found.total, {"kl": found.kl, "cross_entropy": found.cross_entropy}
        if objective.kd_beta > 0 and taught is not None:
            ours, theirs = output.hidden_states[:-1], [h.to(last.device) for h in taught.hidden_states[:-1]]
            distance = (_compiled_distance() if self.options.compile else hidden_distance)(list(ours), theirs)
            loss, parts["hidden"] = loss + objective.kd_beta * distance, distance.detach()
        if objective.kd_gamma > 0 and taught is not None:
            distance = attention_distance(output.attentions, [a.to(last.device) for a in taught.attentions])
            loss, parts["attention"] = loss + objective.kd_gamma * distance, distance.detach()
        if model.training:
            self._micro_steps += 1
            for name, value in parts.items():
                self._parts[name] = self._parts.get(name, 0) + value.detach()
        return (loss, parts) if return_outputs else loss

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor, None, None]:
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, inputs).detach(), None, None

    def take_parts(self) -> dict[str, float]:
        """Means of the parts of the loss since they were last taken."""
        count, self._micro_steps = max(self._micro_steps, 1), 0
        parts = {name: float(self.accelerator.reduce(total, "mean")) / count for name, total in self._parts.items()}
        self._parts = {}
        return parts

    def _head(self) -> Head:
        """The student's head with its parameters as they are now; an engine that divides them has put others there."""
        module = self.accelerator.unwrap_model(self.model).get_output_embeddings()
        return self.head._replace(weight=gathered(module.weight), bias=gathered(module.bias))

    # How it is learnt.

    def create_optimizer(self, model: Any = None) -> Any:
        if self.optimizer is None and self.options.optim == "muon":
            matrices = {id(parameter) for parameter in latents(self.model)}
            rest = [p for p in self.model.parameters() if p.requires_grad and id(p) not in matrices]
            options = self.options
            muon = Muon([p for p in latents(self.model) if p.requires_grad], lr=options.learning_rate)
            adam = torch.optim.AdamW(
                rest, lr=options.learning_rate, betas=(options.beta1, options.beta2),
                weight_decay=options.weight_decay, fused=bool(rest) and rest[0].is_cuda,
            )  # fmt: skip
            self.optimizer = Together([muon, adam], options.max_grad_norm)
        return super().create_optimizer(model)

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        if self.lr_scheduler is None:
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                optimizer or self.optimizer, lambda step: self.schedule.factor(self.budget.done(step + 1), step)
            )
        return self.lr_scheduler

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return SequentialSampler(train_dataset if train_dataset is not None else self.train_dataset)  # it is shuffled

    # What is kept.

    def _get_output_dir(self, trial: Any) -> str:
        return str(self.out / _UNFINISHED)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """A checkpoint is complete or absent: it gets its name when all of it is on the disk."""
        staging = self.out / _UNFINISHED
        name = f"{_CHECKPOINT}{self.state.global_step}"
        try:
            if self.args.should_save and staging.exists():
                shutil.rmtree(staging)
            super()._save_checkpoint(model, trial)
            if self.args.should_save:
                state = {"used_s": self.budget.used_s, "step": self.state.global_step}
                (staging / name / STATE).write_text(json.dumps(state))
                for path in (staging / name).iterdir():
                    with path.open("rb") as file:
                        os.fsync(file.fileno())
                if (self.out / name).exists():
                    shutil.rmtree(self.out / name)
                os.replace(staging / name, self.out / name)
                shutil.rmtree(staging, ignore_errors=True)
                rotate_checkpoints(output_dir=str(self.out), save_total_limit=self.options.keep_checkpoints)
        except (OSError, SafetensorError, RuntimeError) as error:
            shutil.rmtree(staging, ignore_errors=True)
            last = last_checkpoint(self.out)
            kept = f"{last} is complete" if last else "there is no earlier one"
            raise TrainingError(
                f"the checkpoint of step {self.state.global_step} could not be written "
                f"({str(error).splitlines()[0]}); {kept}. Free space, then go on with --resume"
            ) from error

    def run(self, checkpoint: Path | None = None) -> None:
        """Trains to the end of the budget, from `checkpoint` on if there is one."""
        seen = 0
        if checkpoint is not None:
            state = json.loads((checkpoint / STATE).read_text())
            seen = state["step"] * self.options.batch_size
            if self.is_world_process_zero():
                self.metrics.forget_after(state["step"])
            self.budget.begin(state["used_s"])
            if self.budget.done(state["step"]) >= 1:
                return
        else:
            self.budget.begin()
        self.train_dataset = Subset(self._data, range(seen, len(self._data)))  # type: ignore[arg-type]
        self.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))


def _check_engine(kind: str, optim: str) -> None:
    """Raises OptionError where the launch asked for another engine than there is, or Muon cannot do its step.

    Accelerate falls back to DDP, in silence, for FSDP on CPUs and for a launch that does not name DeepSpeed.
    """
    for variable, wanted in (("ACCELERATE_USE_FSDP", "FSDP"), ("ACCELERATE_USE_DEEPSPEED", "DEEPSPEED")):
        if os.environ.get(variable, "false").lower() == "true" and kind != wanted:
            raise OptionError(
                f"{wanted} was asked for, but accelerate gives {kind} here (it has no FSDP on CPUs); launch without it, "
                "or on GPUs"
            )
    if kind == "DEEPSPEED" and optim == "muon":
        raise OptionError(
            "muon needs whole matrices, which DeepSpeed keeps in parts; use FSDP2, or --optim adamw_torch"
        )


def gathered(tensor: Any) -> Any:
    """The whole of a tensor that an engine divides over devices; others, and None, as they are."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


#: More steps than any run under a budget of minutes makes.
_ENDLESS = 10_000_000
_CHECKPOINTING = next(
    name
    for name in ("activation_checkpointing", "gradient_checkpointing")
    if name in inspect.signature(TrainingArguments).parameters
)
_ONE_LOGIT = {"logits_to_keep": 1}
_distance: list[Callable[..., Tensor]] = []


def _compiled_distance() -> Callable[..., Tensor]:
    if not _distance:
        _distance.append(torch.compile(hidden_distance))
    return _distance[0]


def _stack(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {"input_ids": torch.stack([row["input_ids"] for row in rows])}


def last_checkpoint(out: Path) -> Path | None:
    """The newest complete checkpoint of a run, or None."""
    found = [path for path in out.glob(f"{_CHECKPOINT}*") if (path / STATE).is_file()]
    return max(found, key=lambda path: int(path.name.removeprefix(_CHECKPOINT)), default=None)


class Metrics(TrainerCallback):
    """Stops at the end of the budget, and writes what is measured: one JSON object a line, and a progress bar.

    What does not depend on the machine's speed comes first in a line and is the same when a run is resumed.
    """

    def __init__(self, trainer: DistillTrainer) -> None:
        self._trainer = trainer
        self._path = trainer.out / METRICS
        self._bar: Any = None
        self._last: tuple[int, float] | None = None
        self._warned = False

    def forget_after(self, step: int) -> None:
        """Takes the lines of steps after `step` away, which will be made again."""
        if self._path.exists():
            lines = [line for line in self._path.read_text().splitlines() if json.loads(line)["step"] <= step]
            self._path.write_text("".join(f"{line}\n" for line in lines))

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        budget = self._trainer.budget
        self._trainer.flips.since()  # from the signs on that a checkpoint brought
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

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
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
        by_layer = trainer.flips.since()
        parts = trainer.take_parts()
        if not all(map(_is_number, (logs["loss"], *parts.values()))):
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
        line |= {"learning_rate": logs["learning_rate"], "flips": trainer.flips.share(by_layer)}
        norm = getattr(trainer.optimizer, "grad_norm", None) if trainer.optimizer is not None else None
        optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
        norm = logs.get("grad_norm", getattr(optimizer, "grad_norm", norm))
        if norm is not None:
            line["grad_norm"] = float(norm)
        line |= {"tokens": state.global_step * tokens, "flips_by_layer": by_layer}
        line |= {"tokens_per_s": rate, "used_s": trainer.budget.used_s}
        logs |= {"flips": line["flips"], "tokens_per_s": rate, **parts}
        if state.is_world_process_zero:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {line['loss']:.4g}, flips {line['flips']:.2%}, {rate:,.0f} tokens/s")
        late = state.global_step >= 5 * trainer.options.log_every
        if late and not self._warned and line["flips"] == 0 and logs["learning_rate"] > 0:
            self._warned = True
            print(
                f"WARNING: not one sign changed in the last {trainer.options.log_every} steps; what is trained will pack to "
                "the start. Raise --learning-rate, or lower --latent-size",
                file=sys.stderr,
            )

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        if metrics and state.is_world_process_zero:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": state.global_step, "validation_loss": metrics["eval_loss"]}) + "\n")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._bar is not None:
            self._bar.close()


def _is_number(value: float) -> bool:
    return value == value and abs(value) != float("inf")
