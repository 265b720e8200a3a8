"""The part of `signbit eval` that measures perplexity: of a whole model, or of one block after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from signbit.cli.output import Bars, note, table
from signbit.errors import OptionError

if TYPE_CHECKING:
    from signbit.cli.tasks import Place
    from signbit.hub.subject import Subject

#: Model → share of 16 bits that its packed linears, and its whole files, save.
Saved = dict[str, tuple[float, float]]


def named(args: Any, tasks: bool, place: Place) -> list[str]:
    """The protocols and files of --ppl, by default wikitext2 unless `tasks` are asked for; raises OptionError, DataError."""
    from signbit.evaluate.perplexity import check

    ppl = args.ppl if args.ppl is not None or tasks else "wikitext2"
    names = [name.strip() for name in (ppl or "").split(",") if name.strip()]
    if ppl is not None and not names:
        raise OptionError("--ppl names nothing to measure; see signbit eval --list")
    if args.offload and tasks:
        raise OptionError("--offload is for --ppl: tasks need the whole model; measure them without it")
    if args.offload and place.number > 1:
        raise OptionError("--offload is for one process: each of several would read the whole model")
    for name in names:
        check(name, args.data_dir, args.text, args.max_windows)
    return names


def subject(model_name: str, args: Any) -> Subject:
    """A model whose perplexities are kept where `signbit report` finds them."""
    from signbit.hub.subject import Subject, Where

    run = args.run
    return Subject(Path(model_name).name, model_name, Where(run.device, run.dtype, run.activations), args.again)


def _protocol(name: str, args: Any) -> dict[str, Any]:
    from signbit.hub.subject import perplexity_protocol

    return perplexity_protocol(name, args.data_dir, args.max_windows, args.text)


def _recalled(of: Subject, name: str, args: Any) -> dict[str, Any] | None:
    """The perplexity `name` as it was kept, as JSON values; None where it is to be measured."""
    protocol = _protocol(name, args)
    known = of.recall("perplexity", protocol)
    return None if known is None else {**_result(of, name, protocol, known), "kept": True}


def _result(of: Subject, name: str, protocol: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    return {"model": of.place, "name": name, "asked": protocol, **found}


def _keep(of: Subject, result: dict[str, Any]) -> None:
    found = {key: value for key, value in result.items() if key not in ("model", "asked", "offloaded")}
    of.keep("perplexity", result["asked"], found)


def measured(of: Subject, loaded: Callable[[], tuple[Any, Any]], name: str, args: Any, place: Place) -> dict[str, Any]:
    """The perplexity `name` of a model, as JSON values: what is kept, else what is measured, which is kept at once.

    `loaded` gives model and tokenizer. Each process measures its share of the windows, and all do what the first decides.
    Windows are kept as they come, so that a killed command goes on behind them.
    """
    from tqdm import tqdm

    from signbit.evaluate.perplexity import perplexity

    known: dict[str, Any] | None = place.of_main(_recalled(of, name, args) if place.main else None)
    if known is not None:
        return known
    model, tokenizer = loaded()
    protocol = _protocol(name, args)
    windows = of.windows(protocol, place.index)
    if windows.known and place.main:
        note(f"{of.name} {name}: {len(windows.known)} windows are kept from a run that ended early")
    silent = None if place.main else True  # None: silent unless on a terminal
    with tqdm(desc=f"{of.name} {name}", unit="window", disable=silent, leave=False) as bar:

        def step(done: int, total: int, value: float) -> None:
            bar.total = total
            bar.set_postfix_str(f"ppl {value:.2f}", refresh=False)
            bar.update(done - bar.n)

        processes = place.index, place.number
        found = perplexity(model, tokenizer, name, args.data_dir, args.text, args.max_windows, step, processes, windows)
    result = _result(of, name, protocol, found.to_dict())
    if place.main:
        _keep(of, result)
    return result


def offloaded(of: Subject, names: Sequence[str], args: Any) -> list[dict[str, Any]]:
    """The perplexities `names` as `measured` gives them; those that are not kept go together, a block in memory at a time."""
    known = [_recalled(of, name, args) for name in names]
    lacking = [name for name, result in zip(names, known, strict=True) if result is None]
    fresh = iter(_by_blocks(of, lacking, args) if lacking else ())
    return [next(fresh) if result is None else result for result in known]


def _by_blocks(of: Subject, names: Sequence[str], args: Any) -> list[dict[str, Any]]:
    from signbit.hub.load import is_packed
    from signbit.hub.offload import offloaded_perplexities

    if args.run.activations != "exact" and not is_packed(of.place):
        note(f"{of.place} has no packed layer; its activations stay exact")
    bars = Bars()

    def step(done: int, total: int, block: int) -> None:
        bars(f"{of.name} by blocks", done, total, f"block {block}")

    run = args.run
    try:
        found = offloaded_perplexities(
            of.place, names, args.data_dir, args.text, args.max_windows, run.device, run.dtype, run.activations,
            args.inputs_on, step,
        )  # fmt: skip
    finally:
        bars.close()
    results = [
        {**_result(of, name, _protocol(name, args), result.to_dict()), "offloaded": True}
        for name, result in zip(names, found, strict=True)
    ]
    for result in results:
        _keep(of, result)
    return results


def print_perplexities(results: Sequence[dict[str, Any]], against: Sequence[str], saved: Saved) -> None:
    """A line a model and protocol, with the ratio to the last of `against`; nothing where there are none."""
    if not results:
        return
    anchors = {r["protocol"]: r["perplexity"] for r in results if r["model"] == (against or ("",))[-1]}
    rows = [
        (
            r["model"], r["protocol"], f"{r['perplexity']:.4g}" if r["perplexity"] >= 1e4 else f"{r['perplexity']:.3f}",
            f"{r['perplexity'] / anchors[r['protocol']]:.3g} ×" if r["protocol"] in anchors else "",
            " / ".join(f"{share:.1%}" for share in saved.get(r["model"], ())),
            f"{r['windows']} × {r['window']}",
            f"{r['dtype']}, {r['activations']}" + (", by blocks" if r.get("offloaded") else ""),
            "kept" if r.get("kept") else f"{r['seconds_s']:.0f} s",
        )
        for r in results
    ]  # fmt: skip
    last = f"of {against[-1]}" if against else ""
    table(None, ("model", "protocol", "perplexity", last, "saved", "windows", "run", "time"), rows)
    if saved:
        print("saved: of 16 bits, in the packed linears / in the whole weight files")
    if any(r.get("kept") for r in results):
        print("kept: measured before (--again measures anew)")
