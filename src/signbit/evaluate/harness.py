"""The tasks of lm-eval: its prompts, its few-shot examples, its choices; the only file that imports it."""

from __future__ import annotations

import contextlib
import difflib
import io
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from signbit.data.sources import json_lines, reading
from signbit.errors import DataError, OptionError
from signbit.evaluate.requests import METRICS, SUITES, Group, Question, Requests, Task, chosen
from signbit.extras import install

#: Folders of the harness that hold the tasks most asked for; to look through all 15 000 files takes half a minute.
_FOLDERS = (
    "arc",
    "hellaswag",
    "lambada",
    "mmlu/default",
    "openbookqa",
    "piqa",
    "storycloze",
    "super_glue",
    "winogrande",
    "wsc273",
)
#: What a task's files are called under --data-dir, where it is not NAME/SPLIT.
_PLACES = {
    "boolq": "boolq/{split}_superglue",  # whose passages begin with their title, as in the harness's set
    "lambada_openai": "lambada/{split}",
}
_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.xz", ".parquet")
_KINDS = {"multiple_choice": "choice", "loglikelihood": "continuation"}


def place(task: str, split: str) -> str:
    """Where a split of a task lies under --data-dir, without the suffix: "piqa/validation", "mmlu/anatomy/test"."""
    if task.startswith("mmlu_"):
        return f"mmlu/{task.removeprefix('mmlu_')}/{split}"
    return _PLACES.get(task, f"{task}/{{split}}").format(split=split)


def _local_file(data_dir: Path, task: str, split: str) -> Path | None:
    """The file of a split, if there is one."""
    found = (data_dir / (place(task, split) + suffix) for suffix in _SUFFIXES)
    return next((path for path in found if path.is_file()), None)


def _rows(path: Path) -> Any:
    """The `datasets.Dataset` of a local file, in memory."""
    import datasets

    with reading(path):
        if path.suffix == ".parquet":
            from pyarrow.parquet import read_table

            return datasets.Dataset.from_list(read_table(path).to_pylist())
        return datasets.Dataset.from_list([row for _, row in json_lines(path)])


def _local(config: dict[str, Any], data_dir: Path, shots: int, named: str) -> tuple[dict[str, Any], str]:
    """What to change in a task's configuration so that it reads local files, and the file of its documents.

    `named` is the name under which the task was asked for: its own, a group's or a tag's.
    """
    task = config["task"]
    examples = config.get("fewshot_config") or {}
    keys = ("test_split", "validation_split", "training_split", "fewshot_split")
    splits: dict[str, Any] = {key: config.get(key) for key in keys}
    if "split" in examples:
        splits["fewshot_split"] = examples["split"]
    asked = splits["test_split"] or splits["validation_split"]
    if asked is None:
        raise DataError(f"{task} reads its documents by code of its own, so that --data-dir cannot replace them")
    shown = splits["fewshot_split"] or splits["training_split"] or splits["validation_split"] or asked
    needed = {asked} if shots == 0 or "samples" in examples else {asked, shown}
    files: dict[str, Path | None] = {
        split: _local_file(data_dir, task, split) for split in splits.values() if split is not None
    }
    for split in sorted(needed):
        if files[split] is None:
            why = "" if split == asked else f" (its {shots} examples a prompt come from there)"
            raise DataError(
                f"{data_dir} has no file for {split} of {task}{why}; it is looked for as "
                f"{place(task, split)}{{{','.join(_SUFFIXES)}}}. Without --data-dir it comes from the hub"
                + (
                    f"; {named} names several tasks, each of which can be asked by its own name"
                    if named != task
                    else ""
                )
            )
    there = {split: path for split, path in files.items() if path is not None}
    changes: dict[str, Any] = {key: split if split in there else None for key, split in splits.items()}
    if "split" in examples:
        changes["fewshot_config"] = {**examples, "split": changes["fewshot_split"]}

    def read(**_: Any) -> dict[str, Any]:
        return {split: _rows(path) for split, path in there.items()}

    return {**changes, "custom_dataset": read}, str(there[asked])


