"""The trainer of students: transformers' own, with a teacher beside it, our losses, optimizer and budget."""

from __future__ import annotations

import functools
import inspect
import math
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.data import Dataset, SequentialSampler
from transformers import Trainer, TrainingArguments
from transformers.integrations import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations
from transformers.trainer_callback import DefaultFlowCallback, PrinterCallback
from transformers.training_args import OptimizerNames

from signbit.errors import OptionError, TrainingError
from signbit.linear import BinaryLinear
from signbit.methods.base import check_choice
from signbit.models.structure import find_blocks
from signbit.train.annealing import Annealing
from signbit.train.budget import Budget, Schedule
from signbit.train.captured import CapturedStep
from signbit.train.checkpoints import (
    METRICS,
    STATE,
    UNFINISHED,
    checkpoints,
    finish_checkpoint,
    last_checkpoint,
    read_json,
    read_metrics,
    remove_checkpoint,
)
from signbit.train.compiling import compiled, compiled_once, repeatable
from signbit.train.divided import divide_, local, whole
from signbit.train.flips import Flips
from signbit.train.metrics import Metrics
from signbit.train.muon import Muon, Together
from signbit.train.objectives import Head, Objective, Top, attention_distance, hidden_distance, output_loss
from signbit.train.outputs import States, head_of, weight_of
from signbit.train.spikes import Unskipped, check_in_a_row, recorded
from signbit.train.students import matrices


