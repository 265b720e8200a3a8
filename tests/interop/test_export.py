"""Dense and `bitnet` directories, which plain transformers loads; shifts, ternary and vectors in GGUF; what is refused."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import signbit
from signbit.cli import main
from signbit.errors import ExportError, FormatError, OptionError
from signbit.interop.export import blocks
from signbit.interop.export.request import ExportRequest
from signbit.interop.export.run import export
from signbit.interop.recognise import open_checkpoint
from signbit.linear import PackedLinear
from signbit.models import set_module
from signbit.weight import BinaryWeight
from tests.conftest import tiny_llama_config
from tests.interop import llamacpp
from tests.interop.test_export_gguf import byte_level, compare, config, gguf_in, relative, same_layers, with_norms

ROUNDING = 2e-5


def quantized(folder, model, *options, tokenizer=None):
    model.save_pretrained(folder / "m")
    if tokenizer is not None:
        tokenizer.save_pretrained(folder / "m")
    assert main(["quantize", str(folder / "m"), "-o", str(folder / "p"), *options]) == 0
    return str(folder / "p")


@torch.no_grad()
def logits(model, ids):
    return model.eval()(ids).logits


MODELS = {
    "llama, tied": lambda: LlamaForCausalLM(tiny_llama_config()),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=64, n_positions=64)),
    "experts": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(hidden_size=32, intermediate_size=32, moe_intermediate_size=16, num_hidden_layers=2, head_dim=8,
                       num_attention_heads=4, num_key_value_heads=2, num_experts=4, num_experts_per_tok=2, vocab_size=64)
    ),
}  # fmt: skip


@pytest.mark.parametrize("head", ["keep", "int8"])
@pytest.mark.parametrize("model", MODELS)
def test_dense_is_the_same_model_in_plain_transformers(model, head, tmp_path, ids, tokenizer):
    packed = quantized(
        tmp_path,
        MODELS[model](),
        "--method",
        "pbllm",
        "--no-gptq",
        "--saliency",
        "magnitude",
        "--salient",
        "0.1",
        "--head",
        head,
        tokenizer=tokenizer,
    )
    assert main(["export", packed, "--format", "dense", "--dtype", "float32", "-o", str(tmp_path / "d")]) == 0
    plain, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "d", output_loading_info=True)
    assert not any(loading[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert not any(isinstance(module, PackedLinear) for module in plain.modules())
    assert relative(logits(plain, ids), logits(signbit.load(packed, dtype=torch.float32), ids)) < ROUNDING
    assert (tmp_path / "d" / "tokenizer.json").exists()


def test_dense_says_what_its_dtype_rounds(tmp_path):
    packed = quantized(
        tmp_path, LlamaForCausalLM(tiny_llama_config()), "--method", "absmean", "--scale-dtype", "float32"
    )
    notes = []
    export(packed, tmp_path / "d", ExportRequest("dense", dtype="float16"), note=notes.append)
    assert "--dtype float32" in notes[0] and "14 of 14" in notes[0]
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "d")
    assert half.dtype is torch.float16
    notes.clear()
    export(packed, tmp_path / "e", ExportRequest("dense"), note=notes.append)
    assert not notes


def bitnet(folder, tokenizer=None, norm="none", dtype=torch.float32):
    """A packed b1.58 model with zeros in it."""
    return quantized(
        folder, with_norms(LlamaForCausalLM(config(64 if tokenizer is None else len(tokenizer)))).to(dtype),
        "--method", "bitnet", "--weights", "ternary", "--norm", norm, tokenizer=tokenizer,
    )  # fmt: skip


ALONE = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
assert "signbit" not in sys.modules
with torch.no_grad():
    torch.save(model(torch.tensor([[3, 5, 7, 11, 13, 17]])).logits, sys.argv[2])
"""


@pytest.mark.parametrize("norm", ["none", pytest.param("rms", marks=pytest.mark.slow)])
def test_bitnet_loads_where_signbit_is_not_and_comes_back(norm, tmp_path, ids, capsys):
    packed = bitnet(tmp_path, norm=norm)
    assert main(["export", packed, "--format", "bitnet", "-o", str(tmp_path / "b")]) == 0
    done = subprocess.run(
        [sys.executable, "-c", ALONE, tmp_path / "b", tmp_path / "logits"], capture_output=True, text=True, timeout=300,
        env={**os.environ, "TORCHDYNAMO_DISABLE": "1"},  # its functions are compiled, which takes minutes
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "newly initialized" not in done.stderr
    want = logits(signbit.load(packed, dtype=torch.float32), ids)
    assert relative(torch.load(tmp_path / "logits"), want) < 1e-3  # a number that falls on the other side of a half
    assert main(["import", str(tmp_path / "b"), "-o", str(tmp_path / "again")]) == 0
    same_layers(packed, tmp_path / "again")
    assert relative(logits(signbit.load(tmp_path / "again", dtype=torch.float32), ids), want) < ROUNDING


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--method", "absmean"), r"q_proj is no layer of transformers' bitnet: its activations are float"),
        (("--method", "onebit"), "its activations are float"),
    ],
)
def test_bitnet_refuses_the_rest_by_name(options, said, tmp_path):
    packed = quantized(tmp_path, LlamaForCausalLM(tiny_llama_config()), *options)
    with pytest.raises(ExportError, match=said):
        export(packed, tmp_path / "b", ExportRequest("bitnet"))
    assert not (tmp_path / "b").exists()


