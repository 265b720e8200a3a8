"""Tokens per second of a packed model beside the same model in bfloat16, on one GPU in one run.

    python -m benchmarks.generate_cuda --json generate.json      # a Llama of the 7B shape with random weights

Two ways of decoding with transformers' static cache, the same for both models. "graph": one step, compiled by
torch.compile and captured with its argmax in a CUDA graph that is replayed, which is what the GPU can do. "generate":
`model.generate(..., cache_implementation="static")`, whose own Python costs milliseconds a token. Each figure is the
median of several answers. Nothing is timed unless every layer is multiplied by the kernels and those of the first block
give what plain torch gives on the same bits, nor the graph unless it chooses what the eager model does.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch._inductor.config
import transformers
from transformers import StaticCache

import signbit
from benchmarks.generate import random_llama
from benchmarks.rows import Row, show
from signbit.linear import PackedLinear
from signbit.ops import reference

SHAPES = {
    "7B": {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "num_hidden_layers": 32},
    "tiny": {"hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4, "num_hidden_layers": 2},
}
PROMPT = 16
PROFILED = 20
COMPARED, NEARLY = 16, 0.25  # steps; standard deviations of the logits, of which a wrong step's token is several off


def compare(model: Any, cache: StaticCache, token: torch.Tensor, begin: Callable[[], None], graph: Any) -> None:
    """Ends the run unless the captured step chooses the eager step's tokens, or such as are nearly as likely there.

    Both get the eager tokens: a rounding that decides between two that are as likely would make two different texts.
    """
    begin()
    eager = []
    for _ in range(COMPARED):
        logits = model(token, past_key_values=cache).logits[0, -1].float()
        eager.append(logits.cpu())
        token.copy_(logits.argmax())
    begin()
    for logits in eager:
        graph.replay()
        if not logits.max() - logits[int(token)] <= NEARLY * logits.std():
            raise SystemExit("the captured step chooses other tokens than the eager one; nothing is timed")
        token.copy_(logits.argmax())


@torch.no_grad()
def graph_rate(model: Any, tokens: int, runs: int, profiled: bool) -> float:
    """Tokens per second of a captured decoding step, greedy; `profiled`: prints what its kernels take."""
    cache = StaticCache(config=model.config, max_cache_len=PROMPT + tokens)
    prompt = torch.arange(1, PROMPT + 1, device=model.device)[None]
    first = model(prompt, past_key_values=cache).logits[:, -1:].argmax(-1)
    step = torch.compile(model.forward, fullgraph=True, dynamic=False)
    token = first.clone()

    def begin() -> None:
        token.copy_(first)
        for layer in cache.layers:
            layer.cumulative_length.fill_(PROMPT)

    def advance() -> None:
        token.copy_(step(token, past_key_values=cache).logits[:, -1:].argmax(-1))

    for _ in range(3):
        advance()
    begin()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        advance()
    compare(model, cache, token, begin, graph)
    seconds = []
    for _ in range(runs + 1):
        begin()
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(tokens):
            graph.replay()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    if not int(cache.layers[0].cumulative_length) == PROMPT + tokens:
        raise SystemExit("the captured step does not go forward; nothing is timed")
    if profiled:
        begin()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            for _ in range(4):
                graph.replay()
            torch.cuda.synchronize()
        print("kernels of 4 steps:")
        for event in sorted(profile.key_averages(), key=lambda e: -e.self_device_time_total)[:PROFILED]:
            took, count = event.self_device_time_total, event.count
            print(f"{took:9.0f} µs  {count:5} × {took / count:6.2f}  {event.key[:120]}", flush=True)
    return tokens / statistics.median(seconds[1:])


def generate_rate(model: Any, tokens: int, runs: int, profiled: bool) -> float:
    """Tokens per second of `generate`, after the first."""
    prompt = torch.arange(1, PROMPT + 1, device=model.device)[None]

    def seconds(count: int) -> float:
        torch.cuda.synchronize()
        began = time.perf_counter()
        out = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=count,
            cache_implementation="static", pad_token_id=0,
        )  # fmt: skip
        torch.cuda.synchronize()
        if out.shape[1] != PROMPT + count:
            raise SystemExit(f"{out.shape[1] - PROMPT} tokens came instead of {count}; nothing is timed")
        return time.perf_counter() - began

    for count in (tokens, tokens, tokens // 2):  # compile
        seconds(count)
    # What the first token and a call by itself cost is in both.
    whole = statistics.median(seconds(tokens) for _ in range(runs))
    half = statistics.median(seconds(tokens // 2) for _ in range(runs))
    return (tokens - tokens // 2) / (whole - half)


WAYS = {"graph": graph_rate, "generate": generate_rate}


def rates(model: Any, label: str, ways: list[str], tokens: int, runs: int, profiled: bool) -> dict[str, float]:
    """Tokens per second by each way, and the most memory that was allocated meanwhile in GB; printed after `label`."""
    torch._dynamo.reset()
    gc.collect()
    torch.cuda.synchronize()
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    # All on one stream, which is not the default one and may be captured: cuBLAS keeps 32 MB for each that it has met.
    with torch.cuda.stream(torch.cuda.Stream()):
        found = {way: WAYS[way](model, tokens, runs, profiled) for way in ways}
    found["memory"] = torch.cuda.max_memory_allocated() / 1e9
    print(label, {name: round(value, 2) for name, value in found.items()}, flush=True)
    return found


@torch.no_grad()
def check(model: Any) -> None:
    """Ends the run unless all layers are on the kernels and the first block's give what plain torch does."""
    layers = [module for module in model.modules() if isinstance(module, PackedLinear)]
    if left := {reason for layer in layers if (reason := layer.prepare()) is not None}:
        raise SystemExit(f"not all layers are multiplied by the kernels: {left}; nothing is timed")
    for layer in layers[:7]:
        x = torch.randn(1, layer.in_features, device=model.device, dtype=torch.bfloat16)
        want = reference.binary_linear(x.float(), layer.weights[0].operands(), layer.activations)
        if not (layer(x) - want).abs().max() <= 0.01 * want.abs().max():
            raise SystemExit("a layer is off the reference; nothing is timed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="7B", choices=SHAPES)
    parser.add_argument("--group", type=int, default=-1)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--modes", nargs="+", default=["int8", "exact"], choices=["int8", "exact"])
    parser.add_argument(
        "--ways", nargs="+", default=list(WAYS), choices=list(WAYS), help="each compiles for half a minute"
    )
    parser.add_argument("--attention", default="sdpa", choices=["sdpa", "eager"])
    parser.add_argument(
        "--inductor-defaults",
        action="store_true",
        help="without the two settings of torch.compile that help both models",
    )
    parser.add_argument("--profile", action="store_true", help="also print what the kernels of a captured step take")
    parser.add_argument("--json")
    args = parser.parse_args()
    # Kernels that inductor makes may begin before the one ahead of them has ended, as ours do, and those that do not wait
    # for each other are one launch; for both models.
    torch._inductor.config.triton.enable_pdl = not args.inductor_defaults
    torch._inductor.config.combo_kernels = not args.inductor_defaults
    model = random_llama(SHAPES[args.shape], "cuda")
    model.set_attn_implementation(args.attention)
    theirs = rates(model, "bfloat16", args.ways, args.tokens, args.runs, args.profile)
    # In place, layer by layer: what the dense layers held is free again.
    signbit.quantize_(model, signbit.SignbitConfig(method="absmean", group=args.group, head="int8"))
    rows = []
    for mode in args.modes:
        signbit.set_activations(model, mode)
        check(model)
        scale = "row scale" if args.group < 0 else f"group {args.group}"
        form = f"{args.shape}, {scale}, {args.tokens} tokens after {PROMPT}"
        for what, ours in rates(model, mode, args.ways, args.tokens, args.runs, args.profile).items():
            more, unit = (theirs[what] / ours, "GB") if what == "memory" else (ours / theirs[what], "tokens/s")
            rows.append(Row(f"{what} {mode}, {form}", ours, "torch bfloat16", theirs[what], more, unit))
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, transformers {transformers.__version__}")
    show(rows, args.json)


if __name__ == "__main__":
    main()
