"""All that is known of one model: size, perplexities, tasks, agreement with a teacher, speed, text; and files of it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from signbit.errors import DataError
from signbit.evaluate.machines import joined, what

#: A run of tasks and the result of one of them.
Asked = tuple[dict[str, Any], dict[str, Any]]
#: Fields of `Facts` that hold lists, which are joined when two records of one model meet.
_LISTS = ("perplexities", "tasks", "samples", "layers", "measured_on")
#: Fields of which a model has one, though both records may have it.
_SINGLE = ("agreement", "speed", "layers")


@dataclass(frozen=True)
class Facts:
    """What was measured of a model, as JSON values; None and empty: it was not."""

    name: str
    model: str = ""
    """Its directory or hub id, where it was measured."""
    model_sha256: str | None = None
    """SHA-256 over its files (`signbit.hub.subject.model_digests`)."""
    made_by: str | None = None
    """Method and options of a packed model."""
    command: str | None = None
    """The command that made it, out of its model card."""
    size: dict[str, Any] | None = None
    """parameters, file_bytes, bits_per_parameter, file_saved; of a packed model also bits_per_weight, linears_saved, kinds."""
    perplexities: tuple[dict[str, Any], ...] = ()
    """`signbit.evaluate.Perplexity` each."""
    tasks: tuple[dict[str, Any], ...] = ()
    """A run of tasks each: harness, limit, protocol, results."""
    agreement: dict[str, Any] | None = None
    """`signbit.hub.agreement.Agreement` with the teacher."""
    speed: dict[str, Any] | None = None
    """`signbit.evaluate.speed.Speed`."""
    samples: tuple[dict[str, Any], ...] = ()
    """prompt, text, how."""
    layers: tuple[dict[str, Any], ...] = ()
    """name, bits_per_weight, nbytes, weights; error and sign_agreement against the teacher's matrix, where it was at hand."""
    measured_on: tuple[dict[str, Any], ...] = ()
    """A machine each (`signbit.evaluate.machines.here`) and `what` was found on it; only `what`: it was not recorded."""
    unknown: dict[str, str] = field(default_factory=dict)
    """agreement, layers or speed → why it was not measured."""
    source: str | None = None
    """The file that this was read from; None for what this command measured or found in its cache."""

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)

    def with_found(self, other: Facts) -> Facts:
        """With what `other`, a record of the same model, knows beside."""
        both: dict[str, Any] = {}
        for key in self.__dataclass_fields__:
            mine, its = getattr(self, key), getattr(other, key)
            if key == "layers":
                both[key] = its if "layers" in other.found() and "layers" not in self.found() else mine or its
            elif key in _LISTS:
                both[key] = (*mine, *(item for item in its if item not in mine))
            elif key not in ("name", "source"):
                both[key] = its if mine in (None, "") else mine
        taken = {name for name in _SINGLE if name in self.found()}
        its = tuple(
            {**record, "what": [name for name in record["what"] if name not in taken]} for record in other.measured_on
        )
        both["measured_on"] = joined((*self.measured_on, *its))
        reasons = {**other.unknown, **self.unknown}
        both["unknown"] = {name: why for name, why in reasons.items() if name == "layers" or not both[name]}
        return replace(self, **both)

    def why_unknown(self, name: str) -> str:
        """Why agreement, layers or speed are not known, as far as that is known."""
        why = self.unknown.get(name)
        if self.source is None:
            return why or "it was not measured"
        return f"{self.source} does not have it{f' ({why})' if why else ''}, and the model was not at hand"

    def found(self) -> list[str]:
        """What was measured, by the names that `measured_on` has for it."""
        names = {
            **{what("perplexity", found): True for found in self.perplexities},
            "tasks": self.tasks, "agreement": self.agreement, "speed": self.speed, "sample": self.samples,
            "layers": any(layer.get("error") is not None for layer in self.layers),
        }  # fmt: skip
        return [name for name, known in names.items() if known]

    def results(self) -> list[Asked]:
        """Each task or group, once for each way in which it was asked."""
        found: list[Asked] = []
        for run in self.tasks:
            for result in run["results"]:
                if not any(asked_alike((run, result), other) for other in found):
                    found.append((run, result))
        return found


@dataclass(frozen=True)
class Share:
    """The share of a teacher's mean task score that a model keeps."""

    metric: str
    """acc, or acc_norm: a task that does not count it stands with its acc."""
    tasks: tuple[str, ...]
    model: float
    """Mean score over the tasks, each counting alike."""
    teacher: float
    chance: float
    documents: int
    """Of all tasks together."""

    @property
    def kept(self) -> float:
        """Mean score of the model / that of the teacher."""
        return self.model / self.teacher

    @property
    def kept_above_chance(self) -> float | None:
        """(model − chance) / (teacher − chance); None where the teacher itself is not above chance."""
        return (self.model - self.chance) / (self.teacher - self.chance) if self.teacher > self.chance else None


def asked_alike(a: Asked, b: Asked) -> bool:
    """Whether both are one task, asked with one harness, beginning of the prompt and examples, over the same documents.

    Documents are the same if their digests are; a result of an older signbit has none, and their number decides.
    """

    def how(run: dict[str, Any], result: dict[str, Any]) -> tuple[Any, ...]:
        return result["name"], run["harness"], run["protocol"]["bos"], result["few_shot"], result["documents"]

    digests = {a[1].get("asked_sha256"), b[1].get("asked_sha256")} - {None}
    return how(*a) == how(*b) and len(digests) < 2


