"""`signbit info`, `memory`, `eval`, `doctor`: what a model weighs and costs, and what multiplies."""

from __future__ import annotations

import functools
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from signbit.cli.output import byte_text, check_file, note, quiet, table, write_json
from signbit.cli.parsing import RunOptions, at_least, parse
from signbit.errors import OptionError, SignbitError
from signbit.version import VERSION

if TYPE_CHECKING:
    from signbit.cli.tasks import Place
    from signbit.evaluate.doctor import Machine
    from signbit.evaluate.requests import Requests
    from signbit.evaluate.table import Table
    from signbit.hub.subject import Subject


@dataclass(frozen=True)
class InfoOptions:
    """Show the true size of a packed directory: bits per weight, bits per parameter, bytes, salient share."""

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    """Packed directory."""
    layers: bool = False
    """One line a layer instead of one a kind."""
    json: str | None = None
    """Also write everything to this JSON file."""


@dataclass(frozen=True)
class MemoryOptions:
    """Show what a model takes in memory, in training and packed: fp32, bf16, int8 signs, 1 bit; or in energy."""

    model: Annotated[tyro.conf.Positional[str | None], tyro.conf.arg(metavar="[MODEL]")] = None
    """Model directory, config.json or hub id; beside a recipe its shape is taken in place of the recipe's."""
    recipe: str | None = None
    """Named recipe, or a .toml file of one: shape, method, optimizer, length (see signbit pretrain --list)."""
    method: str | None = None
    """Method of the 1-bit form; default: the recipe's, else onebit."""
    sequences: int = 1
    """Sequences on a device at a time."""
    sequence_length: int | None = None
    """Tokens a sequence; default: the recipe's, else 1024."""
    vocabulary: int | None = None
    """Tokens of the vocabulary, where the recipe does not say it or another is meant."""
    measure: Literal["auto", "always", "never"] = "auto"
    """Whether to make a step here where there is room for it, and count its tensors: auto leaves out what takes long on a
    CPU."""
    device: str = "cpu"
    """Device on which to measure: cpu, cuda, cuda:1 …"""
    energy: bool = False
    """Show what additions and multiplications take in J, by the BitNet paper's model; of its own models without MODEL."""
    tokens: int = 512
    """Tokens of the text whose energy is shown."""
    json: str | None = None
    """Also write everything to this JSON file."""


@dataclass(frozen=True)
class EvalOptions:
    """Measure perplexity by named protocols, and accuracy on lm-eval's tasks."""

    model: Annotated[tyro.conf.Positional[str | None], tyro.conf.arg(metavar="[MODEL]")] = None
    """Packed or full-precision model; --export-requests needs none."""
    ppl: str | None = None
    """Protocols or text files (.txt, .jsonl), divided by commas; see `signbit eval --list`. Default: wikitext2, unless
    tasks are asked for."""
    tasks: str | None = None
    """Tasks, groups or tags of lm-eval and suites of the papers (zeroshot6, zeroshot7, mmlu), divided by commas."""
    few_shot: int | None = None
    """Solved examples in each prompt; default: as the task says, mostly 0."""
    limit: int | None = None
    """Only the first documents of each task; the result says so."""
    prompt_bos: Literal["tokenizer", "yes", "no"] | None = None
    """Whether the beginning-of-sequence token stands before a prompt of a task; default: as the table or the file of
    --requests says, else as the tokenizer does it."""
    requests: str | None = None
    """Score the requests of this file in place of --tasks; it needs no lm-eval."""
    export_requests: str | None = None
    """Write what the tasks ask to this file (.jsonl, .jsonl.gz), to be scored elsewhere, and exit."""
    against: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Another model to measure beside it, the full-precision one for example; may be repeated."""
    table: str | None = None
    """Measure a paper's table again and show its figures beside ours: one of `signbit eval --list`, or a .toml file."""
    table_models: Annotated[
        tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(name="model", metavar="NAME[=DIR]")
    ] = ()
    """A model of the table and where it is, by default on the hub; may be repeated. The others stay "not measured"."""
    markdown: str | None = None
    """Also write the table to this Markdown file."""
    data_dir: str | None = None
    """Directory of local files in place of the hub (wikitext2/wiki.test.raw, piqa/validation.jsonl …)."""
    json: str | None = None
    """Also write the results to this JSON file."""
    max_windows: int | None = None
    """Stop after this many windows; the result says so."""
    offload: bool = False
    """Measure perplexity with one block of the model in memory at a time, read from its files when its turn comes: the same
    number, of a model that is larger than the memory."""
    inputs_on: Literal["device", "cpu", "disk"] = "cpu"
    """Where what a block has made of the text waits for the next one, with --offload."""
    again: bool = False
    """Measure anew the perplexities that are kept from before."""
    list: bool = False
    """List the protocols, the suites of tasks and the papers' tables, and exit."""


