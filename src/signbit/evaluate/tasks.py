"""Accuracy on tasks: what a model's log-likelihoods answer, counted as lm-eval counts it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from signbit.evaluate.kept import digest
from signbit.evaluate.requests import Group, Question, Requests, Task
from signbit.evaluate.scoring import Answer


@dataclass(frozen=True)
class TaskResult:
    """What was counted in a task or a group."""

    name: str
    values: dict[str, float]
    """acc: share of documents whose likeliest choice is right (or whose continuation is the greedy one). acc_norm: the same
    with ln p divided by the choice's characters. perplexity: exp(−mean ln p) of the continuation."""
    stderr: dict[str, float | None]
    """Standard error of acc and acc_norm, s/√n with s over n − 1; None for a single document."""
    chance: float | None
    """acc of guessing: the mean of 1 / number of choices; None where there are none."""
    documents: int
    of: int
    """Documents of the whole split."""
    few_shot: int | None
    """None in a group whose tasks differ."""
    version: str
    source: str
    asked_sha256: str
    """SHA-256, 16 hexadecimal digits of it, over the texts, right choices and lengths that were asked, in order."""
    tasks: tuple[str, ...] = ()
    """The tasks that a group averages."""

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)


def counted(question: Question, kind: str, answers: Sequence[Answer]) -> dict[str, float]:
    """What one document adds to each metric: 1 or 0, and for perplexity ln p.

    acc: argmax_i ln p_i is right; acc_norm: argmax_i ln p_i / characters_i is (the first of equals in both).
    """
    if kind == "continuation":
        return {"acc": float(answers[0][1]), "perplexity": answers[0][0]}
    sums = [logprob for logprob, _ in answers]
    shares = [s / n if n else -math.inf for s, n in zip(sums, question.lengths, strict=True)]
    return {
        metric: float(max(range(len(values)), key=values.__getitem__) in question.gold)
        for metric, values in (("acc", sums), ("acc_norm", shares))
    }


def _stderr(values: Sequence[float]) -> float | None:
    if len(values) < 2:
        return None
    mean = sum(values) / len(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1)) / math.sqrt(len(values))


def results(requests: Requests, answers: dict[tuple[str, str], Answer]) -> list[TaskResult]:
    """The groups of `requests`, then its tasks, counted from the answers to all of their pairs."""
    by_task: dict[str, list[Question]] = {task.name: [] for task in requests.tasks}
    for question in requests.questions:
        by_task[question.task].append(question)
    tasks = {task.name: _task_result(task, by_task[task.name], answers) for task in requests.tasks}
    return [
        *(_group_result(group, [tasks[name] for name in group.tasks]) for group in requests.groups),
        *tasks.values(),
    ]


def _task_result(task: Task, questions: Sequence[Question], answers: dict[tuple[str, str], Answer]) -> TaskResult:
    counts = [counted(question, task.kind, [answers[pair] for pair in question.pairs]) for question in questions]
    lists = {metric: [count[metric] for count in counts] for metric in task.metrics}
    values = {metric: sum(found) / len(found) for metric, found in lists.items()}
    if "perplexity" in values:
        values["perplexity"] = math.exp(-values["perplexity"])
    chance = None
    if task.kind == "choice":
        chance = sum(len(question.gold) / len(question.pairs) for question in questions) / len(questions)
    stderr = {metric: _stderr(found) for metric, found in lists.items() if metric != "perplexity"}
    asked = digest([[question.pairs, question.gold, question.lengths] for question in questions])[:16]
    return TaskResult(
        task.name, values, stderr, chance, len(questions), task.documents, task.few_shot, task.version, task.source,
        asked,
    )  # fmt: skip


def _group_result(group: Group, members: Sequence[TaskResult]) -> TaskResult:
    """The mean over a group: of its documents (weighted) or of its tasks, with lm-eval's standard errors.

    Weighted: √(Σ (n_i − 1) n_i e_i² / (Σn_i − k) / Σn_i), the pooled one; else √(Σ e_i²) / k.
    """
    values: dict[str, float] = {}
    stderr: dict[str, float | None] = {}
    for metric in group.metrics:
        name = {m.name: metric if metric in m.values or not group.suite else "acc" for m in members}
        counting = [m for m in members if name[m.name] in m.values]
        if not counting:
            continue
        found = [m.values[name[m.name]] for m in counting]
        errors = [e for m in counting if (e := m.stderr.get(name[m.name])) is not None]
        sizes = [m.documents if group.weighted else 1 for m in counting]
        values[metric] = sum(value * size for value, size in zip(found, sizes, strict=True)) / sum(sizes)
        stderr[metric] = None
        if len(errors) == len(counting):
            if group.weighted:
                pooled = sum((n - 1) * e**2 * n for n, e in zip(sizes, errors, strict=True)) / (sum(sizes) - len(sizes))
                stderr[metric] = math.sqrt(pooled / sum(sizes))
            else:
                stderr[metric] = math.sqrt(sum(e**2 for e in errors)) / len(errors)
    chances = [(m.chance, m.documents if group.weighted else 1) for m in members if m.chance is not None]
    chance = sum(c * n for c, n in chances) / sum(n for _, n in chances) if len(chances) == len(members) else None
    shots = {m.few_shot for m in members}
    return TaskResult(
        group.name,
        values,
        stderr,
        chance,
        sum(m.documents for m in members),
        sum(m.of for m in members),
        shots.pop() if len(shots) == 1 else None,
        "",
        "the mean of all documents" if group.weighted else "the mean of its tasks",
        digest([m.asked_sha256 for m in members])[:16],
        group.tasks,
    )
