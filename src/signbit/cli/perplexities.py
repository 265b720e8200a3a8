"""The part of `signbit eval` that measures perplexity: of a whole model, or of one block after the other."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from signbit.cli.output import Bars, note, table
from signbit.errors import OptionError

if TYPE_CHECKING:
    from signbit.cli.tasks import Place

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


def measured(model: Any, tokenizer: Any, model_name: str, name: str, args: Any, place: Place) -> dict[str, Any]:
    """The perplexity `name` of a loaded model, as JSON values; each process measures its share of the windows."""
    from tqdm import tqdm

    from signbit.evaluate.perplexity import perplexity

    silent = None if place.main else True  # None: silent unless on a terminal
    with tqdm(desc=f"{Path(model_name).name} {name}", unit="window", disable=silent, leave=False) as bar:

        def step(done: int, total: int, value: float) -> None:
            bar.total = total
            bar.set_postfix_str(f"ppl {value:.2f}", refresh=False)
            bar.update(done - bar.n)

        processes = place.index, place.number
        result = perplexity(model, tokenizer, name, args.data_dir, args.text, args.max_windows, step, processes)
    return {"model": model_name, "name": name, **result.to_dict()}


def offloaded(model_name: str, names: Sequence[str], args: Any) -> list[dict[str, Any]]:
    """The perplexities `names` with one block in memory at a time, as JSON values."""
    from signbit.hub.load import is_packed
    from signbit.hub.offload import offloaded_perplexities

    if args.run.activations != "exact" and not is_packed(model_name):
        note(f"{model_name} has no packed layer; its activations stay exact")
    bars = Bars()

    def step(done: int, total: int, block: int) -> None:
        bars(f"{Path(model_name).name} by blocks", done, total, f"block {block}")

    run = args.run
    try:
        found = offloaded_perplexities(
            model_name, names, args.data_dir, args.text, args.max_windows, run.device, run.dtype, run.activations,
            args.inputs_on, step,
        )  # fmt: skip
    finally:
        bars.close()
    return [
        {"model": model_name, "name": name, **result.to_dict(), "offloaded": True}
        for name, result in zip(names, found, strict=True)
    ]


def kept(model_name: str, results: Sequence[dict[str, Any]], args: Any) -> dict[str, Any]:
    """Keeps a model's perplexities where `signbit report` finds them; returns what is known of the model, as JSON values."""
    from signbit.hub.subject import Subject, Where, perplexity_protocol

    subject = Subject(Path(model_name).name, model_name, Where(args.run.device, args.run.dtype, args.run.activations))
    for result in results:
        of = perplexity_protocol(result["name"], args.data_dir, args.max_windows, args.text)
        subject.keep("perplexity", of, {k: v for k, v in result.items() if k not in ("model", "offloaded")})
    return subject.facts().to_dict()


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
            f"{r['seconds_s']:.0f} s",
        )
        for r in results
    ]  # fmt: skip
    last = f"of {against[-1]}" if against else ""
    table(None, ("model", "protocol", "perplexity", last, "saved", "windows", "run", "time"), rows)
    if saved:
        print("saved: of 16 bits, in the packed linears / in the whole weight files")
