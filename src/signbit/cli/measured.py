"""What `signbit report` and `compare` measure of their models, each thing once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from signbit.cli.output import Bars, note
from signbit.cli.parsing import at_least
from signbit.errors import OptionError, StructureError

if TYPE_CHECKING:
    from signbit.evaluate.facts import Facts
    from signbit.hub.subject import Subject

_LEFT_OUT = "it was left out (--skip {})"
#: Behind what the samples go on.
PROMPTS = ("The weather was", "Once upon a time", "The capital of France is")


def subjects(models: Sequence[str], args: Any) -> list[Subject]:
    """The models of a command line, each under a name of its own; raises OptionError for one that is there twice."""
    from signbit.hub.load import torch_device
    from signbit.hub.subject import Subject, Where, named

    where = Where(torch_device(args.run.device), args.run.dtype, args.run.activations)
    pairs = [named(text) for text in models]
    names = [name for name, _ in pairs]
    labels = [place if names.count(name) > 1 else name for name, place in pairs]
    if twice := [label for label in labels if labels.count(label) > 1]:
        raise OptionError(f"{twice[0]} is named twice; give each model once, or names (NAME=MODEL)")
    return [Subject(label, place, where, args.again) for label, (_, place) in zip(labels, pairs, strict=True)]


def check(args: Any) -> None:
    """Raises OptionError, before any work is done, for a number that is too small."""
    at_least(
        1, max_windows=args.max_windows, held_out_tokens=args.held_out_tokens, block=args.block,
        sample_tokens=args.sample_tokens,
    )  # fmt: skip


def measured(models: Sequence[Subject], args: Any, has_teacher: bool) -> tuple[list[Facts], Facts | None]:
    """All that is asked of `models`, then the models of --results that are elsewhere; and the teacher, their last."""
    from signbit.cli import tasks
    from signbit.data import PROTOCOLS
    from signbit.evaluate.facts import merged, read_results
    from signbit.evaluate.perplexity import check
    from signbit.hub.subject import named

    read: list[Facts] = []
    for text in args.results:
        name, path = named(text)
        read += read_results(path, name if text != path else None)
    protocols = [] if args.ppl == "none" else [name.strip() for name in args.ppl.split(",") if name.strip()]
    for name in protocols:
        check(name, args.data_dir, args.text if name not in PROTOCOLS else None, args.max_windows)
    with tasks.Place() as place:
        if place.number > 1:
            raise OptionError("a report is made in one process; measure with signbit eval in several, then --results")
    options = {field.name: getattr(args, field.name) for field in fields(args)}
    requests = tasks.requests(SimpleNamespace(**options, export_requests=None), place)
    teacher = models[-1] if has_teacher else None
    known: dict[str, Facts] = {}
    for facts in read:
        if (sha256 := facts.model_sha256) is not None:
            known[sha256] = known[sha256].with_found(facts) if sha256 in known else facts
    _read_texts(models, known, teacher, protocols, args)
    # First, while no other model takes memory.
    speeds = [None if "speed" in args.skip else _speed(subject, known.get(subject.sha256)) for subject in models]
    at_hand = []
    for subject, speed in zip(models, speeds, strict=True):
        facts = _measure(subject, known.get(subject.sha256), teacher, protocols, requests, args)
        at_hand.append(replace(facts, speed=speed, measured_on=subject.measured_on))
        if subject is not teacher:
            subject.release()
    found = merged(at_hand, read)
    return found, None if teacher is None else found[len(models) - 1]


def _asked(there: Facts | None, protocols: Sequence[str], args: Any) -> list[str]:
    """The `protocols` that no file of results has of a model."""
    from signbit.hub.subject import measured_as

    have = () if there is None else there.perplexities
    return [name for name in protocols if not any(measured_as(found, _protocol(name, args)) for found in have)]


def _read_texts(
    models: Sequence[Subject], known: dict[str, Facts], teacher: Subject | None, protocols: Sequence[str], args: Any
) -> None:
    """Raises DataError or OptionError, before long work, for a text that is needed and not to be had, or too short.

    Local ones of --ppl are checked.
    """
    from signbit.data import PROTOCOLS, read_set
    from signbit.hub.agreement import check_block, text_tokens

    needed = {
        name
        for subject in models
        for name in _asked(known.get(subject.sha256), protocols, args)
        if name in PROTOCOLS and subject.recall("perplexity", _protocol(name, args)) is None
    }
    for name in sorted(needed) if args.data_dir is None else ():
        read_set(PROTOCOLS[name])
    if teacher is not None and "agreement" not in args.skip:
        for subject in models:
            file = text_tokens(subject.tokenizer, args.held_out, args.data_dir, args.held_out_tokens)
            check_block(subject.config, file, args.block)


def _measure(
    subject: Subject, there: Facts | None, teacher: Subject | None, protocols: Sequence[str], requests: Any, args: Any
) -> Facts:
    """What is asked of one model, but for what a file of results has of it (`there`)."""
    asked = _asked(there, protocols, args)
    unknown = {"speed": _LEFT_OUT.format("speed")} if "speed" in args.skip else {}
    perplexities = tuple(_perplexity(subject, name, args) for name in asked)
    facts = replace(subject.facts(), perplexities=perplexities, unknown=unknown)
    if requests is not None:
        facts = replace(facts, tasks=(_tasks(subject, requests, args),))
    if subject is not teacher:
        facts = _beside(facts, subject, there, teacher, args)
    if "samples" not in args.skip:
        facts = replace(facts, samples=_samples(subject, there, args))
    return facts


def _speed(subject: Subject, there: Facts | None) -> dict[str, Any] | None:
    """Speed here, unless a file of results has it."""
    if there is not None and there.speed is not None:
        return None
    from signbit.evaluate.speed import SpeedOptions

    with Bars() as bars:
        bars(f"{subject.name}: speed", 0, None, "")
        return subject.speed(SpeedOptions())


def _protocol(name: str, args: Any) -> dict[str, Any]:
    from signbit.data import PROTOCOLS
    from signbit.hub.subject import perplexity_protocol

    return perplexity_protocol(name, args.data_dir, args.max_windows, None if name in PROTOCOLS else args.text)


def _perplexity(subject: Subject, name: str, args: Any) -> dict[str, Any]:
    from signbit.data import PROTOCOLS
    from signbit.evaluate.perplexity import perplexity

    options, protocol = None if name in PROTOCOLS else args.text, _protocol(name, args)

    def measure() -> dict[str, Any]:
        with Bars() as bars:
            return perplexity(
                subject.model, subject.tokenizer, name, args.data_dir, options, args.max_windows,
                lambda done, total, value: bars(f"{subject.name} {name}", done, total, f"ppl {value:.2f}"),
                kept=subject.windows(protocol),
            ).to_dict()  # fmt: skip

    return {**subject.known("perplexity", protocol, measure), "asked": protocol}


def _tasks(subject: Subject, requests: Any, args: Any) -> dict[str, Any]:
    from signbit.cli import tasks

    found = tasks.answered(subject.model, subject.tokenizer, subject, requests, args, tasks.Place())
    return {key: value for key, value in found.items() if key != "model"}


def _beside(facts: Facts, subject: Subject, there: Facts | None, teacher: Subject | None, args: Any) -> Facts:
    """Agreement with the teacher and errors of layers, or why they are not known: another vocabulary or shape has none.

    A file of results that has the agreement with this teacher (`there`) has errors of layers beside it too.
    """
    unknown = dict(facts.unknown)
    same = there is not None and teacher is not None and (there.agreement or {}).get("teacher") == teacher.name
    known = there.found() if there is not None and same else []
    for name in ("agreement", "layers") if facts.layers else ("agreement",):
        if name in known:
            continue
        if name in args.skip:
            unknown[name] = _LEFT_OUT.format(name)
        elif teacher is None:
            unknown[name] = "no teacher was named (report --against MODEL)"
        else:
            try:
                if name == "agreement":
                    facts = replace(facts, agreement=_agreement(subject, teacher, args))
                else:
                    facts = replace(facts, layers=_layers(facts, subject, teacher))
            except StructureError as error:
                unknown[name] = str(error)
                note(f"{subject.name}, {name} beside {teacher.name}: {error}")
    return replace(facts, unknown=unknown)


def _agreement(subject: Subject, teacher: Subject, args: Any) -> dict[str, Any]:
    from signbit.data.corpus import file_digest
    from signbit.hub.agreement import agreement, text_tokens

    file = text_tokens(subject.tokenizer, args.held_out, args.data_dir, args.held_out_tokens)
    text = file_digest(file.path)
    protocol = {"teacher": teacher.sha256, "text": text, "block": args.block}

    def measure() -> dict[str, Any]:
        with Bars() as bars:
            found = agreement(
                subject.model, lambda: teacher.model, teacher.sha256, teacher.name, file, args.block,
                progress=lambda done, total: bars(f"{subject.name}: agreement", done, total, ""),
                where=teacher.where, again=teacher.again and text not in teacher.answered,
            )  # fmt: skip
        teacher.answered.add(text)
        return found.to_dict()

    return {**subject.known("agreement", protocol, measure), "teacher": teacher.name}


def _layers(facts: Facts, subject: Subject, teacher: Subject) -> tuple[dict[str, Any], ...]:
    from signbit.evaluate.difference import differences

    def measure() -> dict[str, Any]:
        with Bars() as bars:
            found = differences(
                subject.model, teacher.model,
                lambda done, total, name: bars(f"{subject.name}: layers", done, total, name),
            )  # fmt: skip
        return {
            layer.name: {"error": layer.error, "sign_agreement": layer.sign_agreement}
            for layer in found.layers
            if layer.form.startswith("packed")
        }

    errors = subject.known("layers", {"teacher": teacher.sha256}, measure)
    return tuple({**layer, **errors.get(layer["name"], {})} for layer in facts.layers)


def _samples(subject: Subject, there: Facts | None, args: Any) -> tuple[dict[str, Any], ...]:
    """What the model writes behind each prompt that a file of results has no text to."""
    from signbit.serve import GenerateOptions, generate

    options = GenerateOptions(max_new_tokens=args.sample_tokens, repetition_penalty=1.1)
    found = []
    written = set() if there is None else {(sample["prompt"], sample["how"]) for sample in there.samples}
    how = f"greedy, repetition penalty 1.1, {args.sample_tokens} tokens"
    for prompt in args.prompt or PROMPTS:
        if (prompt, how) in written:
            continue

        def measure(prompt: str = prompt) -> dict[str, Any]:
            return {"text": generate(subject.model, subject.tokenizer, prompt, options).text}

        text = subject.known("sample", {"prompt": prompt, **asdict(options)}, measure)["text"]
        found.append({"prompt": prompt, "text": text, "how": how})
    return tuple(found)
