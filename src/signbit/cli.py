"""The command line: one command a verb, each generated from a frozen dataclass; torch is imported by a verb's body."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, make_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from signbit.errors import OptionError, SignbitError
from signbit.version import VERSION

if TYPE_CHECKING:
    from signbit.evaluate.doctor import Machine
    from signbit.models import Report

#: Exit statuses: 1 an error that a message explains, 2 a command line that does not parse, 130 Ctrl-C.
EXIT_ERROR, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130


@dataclass(frozen=True)
class RunOptions:
    """Where and how a model runs."""

    device: str = "cpu"
    """Device of torch: cpu, cuda, cuda:1 …"""
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    """Dtype of activations and unpacked tensors; auto is float32 on a CPU and as stored elsewhere."""
    activations: Literal["exact", "int8"] = "exact"
    """exact: activations stay float. int8: packed layers and an int8 head take 8-bit activations, one scale a token."""


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


@dataclass(frozen=True)
class TrainingOptions:
    """What is trained on what, and where its run lies."""

    out: Annotated[str | None, tyro.conf.arg(aliases=["-o"], metavar="RUN")] = None
    """Directory of the run: checkpoints, metrics.jsonl, pictures."""
    method: str = "onebit"
    """Method; its own options are listed below (see --method NAME --help for another's)."""
    data: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Text to learn from: a .txt, .jsonl, .parquet or .tokens file (.gz and .xz too), a directory of them, c4, wikitext2, ptb,
    or hub:NAME:CONFIG:SPLIT:COLUMN, which is streamed; behind each @50M for so many tokens of its beginning at most,
    =WEIGHT for a mixture; may be repeated."""
    recipe: str | None = None
    """Named recipe (see --list), or a .toml file of one; flags beside it go before it."""
    list: bool = False
    """List the recipes and exit."""
    resume: bool = False
    """Go on at the newest complete checkpoint in RUN."""
    keep: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Pattern of layer names to keep as they are; may be repeated."""
    rule: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Options of single layers, 'pattern: key=value, …'; may be repeated, the last match wins."""
    allow_partial: bool = False
    """Accept a student in which under 90 % of the blocks' parameters are binary."""
    data_dir: str | None = None
    """Directory of local copies of named sets in place of the hub."""
    cache: str | None = None
    """Directory in which tokenized text is kept and found again; default: RUN/data."""
    teacher_logits: str | None = None
    """FILE.logits of signbit data teacher-logits: what TEACHER answers to all of the data, in place of running it."""


@dataclass(frozen=True)
class DistillOptions(TrainingOptions):
    """Train a 1-bit student of a model (the teacher): sign matrices by what the teacher answers."""

    teacher: Annotated[tyro.conf.Positional[str | None], tyro.conf.arg(metavar="TEACHER")] = None
    """Hugging Face model directory or hub id; the student starts from it."""


@dataclass(frozen=True)
class PretrainOptions(TrainingOptions):
    """Train a 1-bit model from scratch, with a teacher (autoregressive distillation) or without; or a dense one beside it."""

    method: str = "fbi"
    """Method, or none for a model in full precision; its own options are listed below (see --method NAME --help for
    another's)."""
    teacher: Annotated[str | None, tyro.conf.arg(metavar="TEACHER")] = None
    """Model directory or hub id to learn from, of whatever shape; without one the next token is learnt (--kd-alpha 0)."""
    tokenizer: Annotated[str | None, tyro.conf.arg(metavar="TOKENIZER")] = None
    """Directory or hub id of the tokenizer; default: TEACHER's, or MODEL's."""
    model: Annotated[str | None, tyro.conf.arg(metavar="MODEL")] = None
    """Model directory or hub id to start from, in the place of a shape."""
    random: bool = False
    """Take MODEL's shape, and random weights."""


@dataclass(frozen=True)
class DataOptions:
    """Make what a student learns from: text that a model writes, or a teacher's logits (signbit data KIND --help)."""

    kind: Annotated[
        tyro.conf.Positional[Literal["self-generate", "teacher-logits"]],
        tyro.conf.arg(metavar="{self-generate,teacher-logits}"),
    ]
    """self-generate MODEL -o DATA.tokens: text. teacher-logits TEACHER -o FILE.logits --data SOURCE: what it answers."""


@dataclass(frozen=True)
class SelfGenerateOptions:
    """Let a model write the text that a student of it learns from: signbit data self-generate MODEL -o DATA.tokens."""

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    """The model that writes: the later teacher."""
    out: Annotated[str, tyro.conf.arg(aliases=["-o"], metavar="DATA")]
    """File to write, NAME.tokens; the same command goes on with an unfinished one."""
    sequences: int = 132000
    """Sequences (OneBit: 132000)."""
    sequence_length: int = 2048
    """Tokens a sequence."""
    batch: int = 32
    """Sequences that are written at a time."""
    seed: int = 0
    """Seed of first tokens and sampling."""
    device: str = "cpu"
    """Device of torch: cpu, cuda, cuda:1 …"""
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    """Dtype of the model; auto is float32 on a CPU and as stored elsewhere."""


@dataclass(frozen=True)
class TeacherLogitsOptions:
    """Ask a teacher once about all of a text, and keep what it answers: signbit data teacher-logits TEACHER -o FILE.logits."""

    teacher: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="TEACHER")]
    """Hugging Face model directory or hub id, or a packed model."""
    out: Annotated[str, tyro.conf.arg(aliases=["-o"], metavar="FILE")]
    """File to write, NAME.logits; the same command goes on with an unfinished one."""
    data: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Text, as signbit distill has it; weights mean nothing here; may be repeated."""
    sequence_length: int = 1024
    """Tokens a block: the --sequence-length of the run that learns from it."""
    top: int = 64
    """How many of the likeliest tokens are kept; each takes four bytes (six, of more than 65536 tokens)."""
    batch: int = 8
    """Blocks that are asked about at a time."""
    device: str = "cpu"
    """Device of torch: cpu, cuda, cuda:1 …"""
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    """Dtype of the teacher; auto is float32 on a CPU and as stored elsewhere."""
    data_dir: str | None = None
    """Directory of local copies of named sets in place of the hub."""
    cache: str | None = None
    """Directory in which tokenized text is kept and found again; default: data, beside FILE."""


@dataclass(frozen=True)
class PackOptions:
    """Write a run's newest checkpoint as a packed 1-bit directory."""

    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]
    """Directory of a run of signbit distill or pretrain."""
    out: Annotated[str, tyro.conf.arg(aliases=["-o"], metavar="OUT")]
    """Directory to write."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """What everything but signs is stored in; float32 loses nothing."""
    overwrite: bool = False
    """Replace OUT if it is a model directory."""


@dataclass(frozen=True)
class FlipsOptions:
    """Show how many signs of a run's latents changed a step, layer by layer (FBI-LLM's analysis)."""

    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]
    """Directory of a training run, finished or not."""
    plot: str | None = None
    """Also draw them to this .png, .svg or .pdf."""
    json: str | None = None
    """Also write every layer's counts and shares, line by line of the run's metrics, to this JSON file."""


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
class InfoOptions:
    """Show the true size of a packed directory: bits per weight, bits per parameter, bytes, salient share."""

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    """Packed directory."""
    layers: bool = False
    """One line a layer instead of one a kind."""
    json: str | None = None
    """Also write everything to this JSON file."""


@dataclass(frozen=True)
class EvalOptions:
    """Measure perplexity by named protocols."""

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    """Packed or full-precision model."""
    ppl: str = "wikitext2"
    """Protocols or text files (.txt, .jsonl), divided by commas; see `signbit eval --list`."""
    against: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Another model to measure beside it, the full-precision one for example; may be repeated."""
    data_dir: str | None = None
    """Directory of local files in place of the hub (wikitext2/wiki.test.raw …)."""
    json: str | None = None
    """Also write the results to this JSON file."""
    max_windows: int | None = None
    """Stop after this many windows; the result says so."""
    list: bool = False
    """List the protocols and exit."""


