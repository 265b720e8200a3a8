"""Tokens per second and most memory of training binary students beside the dense model, on one GPU.

    python -m benchmarks.train --json train.json             # from scratch: FBI-LLM and BitNet beside the dense model
    python -m benchmarks.train MODEL --json train.json       # and distilling MODEL (SmolLM2-135M-Instruct, say) beside
                                                             # fine-tuning it; --profile: what kernels take

All are whole optimizer steps on the same random token blocks. From scratch: one trainer, shape (--recipe), optimizer (Muon)
and loss (the next token's) for all three. Distilling: the student's step with the teacher's forward pass, the loss on hidden
states and Muon; fine-tuning with AdamW on the next token's cross-entropy by transformers' own loss. Nothing is timed unless
signs flipped and the loss fell.
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from benchmarks.rows import Row, show
from signbit.methods import METHODS
from signbit.models import Shape
from signbit.models.structure import find_blocks
from signbit.ptq import Plan
from signbit.train import (
    METRICS,
    Budget,
    DistillTrainer,
    Objective,
    Schedule,
    Trained,
    TrainOptions,
    start_dense_,
    start_training_,
)
from signbit.train.recipe import read_recipe


def blocks(count: int, length: int, vocabulary: int) -> list[dict[str, torch.Tensor]]:
    """Some tokens are likelier than others, so that there is something to learn."""
    generator = torch.Generator().manual_seed(0)
    ids = (torch.rand(count, length, generator=generator) ** 4 * vocabulary).long()
    return [{"input_ids": row} for row in ids]


def whole_steps(
    args: argparse.Namespace, student: Any, teacher: Any, objective: Objective, profiled: bool = False
) -> tuple[float, float]:
    """Tokens per second in the middle half of the steps, and the most memory in GB."""
    data = blocks(args.steps * args.batch, args.length, student.config.vocab_size)
    options = TrainOptions(
        max_steps=args.steps, sequence_length=args.length, batch_size=args.batch, log_every=args.steps // 4,
        save_every=10**6, compile=True, cuda_graph=True, validation_blocks=0,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        trainer: Any = DistillTrainer(
            student, teacher, objective, options, Schedule(), Budget(args.steps, None), data, None, Path(folder)
        )
        trainer._save_checkpoint = lambda *rest: None
        if profiled:
            trainer.add_callback(_profiling(args.steps - 5))
        torch.cuda.reset_peak_memory_stats()
        trainer.run()
        # The first quarter compiles; the profiler starts in the last one.
        first, second, third, last = (json.loads(x) for x in (Path(folder) / METRICS).read_text().splitlines()[:4])
    if not (last.get("flips", 1) > 0 and last["loss"] < first["loss"]):
        raise SystemExit(f"the student does not learn ({first['loss']} → {last['loss']}, {last.get('flips')} flips)")
    return 2 / (1 / second["tokens_per_s"] + 1 / third["tokens_per_s"]), torch.cuda.max_memory_allocated() / 1e9


def pretraining(args: argparse.Namespace, method: str | None, **options: Any) -> tuple[float, float]:
    """The same from random weights, without a teacher; of the dense model where there is no method."""
    torch.manual_seed(0)
    recipe = read_recipe(args.recipe)
    student = AutoModelForCausalLM.from_config(Shape(**recipe["shape"]).config(recipe["vocabulary"])).float().cuda()
    trained = Trained(train_embeddings=True)
    if method is None:
        start_dense_(student, trained)
    else:
        start_training_(student, METHODS[method], Plan(METHODS[method].options(**options)), trained)
    return whole_steps(args, student, None, Objective(kd_alpha=0.0))


def distilling(args: argparse.Namespace) -> tuple[float, float]:
    """The same of a student beside its teacher."""
    student = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).cuda()
    teacher = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16).cuda()
    start_training_(student, METHODS["onebit"], Plan(METHODS["onebit"].options()), Trained())
    return whole_steps(args, student, teacher, Objective(kd_beta=0.5), args.profile)


def _profiling(step: int) -> Any:
    from transformers import TrainerCallback

    class Profiling(TrainerCallback):
        """Prints what the kernels of the last steps take."""

        profile: Any = None

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == step:
                self.profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
                self.profile.__enter__()

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            torch.cuda.synchronize()
            self.profile.__exit__(None, None, None)
            events = self.profile.key_averages()
            total = sum(event.self_device_time_total for event in events)
            print(f"kernels of the last steps, {total / 1e3:.0f} ms:")
            for event in sorted(events, key=lambda e: -e.self_device_time_total)[:25]:
                print(f"{event.self_device_time_total / total:6.1%} {event.count:6} × {event.key[:110]}", flush=True)

    return Profiling()


def fine_tuning(args: argparse.Namespace) -> tuple[float, float]:
    """The same of a plain training step of the dense model."""
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).cuda().train()
    for block in find_blocks(model)[1]:
        block.forward = torch.compile(block.forward)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    data = torch.stack([row["input_ids"] for row in blocks(args.batch, args.length, model.config.vocab_size)]).cuda()
    torch.cuda.reset_peak_memory_stats()
    began = 0.0
    for step in range(args.steps):
        if step == args.steps // 2:
            torch.cuda.synchronize()
            began = time.perf_counter()
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(input_ids=data, labels=data, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    torch.cuda.synchronize()
    steps = args.steps - args.steps // 2
    rate = steps * args.batch * args.length / (time.perf_counter() - began)
    return rate, torch.cuda.max_memory_allocated() / 1e9


def _forget() -> None:
    """Frees the last model, and what was compiled for it: past a few kinds of layer torch.compile would give up."""
    torch._dynamo.reset()
    gc.collect()
    torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?")
    parser.add_argument("--recipe", default="fbi-130m", help="whose shape is trained from scratch")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch", type=int, default=24)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--json")
    args = parser.parse_args()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    size = f"{args.batch} × {args.length} tokens a step"
    rows = []
    theirs, their_memory = pretraining(args, None)
    for name, method, options in (
        ("FBI-LLM", "fbi", {}),
        ("BitNet", "bitnet", {}),
        ("BitNet as in its paper", "bitnet", {"norm": "layer", "ste": "sign"}),
        ("BitNet b1.58", "bitnet", {"weights": "ternary"}),
    ):
        _forget()
        ours, memory = pretraining(args, method, **options)
        form = f"{args.recipe}'s shape, {size}"
        rows.append(Row(f"{name}, {form}", ours, "dense", theirs, ours / theirs, "tokens/s"))
        rows.append(Row(f"memory of {name}, {form}", memory, "dense", their_memory, their_memory / memory, "GB"))
    if args.model is not None:
        _forget()
        theirs, their_memory = fine_tuning(args)
        _forget()
        ours, memory = distilling(args)
        form = f"{Path(args.model).name}, {size}"
        rows.append(Row(f"distilling, {form}", ours, "fine-tuning", theirs, ours / theirs, "tokens/s"))
        rows.append(Row(f"memory, {form}", memory, "fine-tuning", their_memory, their_memory / memory, "GB"))
    show(rows, args.json)


if __name__ == "__main__":
    main()
