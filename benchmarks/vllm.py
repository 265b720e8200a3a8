"""Tokens per second and weight memory of packed models beside their dense source, all in vLLM on this CPU.

    python -m benchmarks.vllm [MODEL] [--dtype float32]         # `make vllm` runs it in the environment that it makes

Each figure is the median over several engines, each in a process of its own, packed and dense in turn. Nothing is timed
unless in float32 the greedy tokens of the packed model are those of transformers: in bfloat16 two roundings of a logit lie
further apart than many two best tokens, so that nothing could be told there.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.rows import Row, lower_is_better, show

SETTINGS = {
    "absmean": ["--method", "absmean"],
    "absmean, group 64, int8 head": ["--method", "absmean", "--head", "int8", "--group", "64"],
    "onebit": ["--method", "onebit"],
    "pbllm, 10 % salient": ["--method", "pbllm", "--salient", "0.1", "--no-gptq", "--saliency", "magnitude"],
}
PROMPTS = ["Once upon a time", "The capital of France is", "To bake bread you need", "A prime number is"]
#: Two best logits in float32 that lie no further apart are a tie: sums in another order.
NEAR_TIE = 1e-3

_CHILD = """
import json, sys
from benchmarks.vllm import run_engine
print("RESULT", json.dumps(run_engine(*json.loads(sys.argv[1]))))
"""


def weight_bytes(model: Any) -> int:
    """Bytes of all tensors of vLLM's model; of a dense layer whose weight oneDNN has taken over, rows × columns × item."""
    from vllm.model_executor.layers.linear import LinearBase

    tensors = [t for t in (*model.parameters(), *model.buffers()) if t.numel()]
    held = sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())
    taken = (
        layer.input_size * layer.output_size * layer.params_dtype.itemsize
        for layer in model.modules()
        if isinstance(layer, LinearBase) and not hasattr(layer, "parts") and not layer.weight.numel()
    )
    return held + sum(taken)


def run_engine(directory: str, dtype: str, new_tokens: int, answers: int) -> dict[str, Any]:
    """Greedy tokens, the median tokens per second of one answer (None without `answers`), and the bytes of the weights."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        directory,
        dtype=dtype,
        max_model_len=256,
        max_num_seqs=4,
        max_num_batched_tokens=256,
        enforce_eager=True,
        seed=0,
    )
    sampling = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True)
    written = [list(a.outputs[0].token_ids) for a in llm.generate(PROMPTS, sampling, use_tqdm=False)]
    rates = []
    for _ in range(answers):
        begin = time.perf_counter()
        llm.generate(PROMPTS[0], sampling, use_tqdm=False)
        rates.append(new_tokens / (time.perf_counter() - begin))
    return {
        "written": written,
        "tokens_per_s": statistics.median(rates) if rates else None,
        "weight_bytes": llm.apply_model(weight_bytes)[0],
    }


def _in_own_process(directory: Path, dtype: str, new_tokens: int, answers: int) -> dict[str, Any]:
    environment = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR",
        "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    values = json.dumps([str(directory), dtype, new_tokens, answers])
    done = subprocess.run(
        [sys.executable, "-c", _CHILD, values], stdout=subprocess.PIPE, text=True, env={**os.environ, **environment}
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode or not lines:
        raise SystemExit(f"vLLM ended with {done.returncode} on {directory}; its own words are above")
    return json.loads(lines[-1].removeprefix("RESULT "))


def check(directory: Path, written: list[list[int]]) -> str:
    """How the tokens that vLLM wrote stand in transformers with the same packed model, float32; ends if they are others'."""
    import torch
    from transformers import AutoTokenizer

    import signbit

    model, tokenizer = signbit.load(directory, dtype=torch.float32), AutoTokenizer.from_pretrained(directory)
    same, behind = 0, 0.0
    for prompt, tokens in zip(PROMPTS, written, strict=True):
        ids = tokenizer(prompt).input_ids
        with torch.no_grad():
            logits = model(torch.tensor([[*ids, *tokens]])).logits[0, len(ids) - 1 : -1].float()
        gaps = logits.max(-1).values - logits[range(len(tokens)), tokens]
        same, behind = same + int((gaps == 0).sum()), max(behind, float(gaps.max()))
    if behind > NEAR_TIE:
        raise SystemExit(f"{directory}: a token of vLLM's is {behind:.3g} behind transformers' best in float32")
    total = sum(map(len, written))
    return f"{same} of {total} greedy tokens are transformers' best, the others at most {behind:.2g} behind"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", help="default: SmolLM2-135M-Instruct, as the demo has it")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--answers", type=int, default=3)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--json")
    args = parser.parse_args()
    if args.model is None:
        from demo.smollm2 import model_directory

        args.model = model_directory()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as scratch:
        directories = {"dense": Path(args.model)}
        for label, options in SETTINGS.items():
            directories[label] = Path(scratch) / label.replace(" ", "_")
            command = [sys.executable, "-m", "signbit", "quantize", str(args.model), "-o", str(directories[label])]
            subprocess.run([*command, *options], check=True, stdout=subprocess.DEVNULL)
        for label in SETTINGS:
            written = _in_own_process(directories[label], "float32", args.new_tokens, 0)["written"]
            print(f"{label}, float32: {check(directories[label], written)}", flush=True)
        runs: dict[str, list[dict[str, Any]]] = {label: [] for label in directories}
        for turn in range(args.rounds):
            for label, directory in directories.items():
                result = _in_own_process(directory, args.dtype, args.new_tokens, args.answers)
                runs[label].append(result)
                print(f"round {turn + 1}, {label}: {result['tokens_per_s']:.1f} tokens/s", flush=True)

    def median(label: str, key: str) -> float:
        return statistics.median(run[key] for run in runs[label])

    peer = f"vLLM, dense {args.dtype}"
    for label in SETTINGS:
        ours, theirs = median(label, "tokens_per_s"), median("dense", "tokens_per_s")
        rows.append(Row(f"one answer, {label}", ours, peer, theirs, ours / theirs, "tokens/s"))
        ours, theirs = (median(name, "weight_bytes") / 1e6 for name in (label, "dense"))
        rows.append(lower_is_better(f"weights, {label}", ours, peer, theirs, "MB"))
    show(rows, args.json)


if __name__ == "__main__":
    main()
