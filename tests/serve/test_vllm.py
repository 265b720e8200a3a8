"""The vLLM plugin. What needs vLLM runs in the environment that `make vllm` makes, and is skipped elsewhere."""

import importlib.util
import os
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import torch

import signbit

needs_vllm = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vLLM is not here: it has an environment of its own (make vllm)"
)
SIZES = {
    "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64,
    "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "initializer_range": 0.3,
}  # fmt: skip
#: Tokens of a prompt; eight more are written.
PROMPT = [1, *(3 + (7 * i * i) % 61 for i in range(40))]
NEAR_TIE = 1e-3


def test_vllm_finds_the_plugin():
    (point,) = entry_points(group="vllm.general_plugins", name="signbit")
    module, _, function = point.value.partition(":")
    spec = importlib.util.find_spec(module)
    assert f"\ndef {function}()" in Path(spec.origin).read_text(encoding="utf-8")


def test_nothing_else_of_signbit_imports_vllm(tmp_path):
    (tmp_path / "vllm.py").write_text("raise RuntimeError('vllm was imported')")
    code = "import signbit, signbit.cli, signbit.serve, signbit.hub.load; signbit.SignbitConfig()"
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": str(tmp_path)})


def configs():
    import transformers as t

    gqa = {"num_key_value_heads": 2}
    opt = {k: v for k, v in SIZES.items() if k not in ("intermediate_size", "initializer_range")}
    return {
        "llama": lambda: t.LlamaConfig(**SIZES, **gqa, tie_word_embeddings=True),
        "llama-untied": lambda: t.LlamaConfig(**{**SIZES, "vocab_size": 70}, **gqa, attention_bias=True),
        "mistral": lambda: t.MistralConfig(**SIZES, **gqa),
        "qwen2": lambda: t.Qwen2Config(**SIZES, **gqa),
        "qwen3": lambda: t.Qwen3Config(**SIZES, **gqa, head_dim=32),
        "gemma3": lambda: t.Gemma3TextConfig(**SIZES, **gqa, head_dim=32, query_pre_attn_scalar=32),
        "phi3": lambda: t.Phi3Config(**SIZES, **gqa),
        "opt": lambda: t.OPTConfig(**opt, ffn_dim=192, init_std=0.3),
        "gpt2": lambda: t.GPT2Config(n_embd=128, n_layer=1, n_head=4, vocab_size=64, n_positions=128),
    }


def packed(out, tokenizer, family, **options):
    """A packed random model in the directory `out`."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(configs()[family]()).eval()
    for name, value in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(value)  # transformers starts them at 0, where losing one would not be seen
    signbit.quantize_(model, signbit.SignbitConfig(**options))
    signbit.save(model, out)
    tokenizer.save_pretrained(out)
    return str(out)


@pytest.fixture
def engine(monkeypatch):
    """Makes vLLM's engine in this process, in float32 unless told otherwise."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    def make(directory, dtype="float32", **options):
        options = {"max_model_len": 128, "max_num_seqs": 4, "max_num_batched_tokens": 128, **options}
        return LLM(directory, dtype=dtype, seed=0, **{"enforce_eager": True, **options})

    yield make
    cleanup_dist_env_and_memory()


def differences(directory, llm, new_tokens=8, mode="exact"):
    """The largest difference of the prompt's log-probabilities, and that vLLM's greedy tokens are transformers'."""
    from transformers import AutoModelForCausalLM
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=new_tokens, prompt_logprobs=0, ignore_eos=True)
    (answer,) = llm.generate([{"prompt_token_ids": PROMPT}], sampling, use_tqdm=False)
    got = torch.tensor(
        [place[token].logprob for place, token in zip(answer.prompt_logprobs[1:], PROMPT[1:], strict=True)]
    )
    written = list(answer.outputs[0].token_ids)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    signbit.set_activations(model, mode)
    with torch.no_grad():
        logits = model(torch.tensor([[*PROMPT, *written]])).logits[0].float()
    want = logits.log_softmax(-1)[range(len(PROMPT) - 1), PROMPT[1:]]
    behind = logits[len(PROMPT) - 1 : -1]
    chosen = behind[range(len(written)), written]
    assert len(written) == new_tokens
    assert bool((behind.max(-1).values - chosen <= NEAR_TIE).all()), "greedy tokens differ"
    return float((got - want).abs().max())


