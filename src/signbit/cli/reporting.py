"""`signbit report`, `compare`, `diff`: models beside each other, as a page, a table, and matrix by matrix."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from signbit.cli import measured
from signbit.cli.output import Bars, check_file, quiet, table, write_json
from signbit.cli.parsing import RunOptions, at_least, parse
from signbit.errors import OptionError

if TYPE_CHECKING:
    from signbit.evaluate.facts import Facts


@dataclass(frozen=True)
class MeasureOptions:
    """What is measured of each model; what was measured before is taken."""

    ppl: str = "wikitext2"
    """Protocols or text files, divided by commas (signbit eval --list); none measures none. --window, --stride and --bos
    are for the files."""
    max_windows: int | None = None
    """Stop perplexity after this many windows; the result says so."""
    tasks: str | None = None
    """Tasks, groups or suites (zeroshot7 …), divided by commas."""
    few_shot: int | None = None
    """Solved examples in each prompt; default: as the task says, mostly 0."""
    limit: int | None = None
    """Only the first documents of each task."""
    prompt_bos: Literal["tokenizer", "yes", "no"] | None = None
    """Whether the beginning-of-sequence token stands before a prompt of a task; default: as the file of --requests says,
    else as the tokenizer does it."""
    requests: str | None = None
    """Score the requests of this file in place of --tasks; it needs no lm-eval."""
    results: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Take results from this file, which --json of eval, compare or report wrote, maybe elsewhere; NAME=FILE names its
    model. May be repeated."""
    data_dir: str | None = None
    """Directory of local files in place of the hub."""
    held_out: str = "casterbridge"
    """Text on which KL and top-1 agreement with the teacher are measured: a named set or a file."""
    held_out_tokens: int = 8192
    """At most so many tokens of it."""
    block: int = 512
    """Tokens of it that are read at a time."""
    prompt: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A text to go on from; may be repeated. Default: three of signbit's."""
    sample_tokens: int = 40
    """Tokens that are written behind each."""
    skip: tyro.conf.UseAppendAction[tuple[Literal["agreement", "speed", "samples", "layers"], ...]] = ()
    """Leave this out; may be repeated."""
    again: bool = False
    """Measure anew what is kept from before (but answers to tasks)."""
    json: str | None = None
    """Also write everything to this JSON file."""


@dataclass(frozen=True)
class ReportOptions(MeasureOptions):
    """Write the report of a model: a page as Markdown and HTML, its pictures, and the same facts into its model card."""

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")] = field(kw_only=True)
    """Packed directory, or any model; NAME=MODEL names it in the report."""
    against: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A model to stand beside it; the last one is the teacher. NAME=MODEL names it; may be repeated."""
    out: Annotated[str, tyro.conf.arg(aliases=["-o"], metavar="FOLDER")] = "report"
    """Folder to write: report.md, report.html, report.json, quality.png, layers.png."""
    no_card: bool = False
    """Leave the model card (README.md) of MODEL alone, which else gets the same facts if it is a packed directory."""


@dataclass(frozen=True)
class CompareOptions(MeasureOptions):
    """Show models beside each other: bits, bytes, perplexity, tasks, agreement with the last one, speed."""

    models: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="MODEL")] = field(kw_only=True)
    """Models, packed or not; the last one is the teacher. NAME=MODEL names one."""


@dataclass(frozen=True)
class DiffOptions:
    """Show where two models differ: signs, values and answers; packed, full-precision, or runs with latent weights."""

    a: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="A")]
    """Packed directory, full-precision model, or the directory of a run."""
    b: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="B")]
    """The one that A is compared with: errors are shares of its energy, and KL is KL(B ‖ A)."""
    layers: bool = False
    """One line a layer instead of one a kind."""
    text: str = "casterbridge"
    """Text on which both answer: a named set or a file; none asks nothing."""
    text_tokens: int = 8192
    """At most so many tokens of it."""
    block: int = 512
    """Tokens of it that are read at a time."""
    data_dir: str | None = None
    """Directory of local files in place of the hub."""
    json: str | None = None
    """Also write every layer to this JSON file."""


def report(argv: Sequence[str]) -> None:
    """`signbit report`."""
    from signbit.evaluate.perplexity import TextOptions

    args = parse("report", argv, ReportOptions, text=TextOptions, run=RunOptions)
    from signbit.evaluate.machines import here
    from signbit.evaluate.page import html, markdown
    from signbit.evaluate.plot import check_plot
    from signbit.evaluate.report import make_page
    from signbit.hub.card import with_report
    from signbit.hub.load import is_packed

    measured.check(args)
    folder = _folder(args.out)
    check_plot(folder / "quality.png")
    check_file("--json", args.json)  # which may lie in the folder
    quiet()
    subjects = measured.subjects((args.model, *args.against), args)
    models, teacher = measured.measured(subjects, args, bool(args.against))
    command = shlex.join(["signbit", "report", *argv])
    page = make_page(models, teacher, folder, [command], here(args.run.device))
    facts = _facts(models, command)
    for name, text in (("report.md", markdown(page)), ("report.html", html(page))):
        _write(folder / name, text)
    write_json(str(folder / "report.json"), facts)
    write_json(args.json, facts)
    print(f"wrote {folder}/report.html, report.md, report.json")
    place = subjects[0].place
    if not args.no_card and is_packed(place):
        card = Path(place) / "README.md"
        before = card.read_text(encoding="utf-8") if card.is_file() else ""
        _write(card, with_report(before, markdown(page, level=2, pictures=False)))
        print(f"wrote the same facts into {card} (--no-card leaves it)")


def compare(argv: Sequence[str]) -> None:
    """`signbit compare`."""
    from signbit.evaluate.perplexity import TextOptions

    args = parse("compare", argv, CompareOptions, text=TextOptions, run=RunOptions)
    from signbit.evaluate.machines import here
    from signbit.evaluate.page import Table
    from signbit.evaluate.report import make_page, summary

    if len(args.models) + len(args.results) < 2:
        raise OptionError("compare what? give at least two models: signbit compare A B, the teacher last")
    measured.check(args)
    check_file("--json", args.json)
    quiet()
    subjects = measured.subjects(args.models, args)
    models, teacher = measured.measured(subjects, args, len(subjects) > 1)
    short = summary(models, teacher)
    command = shlex.join(["signbit", "compare", *argv])
    page = make_page(models, teacher, None, [command], here(args.run.device))
    _print_summary(short.columns, short.rows)
    for section in page.sections:
        for part in section.parts:
            if section.title in ("Perplexity", "Tasks", "Speed and memory") and isinstance(part, Table):
                table(section.title, part.columns, part.rows)
    write_json(args.json, _facts(models, command))


def _facts(models: Sequence[Facts], command: str) -> dict[str, Any]:
    """What --json holds, as JSON values; --results reads it."""
    from signbit.evaluate.doctor import versions

    return {**versions(), "command": command, "models": [model.to_dict() for model in models]}


def _print_summary(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A column a model, which suits a terminal: there are more measures than models."""
    lines = [[column, *(row[place] for row in rows)] for place, column in enumerate(columns) if place]
    table(None, ("", *(row[0] for row in rows)), lines)


