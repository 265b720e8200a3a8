"""`signbit distill`, `finetune`, `pretrain`, `pack`, `flips`: runs and what becomes of them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from signbit.cli.output import Bars, check_file, note, quiet, table, write_json
from signbit.cli.parsing import flag_of, option_value, parse
from signbit.errors import OptionError
from signbit.version import VERSION

#: The objective of a run that has none.
_NO_TEACHER = {"kd_alpha": 0.0, "kd_beta": 0.0, "kd_beta_last": None, "kd_gamma": 0.0}


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
    head: Literal["keep", "binary"] = "keep"
    """Output head: in full precision, or binary as the blocks' layers are, no longer the embedding's matrix."""
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
class StartOptions(TrainingOptions):
    """What a student that goes on takes from where."""

    source: Annotated[str | None, tyro.conf.arg(metavar="MODEL")] = None
    """Model that a packed start was made of: latents get the magnitudes |w − shift| of its weights, not |scale|."""
    masks: Annotated[str | None, tyro.conf.arg(metavar="PTQ_DIR")] = None
    """Packed directory of the same model (of pbllm or pb-gptq), whose salient weights are taken; the rest is the model's."""


@dataclass(frozen=True)
class DistillOptions(StartOptions):
    """Train a 1-bit student of a model (the teacher): sign matrices by what the teacher answers."""

    teacher: Annotated[tyro.conf.Positional[str | None], tyro.conf.arg(metavar="TEACHER")] = None
    """Hugging Face model directory or hub id; the student starts from it."""
    start: Annotated[str | None, tyro.conf.arg(metavar="MODEL|PTQ_DIR|RUN")] = None
    """What the student starts from, if not TEACHER: another model, or a packed directory or a run, which goes on as it is."""


@dataclass(frozen=True)
class FinetuneOptions(StartOptions):
    """Train a 1-bit model by the next token, without a teacher: a model made binary, a run, or a packed directory."""

    method: str = "pbllm"
    """Method; that of a run or a packed directory is its own. Its options are listed below (see --method NAME --help)."""
    start: Annotated[tyro.conf.Positional[str | None], tyro.conf.arg(metavar="MODEL|PTQ_DIR|RUN")] = None
    """Model directory or hub id, packed directory, or run; stands first behind the verb."""
    lora: bool = False
    """Train adapters beside the layers of a packed directory (LoRA, through PEFT), which stay as they are."""


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
    """Directory of a run of signbit distill, finetune or pretrain."""
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


def _go_on(recipe: dict[str, Any], begun: str, source: str) -> Any:
    """How the student is binary that goes on from `begun`, whose options become the recipe's; None for a plain model."""
    from signbit.hub.distill import config_to_go_on

    config = config_to_go_on(begun, source or None) if begun else None
    if config is not None:
        options = asdict(config.plan.options)
        field, made_by = config.method.replace("-", "_"), recipe.get("method", config.method)
        if made_by != config.method:
            raise OptionError(
                f"{begun} is of the method {config.method}, and the recipe's is {made_by}; leave one of both out"
            )
        recipe |= {"method": config.method, field: {**options, **recipe.get(field, {})}}
    return config


def _masked(recipe: dict[str, Any], argv: Sequence[str]) -> dict[str, Any]:
    """The options that say how the salient weights were chosen that --masks names, which become the recipe's."""
    from signbit.hub.distill import salient_options

    masks = option_value(argv, "--masks", recipe.get("masks", ""))
    options = salient_options(masks) if masks else {}
    if masks:
        recipe["pbllm"] = {**options, **recipe.get("pbllm", {})}
    return options


def _check_masked(args: Any, options: dict[str, Any]) -> None:
    given = getattr(args, args.method.replace("-", "_"))
    for key, value in options.items():
        if getattr(given, key, value) != value:
            raise OptionError(f"{key} is {value} in {args.masks}, whose masks are taken; leave out {flag_of(key)}")