@dataclass(frozen=True)
class DoctorOptions:
    """Show what multiplies on this machine and why, and check its kernels against plain torch."""

    model: Annotated[tyro.conf.Positional[str | None], tyro.conf.arg(metavar="[MODEL]")] = None
    """Packed directory; shows which of its layers the kernels multiply, and why not the others."""
    json: str | None = None
    """Also write everything to this JSON file."""


def info(argv: Sequence[str]) -> None:
    """`signbit info`."""
    args = parse("info", argv, InfoOptions)
    check_file("--json", args.json)
    from signbit.evaluate.size import measure_size

    size = measure_size(args.model)
    rows: list[tuple[str, ...]]
    if args.layers:
        rows = [
            (
                layer.name, f"{layer.out_features} × {layer.in_features}", f"{layer.bits_per_weight:.3f}",
                f"{layer.salient:.1%}", byte_text(layer.nbytes),
            )
            for layer in size.layers
        ]  # fmt: skip
        table(None, ("layer", "shape", "true bits", "salient", "bytes"), rows)
    else:
        rows = [
            (kind.name, str(kind.layers), kind.shape, kind.bits, f"{kind.salient:.1%}", byte_text(kind.nbytes))
            for kind in size.kinds()
        ]
        table(None, ("layers", "count", "shape", "true bits", "salient", "bytes"), rows)
    options = ", ".join(f"{key}={value}" for key, value in size.settings.get("options", {}).items())
    print(f"method                          {size.settings.get('method', 'unknown')} ({options})")
    print(f"true bits per packed weight     {size.bits_per_weight:.3f}  ({size.linears_saved:.1%} of 16 saved)")
    print(f"whole file, bits per parameter  {size.bits_per_parameter:.3f}")
    print(f"parameters                      {size.parameters:,}")
    print(f"bytes of the weight files       {size.file_bytes:,}")
    print(f"16-bit model would be           {2 * size.parameters:,}  ({size.file_saved:.1%} saved)")
    write_json(args.json, size.to_dict())


