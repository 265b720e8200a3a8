"""What a set of tasks asks a model: texts whose log-likelihoods decide; as a value, and as a file that travels."""

from __future__ import annotations

import gzip
import json
import lzma
from collections.abc import Callable, Sequence
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

from signbit.data.sources import JSON_LINES, json_lines, reading
from signbit.errors import DataError, OptionError

#: Tasks that papers report together, and who does.
SUITES: dict[str, tuple[tuple[str, ...], str]] = {
    "zeroshot6": (
        ("winogrande", "hellaswag", "piqa", "boolq", "arc_easy", "arc_challenge"),
        "the six of OneBit",
    ),
    "zeroshot7": (
        ("boolq", "piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa"),
        "the seven of FBI-LLM and PB-LLM",
    ),
}
#: What is counted, by the kind of a task.
METRICS = {"choice": ("acc", "acc_norm"), "continuation": ("acc", "perplexity")}
#: What stands before a prompt. tokenizer: special tokens as the tokenizer adds them. yes, no: the beginning-of-sequence
#: token, or nothing.
Bos = Literal["tokenizer", "yes", "no"]
_FORMAT = 1


@dataclass(frozen=True)
class Question:
    """One document of a task: the pairs (context, continuation) that a model scores, and which of them is right."""

    task: str
    document: int
    """Its place in the split, from 0."""
    pairs: tuple[tuple[str, str], ...]
    gold: tuple[int, ...] = ()
    """Places of the right pairs; empty in a task of kind "continuation"."""
    lengths: tuple[int, ...] = ()
    """Characters of each choice, which acc_norm divides by."""


@dataclass(frozen=True)
class Task:
    """What is asked in a task, and how it is counted."""

    name: str
    kind: str
    """choice: the likeliest of several pairs counts. continuation: one pair, which should be the greedy one."""
    metrics: tuple[str, ...]
    few_shot: int
    """Solved examples in each prompt."""
    version: str
    """The harness's version of the task."""
    documents: int
    """Documents of the whole split; fewer were asked under a limit."""
    source: str
    """Where the documents come from."""


@dataclass(frozen=True)
class Group:
    """Tasks that are averaged: a group of the harness, or a suite of the papers."""

    name: str
    tasks: tuple[str, ...]
    metrics: tuple[str, ...] = ("acc",)
    weighted: bool = False
    """Each document counts alike, as in the harness's MMLU; else each task does."""
    suite: bool = False
    """In the mean of acc_norm, a task that does not count it stands with its acc, as in the papers' averages."""


@dataclass(frozen=True)
class Requests:
    """Everything that a model is asked; `write` and `read_requests` carry it to a machine without lm-eval."""

    harness: str
    """The harness that made the prompts, and its version."""
    limit: int | None
    tasks: tuple[Task, ...]
    groups: tuple[Group, ...]
    questions: tuple[Question, ...]
    prompt_bos: Bos | None = None
    """What is to stand before a prompt; None leaves it to who scores."""

    def write(self, path: str | Path) -> None:
        """One JSON object a line: what is asked, then a question each; packed if the name ends in .gz or .xz.

        Raises OptionError if the name does not end in .jsonl, .jsonl.gz or .jsonl.xz, or the file cannot be written.
        """
        path = Path(path)
        if not path.name.endswith(JSON_LINES[:3]):
            raise OptionError(f"{path}: requests are lines of JSON; let the name end in {', '.join(JSON_LINES[:3])}")
        head = {
            "signbit_requests": _FORMAT,
            "harness": self.harness,
            "limit": self.limit,
            "prompt_bos": self.prompt_bos,
            "tasks": [asdict(task) for task in self.tasks],
            "groups": [asdict(group) for group in self.groups],
        }
        opener: Any = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
        try:
            with opener(path, "wt", encoding="utf-8") as stream:
                for value in (head, *map(asdict, self.questions)):
                    stream.write(json.dumps(value) + "\n")
        except OSError as error:
            raise OptionError(f"{path} cannot be written ({error.strerror})") from error


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _number(value: Any) -> bool:
    return type(value) is int and value >= 0  # true is an int, too


def _list_of(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(fits, value))


#: Type of a field → what its JSON is called, and whether a value is such.
_TYPES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "str": ("a text", _text),
    "int": ("a whole number from 0", _number),
    "bool": ("true or false", lambda value: isinstance(value, bool)),
    "tuple[str, ...]": ("a list of texts", _list_of(_text)),
    "tuple[int, ...]": ("a list of whole numbers from 0", _list_of(_number)),
    "tuple[tuple[str, str], ...]": (
        "a list of pairs of texts",
        _list_of(lambda value: _list_of(_text)(value) and len(value) == 2),
    ),
}


def _must(holds: object, what: str) -> None:
    """Raises ValueError, which says `what` is wrong, unless it `holds`."""
    if not holds:
        raise ValueError(what)


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list) else value


def _made(cls: type, value: Any) -> Any:
    """A dataclass of this file from its JSON, lists as tuples; raises ValueError, with the field, for what is not one."""
    name = cls.__name__.lower()
    _must(isinstance(value, dict), f"a {name} is an object, not {value!r:.80}")
    types = {field.name: str(field.type) for field in fields(cls)}
    needed = {field.name for field in fields(cls) if field.default is MISSING}
    _must(needed <= set(value), f"a {name} has no {', '.join(sorted(needed - set(value)))}")
    for key, item in value.items():
        _must(key in types, f"{key!r} is no field of a {name}, which has {', '.join(types)}")
        called, fits = _TYPES[types[key]]
        if not fits(item):  # its text would be made for each of thousands that do
            raise ValueError(f"{key} of a {name} is {item!r:.80}, not {called}")
    return cls(**{key: _frozen(item) for key, item in value.items()})