def _gone_on(args: Any, begun: str, config: Any) -> Any:
    """`config` with what flags may change of it; raises OptionError for what they may not."""
    from signbit.hub.distill import is_run

    if args.method != config.method:
        raise OptionError(f"{begun} is of the method {config.method}; leave out --method {args.method}")
    if args.keep or args.rule or args.allow_partial or args.head not in ("keep", config.head):
        raise OptionError(
            f"which layers are binary, and how, is {begun}'s; leave out --head, --keep, --rule and --allow-partial"
        )
    options = getattr(args, args.method.replace("-", "_"))
    free = () if is_run(begun) else options.TRAINING
    for key, value in asdict(config.plan.options).items():
        if getattr(options, key) != value and key not in free:
            raise OptionError(f"{key} is {value} in {begun}, which goes on as it is; leave out {flag_of(key)}")
    settings = config.settings()
    del settings["options"]
    return type(config)(**settings, **asdict(options))


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
    if "adapters" not in parts and (name != DENSE or base is not PretrainOptions):
        field, options = name.replace("-", "_"), find_method(METHODS, name).options
        parts = {field: options, **parts}
        recipe[field] = {**options.training_defaults(), **recipe.get(field, {})}
    parts |= {"objective": Objective, "train": TrainOptions, "schedule": Schedule, "trained": Trained}
    known = {*parts, *(field.name for field in fields(base))}
    defaults = {key: value for key, value in recipe.items() if key in known}
    return parse(verb, argv, base, {**defaults, "method": name}, **parts)