@dataclass(frozen=True)
class TrainOptions:
    """How a student is trained."""

    max_steps: int | None = None
    """Length of the run in optimizer steps."""
    max_minutes: float | None = None
    """Length of the run in minutes of training; the learning rate follows."""
    max_passes: float | None = None
    """Length of the run in passes over all of the text (epochs)."""
    sequence_length: int = 1024
    """Tokens a sequence."""
    batch_size: int = 8
    """Sequences that one optimizer step sees, over all devices."""
    accumulation: int = 1
    """Parts in which each device takes its sequences of a step, one after another."""
    learning_rate: float = 1e-3
    """Peak learning rate."""
    optim: str = "muon"
    """muon: Muon for the latent matrices (of a dense model: its blocks' matrices), AdamW for everything else; or any
    optimizer's name that transformers knows."""
    beta1: float = 0.9
    """First momentum of AdamW."""
    beta2: float = 0.95
    """Second momentum of AdamW."""
    weight_decay: float = 0.0
    """Decay of AdamW's parameters."""
    decay_all: bool = False
    """Decay norms and biases too, as FBI-LLM; else they are left out, as transformers has it (muon: all of AdamW's decay)."""
    max_grad_norm: float = 1.0
    """Norm to which gradients are cut (with muon those of AdamW's parameters: Muon's updates have a size of their own)."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """What is multiplied in: auto is bfloat16 on a GPU, float32 on a CPU. Latents and optimizers stay float32."""
    teacher_dtype: Literal["auto", "float32", "bfloat16", "int8"] = "auto"
    """What the teacher is kept in: auto is bfloat16 on a GPU, float32 on a CPU; int8 keeps the linears of its blocks as
    8-bit codes with a scale a row."""
    teacher_device: str | None = None
    """Device of the teacher (cuda:1, cpu) if it is not to be the student's."""
    teacher_sharded: bool = False
    """Divide the teacher's blocks over all processes, each gathered while it computes (FSDP2), whatever divides the student."""
    compile: bool = False
    """Compile each block by torch.compile."""
    cuda_graph: bool = False
    """Capture forward and backward pass in one CUDA graph (one GPU, no accumulation): a small model's kernels are shorter
    than what Python takes to launch them."""
    deterministic: bool = False
    """Only algorithms that give the same bits each time, some of them slower: a resumed run on a GPU then gives the metrics
    of one that was never stopped, to the last digit, as on a CPU it always does."""
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
    spike: float | None = None
    """How many times the usual loss (the median of the last 20 lines) is a spike: the run goes back to its last checkpoint
    and leaves out the chunk of data behind it, which is what the steps up to the next checkpoint see. Default: none is."""
    skip_chunks: tuple[int, ...] = ()
    """Chunks of data to leave out, by number: the first --save-every steps see chunk 0, the next chunk 1, and so on. May be
    named with --resume too, which then goes back to before them."""
    seed: int = 0
    """Seed of the data's order and of everything random."""
    report_to: tuple[str, ...] = ()
    """Where else metrics go: tensorboard, trackio, wandb."""

    def __post_init__(self) -> None:
        check_choice("precision", self.precision, ("auto", "float32", "bfloat16"))
        check_choice("teacher_dtype", self.teacher_dtype, ("auto", "float32", "bfloat16", "int8"))
        for name, least in (
            ("sequence_length", 2), ("batch_size", 1), ("accumulation", 1), ("log_every", 1), ("save_every", 1),
            ("keep_checkpoints", 1), ("validation_blocks", 0),
        ):  # fmt: skip
            if getattr(self, name) < least:
                raise OptionError(f"--{name.replace('_', '-')} is {getattr(self, name)}; at least {least} is needed")
        if self.spike is not None and not self.spike > 1:
            raise OptionError(f"--spike is {self.spike}; it is a multiple of the usual loss, above 1 (1.5)")
        if any(chunk < 0 for chunk in self.skip_chunks) or len(set(self.skip_chunks)) < len(self.skip_chunks):
            raise OptionError(
                f"--skip-chunks is {' '.join(map(str, self.skip_chunks))}; each chunk is named once, by its number from 0"
            )
        for name in ("learning_rate", "weight_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise OptionError(
                    f"--{name.replace('_', '-')} is {getattr(self, name)}; a number of 0 or more is needed"
                )
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise OptionError(
                    f"--{name.replace('_', '-')} is {getattr(self, name)}; it is a share, from 0 to below 1"
                )
        if not self.max_grad_norm >= 0:
            raise OptionError(f"--max-grad-norm is {self.max_grad_norm}; it is a norm, or 0 to cut nothing")
        known = [name.value for name in OptimizerNames]
        if self.optim != "muon" and self.optim not in known:
            raise OptionError(f"--optim is {self.optim!r}; muon and transformers' are allowed: {', '.join(known)}")
        if self.cuda_graph and (self.accumulation > 1 or self.gradient_checkpointing):
            raise OptionError(
                "--cuda-graph goes with neither --accumulation nor --gradient-checkpointing; leave it out"
            )
        if self.cuda_graph and not torch.cuda.is_available():
            raise OptionError("--cuda-graph needs a CUDA device, and there is none here; leave it out")
        if self.teacher_sharded and (self.teacher_dtype == "int8" or self.teacher_device is not None):
            raise OptionError(
                "--teacher-sharded divides floating-point weights over the processes' own devices; leave out --teacher-device "
                "and --teacher-dtype int8, or leave out --teacher-sharded"
            )
        if self.optim == "muon" and not hasattr(torch.optim, "Muon"):
            raise OptionError(f"muon needs torch 2.9 or newer, this is {torch.__version__}; use --optim adamw_torch")
        for name in self.report_to:
            if name not in ("none", *INTEGRATION_TO_CALLBACK):
                raise OptionError(
                    f"--report-to is {name!r}; tensorboard, trackio and wandb are allowed, and what else transformers "
                    f"reports to: {', '.join(INTEGRATION_TO_CALLBACK)}"
                )
            if name != "none" and name not in get_available_reporting_integrations():
                raise OptionError(f"--report-to {name} needs a package that is not installed: pip install {name}")

    def check_alone(self, instead: str) -> None:
        """Raises OptionError for what says how a teacher stands beside the student; `instead` is why none does."""
        if self.teacher_dtype != "auto" or self.teacher_device is not None or self.teacher_sharded:
            raise OptionError(
                "--teacher-dtype, --teacher-device and --teacher-sharded are for a teacher beside the student; leave them "
                f"out, or {instead}"
            )

    def check_top(self) -> None:
        """Raises OptionError for what does not go with a teacher's likeliest tokens in its place."""
        self.check_alone("leave out --teacher-logits")
        if self.cuda_graph:
            raise OptionError(
                "--cuda-graph gives its step token ids alone, and not the teacher's logits; leave it out, or leave out "
                "--teacher-logits"
            )


