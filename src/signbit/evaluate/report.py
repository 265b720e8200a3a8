"""The report of models: the page of all that is known of them, with its pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from signbit.errors import OptionError
from signbit.evaluate.facts import Asked, Facts, Share, asked_alike, commonly_asked, share_kept
from signbit.evaluate.machines import described, of_machine
from signbit.evaluate.page import Code, Fold, Page, Part, Picture, Quote, Section, Table
from signbit.evaluate.plot import Quality, plot_layers, plot_quality
from signbit.models import Decision, Report

#: What stands where nothing was measured.
MISSING = "–"


def number(value: float | None, digits: int = 3) -> str:
    """A measure for people, or the sign of one that is missing."""
    if value is None:
        return MISSING
    return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:,.{digits}f}"


def percent(value: float | None) -> str:
    """A share for people."""
    return MISSING if value is None else f"{round(value, 3) + 0.0:.1%}"


def megabytes(count: float | None) -> str:
    """Bytes as MB."""
    return MISSING if count is None else f"{count / 1e6:,.1f} MB"


def summary(models: Sequence[Facts], teacher: Facts | None) -> Table:
    """A line a model: size, what is saved, perplexity, what is kept of the teacher, speed."""
    protocol, shares = _common_protocol(models), _common_shares(models, teacher)
    rows = []
    for facts in models:
        size, speed, near = facts.size or {}, facts.speed or {}, facts.agreement or {}
        share = shares.get(facts.name)
        found = next((p["perplexity"] for p in facts.perplexities if p["protocol"] == protocol), None)
        perplexities = () if protocol is None else (number(found),)
        rows.append(
            (
                facts.name, megabytes(size.get("file_bytes")), number(size.get("bits_per_weight")),
                number(size.get("bits_per_parameter")), percent(size.get("file_saved")), *perplexities,
                percent(share.model if share else None), percent(share.kept if share else None),
                percent(share.kept_above_chance if share else None), number(near.get("kl")), percent(near.get("top1")),
                number(speed.get("decode_tokens_per_s"), 1),
            )
        )  # fmt: skip
    columns = (
        "model", "files", "bits/weight", "bits/parameter", "saved",
        *(() if protocol is None else (f"perplexity ({protocol})",)), "mean acc", "kept", "kept above chance", "KL", "top-1",
        "tokens/s",
    )  # fmt: skip
    return Table(columns, rows)


def _of_all_tasks(
    facts: Facts, teacher: Facts, metric: str = "acc", only: dict[str, Asked] | None = None
) -> Share | None:
    """What is kept over all tasks of `teacher`; None where some were not asked alike: such means do not compare."""
    share, whole = share_kept(facts, teacher, metric, only), share_kept(teacher, teacher, metric, only)
    return share if share is not None and whole is not None and share.tasks == whole.tasks else None


def _common_shares(models: Sequence[Facts], teacher: Facts | None, metric: str = "acc") -> dict[str, Share]:
    """What each model keeps over all tasks of `teacher`, as most models were asked them, so that the means compare."""
    if teacher is None:
        return {}
    asked = commonly_asked(models, teacher)
    found = ((facts.name, _of_all_tasks(facts, teacher, metric, asked)) for facts in models)
    return {name: share for name, share in found if share is not None}


def _common_protocol(models: Sequence[Facts]) -> str | None:
    """The protocol under which most models were measured; of equals the first."""
    counts: dict[str, int] = {}
    for facts in models:
        for protocol in {p["protocol"]: 0 for p in facts.perplexities}:
            counts[protocol] = counts.get(protocol, 0) + 1
    return max(counts, key=counts.__getitem__) if counts else None


def _sizes(models: Sequence[Facts]) -> Section:
    rows = [
        (
            facts.name, f"{size['parameters']:,}", megabytes(size["file_bytes"]), number(size.get("bits_per_weight")),
            number(size["bits_per_parameter"]), percent(size.get("linears_saved")), percent(size["file_saved"]),
        )
        for facts in models
        if (size := facts.size) is not None
    ]  # fmt: skip
    columns = ("model", "parameters", "weight files", "bits/weight", "bits/parameter", "linears saved", "file saved")
    note = (
        "Counted from the bytes of the files. Bits/weight: of the packed linear layers, with scales, salient positions and "
        "padding. Bits/parameter: of the whole weight files. Saved: against 16 bits (fp16)."
    )
    lacking = [facts.name for facts in models if facts.size is None]
    parts: list[Part] = [Table(columns, rows, note)] if rows else []
    parts += [f"The size of {', '.join(lacking)} is not known: no file says it."] if lacking else []
    for facts in models:
        if facts.size and (kinds := facts.size.get("kinds")):
            lines = [
                (
                    kind["name"], str(kind["layers"]), kind["shape"], kind["bits"], f"{kind['salient']:.1%}",
                    megabytes(kind["nbytes"]),
                )
                for kind in kinds
            ]  # fmt: skip
            parts.append(
                Fold(
                    f"Layers of {facts.name}, by kind",
                    Table(("layers", "count", "shape", "bits/weight", "salient", "bytes"), lines),
                )
            )
    return Section("Size", parts)


def _perplexities(models: Sequence[Facts], teacher: Facts | None) -> Section:
    anchors = {p["protocol"]: p["perplexity"] for p in (teacher.perplexities if teacher else ())}
    rows = [
        (
            facts.name, p["protocol"], number(p["perplexity"]),
            f"{p['perplexity'] / anchors[p['protocol']]:.3g} ×" if p["protocol"] in anchors else MISSING,
            f"{p['windows']} × {p['window']}", f"{p['dtype']}, {p['activations']}", p["device"],
        )
        for facts in models
        for p in facts.perplexities
    ]  # fmt: skip
    if not rows:
        return Section("Perplexity", ["No perplexity was measured (--ppl, or --results with one)."])
    columns = ("model", "protocol", "perplexity", f"of {teacher.name}" if teacher else "", "windows", "run", "device")
    lacking = [facts.name for facts in models if not facts.perplexities]
    note = f"Not measured: {', '.join(lacking)}." if lacking else ""
    return Section("Perplexity", [Table(columns, rows, note)])


def score(result: dict[str, Any], metric: str) -> str:
    """A task's score with its standard error."""
    if metric not in result["values"]:
        return MISSING
    error = result["stderr"].get(metric)
    return f"{result['values'][metric]:.1%}" + (f" ± {error:.1%}" if error is not None else "")


