"""What a set of tasks asks a model: texts whose log-likelihoods decide; as a value, and as a file that travels."""

from __future__ import annotations

import gzip
import json
import lzma
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

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


def _made(cls: type, value: Any) -> Any:
    """A dataclass of this file from its JSON, lists as tuples; raises TypeError, ValueError for what is not one."""
    fields = {key: tuple(item) if isinstance(item, list) else item for key, item in dict(value).items()}
    return cls(**fields)


def _question(value: Any, kinds: dict[str, str]) -> Question:
    question = _made(Question, value)
    pairs = tuple((str(context), str(continuation)) for context, continuation in question.pairs)
    kind = kinds[question.task]
    if not pairs or (kind == "continuation" and len(pairs) > 1):
        raise ValueError(f"{len(pairs)} pairs in a task of kind {kind}")
    if not all(0 <= place < len(pairs) for place in question.gold):
        raise ValueError(f"gold is {list(question.gold)}, and there are {len(pairs)} pairs")
    if kind == "choice" and len(question.lengths) != len(pairs):
        raise ValueError(f"{len(question.lengths)} lengths for {len(pairs)} pairs")
    return Question(question.task, int(question.document), pairs, question.gold, question.lengths)


def read_requests(path: str | Path) -> Requests:
    """The requests of a file that `Requests.write` made; raises DataError, with the line, if it is none or damaged."""
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
            tasks = tuple(_made(Task, task) for task in head["tasks"])
            groups = tuple(_made(Group, group) for group in head["groups"])
            kinds = {task.name: task.kind for task in tasks}
            if unknown := set(kinds.values()) - set(METRICS):
                raise ValueError(f"a task of kind {unknown.pop()}")
            if unknown := {name for group in groups for name in group.tasks} - set(kinds):
                raise ValueError(f"a group has the task {unknown.pop()}, which is not there")
            questions = []
            for at in lines:
                number = at[0]
                questions.append(_question(at[1], kinds))
            asked = {question.task for question in questions}
            if missing := [name for name in kinds if name not in asked]:
                raise ValueError(f"no question of {missing[0]}")
            return Requests(str(head["harness"]), head["limit"], tasks, groups, tuple(questions))
        except (KeyError, TypeError, ValueError) as error:
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