def memory(argv: Sequence[str]) -> None:
    """`signbit memory`."""
    args = parse("memory", argv, MemoryOptions)
    check_file("--json", args.json)
    facts: dict[str, Any] = {"signbit": VERSION, "command": shlex.join(["signbit", "memory", *argv])}
    if args.energy and args.model is None and args.recipe is None:
        from signbit.evaluate.energy import PAPER

        models, name = PAPER, ""
    else:
        from signbit.hub import memory as of

        quiet()
        asked = of.subject(args.recipe, args.model, args.vocabulary, args.method, args.sequences, args.sequence_length)
        name = args.recipe or Path(args.model).name
        models = {name: of.products(asked)} if args.energy else {}
    if args.energy:
        from signbit.evaluate.energy import energy

        if args.tokens < 1:
            raise OptionError(f"--tokens is {args.tokens}; at least 1 is needed")
        found = [(model, use) for model, products in models.items() for use in energy(products, args.tokens)]
        rows = [
            (model, use.form, f"{use.process_nm} nm", f"{use.multiplications_j:.3g} J", f"{use.additions_j:.3g} J")
            for model, use in found
        ]
        table(f"energy of {args.tokens} tokens", ("model", "form", "process", "multiplications", "additions"), rows)
        print(
            "linears and attention of the blocks, by the model of BitNet (arXiv 2310.11453); embedding and head are left out"
        )
        write_json(args.json, {**facts, "tokens": args.tokens, "energy": [{"model": m, **asdict(u)} for m, u in found]})
        return
    from signbit.hub.load import torch_device

    uses = of.memory(asked, args.measure, torch_device(args.device), note)
    forms = [
        (
            use.phase, use.form, byte_text(use.weights),
            *(byte_text(part) if use.phase == "training" else "" for part in (use.gradients, use.optimizer)),
            byte_text(use.activations), byte_text(use.total), "measured" if use.measured else "computed",
        )
        for use in uses
    ]  # fmt: skip
    options = asked.options
    table(name, ("", "form", "weights", "gradients", "optimizer", "activations", "total", ""), forms)
    print(
        f"1 bit is {asked.method}; {options.optim}; {asked.sequences} × {options.sequence_length} tokens at a time"
        f"{', blocks computed again in the backward pass' if options.gradient_checkpointing else ''}"
    )
    print(
        "activations: in training what the backward pass needs (logits and a teacher are not in it); packed: keys and values"
    )
    size = {"sequences": asked.sequences, "sequence_length": options.sequence_length, "optim": options.optim}
    rows_of = [{**asdict(use), "total": use.total} for use in uses]
    write_json(args.json, {**facts, "method": asked.method, **size, "config": asked.config.to_dict(), "rows": rows_of})


def evaluate(argv: Sequence[str]) -> None:
    """`signbit eval`."""
    if "--list" in argv:
        from signbit.data import PROTOCOLS
        from signbit.evaluate.requests import SUITES
        from signbit.evaluate.table import table_names

        for name, protocol in PROTOCOLS.items():
            print(f"{name:14} {protocol.help}")
        for name, (members, who) in SUITES.items():
            print(f"{name:14} {', '.join(members)} ({who})")
        for name, about in table_names().items():
            print(f"{name:20} --table: {about}")
        return
    from signbit.evaluate.perplexity import TextOptions

    args = parse("eval", argv, EvalOptions, text=TextOptions, run=RunOptions)
    from signbit.cli import tables, tasks

    at_least(1, max_windows=args.max_windows)
    check_file("--json", args.json)
    check_file("--markdown", args.markdown)
    quiet()
    args, paper, models = tables.applied(args)
    if args.export_requests is not None and (args.model is not None or args.ppl is not None):
        raise OptionError("--export-requests writes what --tasks ask and measures nothing; leave MODEL and --ppl out")
    if args.export_requests is None and args.model is None and paper is None:
        raise OptionError("give the MODEL to measure, --table NAME, or --tasks … --export-requests FILE")
    with tasks.Place() as place:
        _evaluated(args, paper, models, place, shlex.join(["signbit", "eval", *argv]))


def _evaluated(args: Any, paper: Table | None, models: dict[str, str], place: Place, command: str) -> None:
    """What `command` asks of its models: measured, shown and written."""
    from signbit.cli import perplexities, tables, tasks

    requests = tasks.requests(args, place)
    if args.export_requests is not None:
        return
    if paper is not None:
        tables.check(paper, requests)
    names = perplexities.named(args, requests is not None, place) if paper is None or args.ppl is not None else []
    results: list[dict[str, Any]] = []
    asked: list[dict[str, Any]] = []
    facts: list[dict[str, Any]] = []
    saved: perplexities.Saved = {}
    for model_name in (args.model, *args.against) if args.model is not None else ():
        of = perplexities.subject(model_name, args)
        if args.offload:
            results += perplexities.offloaded(of, names, args)
        else:
            _whole(of, names, requests, args, place, results, asked)
        if (shares := _saved(model_name)) is not None:
            saved[model_name] = shares
        if place.main:
            facts.append(of.facts().to_dict())
    if not place.main:
        return
    found: dict[str, Any] = {"models": facts, "results": [{**r, "saved": saved.get(r["model"])} for r in results]}
    if asked:
        found["tasks"] = asked
    if paper is not None:
        found["table"] = tables.show(paper, models, results, asked, args.markdown)
    else:
        perplexities.print_perplexities(results, args.against, saved)
        tasks.print_results(asked)
    write_json(args.json, {"signbit": VERSION, "command": command, **found})