def gguf_of(folder, *options, model=None, request=None):
    tokenizer = byte_level()
    model = model or with_norms(LlamaForCausalLM(config(len(tokenizer), initializer_range=0.08)))
    packed = quantized(folder, model.half(), "--head", "int8", *options, tokenizer=tokenizer)
    export(packed, folder / "g", request or ExportRequest("gguf"))
    return packed


def test_onebit_of_one_vector_is_exact(tmp_path):
    packed = gguf_of(tmp_path, "--method", "onebit", "--vectors", "rows")
    assert compare(signbit.load(packed, dtype=torch.float32), tmp_path / "g", tokens=4) >= 1
    main(["import", str(tmp_path / "g"), "-o", str(tmp_path / "again")])
    same_layers(packed, tmp_path / "again")
    assert gguf_in(tmp_path / "g")[1] is None


def test_tq2_0_of_ternary_weights_and_on_request_of_binary_ones(tmp_path):
    packed = gguf_of(tmp_path, "--method", "absmean", request=ExportRequest("gguf", type="tq2_0"))
    main(["import", str(tmp_path / "g"), "-o", str(tmp_path / "again")])
    same_layers(packed, tmp_path / "again")
    assert "TQ2_0-2.062bpw" in gguf_in(tmp_path / "g")[0].name
    # llama.cpp rounds 256 activations at a time here.
    assert compare(signbit.load(packed, dtype=torch.float32), tmp_path / "g", 1, close=0.06, round_=False) == 1
    (tmp_path / "t").mkdir()
    ternary = bitnet(tmp_path / "t", byte_level())
    export(ternary, tmp_path / "t" / "g", ExportRequest("gguf"))
    main(["import", str(tmp_path / "t" / "g"), "-o", str(tmp_path / "t" / "again")])
    one, other = signbit.load(ternary), signbit.load(tmp_path / "t" / "again")
    for name, layer in one.named_modules():
        if isinstance(layer, PackedLinear):
            w, v = layer.weights[0], other.get_submodule(name).weights[0]
            assert torch.equal(w.signs, v.signs)
            assert torch.equal(2 * w.scale.half().float(), 2 * v.scale.float()[:, :1, :1].expand_as(w.scale))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--method", "onebit", "--norm", "layer"), r"q_proj \(K = 256\) .*LayerNorm stands behind .*keep it packed"),
        (("--method", "onebit"), "a vector multiplies its inputs, which folds into nothing"),
        (
            ("--method", "pbllm", "--no-gptq", "--saliency", "magnitude", "--salient", "0.1"),
            "salient weights of more bits",
        ),
        (("--method", "absmean", "--group", "32"), "Q1_0 has a scale for 128 columns, and its groups have 32"),
    ],
)
def test_what_q1_0_does_not_hold_is_refused_with_its_reason(options, said, tmp_path):
    with pytest.raises(ExportError, match=said):
        gguf_of(tmp_path, *options)
    assert not (tmp_path / "g").exists()


@pytest.mark.parametrize("pattern", ["row", "column", "single", "groups"])
def test_shifts_are_exact_through_an_adapter(pattern, tmp_path):
    packed = gguf_of(tmp_path, "--method", "absmean", "--group", "128")
    model = signbit.load(packed, dtype=torch.float32)
    shifted(model, pattern)
    signbit.save(model, tmp_path / "q", AutoTokenizer.from_pretrained(packed))
    export(tmp_path / "q", tmp_path / "h", ExportRequest("gguf"))
    path, adapter = gguf_in(tmp_path / "h")
    assert adapter is not None and adapter.name in (tmp_path / "h" / "Modelfile").read_text()
    with pytest.raises(FormatError, match="its shifts are in"):
        open_checkpoint(path)
    # The adapter multiplies float activations, so that only the signs' are rounded here.
    for name, module in list(model.named_modules()):
        if isinstance(module, PackedLinear):
            set_module(model, name, Shifted(module))
    assert compare(model, tmp_path / "h", tokens=4) >= 1


class Shifted(torch.nn.Module):
    """W in two parts: signs, whose inputs llama.cpp rounds, and shifts, whose inputs it does not."""

    def __init__(self, layer):
        super().__init__()
        w = layer.weights[0]
        self.whole, self.signs = w.to_dense(), replace(w, shift=None, in_shift=None).to_dense()

    def forward(self, x):
        return llamacpp.rounded(x) @ self.signs.T + x @ (self.whole - self.signs).T


