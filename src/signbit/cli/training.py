"""`signbit distill`, `pretrain`, `pack`, `flips`: runs and what becomes of them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from signbit.cli.output import Bars, note, quiet, table, write_json
from signbit.cli.parsing import flag_of, option_value, parse
from signbit.errors import OptionError
from signbit.version import VERSION


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
    if any(option_value(argv, flag_of(key), "") for key in lengths):
        for key in lengths:
            recipe.get("train", {}).pop(key, None)
    for key in ("data", "keep"):  # they would be appended
        if option_value(argv, flag_of(key), ""):
            recipe.pop(key, None)
    name = option_value(argv, "--method", recipe.get("method", base.method))
    if name != DENSE or base is DistillOptions:
        parts = {name.replace("-", "_"): find_method(METHODS, name).options, **parts}
    parts |= {"objective": Objective, "train": TrainOptions, "schedule": Schedule, "trained": Trained}
    known = {*parts, *(field.name for field in fields(base))}
    defaults = {key: value for key, value in recipe.items() if key in known}
    return parse(verb, argv, base, {**defaults, "method": name}, **parts)


def _run_training(args: Any, teacher: str | None, tokenizer: str, **start: Any) -> None:
    """Trains as `args` say a student that starts as `start` says."""
    from signbit.hub.config import SignbitConfig
    from signbit.hub.distill import Recipe, Start, train
    from signbit.methods.rules import parse_rule

    if not args.data:
        raise OptionError("what is learnt from? give --data FILE (.txt, .jsonl, .parquet, .tokens), or a named set")
    quiet()
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
    bars = Bars()
    try:
        last = train(recipe, args.out, args.resume, args.data_dir, args.cache, bars.tokenizing, note)
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
    wanted = option_value(argv, "--recipe", "")
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
    wanted = option_value(argv, "--recipe", "")
    recipe = read_recipe(wanted) if wanted else {}
    recipe["trained"] = {"train_embeddings": True, **recipe.get("trained", {})}
    taught = option_value(argv, "--teacher", recipe.get("teacher", ""))
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
        flags := [f for f in map(flag_of, Shape.__dataclass_fields__) if option_value(argv, f, "")]
    ):
        raise OptionError(f"{flags[0]} is for a student without --model, which has a shape; leave one of both out")
    if not taught:
        note("there is no teacher: the loss is that of the next token")
    start = {"shape": args.shape} if args.model is None else {"model": args.model, "random": args.random}
    _run_training(args, args.teacher, tokenizer, **start)


def pack(argv: Sequence[str]) -> None:
    """`signbit pack`."""
    args = parse("pack", argv, PackOptions)
    from signbit.hub.distill import pack as write

    quiet()
    path, zeros = write(args.run, args.out, args.overwrite, args.dtype)
    if zeros:
        print(f"note: {zeros} latents are exactly 0; their sign is +1, as it was in training", file=sys.stderr)
    print(f"wrote {path}; see `signbit info {args.out}`")


def flips(argv: Sequence[str]) -> None:
    """`signbit flips`."""
    args = parse("flips", argv, FlipsOptions)
    if args.plot is not None:
        from signbit.evaluate.plot import check_plot

        check_plot(args.plot)
    from signbit.train.flips import read_flips

    history = read_flips(args.run)
    rows = [
        (kind, str(layers), f"{weights:,}", *(f"{share:.4%}" for share in shares))
        for kind, layers, weights, *shares in history.summary()
    ]
    table(None, ("layers", "count", "signs", "first", "mean", "last"), rows)
    print(
        f"share of the signs that changed a step, of {history.step[-1]:,} steps; first and last: mean of "
        f"{history.steps[0]} and {history.steps[-1]} of them"
    )
    write_json(args.json, {"signbit": VERSION, "run": args.run, **history.to_dict()})
    if args.plot is not None:
        from signbit.train.plot import plot_flips

        plot_flips(history, args.plot, Path(args.run).name)