def _once(what: str, items: Sequence[Any]) -> None:
    """Raises ValueError if there are no `items`, or one is there twice."""
    _must(items, f"{what} is empty")
    twice = next((item for item in items if items.count(item) > 1), None)
    _must(twice is None, f"{what}: {twice!r} is there twice")


def _check_task(task: Task) -> None:
    _must(task.kind in METRICS, f"kind of {task.name} is {task.kind!r}; there are {', '.join(METRICS)}")
    _once(f"metrics of {task.name}", task.metrics)
    for metric in task.metrics:
        allowed = METRICS[task.kind]
        _must(metric in allowed, f"metrics of {task.name}: {metric!r} is none of {', '.join(allowed)}")


def _check_group(group: Group, tasks: Sequence[str]) -> None:
    known = list(dict.fromkeys(metric for metrics in METRICS.values() for metric in metrics))
    for field, names, allowed in (("tasks", group.tasks, tasks), ("metrics", group.metrics, known)):
        _once(f"{field} of {group.name}", names)
        for name in names:
            _must(name in allowed, f"{field} of {group.name}: {name!r} is none of {', '.join(allowed)}")


def _question(value: Any, tasks: dict[str, Task]) -> Question:
    question: Question = _made(Question, value)
    _must(question.task in tasks, f"task is {question.task!r}, which is none of {', '.join(tasks)}")
    task, pairs = tasks[question.task], len(question.pairs)
    _must(question.document < task.documents, f"document is {question.document}, and {task.name} has {task.documents}")
    if task.kind == "continuation":
        _must(pairs == 1, f"pairs: there are {pairs} in a task of kind {task.kind}, which has one")
        return question
    _once("gold", question.gold)
    _must(max(question.gold) < pairs, f"gold is {list(question.gold)}, and there are {pairs} pairs")
    _must(len(question.lengths) == pairs, f"lengths: there are {len(question.lengths)} for {pairs} pairs")
    return question


def _head(value: dict[str, Any]) -> Requests:
    """What the first line of a file says; the questions follow."""
    for key in ("tasks", "groups"):
        _must(isinstance(value.get(key), list), f"{key} is {value.get(key)!r:.80}, not a list")
    tasks = [_made(Task, task) for task in value["tasks"]]
    groups = [_made(Group, group) for group in value["groups"]]
    _once("tasks", [task.name for task in tasks])
    _once("tasks and groups", [part.name for part in (*tasks, *groups)])
    for task in tasks:
        _check_task(task)
    for group in groups:
        _check_group(group, [task.name for task in tasks])
    harness, limit, bos = value.get("harness"), value.get("limit"), value.get("prompt_bos")
    _must(_text(harness), f"harness is {harness!r:.80}, not a text")
    _must(limit is None or (_number(limit) and limit > 0), f"limit is {limit!r:.80}, not null or a whole number from 1")
    _must(bos in (None, *get_args(Bos)), f"prompt_bos is {bos!r:.80}; allowed are {', '.join(get_args(Bos))} and null")
    return Requests(str(harness), limit, tuple(tasks), tuple(groups), (), bos)


def read_requests(path: str | Path) -> Requests:
    """The requests of a file that `Requests.write` made.

    Raises DataError, with line and field, if it is none, damaged, or changed into what nobody can ask.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(
            f"{path} is no file; make one where lm-eval is: signbit eval --tasks … --export-requests {path}"
        )
    with reading(path):
        lines = json_lines(path)
        number, head = next(lines, (1, None))
        if not isinstance(head, dict) or "signbit_requests" not in head:
            raise DataError(f"{path} holds no requests; signbit eval --tasks … --export-requests makes such a file")
        if head["signbit_requests"] != _FORMAT:
            raise DataError(
                f"{path} is of format {head['signbit_requests']}, and this signbit reads {_FORMAT}; export it anew"
            )
        try:
            asked = _head(head)
            tasks = {task.name: task for task in asked.tasks}
            questions: dict[tuple[str, int], Question] = {}
            for at in lines:
                number = at[0]
                question = _question(at[1], tasks)
                place = question.task, question.document
                _must(place not in questions, f"document {question.document} of {question.task} is there twice")
                questions[place] = question
            answered = {task for task, _ in questions}
            missing = [name for name in tasks if name not in answered]
            _must(not missing, f"there is no question of {', '.join(missing)}")
            return replace(asked, questions=tuple(questions.values()))
        except ValueError as error:
            raise DataError(f"{path}, line {number}: not as requests are written ({error}); export it anew") from error


def chosen(names: Sequence[str]) -> tuple[list[str], list[Group]]:
    """The tasks behind `names`, each once and in order, with suites taken apart, and the suites as groups.

    Raises OptionError if nothing is named.
    """
    tasks: list[str] = []
    groups = []
    for name in names:
        if name in SUITES:
            groups.append(Group(name, SUITES[name][0], ("acc", "acc_norm"), suite=True))
        tasks += SUITES[name][0] if name in SUITES else (name,)
    if not tasks:
        raise OptionError("--tasks names nothing to measure; see signbit eval --list")
    return list(dict.fromkeys(tasks)), groups
