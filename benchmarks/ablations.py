"""PB-LLM's ablations (its gptq_pb/run_all.sh) as one markdown table: perplexity and true bits by setting and salient share.

    python -m benchmarks.ablations MODEL --data-dir ../shared/data --group 64 --rows ablations.jsonl --device cuda

Rounding beside GPTQ, magnitude beside the Hessian, one scale a row beside groups, at 50, 20, 10 and 5 % salient; SparseGPT
at 50 % and GPTQ at 4 bits; signbit's default. Every finished cell is appended to --rows and not measured again, so that the
command can be killed and repeated; with --rows alone complete, it prints the table and measures nothing. A cell is refused
unless the packed model and its dequantized twin agree (benchmarks.calibration).
"""

from __future__ import annotations

import argparse
from typing import Any

import signbit
from benchmarks.calibration import keep_row, measure, read_rows
from signbit.hub.load import load_any, load_tokenizer

SHARES = (0.5, 0.2, 0.1, 0.05)
#: Label, setting as benchmarks.calibration has it ({group} is --group), and the salient shares; None where it has its own.
SETTINGS: tuple[tuple[str, str, tuple[float, ...]], ...] = (
    ("rounded to nearest, magnitude", "pb-gptq: gptq=false, saliency=magnitude", SHARES),
    ("rounded to nearest, Hessian", "pb-gptq: gptq=false", SHARES),
    ("PB-GPTQ, magnitude", "pb-gptq: saliency=magnitude", SHARES),
    ("PB-GPTQ, Hessian", "pb-gptq", SHARES),
    ("PB-GPTQ, magnitude, groups of {group}", "pb-gptq: saliency=magnitude, group={group}", SHARES),
    ("PB-GPTQ, Hessian, groups of {group}", "pb-gptq: group={group}", SHARES),
    ("signbit's default (`--method pbllm`)", "pbllm", SHARES),
    # Published: prune --low_frac 0.5, the rest of the weights at 8 bits.
    ("SparseGPT, half of the weights 0", "pb-gptq: low=prune", (0.5,)),
    # Published: prune --low_frac 0.001 --high_bit 4, a thousandth of the weights 0 and 4 bits an entry for the others.
    ("GPTQ, 4 bits, none salient", "pb-gptq: low=4bit", (0.0,)),
)
#: The row of full precision, which has one cell.
DENSE = "full precision"


def wanted(group: int, shares: list[float] | None) -> list[tuple[str, str, float]]:
    """Label, setting and share of each cell."""
    return [
        (label.format(group=group), setting.format(group=group), share)
        for label, setting, its in SETTINGS
        for share in its
        if shares is None or share in shares
    ]


def cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    value = row["perplexity"]
    return (
        f"{value:.4g} ({row['bits_per_weight']:.2f})" if value < 1e4 else f"{value:.0f} ({row['bits_per_weight']:.2f})"
    )


def markdown(rows: list[dict[str, Any]], group: int) -> str:
    """The table: a line a setting, a column a share; in brackets true bits per weight."""
    found = {(row["setting"], row["share"]): row for row in rows}
    lines = [f"| | {' | '.join(f'{share:.0%} salient' for share in SHARES)} |", "|---|" + "---|" * len(SHARES)]
    for label, setting, shares in SETTINGS:
        cells = [cell(found.get((setting.format(group=group), share))) for share in shares]
        if shares != SHARES:
            cells += [""] * (len(SHARES) - len(cells))
        lines.append(f"| {label.format(group=group)} | {' | '.join(cells)} |")
    lines.append(f"| {DENSE} | {cell(found.get((DENSE, 1.0)))} |{' |' * (len(SHARES) - 1)}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--data-dir")
    parser.add_argument("--calibration", default="c4")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--sequence-length", type=int, default=2048)
    parser.add_argument("--ppl", default="wikitext2")
    parser.add_argument("--max-windows", type=int)
    parser.add_argument("--group", type=int, default=64, help="columns of a group; it must divide each layer's width")
    parser.add_argument(
        "--shares", type=float, nargs="+", choices=(*SHARES, 0.0), help="measure only these salient shares"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--inputs-on", default="device")
    parser.add_argument("--rows", help="JSON lines, one a finished cell")
    args = parser.parse_args()
    run = {
        "model": args.model, "calibration": args.calibration, "protocol": args.ppl, "windows": args.max_windows,
        "samples": args.samples, "length": args.sequence_length,
    }  # fmt: skip
    rows = read_rows(args.rows, run)
    known = {(row["setting"], row["share"]) for row in rows}
    if (DENSE, 1.0) not in known:
        dense = load_any(args.model, "float32", args.device)
        tokenizer = load_tokenizer(args.model)
        value = signbit.perplexity(dense, tokenizer, args.ppl, args.data_dir, max_windows=args.max_windows).perplexity
        rows.append({**run, "setting": DENSE, "share": 1.0, "perplexity": value, "bits_per_weight": 16.0})
        keep_row(args.rows, rows[-1])
    for label, setting, share in wanted(args.group, args.shares):
        if (setting, share) not in known:
            row = {**measure(args, setting, share, 0), **run}
            rows.append(row)
            keep_row(args.rows, row)
            print(f"{label}, {share:.0%}: {row['perplexity']:.5g} at {row['bits_per_weight']:.3f} bits", flush=True)
    print(markdown(rows, args.group))


if __name__ == "__main__":
    main()