class DistillTrainer(Trainer):
    """transformers' Trainer for a student of binary layers and, if the objective looks at one, a teacher beside it.

    The teacher stands beside the student and is no part of it: it is neither trained nor saved with it. In its place
    each item of the data may hold its likeliest tokens (top_ids, top_log_p [T, K]), of a vocabulary of `top_vocabulary`.
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
        top_vocabulary: int | None = None,
    ) -> None:
        if top_vocabulary is not None:
            objective.check_top()
            options.check_top()
        elif objective.needs_teacher and teacher is None:
            raise OptionError("the objective looks at a teacher, and there is none")
        self.optimizer: Any
        self.lr_scheduler: Any
        self.objective, self.options, self.schedule, self.budget = objective, options, schedule, budget
        self.teacher, self._taught_by_top = teacher, top_vocabulary is not None
        self.out = out
        self._data = data
        self._parts: dict[str, Tensor] = {}
        self._micro_steps = 0
        self._random_state_of: str | None = None
        self._captured: CapturedStep | None = None
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
            accelerator_config={"non_blocking": True},
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
        self._held_out = torch.zeros(2, device=self.args.device)
        self.model_accepts_loss_kwargs = False
        #: What divides the work, and over how many processes.
        self.engine = {"kind": self.accelerator.distributed_type.value, "processes": self.accelerator.num_processes}
        trains_head = any(
            e is not None and e.weight.requires_grad
            for e in (student.get_input_embeddings(), student.get_output_embeddings())
        )
        _check_engine(self.engine["kind"], options.optim, trains_head)
        self._adapted = bool(getattr(student, "_hf_peft_config_loaded", False))
        if self._adapted and self.engine["kind"] in ("FSDP", "DEEPSPEED"):
            raise OptionError(f"adapters beside packed layers train on one GPU or under DDP, not {self.engine['kind']}")
        if options.cuda_graph and self.engine["processes"] > 1:
            raise OptionError(
                f"--cuda-graph is for one GPU, and this launch has {self.engine['processes']}; leave it out"
            )
        for who, model in (("student", student), ("teacher", teacher)):
            if model is not None:
                _check_positions(who, model, options.sequence_length)
        if teacher is not None:
            _check_layers(student, teacher, objective)
        binary_head = isinstance(student.get_output_embeddings(), BinaryLinear)
        if binary_head and self.engine["kind"] in ("FSDP", "DEEPSPEED"):
            raise OptionError(
                f"--head binary needs the whole head, which {self.engine['kind']} keeps in parts; leave it out"
            )
        self._states, self._taught = States(student), None if teacher is None else States(teacher)
        self.head = head_of(student, self._states)
        self.teacher_head: Head | None = None
        if teacher is not None:
            teacher.eval().requires_grad_(False)
            self._teacher_device = next(teacher.parameters()).device
            if options.cuda_graph and self._teacher_device != self.args.device:
                raise OptionError("--cuda-graph needs the teacher on the student's device; leave out --teacher-device")
            assert self._taught is not None
            told = head_of(teacher, self._taught)
            here = self.args.device
            bias = None if told.bias is None else told.bias.to(here)
            self.teacher_head = told._replace(weight=told.weight.to(here), bias=bias)
            if options.teacher_sharded:
                if self.engine["processes"] == 1:
                    raise OptionError(
                        "--teacher-sharded is for several processes, and this launch has one; leave it out"
                    )
                divide_(find_blocks(teacher)[1])
        theirs = top_vocabulary if self.teacher_head is None else self.teacher_head.weight.shape[0]
        if theirs not in (None, self.head.weight.shape[0]):
            raise OptionError(
                f"the teacher has {theirs} tokens in its vocabulary and the student {self.head.weight.shape[0]}; they must "
                "share one tokenizer"
            )
        if self._halves:
            # The stream that blocks add to is in the dtype that they multiply in; norms still compute in float32.
            student.get_input_embeddings().register_forward_hook(lambda module, given, out: out.bfloat16())
        if options.compile:
            for model in (student, teacher):
                if model is not None:
                    for block in find_blocks(model)[1]:
                        block.forward = compiled(block.forward)
        #: Chunks of data that are left out.
        self.skipped = set(options.skip_chunks)
        self.flips = Flips(student)
        self.metrics = Metrics(self)
        self.remove_callback(PrinterCallback)
        # Behind what says when there is a line, before those who report it (--report-to) and so see what it adds.
        told = self.callback_handler.callbacks
        place = 1 + [isinstance(one, DefaultFlowCallback) for one in told].index(True)
        told[place:place] = [self.metrics, Annealing(self)]

    # What is learnt from.

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The objective on a batch of token ids [B, T], and of the teacher's likeliest tokens if it is taught by those."""
        weight = self.objective.hidden_weight(self.budget.done(self.state.global_step))
        top = Top(inputs["top_ids"], inputs["top_log_p"]) if self._taught_by_top else None
        loss, parts = self._losses(model, inputs["input_ids"], weight, top, inputs.get("learnt"))
        if model.training:
            self._note(parts)
        return (loss, parts) if return_outputs else loss

    def _losses(
        self,
        model: nn.Module,
        ids: Tensor,
        hidden_weight: float | Tensor,
        top: Top | None = None,
        learnt: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss with its gradient, and its parts without; `learnt` bool [B, T] says which tokens are predicted."""
        objective = self.objective
        how = {"input_ids": ids, "use_cache": False, **_ONE_LOGIT}
        if objective.kd_gamma > 0:
            how["output_attentions"] = True
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=self._halves), self._states.listening():
            output = model(**how)
        # Of held-out text a process may have been given sequences twice; the loss is that of the others.
        rows = len(ids) if model.training else max(self._counted(len(ids)), 1)
        ours, last = self._states.take()
        ours, last = [state[:rows] for state in ours], last[:rows]
        told: list[Tensor] = []
        taught = taught_last = None
        if self._taught is not None and self.teacher is not None and objective.needs_teacher:
            with torch.no_grad(), self._taught.listening():
                taught = self.teacher(**{**how, "input_ids": ids.to(self._teacher_device)})
            told, taught_last = self._taught.take()
            told = [state[:rows].to(ids.device) for state in told]
            taught_last = taught_last[:rows].reshape(-1, taught_last.shape[-1]).to(ids.device)
        labels = None
        if objective.kd_alpha < 1 or not model.training:  # on held-out text runs of all objectives are compared by it
            labels = torch.full_like(ids[:rows], -100)
            labels[:, :-1] = ids[:rows, 1:]
            if learnt is not None:
                labels[:, :-1].masked_fill_(~learnt[:rows, 1:], -100)
            labels = labels.reshape(-1)
        kl_weight = objective.kd_alpha * objective.kd_loss_scale
        if objective.kd_reduction == "sequence":
            kl_weight *= ids.shape[1]
        found = output_loss(
            last.reshape(-1, last.shape[-1]), self._head(), taught_last if kl_weight > 0 else None,
            self.teacher_head if kl_weight > 0 and taught is not None else None, labels, kl_weight,
            1 - objective.kd_alpha, objective, dtype=torch.bfloat16 if self._halves else None,
            compiled=self.options.compile, top=None if top is None else Top(*(part[:rows].flatten(0, 1) for part in top)),
        )  # fmt: skip
        loss, parts = found.total, {"kl": found.kl, "cross_entropy": found.cross_entropy}
        if objective.looks_at_hidden and taught is not None:
            distance = (compiled_once(hidden_distance) if self.options.compile else hidden_distance)(ours, told)
            loss, parts["hidden"] = loss + hidden_weight * distance, distance
        if objective.kd_gamma > 0 and taught is not None:
            pairs = ([part[:rows].to(ids.device) for part in one.attentions] for one in (output, taught))
            distance = attention_distance(*pairs)
            loss, parts["attention"] = loss + objective.kd_gamma * distance, distance
        return loss, {name: value.detach() for name, value in parts.items()}

    def _note(self, parts: dict[str, Tensor]) -> None:
        self._micro_steps += 1
        for name, value in parts.items():
            self._parts[name] = self._parts.get(name, 0) + value

    def _load_rng_state(self, checkpoint: str | None) -> None:
        # Before the first step and not now: the loader of the data, which is made in between, draws a number.
        self._random_state_of = checkpoint

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        if self._random_state_of is not None:
            super()._load_rng_state(self._random_state_of)
            self._random_state_of = None
        if not self.options.cuda_graph:
            loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
            return loss
        model.train()
        ids = self._prepare_inputs(inputs)["input_ids"]
        if self._captured is None:
            self._captured = CapturedStep(functools.partial(self._losses, model), model.parameters(), ids)
        weight = self.objective.hidden_weight(self.budget.done(self.state.global_step))
        loss, parts = self._captured(ids, weight)
        self._note(parts)
        return loss

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor, None, None]:
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, parts = self.compute_loss(model, inputs, return_outputs=True)
        ids, learnt = inputs["input_ids"], inputs.get("learnt")
        sequences = self._counted(len(ids))
        count = sequences * (ids.shape[1] - 1) if learnt is None else learnt[:sequences, 1:].sum().item()
        self._held_out = self._held_out + torch.stack([count * parts["cross_entropy"], loss.new_tensor(count)])
        return loss.detach(), None, None

    def _counted(self, sequences: int) -> int:
        """How many of a process's held-out sequences count: accelerate fills up the last ones with the first again."""
        state = self.accelerator.gradient_state
        if not state.end_of_dataloader or state.remainder <= 0:
            return sequences
        left: int = state.remainder - self.accelerator.process_index * sequences
        return min(max(left, 0), sequences)

    def take_held_out(self) -> float:
        """Mean cross-entropy over the tokens that were predicted of held-out text since it was last taken."""
        total, count = self.accelerator.reduce(self._held_out, "sum").tolist()
        self._held_out = torch.zeros(2, device=self.args.device)
        return float(total / count)

    def take_parts(self) -> dict[str, float]:
        """Means of the parts of the loss since they were last taken."""
        count, self._micro_steps = max(self._micro_steps, 1), 0
        parts = {name: float(self.accelerator.reduce(total, "mean")) / count for name, total in self._parts.items()}
        self._parts = {}
        return parts

    def _head(self) -> Head:
        """The student's head with its parameters as they are now; an engine that divides them has put others there."""
        module = self.accelerator.unwrap_model(self.model).get_output_embeddings()
        return self.head._replace(weight=whole(weight_of(module)), bias=whole(module.bias))

    # How it is learnt.

    def create_optimizer(self, model: Any = None) -> Any:
        if self.optimizer is None and self.options.optim == "muon":
            self.optimizer = muon_beside_adam(self.model, self.options)
        try:
            return super().create_optimizer(model)
        except (ImportError, ValueError) as error:
            raise OptionError(
                f"--optim {self.options.optim} cannot be had here ({str(error).strip().splitlines()[0]}); muon and adamw_torch "
                "need no more than torch"
            ) from error

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        if self.options.decay_all:
            return [name for name, _ in model.named_parameters()]
        names: list[str] = super().get_decay_parameter_names(model)
        return names

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        if self.lr_scheduler is None:
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                optimizer or self.optimizer, lambda step: self.schedule.factor(self.budget.done(step + 1), step)
            )
        return self.lr_scheduler

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return SequentialSampler(train_dataset if train_dataset is not None else self.train_dataset)  # it is shuffled

    def check_wrapped(self) -> None:
        """Raises TrainingError if what stands around the student is not what the launch asked for; called before step 1."""
        kind, model = self.engine["kind"], self.model_wrapped
        names = {type(model).__name__, *(base.__name__ for base in type(model).__mro__)}
        expected = {"FSDP": "FSDPModule", "DEEPSPEED": "DeepSpeedEngine"}.get(
            kind, "DistributedDataParallel" if self.engine["processes"] > 1 else None
        )
        if expected is not None and expected not in names:
            raise TrainingError(f"accelerate was to give {expected} for {kind}, and gave {type(model).__name__}")

    # What is kept.

    def _get_output_dir(self, trial: Any) -> str:
        return str(self.out / UNFINISHED)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """A checkpoint is complete or absent: it gets its name when all of it is on the disk."""
        step, last = self.state.global_step, last_checkpoint(self.out)
        if not all(bool(torch.isfinite(local(p)).all()) for p in self.model.parameters() if p.requires_grad):
            kept = f"{last} is the last good checkpoint" if last else "there is no checkpoint yet"
            raise TrainingError(f"after step {step} a parameter is no number; {kept}. Lower --learning-rate")
        try:
            if self.args.should_save and (self.out / UNFINISHED).exists():
                shutil.rmtree(self.out / UNFINISHED)
            self.accelerator.wait_for_everyone()
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                finish_checkpoint(
                    self.out, step, {"used_s": self.budget.used_s, "step": step, "skipped": sorted(self.skipped)}
                )
                for path in checkpoints(self.out)[self.options.keep_checkpoints :]:
                    remove_checkpoint(path)
        except (OSError, SafetensorError, RuntimeError) as error:
            shutil.rmtree(self.out / UNFINISHED, ignore_errors=True)
            kept = f"{last} is complete" if last else "there is no earlier one"
            raise TrainingError(
                f"the checkpoint of step {step} could not be written ({str(error).splitlines()[0]}); {kept}. Free space, then "
                "go on with --resume"
            ) from error

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if not self._adapted:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        from signbit.models.lora import fill_adapter

        fill_adapter(self.model if model is None else model, resume_from_checkpoint)

    def run(self, checkpoint: Path | None = None) -> None:
        """Trains to the end of the budget, from `checkpoint` on if there is one; goes back where the loss spikes.

        Raises TrainingError if it spikes behind one checkpoint again and again, or under FSDP or DeepSpeed.
        """
        state: dict[str, Any] = {"step": 0, "used_s": 0.0} if checkpoint is None else read_json(checkpoint / STATE)
        if self.is_world_process_zero():
            self._forget_after(checkpoint, state["step"])
        self.budget.begin(state["used_s"])
        if self.budget.done(state["step"]) >= 1:
            return
        self._train_from(checkpoint, state["step"])
        while (spike := self.metrics.spike) is not None:
            checkpoint = last_checkpoint(self.out)
            assert checkpoint is not None
            if self.engine["kind"] in ("FSDP", "DEEPSPEED"):  # which wrap model and optimizer once only
                raise TrainingError(
                    f"the loss spiked at step {spike.step}. Go on with --resume, which leaves out chunk "
                    f"{spike.skipped_chunk} behind {checkpoint}; under {self.engine['kind']} a run does not go back by itself"
                )
            self._train_from(checkpoint, read_json(checkpoint / STATE)["step"])

    def _forget_after(self, checkpoint: Path | None, step: int) -> None:
        """Takes away what an earlier run left that was made after the checkpoint to go on with."""
        for path in checkpoints(self.out):
            if path == checkpoint:
                break
            print(f"note: {path} has learnt from a chunk that is skipped now, and is removed", file=sys.stderr)
            remove_checkpoint(path)
        self.metrics.forget_after(step)

    def _train_from(self, checkpoint: Path | None, step: int) -> None:
        self.accelerator.wait_for_everyone()  # the first process may have written metrics
        path = self.out / METRICS
        lines = read_metrics(path) if path.exists() else []
        check_in_a_row(lines, step)
        self.skipped = {*self.options.skip_chunks, *recorded(lines)}
        self.metrics.remember(lines)
        size = self.options.save_every * self.options.batch_size
        self.train_dataset = Unskipped(self._data, step * self.options.batch_size, size, self.skipped)
        with repeatable(self.options.deterministic):
            self.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))