def _tasks(models: Sequence[Facts], teacher: Facts | None) -> Section:
    asked = [facts for facts in models if facts.tasks]
    if not asked:
        return Section("Tasks", ["No task was asked (--tasks, --requests, or --results with them)."])
    askings: list[tuple[list[Asked], dict[str, dict[str, Any]]]] = []
    asked_so: dict[str, list[str]] = {}
    for facts in asked:
        for run, result in facts.results():
            for alike, found in askings:
                if facts.name not in found and all(asked_alike((run, result), other) for other in alike):
                    break
            else:
                askings.append(((alike := []), (found := {})))
            alike.append((run, result))
            found[facts.name] = result
            protocol = run["protocol"]
            line = (
                f"{run['harness']}; {protocol['bos']}; {protocol['dtype']}, {protocol['activations']} activations, "
                f"{protocol['device']}"
            )
            names = asked_so.setdefault(line, [])
            names += [] if facts.name in names else [facts.name]
    by_models: dict[tuple[str, ...], list[dict[str, dict[str, Any]]]] = {}
    for _, found in askings:
        by_models.setdefault(tuple(found), []).append(found)
    parts: list[Part] = [_scores(names, rows) for names, rows in by_models.items()]
    lacking = [facts.name for facts in models if not facts.tasks]
    how = [f"{', '.join(names)}: {line}." for line, names in asked_so.items()]
    how += [f"Not asked: {', '.join(lacking)}."] if lacking else []
    return Section("Tasks", [*_kept(models, teacher), *parts, " ".join(how)])


