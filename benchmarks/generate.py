"""Tokens per second of a packed model beside its dense bfloat16 source, in one run under the same transformers.

    python -m benchmarks.generate MODEL         # a directory, or 1.3B: a Llama of that shape with random weights

Each figure is the median over several answers of `signbit generate`'s own rate: new tokens after the first over the
time since the first. Nothing is timed unless all layers are multiplied by the kernels, and one layer and the head give in
both modes what plain torch gives on the same bits.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from typing import Any

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import signbit
from benchmarks.rows import Row, show
from signbit.hub.load import load_any
from signbit.linear import Int8Head, PackedLinear
from signbit.ops import cpu
from signbit.serve.generate import GenerateOptions, generate

SHAPE = {"hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 32, "num_hidden_layers": 24}


class Words:
    """A stand-in tokenizer for random weights: every token is a word."""

    pad_token_id = eos_token_id = None

    def __call__(self, text: str, return_tensors: str) -> dict[str, torch.Tensor]:
        ids = torch.arange(1, 1 + len(text.split()))[None]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def decode(self, ids: Any, **kwargs: Any) -> str:
        return " ".join(f"w{int(i)}" for i in ids) + " "


def source(name: str) -> tuple[Any, Any]:
    """The dense bfloat16 model and its tokenizer."""
    if name != "1.3B":
        return load_any(name, "bfloat16"), AutoTokenizer.from_pretrained(name)
    return random_llama(SHAPE), Words()


def random_llama(shape: dict[str, int], device: str = "cpu") -> Any:
    """A dense bfloat16 Llama with random weights, made where it will run; it never ends an answer by itself."""
    config = LlamaConfig(**shape, vocab_size=32000, max_position_embeddings=2048, eos_token_id=None)
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


def rate(model: Any, tokenizer: Any, tokens: int, runs: int) -> float:
    """Median tokens per second of `runs` answers, after one that is not counted."""
    options = GenerateOptions(max_new_tokens=tokens)
    prompt = "Once upon a time there was a small house at the edge of a wood"
    return statistics.median(
        [generate(model, tokenizer, prompt, options).decode_tokens_per_s for _ in range(runs + 1)][1:]
    )


def check(model: Any) -> None:
    """Ends the run unless every layer is multiplied by the kernels, and a layer and the head give what plain torch does."""
    layers = [module for module in model.modules() if isinstance(module, PackedLinear)]
    if left := {reason for layer in layers if (reason := layer.prepare()) is not None}:
        raise SystemExit(f"not all layers are multiplied by the kernels: {left}; nothing is timed")
    layer, head = layers[0], next(module for module in model.modules() if isinstance(module, Int8Head))
    for mode in ("exact", "int8"):
        signbit.set_activations(model, mode)
        for module in (layer, head):
            x = torch.randn(3, module.in_features)
            got = module(x)
            operands = layer.weights[0].operands()
            want = (
                cpu.reference.binary_linear(x, operands, mode)
                if module is layer
                else cpu.reference.int8_linear(x, head.weight, head.scale, mode)
            )
            if not (got - want).abs().max() <= 1e-4 * want.abs().max():
                raise SystemExit(f"{type(module).__name__}, {mode}: off the reference; nothing is timed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--group", type=int, default=-1)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--json")
    args = parser.parse_args()
    dense, tokenizer = source(args.model)
    if args.model == "1.3B":
        packed, dense_rate = dense, rate(dense, tokenizer, args.tokens, args.runs)
    else:
        packed, dense_rate = copy.deepcopy(dense), rate(dense, tokenizer, args.tokens, args.runs)
    signbit.quantize_(packed, signbit.SignbitConfig(method="absmean", group=args.group, head="int8"))
    form = "row scale" if args.group < 0 else f"group {args.group}"
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        packed = packed.to(dtype)
        check(packed)
        for mode in ("int8", "exact"):
            signbit.set_activations(packed, mode)
            ours = rate(packed, tokenizer, args.tokens, args.runs)
            work = f"generate {mode}, {args.model.rstrip('/').rsplit('/')[-1]}, {form}, {str(dtype)[6:]} activations"
            rows.append(Row(work, ours, "torch bfloat16", dense_rate, ours / dense_rate, "tokens/s"))
    print(f"{torch.get_num_threads()} threads, {cpu.selected()[0]}, torch {torch.__version__}")
    show(rows, args.json)


if __name__ == "__main__":
    main()
