"""Load time and resident memory of a packed model against the dense one, and the start of the command line.

    python -m benchmarks.load MODEL [--json FILE]

Each load runs in a process of its own; medians of several. Refuses to time a packed model that does not give the
logits of the model it was saved from.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

import signbit
from benchmarks.rows import Row, lower_is_better, show
from signbit.hub.load import load_source

SETTINGS = {
    "absmean, group 64": {"method": "absmean", "group": 64},
    "absmean, group 64, int8 head": {"method": "absmean", "group": 64, "head": "int8"},
    "pbllm, 10 % salient": {"method": "pbllm", "salient": 0.1, "gptq": False, "saliency": "magnitude"},
}
_CHILD = """
import gc, json, sys, time
import signbit, torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging
import transformers.models.llama.modeling_llama  # imports are not what is measured
logging.disable_progress_bar()

def resident_bytes():
    gc.collect()
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmRSS"))

before = resident_bytes()
begin = time.perf_counter()
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto")
seconds = time.perf_counter() - begin
# Every weight is read once, so that pages that only were reserved count too.
tensors = [t for t in (*model.parameters(), *model.buffers()) if t.dim()]
checksum = [t.view(torch.uint8).sum() for t in tensors]
# What the kernels multiply by is among them, and nothing is kept twice; a tied pair is one storage.
weights = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
print(json.dumps({"seconds": seconds, "resident_bytes": resident_bytes() - before, "weights_bytes": sum(weights.values())}))
"""


def _load(directory: Path | str, runs: int) -> dict[str, float]:
    """Median seconds of from_pretrained, and by how many bytes the process has grown."""
    measured = [
        json.loads(
            subprocess.run([sys.executable, "-c", _CHILD, str(directory)], capture_output=True, check=True).stdout
        )
        for _ in range(runs)
    ]
    return {key: statistics.median(m[key] for m in measured) for key in measured[0]}


def _seconds(command: list[str], runs: int) -> float:
    import time

    times = []
    for _ in range(runs):
        begin = time.perf_counter()
        subprocess.run(command, capture_output=True, check=True)
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--json")
    args = parser.parse_args()
    dense = _load(args.model, args.runs)
    ids = torch.tensor([[1, 2, 3, 4]])
    rows: list[Row] = []
    for label, setting in SETTINGS.items():
        with tempfile.TemporaryDirectory() as scratch:
            model = load_source(args.model)
            signbit.quantize_(model, signbit.SignbitConfig(**setting))
            out = signbit.save(model, Path(scratch) / "packed")
            if not torch.equal(signbit.load(out)(ids).logits, model(ids).logits):
                raise SystemExit(f"{label}: the loaded model gives other logits than the saved one")
            packed = _load(out, args.runs)
            file_bytes = (out / "model.safetensors").stat().st_size
        rows.append(lower_is_better(f"load, {label}", packed["seconds"], "transformers, dense", dense["seconds"], "s"))
        rows.append(
            lower_is_better(
                f"resident memory, {label}",
                packed["resident_bytes"] / 1e6,
                "transformers, dense",
                dense["resident_bytes"] / 1e6,
                "MB",
            )
        )
        rows.append(
            lower_is_better(
                f"resident memory, {label}", packed["resident_bytes"] / 1e6, "its own file", file_bytes / 1e6, "MB"
            )
        )
        rows.append(
            lower_is_better(
                f"weights in memory, {label}", packed["weights_bytes"] / 1e6, "its own file", file_bytes / 1e6, "MB"
            )
        )
    ours = _seconds([sys.executable, "-m", "signbit", "--help"], args.runs)
    torch_s = _seconds([sys.executable, "-c", "import torch"], args.runs)
    rows.append(lower_is_better("signbit --help", ours, "python -c 'import torch'", torch_s, "s"))
    show(rows, args.json)


if __name__ == "__main__":
    main()
