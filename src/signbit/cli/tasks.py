"""The part of `signbit eval` that asks tasks: requests made or read, answered by each model, shown."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from signbit.cli.output import Bars, note, table
from signbit.errors import OptionError
from signbit.version import VERSION

if TYPE_CHECKING:
    from accelerate import PartialState

    from signbit.evaluate.requests import Requests
    from signbit.hub.subject import Subject


class Place:
    """Which process this is of those that `accelerate launch` started; the only one where none were.

    As a context it leaves their group at the end.
    """

    def __init__(self) -> None:
        self.number, self.index, self.local = 1, 0, 0
        self._state: PartialState | None = None
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            import torch
            from accelerate import PartialState

            self._state = state = PartialState(cpu=not torch.cuda.is_available())
            self.number, self.index, self.local = state.num_processes, state.process_index, state.local_process_index

    def __enter__(self) -> Place:
        return self

    def __exit__(self, *_: object) -> None:
        if self._state is not None:
            self._state.destroy_process_group()

    @property
    def main(self) -> bool:
        """Whether this process says and writes what all have found."""
        return self.index == 0

    def of_main(self, value: Any) -> Any:
        """What the first process has as `value`, in every process."""
        if self.number == 1:
            return value
        from accelerate.utils import broadcast_object_list

        return broadcast_object_list([value])[0]

    def device(self, asked: str) -> str:
        """The device of this process: its own GPU where --device cuda is asked of several."""
        return f"cuda:{self.local}" if asked == "cuda" and self.number > 1 else asked


def requests(args: Any, place: Place) -> Requests | None:
    """What --tasks or --requests ask, written to the file of --export-requests; None where neither is given."""
    if args.tasks is not None and args.requests is not None:
        raise OptionError("--tasks and --requests both say what is asked; give one of them")
    if args.tasks is None and (args.few_shot is not None or (args.limit is not None and args.requests is None)):
        raise OptionError("--few-shot and --limit are for --tasks; perplexity is cut short with --max-windows")
    if args.tasks is None and args.export_requests is not None:
        raise OptionError("--export-requests writes what --tasks ask; give those too")
    if args.requests is not None:
        if args.limit is not None:
            raise OptionError("--limit was settled when the requests were written; export them anew with it")
        return _from_file(args)
    if args.tasks is None:
        return None
    from signbit.evaluate.harness import harness_requests

    bars = Bars()
    names = [name.strip() for name in args.tasks.split(",") if name.strip()]

    def step(done: int, total: int, name: str) -> None:
        if place.main:
            bars("prompts", done, total, name)

    say = note if place.main else lambda line: None
    try:
        found = harness_requests(names, args.data_dir, args.few_shot, args.limit, say, step)
    finally:
        bars.close()
    found = replace(found, prompt_bos=args.prompt_bos)
    if args.export_requests is not None and place.main:
        found.write(args.export_requests)
        pairs = {pair for question in found.questions for pair in question.pairs}
        print(
            f"{args.export_requests}: {len(found.questions)} documents of {len(found.tasks)} tasks, {len(pairs)} texts to "
            f"score, by {found.harness}; signbit eval MODEL --requests {args.export_requests} scores them"
        )
    return found


def _from_file(args: Any) -> Requests:
    """What the file of --requests asks; raises OptionError if it is to be asked with another BOS than it was written for."""
    from signbit.evaluate.requests import read_requests

    found = read_requests(args.requests)
    asked = args.prompt_bos or found.prompt_bos
    if found.prompt_bos not in (None, asked):
        said = f"the table {args.table} or --prompt-bos" if getattr(args, "table", None) else "--prompt-bos"
        raise OptionError(
            f"{args.requests} was written for --prompt-bos {found.prompt_bos}, and {said} says {asked}; leave that out, or "
            f"export the requests anew with --prompt-bos {asked}"
        )
    return replace(found, prompt_bos=asked)


def answered(model: Any, tokenizer: Any, of: Subject, requests: Requests, args: Any, place: Place) -> dict[str, Any]:
    """What `model`, that of `of`, answers, from its answers on the disk as far as they go: results, protocol, hash; JSON.

    The machines that gave the answers are recorded in `of`.
    """
    from signbit.evaluate.machines import forced_kernels, here
    from signbit.evaluate.scoring import Answers, Encoder, answers_path, positions, score
    from signbit.evaluate.tasks import results
    from signbit.hub.subject import model_digests
    from signbit.linear import get_activations

    bos = requests.prompt_bos or "tokenizer"
    encoder, name = Encoder(tokenizer, bos), of.place
    protocol = {
        "signbit": VERSION,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": next(model.parameters()).device.type,
        "activations": get_activations(model),
        "bos": encoder.described(),
        "positions": positions(model, tokenizer),
    }
    path = answers_path(model_digests(name), {**protocol, "prompt_bos": bos, **forced_kernels()})
    answers = Answers(path, place.index, here(str(next(model.parameters()).device)))
    bars, begin = Bars(), time.perf_counter()

    def step(done: int, total: int) -> None:
        if place.main:
            bars(f"{Path(name).name} tasks", done, total, f"{done} of {total} texts")

    pairs = [pair for question in requests.questions for pair in question.pairs]
    try:
        scored = score(model, encoder, pairs, answers, (place.index, place.number), step)
    finally:
        bars.close()
    for machine in answers.machines(scored.answers):
        of.record("tasks", machine)
    if scored.truncated and place.main:
        note(f"{name}: {scored.truncated} texts were cut on the left to the model's {protocol['positions']} positions")
    return {
        "model": name,
        "model_sha256": of.sha256,
        "harness": requests.harness,
        "limit": requests.limit,
        "protocol": protocol,
        "results": [result.to_dict() for result in results(requests, scored.answers)],
        "texts": len(scored.answers),
        "texts_from_disk": scored.known,
        "answers": f"{path}-*.jsonl",
        "truncated": scored.truncated,
        "batch_tokens": scored.batch_tokens,
        "processes": place.number,
        "seconds_s": time.perf_counter() - begin,
    }


def _share(result: dict[str, Any], metric: str) -> str:
    if metric not in result["values"]:
        return ""
    error = result["stderr"].get(metric)
    return f"{result['values'][metric]:.2%}" + (f" ± {error:.2%}" if error is not None else "")


def print_results(asked: list[dict[str, Any]]) -> None:
    """A line a task and model; the tasks of a group of more than ten are left to --json."""
    if not asked:
        return
    perplexities = any("perplexity" in result["values"] for run in asked for result in run["results"])
    rows, hidden = [], 0
    for run in asked:
        many = {task for result in run["results"] if len(result["tasks"]) > 10 for task in result["tasks"]}
        for result in run["results"]:
            if result["name"] in many:
                hidden += 1
                continue
            part = "" if result["documents"] == result["of"] else f" of {result['of']}"
            rows.append(
                (
                    run["model"], result["name"], "" if result["few_shot"] is None else str(result["few_shot"]),
                    _share(result, "acc"), _share(result, "acc_norm"),
                    "" if result["chance"] is None else f"{result['chance']:.1%}",
                    *([f"{result['values'].get('perplexity', float('nan')):.3f}"] if perplexities else []),
                    f"{result['documents']}{part}",
                )
            )  # fmt: skip
    columns = (
        "model",
        "task",
        "shots",
        "acc",
        "acc_norm",
        "chance",
        *(("perplexity",) if perplexities else ()),
        "documents",
    )
    table(None, columns, rows)
    if hidden:
        print(f"{hidden} lines of single tasks are in the file of --json")
    if any(result["tasks"] and "acc_norm" in result["values"] for run in asked for result in run["results"]):
        print("a mean of acc_norm counts the acc of tasks without it")
    for run in asked:
        protocol = run["protocol"]
        print(
            f"{run['model']}: {run['harness']}; {protocol['bos']}; {protocol['dtype']}, {protocol['activations']} "
            f"activations, {protocol['device']}; {run['texts']} texts in {run['seconds_s']:.0f} s, of which "
            f"{run['texts_from_disk']} were answered before ({run['answers']})"
        )
