"""The papers' tables: what was measured, how, and what was published; as files, and beside what is found here."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, get_args

from signbit.data import PROTOCOLS
from signbit.errors import OptionError
from signbit.evaluate.requests import METRICS, Bos

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

#: A value that a paper does not give, or a column that nobody can measure again.
ABSENT = "-"
_KEYS = ("about", "paper", "few_shot", "prompt_bos", "columns", "published", "weights")


@dataclass(frozen=True)
class Column:
    """One figure of each model."""

    title: str
    kind: Literal["task", "perplexity", "mean", "absent"]
    """mean: of the tasks' columns. absent: of a text that was not published."""
    source: str = ""
    """Task of lm-eval, or protocol of perplexity."""
    metric: str = ""
    """acc or acc_norm, of a task."""


@dataclass(frozen=True)
class Table:
    """A published table: percents and perplexities of models, and how they are measured again."""

    name: str
    about: str
    paper: str
    """Paper, arXiv number and number of the table."""
    few_shot: int
    prompt_bos: Bos
    columns: tuple[Column, ...]
    published: Mapping[str, tuple[float | None, ...]]
    """Model → a value a column; None where the paper gives none."""
    weights: Mapping[str, str]
    """Model → the hub id of its weights, or the commands that make them."""

    def sources(self, kind: str) -> list[str]:
        """The tasks ("task") or protocols ("perplexity") of the columns."""
        return [column.source for column in self.columns if column.kind == kind]

    def hub_id(self, model: str) -> str | None:
        """Where on the hub the weights of `model` lie as transformers loads them, if they do."""
        where = self.weights.get(model)
        return None if where is None or " " in where else where


@dataclass(frozen=True)
class Compared:
    """One model of a table: what was published, and what was measured here (None: it was not)."""

    model: str
    published: tuple[float | None, ...]
    ours: tuple[float | None, ...] | None

    @property
    def differences(self) -> tuple[float | None, ...]:
        """Ours − published, in points or in units of perplexity, where there are both."""
        ours = self.ours or (None,) * len(self.published)
        return tuple(None if o is None or p is None else o - p for o, p in zip(ours, self.published, strict=True))


def table_names() -> dict[str, str]:
    """The tables that signbit carries, and what each is."""
    folder = files("signbit.evaluate").joinpath("tables")
    texts = {p.name.removesuffix(".toml"): p for p in folder.iterdir() if p.name.endswith(".toml")}
    return {name: parsed(texts[name].read_text(encoding="utf-8"), name).about for name in sorted(texts)}