def diff(argv: Sequence[str]) -> None:
    """`signbit diff`."""
    args = parse("diff", argv, DiffOptions)
    at_least(1, text_tokens=args.text_tokens, block=args.block)
    check_file("--json", args.json)
    from signbit.evaluate.difference import differences
    from signbit.hub.agreement import exact_agreement, text_tokens
    from signbit.hub.load import load_tokenizer
    from signbit.hub.subject import load_to_compare, tokenizer_place
    from signbit.version import VERSION

    quiet()
    with Bars() as bars:
        a, b = load_to_compare(args.a), load_to_compare(args.b)
        near = None
        if args.text != "none":
            tokenizer = load_tokenizer(tokenizer_place(args.b))
            file = text_tokens(tokenizer, args.text, args.data_dir, args.text_tokens)
            near = exact_agreement(a, b, args.b, file, args.block, lambda done, total: bars("answers", done, total, ""))
        found = differences(a, b, lambda done, total, name: bars("layers", done, total, name))
    _print_difference(found, args)
    if near is not None:
        print(
            f"on {near.tokens:,} tokens of {near.source}: KL(B ‖ A) {near.kl:.4f} nats a token; both think the same token "
            f"likeliest behind {near.top1:.1%}"
        )
    facts = {"signbit": VERSION, "command": shlex.join(["signbit", "diff", *argv]), "a": args.a, "b": args.b}
    write_json(
        args.json,
        {
            **facts,
            "layers": [layer.to_dict() for layer in found.layers],
            "only_a": found.only[0],
            "only_b": found.only[1],
            "answers": None if near is None else near.to_dict(),
        },
    )


def _print_difference(found: Any, args: DiffOptions) -> None:
    from signbit.models import kind_of
    from signbit.models.report import error_range

    kinds: dict[tuple[str, str], list[Any]] = {}
    for layer in found.differing:
        kinds.setdefault((layer.name if args.layers else kind_of(layer.name), layer.form), []).append(layer)
    rows = []
    for (name, form), layers in kinds.items():
        weights = sum(layer.weights for layer in layers)
        agree = sum(layer.sign_agreement * layer.weights for layer in layers) / weights
        rows.append(
            (name, str(len(layers)), form, f"{weights:,}", f"{agree:.2%}", error_range(layer.error for layer in layers))
        )
    if rows:
        table(None, ("layers", "count", "held as", "values", "equal signs", "error"), rows)
    print(f"{len(found.differing)} of {len(found.layers)} layers and vectors differ (A {args.a}, B {args.b})")
    if rows:
        print(f"equal signs over all: {found.sign_agreement:.2%}; error: share of B's energy, ‖A − B‖² / ‖B‖²")
    for letter, names in zip("AB", found.only, strict=True):
        if names:
            some = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
            print(f"only {letter} has {len(names)}: {some}")


def _folder(out: str) -> Path:
    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OptionError(
            f"-o {out} cannot be made ({error.strerror}); give a folder to write the report to"
        ) from error
    return folder


def _write(path: Path, text: str) -> None:
    made = path.with_name(f"{path.name}.partial")
    try:
        made.write_text(text, encoding="utf-8")
        made.replace(path)
    except OSError as error:
        raise OptionError(f"{path} cannot be written ({error.strerror})") from error
