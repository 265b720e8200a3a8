"""Seconds and peak memory of quantizing random models of one block shape and 4, 8, 16 blocks; and one of 1.3B.

    python -m benchmarks.ptq                    # the three depths, beside pb-gptq and the dense model's own size
    python -m benchmarks.ptq --shape 1.3B       # hidden 2048, 24 blocks: minutes on two cores

Each run is a process of its own, whose peak resident memory the system reports. Refuses to time a result whose packed
layers do not load and give finite logits.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.rows import Row, lower_is_better, show

SHAPES = {
    "small": {"hidden_size": 768, "intermediate_size": 2048, "num_attention_heads": 12, "vocab_size": 4096},
    "1.3B": {"hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 32, "vocab_size": 32000},
}
RUN = """
import json, resource, sys, time
import signbit
from signbit.data import CalibrationOptions
from signbit.hub.stream import quantize
model, out, text, method, samples, length, where = sys.argv[1:]
began = time.perf_counter()
config = signbit.SignbitConfig(method)
quantize(model, out, config, CalibrationOptions(text, int(samples), int(length)), inputs_on=where)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"seconds_s": time.perf_counter() - began, "peak_bytes": peak}))
"""


def make_model(folder: Path, shape: dict[str, int], blocks: int) -> int:
    """A random bfloat16 Llama with a tokenizer of words; returns its bytes."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    config = LlamaConfig(**shape, num_hidden_layers=blocks, max_position_embeddings=2048, tie_word_embeddings=True)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    LlamaForCausalLM(config).save_pretrained(folder)
    inner = Tokenizer(models.WordLevel({f"w{i}": i for i in range(1000)}, unk_token="w0"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="w0").save_pretrained(folder)
    return (folder / "model.safetensors").stat().st_size


def run(model: Path, out: Path, text: Path, method: str, samples: int, length: int, where: str) -> dict[str, float]:
    words = [str(model), str(out), str(text), method, str(samples), str(length), where]
    done = subprocess.run([sys.executable, "-c", RUN, *words], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"quantizing failed: {done.stderr[-2000:]}")
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


CHECK = """
import sys, torch, signbit
model = signbit.load(sys.argv[1])
assert model(torch.tensor([[3, 4, 5]])).logits.isfinite().all()
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="small", choices=SHAPES)
    parser.add_argument("--blocks", type=int, nargs="+")
    parser.add_argument("--methods", nargs="+", default=["pbllm", "pb-gptq"])
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--inputs-on", default="disk")
    parser.add_argument("--json")
    args = parser.parse_args()
    depths = args.blocks or ([24] if args.shape == "1.3B" else [4, 8, 16])
    rows: list[Row] = []
    peaks: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        text = Path(scratch) / "text.txt"
        generator = random.Random(0)
        text.write_text(" ".join(f"w{generator.randint(0, 999)}" for _ in range(20 * args.sequence_length)))
        for blocks in depths:
            model = Path(scratch) / f"model{blocks}"
            began = time.perf_counter()
            # In a process of its own too, so that this one stays small.
            code = f"from benchmarks.ptq import *; print(make_model(Path({str(model)!r}), SHAPES[{args.shape!r}], {blocks}))"
            made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
            dense_bytes = int(made.stdout.splitlines()[-1])
            print(
                f"{blocks} blocks, {dense_bytes / 1e6:.0f} MB, made in {time.perf_counter() - began:.0f} s", flush=True
            )
            results = {}
            for method in args.methods:
                out = Path(scratch) / f"out{blocks}-{method}"
                results[method] = run(model, out, text, method, args.samples, args.sequence_length, args.inputs_on)
                subprocess.run([sys.executable, "-c", CHECK, str(out)], check=True, capture_output=True)
                peaks.setdefault(method, []).append(results[method]["peak_bytes"])
                print(f"  {method}: {results[method]}", flush=True)
            for method, result in results.items():
                work = f"{method}, {blocks} blocks of {args.shape}"
                peer = args.methods[-1]
                rows.append(
                    lower_is_better(f"{work}: time", result["seconds_s"], peer, results[peer]["seconds_s"], "s")
                )
                peak = result["peak_bytes"] / 1e6
                rows.append(lower_is_better(f"{work}: peak", peak, "the dense file", dense_bytes / 1e6, "MB"))
    show(rows, args.json)
    for method, values in peaks.items():
        if len(values) > 1:
            print(
                f"{method}: peak memory at {depths[-1]} blocks is {values[-1] / values[0]:.3f} of that at {depths[0]}"
            )
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    print(f"(this process: {own:.0f} MB; torch and transformers alone take some 400 MB of each peak)")


if __name__ == "__main__":
    main()