def muon_beside_adam(model: nn.Module, options: TrainOptions) -> Together:
    """Muon for the matrices of `model`, AdamW for what else is trained."""
    some = [p for p in matrices(model) if p.requires_grad]
    chosen = {id(parameter) for parameter in some}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in chosen]
    adam = torch.optim.AdamW(
        rest, lr=options.learning_rate, betas=(options.beta1, options.beta2), weight_decay=options.weight_decay,
        fused=bool(rest) and rest[0].is_cuda,
    )  # fmt: skip
    muon = [Muon(some, lr=options.learning_rate)] if some else []
    return Together([*muon, adam], options.max_grad_norm)


def _check_engine(kind: str, optim: str, trains_head: bool) -> None:
    """Raises OptionError where the launch asked for another engine than there is, or for what an engine cannot do.

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
    if kind == "DEEPSPEED" and trains_head:
        raise OptionError(
            "training embeddings needs the whole head, which DeepSpeed keeps in parts; use FSDP2, or --no-train-embeddings"
        )


def _check_positions(who: str, model: Any, length: int) -> None:
    """Raises OptionError for sequences of more tokens than a model has learned positions; others are only told of."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is None or length <= limit:
        return
    words = model.get_input_embeddings()
    if any(isinstance(module, nn.Embedding) and module is not words for module in model.modules()):
        raise OptionError(
            f"the {who} has {limit} positions, and --sequence-length is {length}; give --sequence-length {limit} or less"
        )
    print(f"note: the {who} was made for {limit} positions, and --sequence-length is {length}", file=sys.stderr)


def _check_layers(student: Any, teacher: Any, objective: Objective) -> None:
    """Raises OptionError where the objective compares layers that the other model has not."""

    def sizes(model: Any, *names: str) -> tuple[int, ...]:
        return (len(find_blocks(model)[1]), *(getattr(model.config.get_text_config(), name) for name in names))

    for flag, wanted, what, name in (
        ("--kd-beta", objective.looks_at_hidden, "hidden states", "hidden_size"),
        ("--kd-gamma", objective.kd_gamma > 0, "attentions", "num_attention_heads"),
    ):
        if wanted and (ours := sizes(student, name)) != (theirs := sizes(teacher, name)):
            raise OptionError(
                f"{flag} compares {what} layer by layer: the teacher has {theirs[0]} layers of {name} {theirs[1]}, the "
                f"student {ours[0]} of {ours[1]}; leave it out, or give them one shape"
            )


#: More steps than any run under a budget of minutes makes.
_ENDLESS = 10_000_000
_CHECKPOINTING = next(
    name
    for name in ("activation_checkpointing", "gradient_checkpointing")
    if name in inspect.signature(TrainingArguments).parameters
)
_ONE_LOGIT = {"logits_to_keep": 1}


def _stack(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
