"""Tokens per second of a packed model beside the same model in bfloat16, on one GPU in one run.

    python -m benchmarks.generate_cuda --json generate.json      # a Llama of the 7B shape with random weights

`model.generate` with a static cache, whose decoding step transformers compiles (torch.compile, CUDA graphs). A rate is
new tokens after the first over the time they took, the median of several answers after those that compile. Nothing is
timed unless every layer is multiplied by the kernels and the packed model's logits are those of plain torch on the same
bits.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import time
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import signbit
from benchmarks.rows import Row, show
from signbit.linear import PackedLinear

SHAPES = {
    "7B": {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "num_hidden_layers": 32},
    "tiny": {"hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4, "num_hidden_layers": 2},
}
PROMPT = 16


def dense(shape: str, device: str) -> Any:
    """The dense bfloat16 model, made where it will run."""
    config = LlamaConfig(**SHAPES[shape], vocab_size=32000, max_position_embeddings=2048, eos_token_id=None)
    torch.manual_seed(0)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model = model.to(torch.bfloat16).to_empty(device=device)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter.data, std=0.02) if parameter.ndim > 1 else torch.nn.init.ones_(parameter.data)
    rotary = model.model.rotary_emb
    model.model.rotary_emb = type(rotary)(config=config).to(device)
    model.generation_config.eos_token_id = None
    return model.eval()


def rate(model: Any, tokens: int, runs: int) -> tuple[float, float]:
    """Tokens per second, and the most memory that was allocated meanwhile in GB (0 on a CPU)."""
    cuda = model.device.type == "cuda"
    prompt = torch.arange(1, PROMPT + 1, device=model.device)[None]
    mask = torch.ones_like(prompt)

    def seconds(count: int) -> float:
        if cuda:
            torch.cuda.synchronize()
        began = time.perf_counter()
        # One length of cache, so that one graph serves both.
        out = model.generate(
            prompt, attention_mask=mask, do_sample=False, max_new_tokens=count, cache_implementation="static",
            pad_token_id=0,
        )  # fmt: skip
        if cuda:
            torch.cuda.synchronize()
        if out.shape[1] != PROMPT + count:
            raise SystemExit(f"{out.shape[1] - PROMPT} tokens came instead of {count}; nothing is timed")
        return time.perf_counter() - began

    for _ in range(2):
        seconds(tokens)
    seconds(tokens // 2)
    gc.collect()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    # The first token's share, and what a call costs by itself, are in both.
    whole = statistics.median(seconds(tokens) for _ in range(runs))
    half = statistics.median(seconds(tokens // 2) for _ in range(runs))
    return (tokens - tokens // 2) / (whole - half), torch.cuda.max_memory_allocated() / 1e9 if cuda else 0.0


@torch.no_grad()
def check(model: Any) -> None:
    """Ends the run unless all layers are on the kernels and give the logits of plain torch."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}
    if left := {reason for layer in layers.values() if (reason := layer.prepare()) is not None}:
        raise SystemExit(f"not all layers are multiplied by the kernels: {left}; nothing is timed")
    for layer in list(layers.values())[:7]:
        x = torch.randn(1, layer.in_features, device=model.device, dtype=torch.bfloat16)
        want = signbit.ops.binary_linear(x.float(), layer.weights[0].operands(), layer.activations)
        if not (layer(x) - want).abs().max() <= 0.01 * want.abs().max():
            raise SystemExit("a layer is off the reference; nothing is timed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="7B", choices=SHAPES)
    parser.add_argument("--group", type=int, default=-1)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json")
    args = parser.parse_args()
    model = dense(args.shape, args.device)
    dense_rate, dense_peak = rate(model, args.tokens, args.runs)
    torch._dynamo.reset()
    # In place, layer by layer: what the dense layers held is free again.
    signbit.quantize_(model, signbit.SignbitConfig(method="absmean", group=args.group, head="int8"))
    rows = []
    for mode in ("int8", "exact"):
        torch._dynamo.reset()
        gc.collect()
        torch.cuda.empty_cache()
        signbit.set_activations(model, mode)
        check(model)
        ours, peak = rate(model, args.tokens, args.runs)
        form = f"{args.shape}, {'row scale' if args.group < 0 else f'group {args.group}'}"
        rows.append(Row(f"generate {mode}, {form}", ours, "torch bfloat16", dense_rate, ours / dense_rate, "tokens/s"))
        rows.append(
            Row(f"most memory, {mode}, {form}", peak, "torch bfloat16", dense_peak, dense_peak / max(peak, 1e-9), "GB")
        )
    name = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}, {os.environ.get('SIGNBIT_CUDA', 'kernels')}")
    show(rows, args.json)


if __name__ == "__main__":
    main()