@dataclass(frozen=True)
class PromptOptions:
    """Continue a text, streamed."""

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    """Packed or full-precision model."""
    prompt: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="TEXT")]
    """Text to continue; - reads it from the standard input."""
    chat: bool = False
    """Put the prompt through the chat template, as one message of a user."""


@dataclass(frozen=True)
class ChatOptions:
    """Talk to a model through its chat template."""

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    """Packed or full-precision model."""
    system: str | None = None
    """System message that the conversation begins with."""


@dataclass(frozen=True)
class DoctorOptions:
    """Show what multiplies on this machine and why, and check its kernels against plain torch."""

    model: Annotated[tyro.conf.Positional[str | None], tyro.conf.arg(metavar="[MODEL]")] = None
    """Packed directory; shows which of its layers the kernels multiply, and why not the others."""
    json: str | None = None
    """Also write everything to this JSON file."""


def _parse(verb: str, argv: Sequence[str], base: type, defaults: Any = None, **parts: type) -> Any:
    """The options of `base` plus those of the dataclasses `parts`, flat on the command line.

    `defaults` are values that stand where no flag does, those of a part under its name.
    """
    cls = make_dataclass(base.__name__, list(parts.items()), bases=(base,), frozen=True, kw_only=True)
    cls.__doc__ = base.__doc__
    given: dict[str, Any] = {}
    if defaults is not None:
        made = {name: part(**defaults.get(name, {})) for name, part in parts.items()}
        given["default"] = cls(**{name: value for name, value in defaults.items() if name not in parts}, **made)
    return tyro.cli(
        cls,
        **given,
        args=list(argv),
        prog=f"signbit {verb}",
        description=base.__doc__,
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff),
    )