def shifted(model, pattern):
    """Gives each packed layer shifts as PB-LLM's and FBI-LLM's have them."""
    for name, module in list(model.named_modules()):
        if isinstance(module, PackedLinear):
            w = module.weights[0]
            size = float(w.scale.float().mean()) / 2
            scale = w.scale.float()
            parts = {
                "row": {"scale": scale[:, :, :1], "shift": size * torch.randn(w.out_features, 1)},
                "column": {"scale": scale, "in_shift": size * torch.randn(w.in_features)},
                "single": {"scale": scale[:, :1, :1], "shift": torch.full((w.out_features, 1), size)},
                "groups": {"scale": scale, "shift": size * torch.randn(w.out_features, w.groups)},
            }[pattern]
            half = {part: tensor.half() for part, tensor in parts.items()}
            set_module(model, name, PackedLinear(replace(w, **half)))


def test_vectors_fold_into_norms_and_rows_before_them(tmp_path):
    packed = gguf_of(tmp_path, "--method", "onebit", "--vectors", "rows")
    model = signbit.load(packed, dtype=torch.float32)
    for layer in model.model.layers:
        for names in (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)):
            first = dict(layer.named_modules())[f"{'self_attn' if names[0][0] in 'qo' else 'mlp'}.{names[0]}"]
            vector = torch.rand(1, first.in_features) + 0.5
            if names == ("o_proj",):  # two heads share each value
                vector = vector.reshape(2, 2, -1)[:, :1].expand(-1, 2, -1).reshape(1, -1)
            for name, module in list(layer.named_modules()):
                if name.endswith(names):
                    set_module(layer, name, PackedLinear(replace(module.weights[0], in_scale=vector.half())))
    signbit.save(model, tmp_path / "q", AutoTokenizer.from_pretrained(packed))
    export(tmp_path / "q", tmp_path / "h", ExportRequest("gguf"))
    main(["import", str(tmp_path / "h"), "-o", str(tmp_path / "again")])
    ids = torch.tensor([[72, 105, 220, 33]])
    got, want = (logits(signbit.load(tmp_path / p, dtype=torch.float32), ids) for p in ("again", "q"))
    assert relative(got, want) < 3e-3  # float16 rounds the rows that took a vector
    assert relative(logits(signbit.load(packed, dtype=torch.float32), ids), want) > 0.05


def test_options_and_targets_that_do_not_fit(tmp_path, llama_dir, capsys):
    packed = quantized(tmp_path, LlamaForCausalLM(tiny_llama_config()), "--method", "absmean")
    with pytest.raises(OptionError, match="--type belongs to --format gguf"):
        export(packed, tmp_path / "d", ExportRequest("dense", type="tq2_0"))
    with pytest.raises(OptionError, match="is the source"):
        export(packed, packed, ExportRequest("dense"), overwrite=True)
    with pytest.raises(FormatError, match="not packed by signbit"):
        export(llama_dir, tmp_path / "d", ExportRequest("dense"))
    with pytest.raises(FormatError, match="has no tokenizer"):
        export(packed, tmp_path / "d", ExportRequest("gguf"))
    assert main(["export", packed, "-o", str(tmp_path / "d")]) == 1
    assert "--format dense, gguf or bitnet" in capsys.readouterr().err
    assert not (tmp_path / "d").exists()


def test_a_failed_export_leaves_nothing(tmp_path, monkeypatch):
    packed = gguf_of(tmp_path, "--method", "absmean")
    before = sorted(file.name for file in tmp_path.rglob("*"))
    kept = gguf_in(tmp_path / "g")[0].read_bytes()

    def fails(*_args):
        raise OSError("no space left on device")

    monkeypatch.setattr("signbit.interop.export.gguf._write_tensors", fails)
    with pytest.raises(FormatError, match="nothing was changed"):
        export(packed, tmp_path / "g", ExportRequest("gguf"), overwrite=True)
    assert sorted(file.name for file in tmp_path.rglob("*")) == before
    assert gguf_in(tmp_path / "g")[0].read_bytes() == kept


def test_literal_bytes():
    signs = torch.full((1, 256), -1.0)
    signs[0, [0, 15, 128]] = 1.0
    made = blocks.blocks(BinaryWeight.from_signs(signs, torch.full((1, 1, 1), 0.5)), "Q1_0")
    want = bytes([0x00, 0x38, 1, 0b10000000, *[0] * 14, 0x00, 0x38, 1, *[0] * 15])
    assert made.rows.tobytes() == want
    made = blocks.blocks(BinaryWeight.from_signs(signs, torch.full((1, 1, 1), 0.5)), "TQ2_0")
    assert made.rows.tobytes() == bytes([0b10, *[0] * 14, 0b10, *[0] * 16, 0b10, *[0] * 31, 0x00, 0x38])
    assert "K = 192" in blocks.blocks(BinaryWeight.from_signs(signs[:, :192], torch.ones(1, 1, 1)), "Q1_0")
    large = BinaryWeight.from_signs(signs, torch.full((1, 1, 1), 1e6))
    assert "beyond float16" in blocks.blocks(large, "Q1_0")
