"""The part of `signbit eval` that measures a paper's table again: `--table`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from signbit.cli.output import table as print_table
from signbit.errors import OptionError

if TYPE_CHECKING:
    from signbit.evaluate.requests import Requests
    from signbit.evaluate.table import Column, Table


def _names(text: str | None) -> list[str]:
    return [name.strip() for name in (text or "").split(",") if name.strip()]


def applied(args: Any) -> tuple[Any, Table | None, dict[str, str]]:
    """The options with what --table fixes, the table, and the directory or hub id of each model that is measured.

    --tasks and --ppl choose among the table's own; neither: all. Raises OptionError for what the table does not have.
    """
    if args.table is None:
        if args.table_models or args.markdown is not None:
            raise OptionError("--model NAME=DIR and --markdown are for --table NAME; see signbit eval --list")
        return args, None, {}
    from signbit.evaluate.table import read_table

    found = read_table(args.table)
    if args.model is not None or args.against:
        raise OptionError(f"--table {found.name} takes each model by its name there: --model NAME=DIR")
    if args.few_shot is not None:
        raise OptionError(f"--table {found.name} has {found.few_shot} examples a prompt; leave --few-shot out")
    models = dict(_model(found, text) for text in args.table_models)
    both = args.tasks is None and args.ppl is None and args.requests is None
    tasks = found.sources("task") if both else _chosen(found, "task", "--tasks", args.tasks)
    ppl = found.sources("perplexity") if both else _chosen(found, "perplexity", "--ppl", args.ppl)
    places = list(dict.fromkeys(models.values()))
    if args.export_requests is not None:
        places, ppl = [], []
    elif not models:  # nothing is measured
        tasks, ppl = [], []
    args = replace(
        args,
        model=places[0] if places else None,
        against=tuple(places[1:]),
        tasks=",".join(tasks) or None,
        ppl=",".join(ppl) or None,
        few_shot=found.few_shot if tasks else None,
        prompt_bos=args.prompt_bos or found.prompt_bos,
    )
    return args, found, models


def _model(table: Table, text: str) -> tuple[str, str]:
    """Name and place of a --model; a name alone is taken from the hub, where its weights are there."""
    name, _, place = text.partition("=")
    if name not in table.published:
        raise OptionError(
            f"--model {text}: the table {table.name} has no model {name!r}; it has {', '.join(table.published)}"
        )
    if not place and (hub := table.hub_id(name)) is not None:
        return name, hub
    if not place:
        made = f" ({table.weights[name]})" if name in table.weights else ""
        raise OptionError(
            f"--model {name}: its weights are not on the hub as they are loaded{made}; give --model {name}=DIR"
        )
    return name, place


def _chosen(table: Table, kind: str, flag: str, text: str | None) -> list[str]:
    known = table.sources(kind)
    for name in _names(text):
        if name not in known:
            raise OptionError(
                f"{flag} {name} is not measured in the table {table.name}; there are {', '.join(known) or 'none'}"
            )
    return _names(text)


def check(table: Table, requests: Requests | None) -> None:
    """Raises OptionError if requests from a file ask the table's tasks in another way than it was measured."""
    for task in requests.tasks if requests is not None else ():
        if task.name in table.sources("task") and task.few_shot != table.few_shot:
            raise OptionError(
                f"{task.name} is asked with {task.few_shot} examples in the file of --requests, and with {table.few_shot} in "
                f"the table {table.name}; export them with signbit eval --table {table.name} --export-requests FILE"
            )


def _figure(
    column: Column, place: str, results: Sequence[Any], asked: Sequence[Any]
) -> tuple[float, dict[str, Any]] | None:
    """What was found in one column of the model at `place`, in the table's unit, with its details."""
    for result in results:
        if column.kind == "perplexity" and (result["model"], result["name"]) == (place, column.source):
            return result["perplexity"], {"of": result["protocol"], "windows": result["windows"]}
    for run in asked:
        for task in run["results"]:
            named = column.kind == "task" and (run["model"], task["name"]) == (place, column.source)
            if named and column.metric in task["values"]:
                error = task["stderr"][column.metric]
                details = {
                    "stderr": None if error is None else 100 * error,
                    "documents": task["documents"],
                    "of": task["of"],
                }
                return 100 * task["values"][column.metric], details
    return None


def _partial(column: Column, details: dict[str, Any]) -> str | None:
    """That less than all was measured, in words."""
    if column.kind == "task" and details["documents"] != details["of"]:
        return f"{column.title}: {details['documents']} of {details['of']} documents"
    if column.kind == "perplexity" and details["of"] != column.source:
        return f"{column.title}: {details['of']}"
    return None


def show(
    table: Table, models: dict[str, str], results: Sequence[Any], asked: Sequence[Any], markdown_file: str | None
) -> dict[str, Any]:
    """Prints published values beside ours, writes them as Markdown if asked, and returns them as JSON values.

    Raises OptionError where the file cannot be written.
    """
    from signbit.evaluate.table import compared, markdown, rows

    measured: dict[str, dict[str, float]] = {}
    details: dict[str, dict[str, Any]] = {}
    partial: dict[str, None] = {}
    for model, place in models.items():
        measured[model], details[model] = {}, {}
        for column in table.columns:
            if (figure := _figure(column, place, results, asked)) is not None:
                measured[model][column.title], details[model][column.title] = figure
                if (note := _partial(column, figure[1])) is not None:
                    partial[note] = None
    lines = compared(table, measured)
    notes = _notes(table, models, list(partial), results, asked)
    titles = ("model", "", *(column.title for column in table.columns))
    before = ""
    made = []
    for row in rows(lines):
        made.append(("" if row[0] == before else row[0], *row[1:]))
        before = row[0]
    print_table(table.paper, titles, made)
    for note in notes:
        print(note)
    if markdown_file is not None:
        try:
            Path(markdown_file).write_text(markdown(table, lines, notes), encoding="utf-8")
        except OSError as error:
            raise OptionError(f"--markdown {markdown_file} cannot be written ({error.strerror})") from error
    return {
        "name": table.name,
        "paper": table.paper,
        "columns": [asdict(column) for column in table.columns],
        "notes": notes,
        "models": [
            {
                **asdict(line), "differences": line.differences, "place": models.get(line.model),
                "details": details.get(line.model), "weights": table.weights.get(line.model),
            }
            for line in lines
        ],
    }  # fmt: skip


def _notes(
    table: Table, models: dict[str, str], partial: Sequence[str], results: Sequence[Any], asked: Sequence[Any]
) -> list[str]:
    """What stands below the table: what was measured and how, what was not, and where its weights are."""
    notes = [f"only part of it was measured here: {'; '.join(partial)}"] if partial else []
    notes += [f"{model} is {place}" for model, place in models.items()]
    notes += [
        f"{c.title} is of a text that was not published: it cannot be measured"
        for c in table.columns
        if c.kind == "absent"
    ]
    notes += dict.fromkeys(
        f"tasks by {run['harness']}; {p['bos']}; {p['dtype']}, {p['activations']} activations, {p['device']}"
        for run in asked
        for p in (run["protocol"],)
    )
    notes += dict.fromkeys(
        f"perplexity in {r['dtype']}, {r['activations']} activations, {r['device']}" for r in results
    )
    missing = [model for model in table.published if model not in models]
    if missing:
        notes.append(f"not measured: {', '.join(missing) if models else 'all'} (--model NAME=DIR)")
    for model in missing:
        if (where := table.weights.get(model)) is not None:
            notes.append(f"weights of {model}: " + (where if " " in where else f"{where} on the hub (--model {model})"))
    return notes