METHODS = [
    ("llama", {"method": "absmean", "group": 32}),
    ("llama", {"method": "absmean", "head": "int8"}),
    ("llama-untied", {"method": "onebit", "head": "int8"}),
    ("llama-untied", {"method": "pbllm", "salient": 0.1, "gptq": False, "saliency": "magnitude"}),
    ("llama", {"method": "bitnet", "weights": "ternary"}),
    ("llama", {"method": "absmean", "keep": ["k_proj", "up_proj"], "allow_partial": True}),
    ("mistral", {"method": "absmean"}),
    ("qwen2", {"method": "fbi"}),
    ("qwen3", {"method": "absmean"}),
    ("gemma3", {"method": "absmean", "head": "int8"}),
    ("phi3", {"method": "absmean"}),
    ("opt", {"method": "onebit"}),
]


def names(value):
    return value if isinstance(value, str) else "-".join(map(str, value.values()))


@needs_vllm
@pytest.mark.slow
@pytest.mark.parametrize(("family", "options"), METHODS, ids=names)
def test_vllm_gives_what_transformers_gives(family, options, engine, tokenizer, tmp_path):
    directory = packed(tmp_path / "out", tokenizer, family, **options)
    assert differences(directory, engine(directory)) < 1e-3


@needs_vllm
@pytest.mark.slow
def test_int8_activations_are_asked_for(engine, tokenizer, tmp_path):
    directory = packed(tmp_path / "out", tokenizer, "llama", method="absmean", head="int8")
    llm = engine(directory, additional_config={"signbit_activations": "int8"})
    # A code that is rounded the other way, after sums in another order, is one in 127.
    assert differences(directory, llm, mode="int8") < 0.05 < differences(directory, llm, mode="exact")


def what_the_linears_hold(model):
    """Floats of the largest float tensor of vLLM's linear layers, parts that the kernels multiply, and bytes of all."""
    from vllm.model_executor.layers.linear import LinearBase

    linears = [m for m in model.modules() if isinstance(m, LinearBase)]
    tensors = [t for m in linears for t in (*m.parameters(), *m.buffers())]
    kernels = sum(bool(part.prepared) for m in linears for part in m.parts)
    return max(t.numel() for t in tensors if t.is_floating_point()), kernels, sum(t.nbytes for t in tensors)


@needs_vllm
@pytest.mark.slow
def test_weights_stay_packed_in_memory(engine, tokenizer, tmp_path):
    llm = engine(packed(tmp_path / "out", tokenizer, "llama", method="absmean"))
    ((most_floats, kernels, nbytes),) = llm.apply_model(what_the_linears_hold)
    weights = 2 * 128 * (128 + 64 + 64 + 128 + 192 * 3)
    assert kernels == 2 * 7
    assert most_floats == 192, "a scale a row is the most"
    assert nbytes < 1.5 * weights / 8


@needs_vllm
@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("gpt2", {}, "holds q, k and v in one matrix whose rows vLLM orders anew"),
        ("opt", {"head": "int8"}, "vLLM's model for opt takes a dense embedding only"),
        ("llama", {"additional_config": {"signbit_activations": "int4"}}, "signbit_activations in additional_config"),
        ("llama", {"ways": 2}, "tensor_parallel_size is 2: packed matrices are not divided"),
        ("llama", {"flip": True}, "do not match tensors_sha256"),
    ],
)
def test_what_it_refuses(family, options, message, engine, tokenizer, tmp_path, monkeypatch):
    from signbit.serve import vllm as plugin

    options = dict(options)
    directory = packed(tmp_path / "out", tokenizer, family, method="absmean", head=options.pop("head", "keep"))
    if ways := options.pop("ways", None):
        monkeypatch.setattr(plugin, "get_tensor_model_parallel_world_size", lambda: ways)
    if options.pop("flip", False):
        file = tmp_path / "out" / "model.safetensors"
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    with pytest.raises(Exception, match=message):
        engine(directory, **options)


@needs_vllm
def test_outputs_that_depend_on_the_batch_are_refused():
    from signbit.serve.vllm import SignbitVllmConfig

    weights = [{"out_features": 8, "in_features": 8}]
    layers = [{"weights": weights, "norm_out": "batch_absmax", "modules": ["a"]}]
    config = {"quant_method": "signbit", "format_version": 1, "layers": layers, "int8": {}}
    with pytest.raises(signbit.SignbitError, match="batches mix requests"):
        SignbitVllmConfig.from_config(config)