def _scores(names: Sequence[str], askings: Sequence[dict[str, dict[str, Any]]]) -> Table:
    """What the models `names` scored in what all of them were asked alike, a result a model in each of `askings`."""
    rows: list[tuple[str, ...]] = []
    for found in askings:
        first = found[names[0]]
        shots, documents = first["few_shot"], f"{first['documents']} of {first['of']}"
        for metric in ("acc", "acc_norm"):
            scores = [score(found[name], metric) for name in names]
            if any(cell != MISSING for cell in scores):
                chance = percent(first["chance"])
                rows.append((first["name"], metric, chance, "" if shots is None else str(shots), documents, *scores))
    return Table(("task", "metric", "chance", "shots", "documents", *names), rows)


def _kept(models: Sequence[Facts], teacher: Facts | None) -> list[Part]:
    """The share of the teacher's mean score that each model keeps, and how it is computed."""
    if teacher is None:
        return ["There is no teacher, of whose score a share could be kept (--against MODEL)."]
    asked = commonly_asked(models, teacher)
    rows = []
    for only in (asked, None):
        for facts in models:
            for metric in ("acc", "acc_norm") if facts is not teacher else ():
                share = _of_all_tasks(facts, teacher, metric, only)
                if share is None or (only is None and share == _of_all_tasks(facts, teacher, metric, asked)):
                    continue
                rows.append(
                    (
                        facts.name, metric, percent(share.model), percent(share.teacher), percent(share.chance),
                        percent(share.kept), percent(share.kept_above_chance), str(len(share.tasks)), f"{share.documents:,}",
                    )
                )  # fmt: skip
    shared = {row[0] for row in rows}
    partly = [facts.name for facts in models if facts.tasks and facts is not teacher and facts.name not in shared]
    lacking = ""
    if partly:
        lacking = (
            f" Without a share, for they were not asked all tasks of {teacher.name} alike (documents, examples, harness, "
            f"beginning of the prompt): {', '.join(partly)}."
        )
    if not rows:
        return [f"No other model was asked all tasks of {teacher.name} alike, so that no share is known.{lacking}"]
    note = (
        f"Mean over all tasks with choices that {teacher.name} was asked, and the model alike, each counting once (in the mean "
        "of acc_norm a task without it stands with its acc): first as most models were asked them, then over more documents "
        "where a model was asked more. Kept: mean / teacher's mean. Above chance: (mean − chance) / "
        "(teacher's mean − chance), which guessing leaves at 0. OneBit (arXiv 2402.11295) aims at over 90 % of the space "
        "saved and at least 80 % of the score kept."
    )
    note += lacking
    columns = ("model", "metric", "mean", "teacher", "chance", "kept", "kept above chance", "tasks", "documents")
    return [Table(columns, rows, note)]


def _not_known(models: Sequence[Facts], name: str) -> list[Part]:
    """The models of which `name` is not known, by the reason."""
    by_reason: dict[str, list[str]] = {}
    for facts in models:
        if getattr(facts, name) is None:
            by_reason.setdefault(facts.why_unknown(name), []).append(facts.name)
    return [f"Not known of {', '.join(names)}: {why}." for why, names in by_reason.items()]