def _manager(names: Sequence[str]) -> Any:
    """lm-eval's index of tasks: of the folders that are most asked for, or of all if one of `names` is not in them."""
    import lm_eval.tasks

    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # which default it takes where a task says nothing
    root = Path(lm_eval.tasks.__file__).parent
    folders = [str(root / folder) for folder in _FOLDERS if (root / folder).is_dir()]
    manager = lm_eval.tasks.TaskManager(include_defaults=False, include_path=folders)
    if not set(names) <= set(manager.task_index):
        manager = lm_eval.tasks.TaskManager()
    for name in names:
        if name not in manager.task_index:
            near = difflib.get_close_matches(name, [*manager.task_index, *SUITES], n=3)
            advice = f"; near it: {', '.join(near)}" if near else "; `lm_eval ls tasks` lists them"
            raise OptionError(f"lm-eval has no task {name}{advice}")
    return manager


def _expand(manager: Any, item: str | dict[str, Any], groups: list[Group]) -> list[dict[str, Any]]:
    """The tasks under a name as {"task": name, what its group changes}; groups that are averaged are added to `groups`."""
    changes = {"task": item} if isinstance(item, str) else dict(item)
    name = changes.pop("group", None) or changes["task"]
    entry = manager.task_index.get(name)
    if entry is None:
        raise OptionError(f"{name} is defined inside a group of lm-eval; use lm_eval --model hf for it")
    if entry.cfg is None:  # a tag: a name for several tasks
        return [{**changes, "task": task} for task in sorted(entry.tags)]
    config = entry.cfg
    if "group" not in config:
        return [{**changes, "task": name}]
    # Before its members, so that a report has the average above its parts.
    metrics = config.get("aggregate_metric_list") or []
    metrics = [metrics] if isinstance(metrics, dict) else metrics
    weights = {bool(metric.get("weight_by_size", True)) for metric in metrics}
    if len(weights) > 1 or any(metric.get("aggregation", "mean") != "mean" for metric in metrics):
        raise OptionError(f"the group {name} is averaged in a way of its own; use lm_eval --model hf for it")
    at = len(groups)
    passed = {key: value for key, value in changes.items() if key != "task"}
    members = [{**passed, **member} for child in config.get("task") or () for member in _expand(manager, child, groups)]
    if metrics:
        names = tuple(member["task"] for member in members)
        groups.insert(at, Group(name, names, tuple(m["metric"] for m in metrics), weights.pop()))
    return members


def harness_requests(
    names: Sequence[str],
    data_dir: str | Path | None = None,
    few_shot: int | None = None,
    limit: int | None = None,
    note: Callable[[str], None] = lambda line: None,
    progress: Callable[[int, int, str], None] = lambda done, total, name: None,
) -> Requests:
    """What lm-eval asks in the tasks, groups, tags and suites `names`; its documents come from `data_dir` or the hub.

    `few_shot` examples stand in each prompt (default: as the task says, mostly 0), drawn as lm_eval draws them (seed
    1234); `limit` takes the first documents of each task. `note` is called with what a user should know,
    `progress` with the tasks done, the tasks in all and the one that is read. Raises OptionError for tasks that do not
    exist or that count what a log-likelihood does not decide, DataError for documents that are not to be had or do not fit.
    """
    if find_spec("lm_eval") is None:
        raise DataError(
            f"tasks come from lm-eval, which is not installed here ({install('eval')}); or export the requests "
            "where it is (--export-requests FILE) and score them here (--requests FILE)"
        )
    if few_shot is not None and few_shot < 0:
        raise OptionError(f"--few-shot is {few_shot}; 0 or more are allowed")
    if limit is not None and limit < 1:
        raise OptionError(f"--limit is {limit}; at least 1 document a task is needed")
    if data_dir is not None and not Path(data_dir).is_dir():
        raise DataError(f"--data-dir {data_dir} is no directory")
    plain, suites = chosen(names)
    manager = _manager(plain)
    groups: list[Group] = []
    wanted: dict[str, tuple[str, dict[str, Any]]] = {}
    for name in plain:
        for member in _expand(manager, name, groups):
            wanted.setdefault(member["task"], (name, member))
    tasks, questions = [], []
    for done, (name, (named, changes)) in enumerate(wanted.items()):
        progress(done, len(wanted), name)
        task, asked = _task(manager, name, named, changes, data_dir, few_shot, limit, note)
        tasks.append(task)
        questions += asked
    averaged = tuple(dict.fromkeys((*groups, *suites)))  # mmlu has mmlu_stem, which may be named beside it
    return Requests(f"lm-eval {version('lm_eval')}", limit, tuple(tasks), averaged, tuple(questions))


