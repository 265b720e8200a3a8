"""`signbit quantize`."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from signbit.cli.output import Bars, byte_text, check_file, note, print_report, quiet, write_json
from signbit.cli.parsing import option_value, parse
from signbit.errors import OptionError
from signbit.version import VERSION


@dataclass(frozen=True)
class QuantizeOptions:
    """Make a packed 1-bit directory of a full-precision model."""

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    """Hugging Face model directory or hub id."""
    out: Annotated[str | None, tyro.conf.arg(aliases=["-o"], metavar="OUT")] = None
    """Directory to write."""
    method: str = "absmean"
    """Method; its own options are listed below (see --method NAME --help for another's)."""
    head: Literal["keep", "int8"] = "keep"
    """Embedding and output head: keep them as they are, or store them in int8."""
    keep: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Pattern of layer names to keep as they are, whole dotted parts (layers.0, mlp.*_proj); may be repeated."""
    rule: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Options of single layers, 'pattern: key=value, …' ('mlp.down_proj: salient=0.3'); may be repeated, the last
    match wins."""
    min_layer: int = 0
    """First block to binarize, counted from 0."""
    max_layer: int | None = None
    """Block before which to stop; default: after the last."""
    only: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Pattern of layer names outside of which everything stays as it is; may be repeated."""
    invert: bool = False
    """Binarize what --min-layer, --max-layer and --only leave out, instead of what they select."""
    allow_partial: bool = False
    """Accept a result in which under 90 % of the blocks' parameters are binarized."""
    data_dir: str | None = None
    """Directory of local calibration sets in place of the hub (c4/c4-train.part.jsonl, wikitext2/wiki.train.raw …)."""
    inputs_on: Literal["device", "cpu", "disk"] = "cpu"
    """Where the inputs of a block are kept while it is calibrated."""
    restart: bool = False
    """Throw away what an earlier, unfinished run left in OUT.partial; without it, that run is finished."""
    plot: str | None = None
    """Also draw each layer's error and true bits to this .png, .svg or .pdf."""
    json: str | None = None
    """Also write what was done to each layer, with its error and bits, to this JSON file."""
    dry_run: bool = False
    """Show what would be converted, sizes, true bits and memory; read no weight, write nothing."""
    overwrite: bool = False
    """Replace OUT if it is a model directory."""
    device: str = "cpu"
    """Device on which blocks compute: cpu, cuda, cuda:1 …; the rest of the model stays on the CPU and the disk."""


def quantize(argv: Sequence[str]) -> None:
    """`signbit quantize`."""
    from signbit.data.calibration import CalibrationOptions
    from signbit.methods import METHODS
    from signbit.methods.base import find_method
    from signbit.methods.rules import parse_rule

    name = option_value(argv, "--method", "absmean")
    method = find_method(METHODS, name).options
    field = name.replace("-", "_")
    parts: dict[str, type] = {field: method, "calibration": CalibrationOptions}
    args = parse("quantize", argv, QuantizeOptions, **parts)
    check_file("--json", args.json)

    from signbit import ptq
    from signbit.hub.config import SignbitConfig
    from signbit.hub.load import load_source
    from signbit.hub.stream import quantize as quantize_directory

    quiet()
    options = asdict(getattr(args, field))
    rules: dict[str, dict[str, Any]] = {}
    for text in args.rule:
        pattern, values = parse_rule(text, method)
        rules[pattern] = {**rules.pop(pattern, {}), **values}
    config = SignbitConfig(
        args.method, args.head, args.keep, args.allow_partial, rules, args.min_layer, args.max_layer, args.only,
        args.invert, **options,
    )  # fmt: skip
    if args.json is not None and not Path(args.json).absolute().parent.is_dir():
        raise OptionError(f"--json {args.json}: there is no directory {Path(args.json).absolute().parent}")
    if args.dry_run:
        model = load_source(args.model, skeleton=True)
        report = ptq.estimate(model, config.plan, int8_head=config.head == "int8")
        print_report(report)
        needs = config.plan.needs(decision.name for decision in report.decisions if not decision.asked)
        need = ptq.memory(model, report, needs, args.calibration.samples * args.calibration.sequence_length)
        print(f"weights: {byte_text(need.dense_bytes)} now, about {byte_text(need.packed_bytes)} packed")
        print(
            f"memory needed: about {byte_text(need.peak_bytes)}, one block at a time (Python, torch and transformers take "
            "some 300 MB more)"
        )
        if need.inputs_bytes:
            print(f"of that, inputs of a block: {byte_text(need.inputs_bytes)}; --inputs-on disk keeps them there")
        write_json(args.json, {"signbit": VERSION, "layers": [asdict(decision) for decision in report.decisions]})
        print("no model was written (--dry-run)")
        return
    if args.out is None:
        raise OptionError("where to? give -o OUT, or --dry-run to see what would be done")
    if args.plot is not None:
        from signbit.evaluate.plot import check_plot

        check_plot(args.plot)
    bars = Bars()
    try:
        path, report = quantize_directory(
            args.model, args.out, config, args.calibration, args.data_dir, args.device, args.inputs_on, args.overwrite,
            args.restart, shlex.join(["signbit", "quantize", *argv]), bars, note,
        )  # fmt: skip
    finally:
        bars.close()
    print_report(report)
    write_json(args.json, {"signbit": VERSION, "layers": [asdict(decision) for decision in report.decisions]})
    if args.plot is not None:
        from signbit.evaluate.plot import plot_layers

        plot_layers(report, args.plot, f"{Path(args.model).name}, {args.method}")
    print(f"wrote {path}; see `signbit info {args.out}`")