def _agreement(models: Sequence[Facts], teacher: Facts | None) -> Section:
    found = [(facts, near) for facts in models if (near := facts.agreement) is not None]
    lacking = _not_known([facts for facts in models if facts is not teacher], "agreement")
    if not found:
        return Section("Agreement with the teacher", lacking or ["There is no model but the teacher."])
    rows = [
        (
            facts.name, near["teacher"], number(near["kl"], 4), percent(near["top1"]), f"{near['tokens']:,}", near["source"],
            f"{near['outcomes']:,} ({near['mass']:.1%})",
        )
        for facts, near in found
    ]  # fmt: skip
    note = (
        "KL(teacher ‖ model) in nats a token, and the share of tokens behind which both think the same one likeliest. The KL "
        "tells the teacher's likeliest tokens apart (that many, with that much of its probability) and takes the others "
        "as one, so that it is a lower bound."
    )
    columns = ("model", "teacher", "KL", "top-1", "tokens", "text", "outcomes")
    return Section("Agreement with the teacher", [Table(columns, rows, note), *lacking])


def _speeds(models: Sequence[Facts]) -> Section:
    found = [(facts, speed) for facts in models if (speed := facts.speed) is not None]
    if not found:
        return Section("Speed and memory", _not_known(models, "speed"))
    rows = [
        (
            facts.name, s["backend"], number(s["prefill_tokens_per_s"], 1), number(s["decode_tokens_per_s"], 1),
            f"{s['load_s']:.2f} s", megabytes(s["peak_bytes"]), megabytes(s["before_bytes"]),
            f"{s['dtype']}, {s['activations']}", s["machine"],
        )
        for facts, s in found
    ]  # fmt: skip
    _, first = found[0]
    note = (
        f"One sequence, in a process of its own: tokens/s of reading {first['prompt_tokens']} tokens (prefill) and of writing "
        f"{first['new_tokens'] - 1} more one at a time (decode), medians of {first['repeats']}; load time without imports; "
        "peak memory of the process, and what of it was there before the model. On a GPU: what torch allocated there. "
        "A busy machine is slower."
    )
    columns = ("model", "multiplied by", "prefill", "decode", "load", "peak", "before", "run", "machine")
    return Section("Speed and memory", [Table(columns, rows, note), *_not_known(models, "speed")])


def _samples(models: Sequence[Facts]) -> Section:
    quotes: list[Part] = [Quote(facts.name, s["prompt"], s["text"]) for facts in models for s in facts.samples]
    how = sorted({sample["how"] for facts in models for sample in facts.samples})
    return Section(
        "What they write", [f"Continued: {'; '.join(how)}.", *quotes] if quotes else ["No text was written."]
    )


def quality(models: Sequence[Facts], teacher: Facts | None) -> list[Quality]:
    """Perplexity and mean score over bytes, of the models of which both are known."""
    protocol = _common_protocol(models)
    sized = [(facts, float(facts.size["file_bytes"])) for facts in models if facts.size is not None]
    perplexities = [
        (facts.name, size, p["perplexity"])
        for facts, size in sized
        for p in facts.perplexities
        if p["protocol"] == protocol
    ]
    panels = [Quality(f"perplexity, {protocol}", tuple(perplexities), -1, True)] if perplexities else []
    if teacher is not None:
        shares = _common_shares(models, teacher)
        scores = [(f.name, size, 100 * share.model) for f, size in sized if (share := shares.get(f.name)) is not None]
        panels += [Quality("mean acc of the tasks, %", tuple(scores), 1)] if scores else []
    return panels