def _by_task(facts: Facts) -> dict[str, list[Asked]]:
    """The tasks with choices, in each way in which they were asked."""
    found: dict[str, list[Asked]] = {}
    for run, result in facts.results():
        if not result["tasks"] and result["chance"] is not None:
            found.setdefault(result["name"], []).append((run, result))
    return found


def commonly_asked(models: Sequence[Facts], teacher: Facts) -> dict[str, Asked]:
    """Of each task of `teacher` the way in which most models were asked it; of equals that over most documents."""

    def rank(asked: Asked) -> tuple[int, int]:
        alike = sum(any(asked_alike(asked, its) for its in facts.results()) for facts in models)
        return alike, asked[1]["documents"]

    return {name: max(ways, key=rank) for name, ways in _by_task(teacher).items()}


def share_kept(model: Facts, teacher: Facts, metric: str = "acc", only: dict[str, Asked] | None = None) -> Share | None:
    """What `model` keeps of the score of `teacher` over the tasks with choices that both were asked alike, or None.

    Where they were asked a task alike in several ways, as in `only`, or without it over most documents. Source: OneBit
    (arXiv 2402.11295) states its models so, by the mean over six tasks.
    """
    mine, its = _by_task(model), _by_task(teacher)
    pairs: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {}
    for name, ways in its.items():
        alike = [
            (ours[1], theirs[1])
            for ours in mine.get(name, ())
            for theirs in ways
            if asked_alike(ours, theirs) and (only is None or (name in only and asked_alike(theirs, only[name])))
        ]
        if alike:
            pairs[name] = max(alike, key=lambda pair: int(pair[0]["documents"]))
    if not pairs:
        return None

    def mean(values: Iterable[dict[str, Any]]) -> float:
        return float(sum(value.get(metric, value["acc"]) for value in values)) / len(pairs)

    return Share(
        metric,
        tuple(pairs),
        mean(ours["values"] for ours, _ in pairs.values()),
        mean(theirs["values"] for _, theirs in pairs.values()),
        sum(theirs["chance"] for _, theirs in pairs.values()) / len(pairs),
        sum(ours["documents"] for ours, _ in pairs.values()),
    )


def read_results(path: str, name: str | None = None) -> list[Facts]:
    """The models of a file that --json of `eval`, `compare` or `report` wrote; `name` renames the only one.

    Raises DataError for a file that is none, or that does not hold one model where it is renamed.
    """
    try:
        written = json.loads(Path(path).read_text(encoding="utf-8"))
        found = {facts.model: facts for entry in written.get("models", ()) for facts in (_facts(entry, path),)}

        def of(entry: dict[str, Any]) -> Facts:
            place = entry["model"]
            known = found.get(place, Facts(Path(place).name, place, source=path))
            return replace(known, model_sha256=known.model_sha256 or entry.get("model_sha256"))

        for entry in written.get("results", ()):
            facts = of(entry)
            found[facts.model] = replace(facts, perplexities=(*facts.perplexities, _without_model(entry)))
        for entry in written.get("tasks", ()):
            facts = of(entry)
            found[facts.model] = replace(facts, tasks=(*facts.tasks, _without_model(entry)))
        read = [_with_unrecorded(facts) for facts in found.values()]
    except OSError as error:
        raise DataError(f"--results {path} cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"--results {path} is no file that --json of signbit eval, compare or report wrote "
            f"({type(error).__name__}: {error})"
        ) from error
    if not found:
        raise DataError(f"--results {path} holds no model's results; it is written by --json of signbit eval")
    if name is not None and len(found) > 1:
        raise DataError(
            f"--results {name}={path}: {len(found)} models are in it ({', '.join(found)}); leave the name out"
        )
    return [replace(facts, name=name or facts.name) for facts in read]


def _without_model(entry: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in entry.items() if key != "model"}


def _with_unrecorded(facts: Facts) -> Facts:
    """With a record of what was found on machines that are not recorded."""
    recorded = [name for record in facts.measured_on for name in record["what"]]
    lacking = [name for name in facts.found() if name not in recorded]
    return replace(facts, measured_on=joined((*facts.measured_on, {"what": lacking})))


def _facts(entry: dict[str, Any], source: str) -> Facts:
    values: dict[str, Any] = {key: tuple(value) if key in _LISTS else value for key, value in entry.items()}
    return Facts(**{**values, "source": source})


def merged(at_hand: Sequence[Facts], read: Sequence[Facts]) -> list[Facts]:
    """The models at hand, each with what was read of it, then those that are elsewhere.

    Records are of one model if their hashes are equal; those without a hash, if they have its name or its path.
    """
    models = list(at_hand)
    for facts in read:
        for place, known in enumerate(models):
            if None not in (facts.model_sha256, known.model_sha256):
                same = facts.model_sha256 == known.model_sha256
            else:
                same = facts.name == known.name or facts.model == known.model != ""
            if same:
                models[place] = known.with_found(facts)
                break
        else:
            models.append(facts)
    labels = [facts.name for facts in models]
    return [
        replace(facts, name=f"{facts.name} ({facts.model or place})") if labels.count(facts.name) > 1 else facts
        for place, facts in enumerate(models)
    ]