def _task(
    manager: Any,
    name: str,
    named: str,
    changes: dict[str, Any],
    data_dir: str | Path | None,
    few_shot: int | None,
    limit: int | None,
    note: Callable[[str], None],
) -> tuple[Task, list[Question]]:
    entry = manager.task_index[name]
    config = {"task": name, **(entry.cfg or {}), **changes}
    shots = few_shot if few_shot is not None else config.get("num_fewshot") or 0
    if few_shot and config.get("num_fewshot") == 0:
        note(f"{name} is asked without examples: its configuration fixes 0")
        shots = 0
    source = f"hub: {config.get('dataset_path')}" + (f" ({n})" if (n := config.get("dataset_name")) else "")
    if data_dir is not None:
        local, source = _local(config, Path(data_dir), shots, named)
        changes = {**changes, **local}
    # A progress bar a task, 57 of them in MMLU; what is downloaded keeps its own.
    hidden = contextlib.redirect_stderr(io.StringIO())
    try:
        # A group that is made up here is the harness's own way of loading a task with changes.
        with hidden if data_dir is not None else contextlib.nullcontext():
            loaded = manager.load([{"group": f"signbit: {name}", "task": [changes]}])["tasks"][name]
        loaded.set_config(key="num_fewshot", value=shots)
        loaded.set_fewshot_seed(1234)
        metrics = _metrics(loaded, name)
        with hidden:
            loaded.build_all_requests(limit=limit, rank=0, world_size=1)
            questions = _questions(loaded, name)
    except (DataError, OptionError):
        raise
    except Exception as error:  # of the hub, the templates, the rows' types: whatever a task's configuration meets
        reason = (str(error).splitlines() or [""])[0]
        advice = (
            "give local files with --data-dir" if data_dir is None else "its rows must be those of the hub's data set"
        )
        raise DataError(
            f"{name} could not be read from {source} ({type(error).__name__}: {reason}); {advice}"
        ) from error
    kind = _KINDS[loaded.OUTPUT_TYPE]
    return Task(name, kind, metrics, shots, str(loaded.VERSION), len(loaded.task_docs), source), questions


def _metrics(task: Any, name: str) -> tuple[str, ...]:
    """What a task counts; raises OptionError if signbit cannot count it from log-likelihoods alone."""
    kind = _KINDS.get(task.OUTPUT_TYPE)
    metrics = tuple(task.aggregation())
    own = task.config.process_results is not None or task.config.filter_list is not None or task.config.repeats != 1
    if kind is None or own or not set(metrics) <= set(METRICS[kind]):
        raise OptionError(
            f"{name} counts {', '.join(metrics)} from {task.OUTPUT_TYPE}, and signbit eval counts "
            f"{', '.join(sorted({m for group in METRICS.values() for m in group}))} from choices and continuations; use "
            f"lm_eval --model hf --model_args pretrained=OUT,trust_remote_code=True --tasks {name}"
        )
    return metrics


def _questions(task: Any, name: str) -> list[Question]:
    by_document: dict[int, list[Any]] = {}
    for instance in task.instances:
        by_document.setdefault(instance.doc_id, []).append(instance)
    questions = []
    for document, instances in by_document.items():
        pairs = tuple(tuple(instance.args) for instance in sorted(instances, key=lambda instance: instance.idx))
        question = Question(name, document, pairs)
        if task.OUTPUT_TYPE == "multiple_choice":
            row = instances[0].doc
            choices = task.doc_to_choice(row)
            gold = task.doc_to_text(row) if task.multiple_input else task.doc_to_target(row)
            places = [choices.index(g) if g in choices else -1 for g in [gold]] if isinstance(gold, str) else gold
            listed = places if isinstance(places, list) else [places]
            right = tuple(dict.fromkeys(place for place in listed if 0 <= place < len(pairs)))
            if not right:
                raise DataError(
                    f"{name}, document {document}: none of its choices is the right one ({gold!r:.40} is said to be); "
                    "splits whose labels are hidden cannot be scored"
                )
            question = replace(question, gold=right, lengths=tuple(map(len, choices)))
        questions.append(question)
    return questions