def _pictures(models: Sequence[Facts], teacher: Facts | None, folder: Path) -> list[Section]:
    """The pictures of which something is known, written to `folder`."""
    sections = []
    panels = quality(models, teacher)
    if panels:
        plot_quality(panels, folder / "quality.png")
        says = "Quality over the bytes of the weight files; models on the Pareto front are filled"
        sections.append(Section("Quality and bytes", [Picture(folder / "quality.png", says)]))
    subject = models[0]
    if subject.layers:
        known = any(layer.get("error") is not None for layer in subject.layers)
        decisions = tuple(
            Decision(
                layer["name"], "binarized", "", layer["weights"], layer["nbytes"], layer["weights"],
                error=layer.get("error"),
            )
            for layer in subject.layers
        )  # fmt: skip
        of = "the teacher's weights' energy"
        plot_layers(Report(decisions, sum(d.weights for d in decisions)), folder / "layers.png", subject.name, of)
        says = (
            "Error is ‖W − V‖² / ‖V‖² of each packed matrix against the teacher's: what rounding does to weights. A trained "
            "model's weights are its own, so that theirs says how far they went and not how good they are."
            if known
            else f"The error of the layers is not known: {subject.why_unknown('layers')}."
        )
        picture = Picture(folder / "layers.png", "True bits (and error) of each packed layer over the blocks")
        sections.append(Section(f"Layers of {subject.name}", [picture, says, Fold("All layers", _layers(subject))]))
    return sections


def _layers(facts: Facts) -> Table:
    rows = [
        (
            layer["name"], f"{layer['weights']:,}", number(layer["bits_per_weight"]), percent(layer.get("error")),
            percent(layer.get("sign_agreement")),
        )
        for layer in facts.layers
    ]  # fmt: skip
    return Table(("layer", "weights", "bits/weight", "error", "equal signs"), rows)


def _sources(models: Sequence[Facts], commands: Sequence[str], here: dict[str, str]) -> Section:
    rows = [
        (facts.name, (facts.model_sha256 or MISSING)[:16], facts.made_by or MISSING, facts.source or "this command")
        for facts in models
    ]
    made = "\n".join([*(facts.command for facts in models if facts.command), *commands])
    table = Table(("model", "SHA-256", "made by", "results from"), rows, "SHA-256 over the models' files.")
    elsewhere: dict[tuple[str, str], list[str]] = {}
    for facts in models:
        for record in facts.measured_on:
            if (machine := of_machine(record)) != here:
                elsewhere.setdefault((described(machine), "; ".join(record["what"])), []).append(facts.name)
    parts: list[Part] = [Code(made), f"Made on: {described(here)}.", table]
    if elsewhere:
        note = "What is not named here was measured where the report was made."
        lines = [(", ".join(names), *found) for found, names in elsewhere.items()]
        parts.append(Table(("models", "measured on", "what"), lines, note))
    return Section("Commands, versions, hashes", parts)


def make_page(
    models: Sequence[Facts],
    teacher: Facts | None,
    folder: Path | None,
    commands: Sequence[str],
    here: dict[str, str],
) -> Page:
    """The page of `models`, the first of which it is about; `folder` takes its pictures, None leaves them out.

    `here` is the machine that makes it (`signbit.evaluate.machines.here`): what was measured on others says so.
    Raises OptionError if matplotlib, which draws, is missing, or a picture cannot be written.
    """
    if not models:
        raise OptionError("a report needs at least one model")
    shown = None if teacher is None else next((facts for facts in models if facts.name == teacher.name), None)
    pictures = _pictures(models, shown, folder) if folder is not None else []
    quality_first, layers = [s for s in pictures if s.title.startswith("Quality")], pictures[1:]
    if not quality_first:
        layers = pictures
    return Page(
        f"{models[0].name}: report",
        "What this model weighs, what it keeps, and what it costs, beside others. "
        f"{MISSING} stands where nothing was measured.",
        [
            Section("In short", [_short(models, shown)]),
            *quality_first,
            _sizes(models),
            _perplexities(models, shown),
            _tasks(models, shown),
            _agreement(models, shown),
            _speeds(models),
            _samples(models),
            *layers,
            _sources(models, commands, here),
        ],
    )


def _short(models: Sequence[Facts], teacher: Facts | None) -> Table:
    """`summary` without columns of which nothing is known."""
    table = summary(models, teacher)
    keep = [0, *(i for i in range(1, len(table.columns)) if any(row[i] != MISSING for row in table.rows))]
    return Table([table.columns[i] for i in keep], [[row[i] for i in keep] for row in table.rows])