def _quiet() -> None:
    """transformers' own progress bars go, and accelerate's word on what is offloaded; other warnings stay."""
    import logging

    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    logging.getLogger("accelerate.big_modeling").setLevel(logging.ERROR)


def _note(line: str) -> None:
    print(f"note: {line}", file=sys.stderr)


class _Bars:
    """One progress bar a stage of long work, with the time that is left."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._stage = ""

    def __call__(self, stage: str, done: int, total: int | None, name: str) -> None:
        from tqdm import tqdm

        if stage != self._stage:
            self.close()
            self._bar = tqdm(desc=stage, total=total, file=sys.stderr, disable=None, leave=False)
            self._stage = stage
        self._bar.set_postfix_str(name, refresh=False)
        self._bar.update(done - self._bar.n)

    def tokenizing(self, source: str, done: int, total: int | None) -> None:
        """The bar of a source that is tokenized."""
        self(f"tokenizing {Path(source).name}", done, total, "")

    def close(self) -> None:
        """Takes the bar off the screen."""
        if self._bar is not None:
            self._bar.close()


def _table(title: str | None, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table for people; numbers to the right. A pipe gets lines as wide as they need."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", header_style="bold")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console = Console()
    if not console.is_terminal:
        console = Console(width=200)
    console.print(table)


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def _print_report(report: Report) -> None:
    rows = [
        (
            line.name, str(line.layers), line.action, line.why, line.error, line.bits,
            _bytes(line.nbytes) if line.nbytes else "",
        )
        for line in report.summary()
    ]  # fmt: skip
    _table(None, ("layers", "count", "what", "why", "error", "true bits", "packed"), rows)
    print(f"{report.share:.1%} of the repeated blocks' parameters are binarized", end="")
    print(f", at {report.bits_per_weight:.3f} true bits per weight" if report.binarized else "")


def _write_json(path: str | None, value: Any) -> None:
    if path is not None:
        try:
            Path(path).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise OptionError(f"--json {path} cannot be written ({error.strerror})") from error


def _option_value(argv: Sequence[str], flag: str, default: str) -> str:
    """The value of `flag` before the rest is parsed, because it decides what the rest may be."""
    for index, word in enumerate(argv):
        if word == flag and index + 1 < len(argv):
            return argv[index + 1]
        if word.startswith(f"{flag}="):
            return word.partition("=")[2]
    return default


def quantize(argv: Sequence[str]) -> None:
    """`signbit quantize`."""
    from signbit.data.calibration import CalibrationOptions
    from signbit.methods import METHODS
    from signbit.methods.base import find_method
    from signbit.methods.rules import parse_rule

    name = _option_value(argv, "--method", "absmean")
    method = find_method(METHODS, name).options
    field = name.replace("-", "_")
    parts: dict[str, type] = {field: method, "calibration": CalibrationOptions}
    args = _parse("quantize", argv, QuantizeOptions, **parts)

    from signbit import ptq
    from signbit.hub.config import SignbitConfig
    from signbit.hub.load import load_source
    from signbit.hub.stream import quantize as quantize_directory

    _quiet()
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
        _print_report(report)
        needs = config.plan.needs(decision.name for decision in report.decisions if not decision.asked)
        need = ptq.memory(model, report, needs, args.calibration.samples * args.calibration.sequence_length)
        print(f"weights: {_bytes(need.dense_bytes)} now, about {_bytes(need.packed_bytes)} packed")
        print(
            f"memory needed: about {_bytes(need.peak_bytes)}, one block at a time (Python, torch and transformers take "
            "some 300 MB more)"
        )
        if need.inputs_bytes:
            print(f"of that, inputs of a block: {_bytes(need.inputs_bytes)}; --inputs-on disk keeps them there")
        _write_json(args.json, {"signbit": VERSION, "layers": [asdict(decision) for decision in report.decisions]})
        print("no model was written (--dry-run)")
        return
    if args.out is None:
        raise OptionError("where to? give -o OUT, or --dry-run to see what would be done")
    if args.plot is not None:
        from signbit.evaluate.plot import check_plot

        check_plot(args.plot)
    bars = _Bars()
    try:
        path, report = quantize_directory(
            args.model, args.out, config, args.calibration, args.data_dir, args.device, args.inputs_on, args.overwrite,
            args.restart, shlex.join(["signbit", "quantize", *argv]), bars, _note,
        )  # fmt: skip
    finally:
        bars.close()
    _print_report(report)
    _write_json(args.json, {"signbit": VERSION, "layers": [asdict(decision) for decision in report.decisions]})
    if args.plot is not None:
        from signbit.evaluate.plot import plot_layers

        plot_layers(report, args.plot, f"{Path(args.model).name}, {args.method}")
    print(f"wrote {path}; see `signbit info {args.out}`")


def _parse_training(
    verb: str, argv: Sequence[str], base: type[TrainingOptions], recipe: dict[str, Any], **parts: type
) -> Any:
    """The options of a run, those of `recipe` where no flag says otherwise; `parts` beside those that all runs have."""
    from signbit.methods import METHODS
    from signbit.methods.base import find_method
    from signbit.train import Objective, Schedule, Trained, TrainOptions
    from signbit.train.recipe import DENSE

    # One length of the run goes before the recipe's other one.
    lengths = ("max_steps", "max_minutes", "max_passes")
    if any(_option_value(argv, _flag(key), "") for key in lengths):
        for key in lengths:
            recipe.get("train", {}).pop(key, None)
    for key in ("data", "keep"):  # they would be appended
        if _option_value(argv, _flag(key), ""):
            recipe.pop(key, None)
    name = _option_value(argv, "--method", recipe.get("method", base.method))
    if name != DENSE or base is DistillOptions:
        parts = {name.replace("-", "_"): find_method(METHODS, name).options, **parts}
    parts |= {"objective": Objective, "train": TrainOptions, "schedule": Schedule, "trained": Trained}
    known = {*parts, *(field.name for field in fields(base))}
    defaults = {key: value for key, value in recipe.items() if key in known}
    return _parse(verb, argv, base, {**defaults, "method": name}, **parts)


def _flag(key: str) -> str:
    return f"--{key.replace('_', '-')}"


def _run_training(args: Any, teacher: str | None, tokenizer: str, **start: Any) -> None:
    """Trains as `args` say a student that starts as `start` says."""
    from signbit.hub.config import SignbitConfig
    from signbit.hub.distill import Recipe, Start, train
    from signbit.methods.rules import parse_rule

    if not args.data:
        raise OptionError("what is learnt from? give --data FILE (.txt, .jsonl, .parquet, .tokens), or a named set")
    _quiet()
    options = getattr(args, args.method.replace("-", "_"), None)
    config = None
    if options is not None:
        rules: dict[str, dict[str, Any]] = {}
        for text in args.rule:
            pattern, values = parse_rule(text, type(options))
            rules[pattern] = {**rules.pop(pattern, {}), **values}
        config = SignbitConfig(args.method, "keep", args.keep, args.allow_partial, rules, **asdict(options))
    elif args.keep or args.rule or args.allow_partial:
        raise OptionError("--keep, --rule and --allow-partial are for binary layers, of which --method none has none")
    recipe = Recipe(
        Start(**start), teacher, tokenizer, config, args.data, args.objective, args.train, args.schedule, args.trained,
        args.teacher_logits,
    )  # fmt: skip
    bars = _Bars()
    try:
        last = train(recipe, args.out, args.resume, args.data_dir, args.cache, bars.tokenizing, _note)
    finally:
        bars.close()
    if last is None:
        return  # another process says it
    pictures = "loss.png lies" if config is None else "loss.png and flips.png lie"
    print(f"{last} is the last checkpoint; metrics.jsonl, {pictures} beside it")
    print(f"pack it: signbit pack {args.out} -o OUT")


def _list_recipes(pretrained: bool) -> None:
    from signbit.train.recipe import recipe_names

    for name, about in recipe_names(pretrained).items():
        print(f"{name:28} {about}")


def distill(argv: Sequence[str]) -> None:
    """`signbit distill`."""
    from signbit.train.recipe import PRETRAINED, read_recipe

    if "--list" in argv:
        _list_recipes(pretrained=False)
        return
    wanted = _option_value(argv, "--recipe", "")
    recipe = read_recipe(wanted) if wanted else {}
    if foreign := [key for key in PRETRAINED if key in recipe]:
        raise OptionError(
            f"the recipe {wanted} has {foreign[0]!r}, which signbit pretrain takes and signbit distill does not"
        )
    args = _parse_training("distill", argv, DistillOptions, recipe)
    if args.teacher is None or args.out is None:
        raise OptionError("what and where to? signbit distill TEACHER -o RUN --data FILE --max-steps N")
    _run_training(args, args.teacher, args.teacher, model=args.teacher)


def pretrain(argv: Sequence[str]) -> None:
    """`signbit pretrain`."""
    from signbit.models import Shape
    from signbit.train.recipe import read_recipe

    if "--list" in argv:
        _list_recipes(pretrained=True)
        return
    wanted = _option_value(argv, "--recipe", "")
    recipe = read_recipe(wanted) if wanted else {}
    recipe["trained"] = {"train_embeddings": True, **recipe.get("trained", {})}
    taught = _option_value(argv, "--teacher", recipe.get("teacher", ""))
    if not taught:
        no_teacher = {"kd_alpha": 0.0, "kd_beta": 0.0, "kd_beta_last": None, "kd_gamma": 0.0}
        recipe["objective"] = {**recipe.get("objective", {}), **no_teacher}
    args = _parse_training("pretrain", argv, PretrainOptions, recipe, shape=Shape)
    tokenizer = args.tokenizer or args.teacher or args.model
    if args.out is None:
        raise OptionError("where to? signbit pretrain --recipe NAME --teacher TEACHER --data FILE -o RUN")
    if tokenizer is None:
        raise OptionError("whose tokenizer? give --tokenizer, or --teacher or --model, whose it then is")
    if args.model is None and args.random:
        raise OptionError("--random takes the shape of --model and not its weights; a shape alone is random anyway")
    if args.model is not None and (
        flags := [f for f in map(_flag, Shape.__dataclass_fields__) if _option_value(argv, f, "")]
    ):
        raise OptionError(f"{flags[0]} is for a student without --model, which has a shape; leave one of both out")
    if not taught:
        _note("there is no teacher: the loss is that of the next token")
    start = {"shape": args.shape} if args.model is None else {"model": args.model, "random": args.random}
    _run_training(args, args.teacher, tokenizer, **start)


def data(argv: Sequence[str]) -> None:
    """`signbit data`."""
    if argv and argv[0] in _DATA:
        _DATA[argv[0]](argv[1:])
        return
    if argv and argv[0] in ("-h", "--help"):
        _parse("data", argv, DataOptions)
    raise OptionError(
        "signbit data makes what a student learns from: signbit data self-generate MODEL -o DATA.tokens, or "
        "signbit data teacher-logits TEACHER -o FILE.logits --data SOURCE"
    )


def self_generate(argv: Sequence[str]) -> None:
    """`signbit data self-generate`."""
    args = _parse("data self-generate", argv, SelfGenerateOptions)
    from signbit.data import self_generate as write
    from signbit.hub.load import load_any, load_tokenizer

    _quiet()
    model, tokenizer = load_any(args.model, args.dtype, args.device), load_tokenizer(args.model)
    bars = _Bars()
    try:
        made = write(
            model, tokenizer, args.out, args.sequences, args.sequence_length, args.batch, args.seed,
            lambda done, total: bars("writing", done, total, ""),
        )  # fmt: skip
    finally:
        bars.close()
    print(f"{made.path}: {made.documents:,} sequences, {made.tokens:,} tokens; learn from it: --data {made.path}")


def teacher_logits(argv: Sequence[str]) -> None:
    """`signbit data teacher-logits`."""
    args = _parse("data teacher-logits", argv, TeacherLogitsOptions)
    if not args.data:
        raise OptionError(
            "what is the teacher asked about? give --data FILE (.txt, .jsonl, .parquet, .tokens), or a named set"
        )
    from signbit.hub.distill import teacher_logits as write

    _quiet()
    bars = _Bars()
    try:
        made = write(
            args.teacher, args.data, args.out, args.sequence_length, args.top, args.batch, args.device, args.dtype,
            args.data_dir, args.cache, bars.tokenizing, lambda done, total: bars("asking", done, total, ""),
        )  # fmt: skip
    finally:
        bars.close()
    print(
        f"{made.path}: the {made.top} likeliest of {made.vocabulary} tokens behind each of {made.blocks * made.length:,}, "
        f"{_bytes(made.path.stat().st_size)}; learn from it: --teacher-logits {made.path} --sequence-length {made.length}"
    )


#: What `signbit data` makes.
_DATA = {"self-generate": self_generate, "teacher-logits": teacher_logits}


def pack(argv: Sequence[str]) -> None:
    """`signbit pack`."""
    args = _parse("pack", argv, PackOptions)
    from signbit.hub.distill import pack as write

    _quiet()
    path, zeros = write(args.run, args.out, args.overwrite, args.dtype)
    if zeros:
        print(f"note: {zeros} latents are exactly 0; their sign is +1, as it was in training", file=sys.stderr)
    print(f"wrote {path}; see `signbit info {args.out}`")


def flips(argv: Sequence[str]) -> None:
    """`signbit flips`."""
    args = _parse("flips", argv, FlipsOptions)
    if args.plot is not None:
        from signbit.evaluate.plot import check_plot

        check_plot(args.plot)
    from signbit.train.flips import read_flips

    history = read_flips(args.run)
    rows = [
        (kind, str(layers), f"{weights:,}", *(f"{share:.4%}" for share in shares))
        for kind, layers, weights, *shares in history.summary()
    ]
    _table(None, ("layers", "count", "signs", "first", "mean", "last"), rows)
    print(
        f"share of the signs that changed a step, of {history.step[-1]:,} steps; first and last: mean of "
        f"{history.steps[0]} and {history.steps[-1]} of them"
    )
    _write_json(args.json, {"signbit": VERSION, "run": args.run, **history.to_dict()})
    if args.plot is not None:
        from signbit.train.plot import plot_flips

        plot_flips(history, args.plot, Path(args.run).name)


def memory(argv: Sequence[str]) -> None:
    """`signbit memory`."""
    args = _parse("memory", argv, MemoryOptions)
    facts: dict[str, Any] = {"signbit": VERSION, "command": shlex.join(["signbit", "memory", *argv])}
    if args.energy and args.model is None and args.recipe is None:
        from signbit.evaluate.energy import PAPER

        models, name = PAPER, ""
    else:
        from signbit.hub import memory as of

        _quiet()
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
        _table(f"energy of {args.tokens} tokens", ("model", "form", "process", "multiplications", "additions"), rows)
        print(
            "linears and attention of the blocks, by the model of BitNet (arXiv 2310.11453); embedding and head are left out"
        )
        _write_json(
            args.json, {**facts, "tokens": args.tokens, "energy": [{"model": m, **asdict(u)} for m, u in found]}
        )
        return
    from signbit.hub.load import torch_device

    uses = of.memory(asked, args.measure, torch_device(args.device), _note)
    forms = [
        (
            use.phase, use.form, _bytes(use.weights),
            *(_bytes(part) if use.phase == "training" else "" for part in (use.gradients, use.optimizer)),
            _bytes(use.activations), _bytes(use.total), "measured" if use.measured else "computed",
        )
        for use in uses
    ]  # fmt: skip
    options = asked.options
    _table(name, ("", "form", "weights", "gradients", "optimizer", "activations", "total", ""), forms)
    print(
        f"1 bit is {asked.method}; {options.optim}; {asked.sequences} × {options.sequence_length} tokens at a time"
        f"{', blocks computed again in the backward pass' if options.gradient_checkpointing else ''}"
    )
    print(
        "activations: in training what the backward pass needs (logits and a teacher are not in it); packed: keys and values"
    )
    size = {"sequences": asked.sequences, "sequence_length": options.sequence_length, "optim": options.optim}
    rows_of = [{**asdict(use), "total": use.total} for use in uses]
    _write_json(args.json, {**facts, "method": asked.method, **size, "config": asked.config.to_dict(), "rows": rows_of})


def info(argv: Sequence[str]) -> None:
    """`signbit info`."""
    args = _parse("info", argv, InfoOptions)
    from signbit.evaluate.size import measure_size

    size = measure_size(args.model)
    rows: list[tuple[str, ...]]
    if args.layers:
        rows = [
            (
                layer.name, f"{layer.out_features} × {layer.in_features}", f"{layer.bits_per_weight:.3f}",
                f"{layer.salient:.1%}", _bytes(layer.nbytes),
            )
            for layer in size.layers
        ]  # fmt: skip
        _table(None, ("layer", "shape", "true bits", "salient", "bytes"), rows)
    else:
        rows = [
            (kind.name, str(kind.layers), kind.shape, kind.bits, f"{kind.salient:.1%}", _bytes(kind.nbytes))
            for kind in size.kinds()
        ]
        _table(None, ("layers", "count", "shape", "true bits", "salient", "bytes"), rows)
    options = ", ".join(f"{key}={value}" for key, value in size.settings.get("options", {}).items())
    print(f"method                          {size.settings.get('method', 'unknown')} ({options})")
    print(f"true bits per packed weight     {size.bits_per_weight:.3f}  ({size.linears_saved:.1%} of 16 saved)")
    print(f"whole file, bits per parameter  {size.bits_per_parameter:.3f}")
    print(f"parameters                      {size.parameters:,}")
    print(f"bytes of the weight files       {size.file_bytes:,}")
    print(f"16-bit model would be           {2 * size.parameters:,}  ({size.file_saved:.1%} saved)")
    _write_json(args.json, size.to_dict())


def evaluate(argv: Sequence[str]) -> None:
    """`signbit eval`."""
    if "--list" in argv:
        from signbit.data import PROTOCOLS

        for name, protocol in PROTOCOLS.items():
            print(f"{name:14} {protocol.help}")
        return
    from signbit.evaluate.perplexity import TextOptions

    args = _parse("eval", argv, EvalOptions, text=TextOptions, run=RunOptions)
    from tqdm import tqdm

    from signbit.evaluate.perplexity import check, perplexity
    from signbit.evaluate.size import measure_size
    from signbit.hub.load import load_any, load_tokenizer
    from signbit.linear import PackedLinear, set_activations

    _quiet()
    names = [name.strip() for name in args.ppl.split(",") if name.strip()]
    if not names:
        raise OptionError("--ppl names nothing to measure; see signbit eval --list")
    for name in names:
        check(name, args.data_dir, args.text, args.max_windows)
    results: list[dict[str, Any]] = []
    saved: dict[str, tuple[float, float]] = {}
    for model_name in (args.model, *args.against):
        model = load_any(model_name, args.run.dtype, args.run.device)
        if Path(model_name).is_dir() and any(isinstance(module, PackedLinear) for module in model.modules()):
            size = measure_size(model_name)
            saved[model_name] = size.linears_saved, size.file_saved
        tokenizer = load_tokenizer(model_name)
        if not set_activations(model, args.run.activations):
            print(f"note: {model_name} has no packed layer; its activations stay exact", file=sys.stderr)
        for name in names:
            with tqdm(desc=f"{Path(model_name).name} {name}", unit="window", disable=None, leave=False) as bar:

                def step(done: int, total: int, value: float, bar: Any = bar) -> None:
                    bar.total = total
                    bar.set_postfix_str(f"ppl {value:.2f}", refresh=False)
                    bar.update(done - bar.n)

                result = perplexity(model, tokenizer, name, args.data_dir, args.text, args.max_windows, step)
            results.append({"model": model_name, **result.to_dict(), "saved": saved.get(model_name)})
        del model
    anchors = {r["protocol"]: r["perplexity"] for r in results if r["model"] == (args.against or ("",))[-1]}
    rows = [
        (
            r["model"], r["protocol"], f"{r['perplexity']:.4g}" if r["perplexity"] >= 1e4 else f"{r['perplexity']:.3f}",
            f"{r['perplexity'] / anchors[r['protocol']]:.3g} ×" if r["protocol"] in anchors else "",
            " / ".join(f"{share:.1%}" for share in saved.get(r["model"], ())),
            f"{r['windows']} × {r['window']}", f"{r['dtype']}, {r['activations']}", f"{r['seconds_s']:.0f} s",
        )
        for r in results
    ]  # fmt: skip
    last = f"of {args.against[-1]}" if args.against else ""
    _table(None, ("model", "protocol", "perplexity", last, "saved", "windows", "run", "time"), rows)
    if saved:
        print("saved: of 16 bits, in the packed linears / in the whole weight files")
    _write_json(args.json, {"signbit": VERSION, "command": shlex.join(["signbit", "eval", *argv]), "results": results})


def generate(argv: Sequence[str]) -> None:
    """`signbit generate`."""
    from signbit.serve.generate import GenerateOptions

    args = _parse("generate", argv, PromptOptions, sampling=GenerateOptions, run=RunOptions)
    from signbit.serve.generate import generate as continue_text

    model, tokenizer = _load_to_run(args)
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt

    def show(text: str) -> None:
        print(text, end="", flush=True)

    if not args.chat:
        show(prompt)
    messages = [{"role": "user", "content": prompt}] if args.chat else prompt
    result = continue_text(model, tokenizer, messages, args.sampling, show)
    print()
    print(
        f"[{result.new_tokens} tokens in {result.seconds_s:.1f} s; {result.decode_tokens_per_s:.1f} tokens/s after "
        f"the first{'; stopped' if result.stopped else ''}{'; the context is full' if result.context_full else ''}]",
        file=sys.stderr,
    )


def chat(argv: Sequence[str]) -> None:
    """`signbit chat`."""
    from signbit.serve.generate import GenerateOptions

    args = _parse("chat", argv, ChatOptions, sampling=GenerateOptions, run=RunOptions)
    from signbit.serve.chat import chat as talk

    model, tokenizer = _load_to_run(args)
    talk(model, tokenizer, args.sampling, args.system)


def doctor(argv: Sequence[str]) -> None:
    """`signbit doctor`; raises SignbitError if kernels fail their check."""
    args = _parse("doctor", argv, DoctorOptions)
    from signbit.evaluate.doctor import examine, multiplied
    from signbit.ops.cpu import VARIABLE

    machine = examine()
    _print_machine(machine, VARIABLE)
    facts: dict[str, Any] = asdict(machine)
    if args.model is not None:
        from signbit.format import read_description
        from signbit.hub.load import load_any

        read_description(args.model)
        _quiet()
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
    _write_json(args.json, facts)
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


def _load_to_run(args: Any) -> tuple[Any, Any]:
    from signbit.hub.load import load_any, load_tokenizer
    from signbit.linear import set_activations

    _quiet()
    model = load_any(args.model, args.run.dtype, args.run.device)
    if not set_activations(model, args.run.activations):
        print(f"note: {args.model} has no packed layer; its activations stay exact", file=sys.stderr)
    return model, load_tokenizer(args.model)


VERBS: dict[str, tuple[Callable[[Sequence[str]], None], type]] = {
    "quantize": (quantize, QuantizeOptions),
    "distill": (distill, DistillOptions),
    "pretrain": (pretrain, PretrainOptions),
    "pack": (pack, PackOptions),
    "flips": (flips, FlipsOptions),
    "data": (data, DataOptions),
    "info": (info, InfoOptions),
    "memory": (memory, MemoryOptions),
    "eval": (evaluate, EvalOptions),
    "generate": (generate, PromptOptions),
    "chat": (chat, ChatOptions),
    "doctor": (doctor, DoctorOptions),
}


def _help() -> str:
    lines = [f"  {verb:10} {options.__doc__}" for verb, (_, options) in VERBS.items()]
    return "\n".join(
        [
            "usage: signbit VERB ...   (signbit VERB --help lists the options of a verb)",
            "",
            "1-bit language models: made from any Hugging Face decoder, packed, run and measured.",
            "",
            *lines,
            "",
            "  --version  Show the version.",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit status."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_help())
        return 0 if argv else EXIT_USAGE
    if argv[0] in ("--version", "version"):
        print(f"signbit {VERSION}")
        return 0
    if argv[0] not in VERBS:
        print(
            f"signbit: there is no verb {argv[0]!r}; there are {', '.join(VERBS)} (see signbit --help)", file=sys.stderr
        )
        return EXIT_USAGE
    try:
        VERBS[argv[0]][0](argv[1:])
    except SignbitError as error:
        print(f"signbit: {error}", file=sys.stderr)
        return EXIT_ERROR
    except KeyboardInterrupt:
        resumes = {
            "quantize": "; the same command goes on at the last finished block",
            "distill": "; with --resume it goes on at the last checkpoint",
            "pretrain": "; with --resume it goes on at the last checkpoint",
            "data": "; the same command goes on with what is written",
        }
        resume = resumes.get(argv[0], "")
        print(f"signbit: interrupted{resume}", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        return EXIT_ERROR
    return 0