def read_table(name: str) -> Table:
    """The table called `name`, or in the file `name` (.toml); raises OptionError for none, or one that is not one."""
    if name.endswith(".toml"):
        try:
            return parsed(Path(name).read_text(encoding="utf-8"), name)
        except (OSError, UnicodeDecodeError) as error:
            raise OptionError(f"--table {name} cannot be read ({error})") from error
    known = table_names()
    if name not in known:
        near = get_close_matches(name, list(known), n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise OptionError(f"there is no table {name!r}; there are {', '.join(known)}{hint}, or give a .toml file")
    file = files("signbit.evaluate").joinpath("tables", f"{name}.toml")
    return parsed(file.read_text(encoding="utf-8"), file.name)


def parsed(text: str, name: str) -> Table:
    """The table that the TOML `text` of the file `name` describes; raises OptionError where it describes none."""
    try:
        found = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise OptionError(f"the table {name} is no TOML ({error})") from error
    if unknown := [key for key in found if key not in _KEYS]:
        raise OptionError(f"{unknown[0]!r} is no key of a table ({name}); there are {', '.join(_KEYS)}")
    for key, kind in (("about", str), ("paper", str), ("columns", dict), ("published", dict)):
        if not isinstance(found.get(key), kind) or not found[key]:
            raise OptionError(f"the table {name} has no {key}, as which a {kind.__name__} is needed")
    columns = tuple(_column(title, value, name) for title, value in found["columns"].items())
    published = {model: _values(model, values, len(columns), name) for model, values in found["published"].items()}
    weights = _weights(found.get("weights", {}), name)
    if stray := [model for model in weights if model not in published]:
        raise OptionError(f"the table {name} says where the weights of {stray[0]} are, which it has no figures of")
    few_shot, bos = found.get("few_shot", 0), found.get("prompt_bos", "tokenizer")
    if type(few_shot) is not int or few_shot < 0:  # true is an int, too
        raise OptionError(f"few_shot of the table {name} is {few_shot!r}; a whole number from 0 is needed")
    if bos not in get_args(Bos):
        raise OptionError(f"prompt_bos of the table {name} is {bos!r}; allowed are {', '.join(get_args(Bos))}")
    return Table(name.removesuffix(".toml"), found["about"], found["paper"], few_shot, bos, columns, published, weights)


def _column(title: str, value: Any, name: str) -> Column:
    words = value.split() if isinstance(value, str) else []
    if words in (["mean"], [ABSENT]):
        return Column(title, "mean" if words == ["mean"] else "absent")
    if len(words) == 1 and words[0] in PROTOCOLS:
        return Column(title, "perplexity", words[0])
    if len(words) == 2 and words[1] in METRICS["choice"]:
        return Column(title, "task", words[0], words[1])
    raise OptionError(
        f"the column {title} of the table {name} is {value!r}; allowed are a protocol of signbit eval --list, a task and "
        f"one of {', '.join(METRICS['choice'])} ('piqa acc_norm'), mean (of the tasks), and {ABSENT} (nobody can measure it)"
    )


def _values(model: str, values: Any, count: int, name: str) -> tuple[float | None, ...]:
    """Published numbers; raises OptionError unless there is one, or a "-", a column."""
    fits = isinstance(values, list) and len(values) == count
    if not fits or not all(value == ABSENT or _is_finite(value) for value in values):
        raise OptionError(f'{model} in the table {name} needs {count} numbers, one a column ("{ABSENT}" for none)')
    return tuple(None if value == ABSENT else float(value) for value in values)


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _weights(found: Any, name: str) -> dict[str, str]:
    """Where weights are; raises OptionError unless each model has a text that says it."""
    if not isinstance(found, dict):
        raise OptionError(f"weights of the table {name} is {found!r}; [weights] with a line a model is needed")
    for model, where in found.items():
        if not isinstance(where, str) or not where.strip():
            raise OptionError(
                f"weights of {model} in the table {name} is {where!r}; a hub id, or the commands that make them, is needed"
            )
    return found


def compared(table: Table, measured: Mapping[str, Mapping[str, float]]) -> list[Compared]:
    """All models of `table` in its order; `measured` has a value by column title, of the models that were measured.

    A mean is that of the tasks' columns, and stands only where each of them was measured.
    """
    lines = []
    for model, published in table.published.items():
        if model not in measured:
            lines.append(Compared(model, published, None))
            continue
        found = measured[model]
        tasks = [found.get(column.title) for column in table.columns if column.kind == "task"]
        whole = [value for value in tasks if value is not None]
        mean = sum(whole) / len(whole) if whole and len(whole) == len(tasks) else None
        ours = tuple(mean if column.kind == "mean" else found.get(column.title) for column in table.columns)
        lines.append(Compared(model, published, ours))
    return lines


def shown(value: float | None, signed: bool = False) -> str:
    """A figure as the papers print it: four digits and more for perplexities beyond 1000."""
    if value is None:
        return ""
    sign = "+" if signed else ""
    return f"{value:{sign}.3g}" if abs(value) >= 1e5 else f"{value:{sign}.2f}"


def rows(lines: Sequence[Compared]) -> list[tuple[str, ...]]:
    """Each model's lines for a table of text: published; then here and difference, or that it was not measured."""
    made: list[tuple[str, ...]] = []
    for line in lines:
        what = "published" if line.ours is not None else "published; not measured"
        made.append((line.model, what, *map(shown, line.published)))
        if line.ours is not None:
            made.append((line.model, "here", *map(shown, line.ours)))
            made.append((line.model, "difference", *(shown(value, signed=True) for value in line.differences)))
    return made


def markdown(table: Table, lines: Sequence[Compared], notes: Sequence[str]) -> str:
    """The comparison as a page of Markdown, `notes` as a list below it."""
    titles = ("model", "", *(column.title for column in table.columns))
    head = [f"# {table.paper}", "", table.about, ""]
    body = ["| " + " | ".join(titles) + " |", "|---|---|" + "---:|" * len(table.columns)]
    body += ["| " + " | ".join(row) + " |" for row in rows(lines)]
    return "\n".join([*head, *body, "", *(f"* {note}" for note in notes)]) + "\n"