def _saved(model_name: str) -> tuple[float, float] | None:
    """Shares of 16 bits that a packed directory saves, in its linears and in its files."""
    from signbit.evaluate.size import measure_size
    from signbit.hub.load import base_of, is_packed

    folder = base_of(model_name) or model_name  # beside whose packed layers an adapter stands
    if not is_packed(folder):
        return None
    size = measure_size(folder)
    return size.linears_saved, size.file_saved


def _whole(
    of: Subject, names: Sequence[str], requests: Requests | None, args: Any, place: Place,
    results: list[dict[str, Any]], asked: list[dict[str, Any]],
) -> None:  # fmt: skip
    """Measures one model, loaded whole if something of it is not kept; what is found is added to `results` and `asked`."""
    from signbit.cli import perplexities, tasks
    from signbit.hub.load import load_any
    from signbit.linear import set_activations

    @functools.cache
    def loaded() -> tuple[Any, Any]:
        model = load_any(of.place, args.run.dtype, place.device(args.run.device))
        if not set_activations(model, args.run.activations) and place.main:
            note(f"{of.place} has no packed layer; its activations stay exact")
        return model, of.tokenizer

    results += [perplexities.measured(of, loaded, name, args, place) for name in names]
    if requests is not None:
        asked.append(tasks.answered(*loaded(), of, requests, args, place))


def doctor(argv: Sequence[str]) -> None:
    """`signbit doctor`; raises SignbitError if kernels fail their check."""
    args = parse("doctor", argv, DoctorOptions)
    check_file("--json", args.json)
    from signbit.evaluate.doctor import examine, multiplied
    from signbit.ops.cpu import VARIABLE

    machine = examine()
    _print_machine(machine, VARIABLE)
    facts: dict[str, Any] = asdict(machine)
    if args.model is not None:
        from signbit.format import read_description
        from signbit.hub.load import load_any

        read_description(args.model)
        quiet()
        result = multiplied(load_any(args.model))
        facts["model"] = {"model": args.model, **asdict(result)}
        print(f"\n{args.model}: the kernels multiply {result.kernels} of {result.layers} packed layers")
        for mode, count in result.dense.items():
            print(
                f"  256 tokens and more, {mode}: {count} of them by a matrix unpacked for the call, which is faster there"
            )
        for reason, names in result.reference.items():
            some = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
            print(f"  plain torch multiplies {len(names)}: {reason} ({some})")
        if result.no_siblings is not None:
            print(f"  on a GPU: {result.no_siblings}")
        elif result.siblings:
            shared = sum(map(len, result.siblings))
            print(
                f"  on a GPU: {shared} of them are given an input with others, and share {len(result.siblings)} launches"
            )
    write_json(args.json, facts)
    if machine.broken:
        raise SignbitError(
            f"the check of {', '.join(machine.broken)} failed; please report this with the lines above (signbit chooses "
            "no kernels that fail)"
        )


def _print_machine(machine: Machine, variable: str) -> None:
    facts = {
        **machine.versions,
        "processor": machine.processor,
        "threads": f"{machine.threads} (of torch)",
        variable: machine.variable or "not set",
    }
    if machine.library is None:
        facts["kernels"] = f"none: {machine.missing}"
    else:
        facts["features"] = " ".join(machine.features) or "none that the kernels use"
        facts["kernels"] = machine.library
        facts["compiled"] = ", ".join(machine.compiled)
        facts["run here"] = ", ".join(check for check in machine.checks if not check.startswith("cuda"))
    for name, value in facts.items():
        print(f"{name:12}  {value}")
    for device, name in machine.devices.items():
        print(f"\n{device} ({name})")
        for choice in machine.choices:
            if choice.device == device:
                print(f"  {choice.op}: {choice.backend} ({choice.reason})")
    if machine.checks:
        print("\nchecked against plain torch")
    for isa, wrong in machine.checks.items():
        print(f"  {isa}: {wrong or 'right'}")
