"""llama.cpp itself, out of xllamacpp's wheel: what it makes of a GGUF file."""

import json
import urllib.request
from contextlib import contextmanager

import torch
import xllamacpp

from signbit.linear import Int8Head, PackedLinear


@contextmanager
def running(path, adapter=None, extra=True):
    """llama.cpp's server on the file: one thread, keys and values in float32."""
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.n_parallel, params.n_gpu_layers = 256, 1, 0
    params.warmup, params.verbosity, params.fit_params = False, 0, False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.no_extra_bufts = extra
    if adapter is not None:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
    server = xllamacpp.Server(params)
    try:
        yield server
    finally:
        del server


def next_token(server, ids, vocabulary):
    """The likeliest token after `ids`, and the log-probabilities [vocabulary]; None for one that ends the text, or is a
    byte in the middle of a letter, of which the server does not tell."""
    asked = {"prompt": ids, "n_predict": 1, "temperature": 0.0, "n_probs": vocabulary, "cache_prompt": False}
    logprobs = server.handle_completions(asked)["choices"][0]["logprobs"]
    if not logprobs:
        return None
    row = torch.full((vocabulary,), torch.nan)
    for entry in logprobs["content"][0]["top_logprobs"]:
        row[entry["id"]] = entry["logprob"]
    return logprobs["content"][0]["id"], row


def tokenize(server, text):
    request = urllib.request.Request(
        f"{server.listening_address}/tokenize",
        json.dumps({"content": text, "add_special": True, "parse_special": True}).encode(),
        {"Content-Type": "application/json"},
    )
    return json.loads(urllib.request.urlopen(request, timeout=60).read())["tokens"]


def rounded(x, block=32):
    """Activations as llama.cpp multiplies them: int8 for each block of 32, with a scale in float16 (its Q8_0)."""
    grouped = x.float().reshape(*x.shape[:-1], -1, block)
    size = grouped.abs().amax(dim=-1, keepdim=True)
    q = (grouped * torch.where(size > 0, 127 / size, 0)).round()
    return (q * (size / 127).half().float()).reshape(x.shape)


def with_its_rounding(model):
    """`model` with the inputs of its packed layers and head rounded as llama.cpp rounds them."""
    for name, module in model.named_modules():
        if isinstance(module, (PackedLinear, Int8Head)) or name == "lm_head":
            module.register_forward_pre_hook(lambda _module, args: (rounded(args[0]),))
    return model