def _run_training(args: Any, teacher: str | None, tokenizer: str, config: Any = None, **start: Any) -> None:
    """Trains as `args` say a student that starts as `start` says, or goes on as `config` says."""
    from signbit.hub.config import SignbitConfig
    from signbit.hub.distill import Recipe, Start, train
    from signbit.methods.rules import parse_rule

    if not args.data:
        raise OptionError("what is learnt from? give --data FILE (.txt, .jsonl, .parquet, .tokens), or a named set")
    quiet()
    options = getattr(args, args.method.replace("-", "_"), None)
    if config is None and options is not None:
        rules: dict[str, dict[str, Any]] = {}
        for text in args.rule:
            pattern, values = parse_rule(text, type(options))
            rules[pattern] = {**rules.pop(pattern, {}), **values}
        config = SignbitConfig(args.method, args.head, args.keep, args.allow_partial, rules, **asdict(options))
    elif options is None and (args.keep or args.rule or args.allow_partial or args.head != "keep"):
        raise OptionError(
            "--head, --keep, --rule and --allow-partial are for binary layers, of which --method none has none"
        )
    recipe = Recipe(
        Start(**start), teacher, tokenizer, config, args.data, args.objective, args.train, args.schedule, args.trained,
        args.teacher_logits, getattr(args, "adapters", None),
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
    if recipe.lora is None:
        print(f"pack it: signbit pack {args.out} -o OUT")
    else:
        print(f"it is an adapter beside {args.start}: signbit generate {last} PROMPT")


def _recipe(verb: str, argv: Sequence[str]) -> dict[str, Any]:
    """The recipe that is asked for, empty if none is; raises OptionError for another verb's."""
    from signbit.train.recipe import read_recipe, verb_of

    wanted = option_value(argv, "--recipe", "")
    recipe = read_recipe(wanted) if wanted else {}
    key, its = verb_of(recipe)
    if verb == "finetune" and "teacher" in recipe:
        key = "teacher"
    if key is not None and its != verb:
        raise OptionError(f"the recipe {wanted} has {key!r}, which signbit {its} takes and signbit {verb} does not")
    return recipe


def _list_recipes(verb: str) -> None:
    from signbit.train.recipe import recipe_names

    for name, about in recipe_names(verb).items():
        print(f"{name:28} {about}")


def distill(argv: Sequence[str]) -> None:
    """`signbit distill`."""
    if "--list" in argv:
        _list_recipes("distill")
        return
    recipe = _recipe("distill", argv)
    config = _go_on(recipe, option_value(argv, "--start", recipe.get("start", "")), option_value(argv, "--source", ""))
    masked = _masked(recipe, argv)
    args = _parse_training("distill", argv, DistillOptions, recipe)
    if args.teacher is None or args.out is None:
        raise OptionError("what and where to? signbit distill TEACHER -o RUN --data FILE --max-steps N")
    if config is not None:
        config = _gone_on(args, args.start, config)
    _check_masked(args, masked)
    _run_training(
        args, args.teacher, args.teacher, config, model=args.start or args.teacher, goes_on=config is not None,
        source=args.source, masks=args.masks,
    )  # fmt: skip


def finetune(argv: Sequence[str]) -> None:
    """`signbit finetune`."""
    if "--list" in argv:
        _list_recipes("finetune")
        return
    recipe = _recipe("finetune", argv)
    if "--lora" in argv:
        _finetune_adapters(argv, recipe)
        return
    # What it goes on from decides which options there are, and so is looked for before they are parsed.
    begun = argv[0] if argv and not argv[0].startswith("-") else recipe.get("start", "")
    config = _go_on(recipe, begun, option_value(argv, "--source", ""))
    recipe["objective"] = {**recipe.get("objective", {}), **_NO_TEACHER}
    masked = _masked(recipe, argv)
    args = _parse_training("finetune", argv, FinetuneOptions, recipe)
    if args.start is None or args.out is None:
        raise OptionError("what and where to? signbit finetune MODEL|PTQ_DIR|RUN -o RUN --data FILE --max-steps N")
    if args.start != begun:
        raise OptionError(f"{args.start} stands first behind the verb: signbit finetune {args.start} -o RUN ...")
    if args.objective.needs_teacher or args.teacher_logits is not None:
        raise OptionError(
            "signbit finetune has no teacher; with one it is signbit distill TEACHER --start START -o RUN ..."
        )
    from signbit.hub.distill import is_run

    if config is not None:
        config = _gone_on(args, begun, config)
    _check_masked(args, masked)
    tokenizer = str(Path(begun) / "tokenizer") if is_run(begun) else begun
    _run_training(
        args, None, tokenizer, config, model=begun, goes_on=config is not None, source=args.source, masks=args.masks
    )


def _finetune_adapters(argv: Sequence[str], recipe: dict[str, Any]) -> None:
    """`signbit finetune OUT --lora`."""
    from signbit.train import Lora

    recipe["objective"] = {**recipe.get("objective", {}), **_NO_TEACHER}
    recipe["trained"] = {"train_norms": False, **recipe.get("trained", {})}
    recipe["train"] = {"optim": "adamw_torch", "learning_rate": 2e-4, **recipe.get("train", {})}
    args = _parse_training("finetune", argv, FinetuneOptions, recipe, adapters=Lora)
    if args.start is None or args.out is None:
        raise OptionError("what and where to? signbit finetune OUT --lora -o RUN --data FILE --max-steps N")
    own = ("--method", "--head", "--keep", "--rule", "--allow-partial", "--source", "--masks")
    if given := [flag for flag in own if any(word.partition("=")[0] == flag for word in argv)]:
        raise OptionError(f"with --lora the packed layers of {args.start} stay as they are; leave out {given[0]}")
    if args.objective.needs_teacher or args.teacher_logits is not None:
        raise OptionError("signbit finetune has no teacher; adapters are trained by the next token")
    _run_training(args, None, args.start, model=args.start, goes_on=True)


def pretrain(argv: Sequence[str]) -> None:
    """`signbit pretrain`."""
    from signbit.models import Shape

    if "--list" in argv:
        _list_recipes("pretrain")
        return
    recipe = _recipe("pretrain", argv)
    recipe["trained"] = {"train_embeddings": True, **recipe.get("trained", {})}
    taught = option_value(argv, "--teacher", recipe.get("teacher", ""))
    if not taught:
        recipe["objective"] = {**recipe.get("objective", {}), **_NO_TEACHER}
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
    check_file("--json", args.json)
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
