"""GGUF files of 1-bit models: quantized by llama.cpp's own code, and read as ggml and transformers read them."""

import ctypes
from functools import partial
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers
import xllamacpp
from gguf import GGMLQuantizationType as Type
from transformers import AutoModelForCausalLM, LlamaForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM

import signbit
from signbit.cli import main
from signbit.errors import FormatError
from signbit.interop.convert import convert
from signbit.interop.gguf import q1_0, tq2_0
from signbit.linear import PackedLinear
from tests.conftest import tiny_llama_config
from tests.interop import originals
from tests.interop.test_import import ROUNDING, continued, difference

NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm", "embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output",
}  # fmt: skip


@pytest.fixture(scope="module")
def ggml():
    """llama.cpp's library, out of xllamacpp's wheel."""
    return ctypes.CDLL(str(next(Path(xllamacpp.__file__).parent.glob("xllamacpp*.so"))))


def pointer(array):
    return array.ctypes.data_as(ctypes.c_void_p)


def quantized_by_ggml(ggml, values, kind):
    """The bytes that llama.cpp's quantizer makes of float32 [N, K], and what its own code reads in them."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    rows, columns = values.shape
    assert columns % block == 0
    raw = np.zeros((rows, columns // block * size), dtype=np.uint8)
    ggml.ggml_quantize_chunk.restype = ctypes.c_size_t
    written = ggml.ggml_quantize_chunk(
        ctypes.c_int(int(kind)), pointer(values), pointer(raw), ctypes.c_int64(0), ctypes.c_int64(rows),
        ctypes.c_int64(columns), None,
    )  # fmt: skip
    assert written == raw.nbytes
    back = np.zeros_like(values)
    read = getattr(ggml, f"dequantize_row_{kind.name.lower()}")
    read(pointer(raw), pointer(back), ctypes.c_int64(back.size))
    return raw, back


def pairs(rows, heads):
    """llama.cpp's order of the rows of q and k: the two that a rotary position turns beside each other."""
    half = len(rows) // heads // 2
    order = [h * 2 * half + part * half + i for h in range(heads) for i in range(half) for part in range(2)]
    return rows[order]


def write(
    path, ggml, kind, make=LlamaForCausalLM, flip=None, tokens=(), width=256, everywhere=False, more=None, **changes
):
    """A GGUF file of a random model whose matrices are of `kind`, and the model with the values that ggml reads in it.

    `everywhere`: embedding and head too; `more` is called with the writer.
    """
    config = {"hidden_size": width, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
    base = tiny_llama_config(**{"tie_word_embeddings": False, **config, **changes})
    model_class = make.config_class
    if model_class is not type(base):
        base = model_class(**{**base.to_dict(), "head_dim": 32, "model_type": model_class.model_type})
    model = make(base).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)  # transformers starts them at 0, where losing one would not be seen
        elif name.endswith("norm.weight"):  # and these at 1, where numbers lie halfway between two of 8 bits
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    arch = base.model_type
    writer = gguf.GGUFWriter(path, arch)
    writer.add_context_length(base.max_position_embeddings)
    writer.add_embedding_length(base.hidden_size)
    writer.add_block_count(base.num_hidden_layers)
    writer.add_feed_forward_length(base.intermediate_size)
    writer.add_head_count(base.num_attention_heads)
    writer.add_head_count_kv(base.num_key_value_heads)
    writer.add_key_length(base.head_dim)
    writer.add_value_length(base.head_dim)
    writer.add_layer_norm_rms_eps(base.rms_norm_eps)
    writer.add_rope_freq_base(base.rope_parameters["rope_theta"])
    writer.add_vocab_size(base.vocab_size)
    if tokens:
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list(tokens)
        writer.add_token_merges(["a b"])
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
    if more is not None:
        more(writer)
    tied = base.tie_word_embeddings
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name == "lm_head.weight" and tied:
                continue
            stem, _, last = name.removeprefix("model.").rpartition(".")
            block = None
            if stem.startswith("layers."):
                _, block, stem = stem.split(".", 2)
            values = np.ascontiguousarray(parameter.numpy())
            packed = values.ndim == 2 and (everywhere or stem.endswith(originals.LINEARS))
            if packed:
                raw, back = quantized_by_ggml(ggml, values, kind)
            elif values.ndim == 2:
                raw, back = quantized_by_ggml(ggml, values, Type.Q8_0)
            else:
                raw, back = values, values
            parameter.copy_(torch.from_numpy(back))
            if arch == "llama" and stem.endswith(("q_proj", "k_proj")) and flip != "order of rows":
                raw = pairs(raw, base.num_attention_heads if stem.endswith("q_proj") else base.num_key_value_heads)
            if packed and flip:
                raw = flipped(raw, kind, flip)
            raw_type = kind if packed else Type.Q8_0 if values.ndim == 2 else None
            writer.add_tensor(
                f"blk.{block}.{NAMES[stem]}.{last}" if block else f"{NAMES[stem]}.{last}", raw, raw_dtype=raw_type
            )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def flipped(raw, kind, flip):
    size = gguf.GGML_QUANT_SIZES[kind][1]
    blocks = raw.reshape(len(raw), -1, size).copy()
    signs = blocks[:, :, 2:] if kind is Type.Q1_0 else blocks[:, :, :-2]
    if flip == "1 is -d":
        signs[:] = ~signs
    elif flip == "order of bits":
        signs[:] = np.packbits(np.unpackbits(signs, axis=-1, bitorder="little"), axis=-1, bitorder="big")
    elif flip == "codes":
        signs[:] = 0b10101010 - signs
    elif flip == "order of pairs":
        signs[:] = sum((signs >> 2 * i & 3) << (6 - 2 * i) for i in range(4))
    return blocks.reshape(raw.shape)


@pytest.fixture
def text(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    return str(tmp_path / "tokenizer")


#: transformers makes a Qwen2's tokenizer a byte-level one, whatever it was.
LETTERS = ["<unk>", "<s>", "</s>", "w", "3", "5", "\u0120", "a", "b", "ab", *(f"x{i}" for i in range(54))]
FILES = {
    "llama Q1_0": (Type.Q1_0, {}),
    "llama Q1_0, tied": (Type.Q1_0, {"tie_word_embeddings": True, "width": 128}),
    "qwen3 Q1_0": (Type.Q1_0, {"make": Qwen3ForCausalLM, "width": 128}),
    "qwen3 Q1_0 everywhere, tied": (
        Type.Q1_0,
        {"make": Qwen3ForCausalLM, "width": 128, "everywhere": True, "tie_word_embeddings": True},
    ),
    "llama Q1_0 everywhere": (Type.Q1_0, {"everywhere": True}),
    "llama Q1_0, biases": (Type.Q1_0, {"attention_bias": True, "mlp_bias": True}),
    "qwen2 Q1_0": (Type.Q1_0, {"make": Qwen2ForCausalLM, "width": 128, "tokens": LETTERS}),
    "qwen2 TQ2_0, tied": (
        Type.TQ2_0,
        {"make": Qwen2ForCausalLM, "num_attention_heads": 8, "tokens": LETTERS, "tie_word_embeddings": True},
    ),
    "llama TQ2_0": (Type.TQ2_0, {}),
    "qwen3 TQ2_0": (Type.TQ2_0, {"make": Qwen3ForCausalLM, "num_attention_heads": 8}),
}


@pytest.mark.parametrize("file", FILES)
def test_logits_are_those_of_ggmls_values_and_it_generates(file, ggml, tmp_path, ids, text, capsys):
    kind, how = FILES[file]
    model = write(tmp_path / "any name", ggml, kind, **how)
    out = str(tmp_path / "out")
    own = "tokens" in how
    assert main(["import", str(tmp_path / "any name"), "-o", out, *([] if own else ["--tokenizer", text])]) == 0
    assert difference(model, out, ids) < ROUNDING
    loaded = signbit.load(out)
    for name, linear in originals.linears(model):
        packed = loaded.get_submodule(name)
        assert isinstance(packed, PackedLinear)
        assert torch.equal(packed.to_dense(), linear.weight)
    if kind is Type.Q1_0:
        assert {w.bits_per_weight for m in loaded.modules() if isinstance(m, PackedLinear) for w in m.weights} == {
            1.125
        }
    if how.get("everywhere"):  # as 1-bit Bonsai
        tied = model.config.tie_word_embeddings
        assert isinstance(loaded.lm_head, torch.nn.Linear if tied else PackedLinear)
        assert main(["info", out]) == 0
        assert "form=GGUF Q1_0" in capsys.readouterr().out
    capsys.readouterr()
    assert main(["generate", out, "w3 w5", "--max-new-tokens", "3"]) == 0
    assert capsys.readouterr().out.removeprefix("w3 w5").split() == continued(model, out, "w3 w5", 3)


@pytest.mark.parametrize(
    ("kind", "flip"),
    [
        (Type.Q1_0, "1 is -d"), (Type.Q1_0, "order of bits"), (Type.Q1_0, "order of rows"), (Type.TQ2_0, "codes"),
        (Type.TQ2_0, "order of pairs"), (Type.TQ2_0, "order of rows"),
    ],
)  # fmt: skip
def test_one_convention_flipped_is_seen(kind, flip, ggml, tmp_path, ids, text):
    model = write(tmp_path / "file", ggml, kind, flip=flip)
    convert(str(tmp_path / "file"), tmp_path / "out", tokenizer=text)
    assert difference(model, tmp_path / "out", ids) > 100 * ROUNDING


def test_logits_are_those_of_transformers_own_reader(ggml, tmp_path, ids, text):
    write(tmp_path / "model.gguf", ggml, Type.TQ2_0)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    convert(str(tmp_path / "model.gguf"), tmp_path / "out", tokenizer=text)
    assert difference(model, tmp_path / "out", ids) < ROUNDING


def test_literal_bytes_of_q1_0():
    raw = np.zeros((1, 18), dtype=np.uint8)
    raw[0, :4] = 0x00, 0x38, 0b00000001, 0b10000000  # fp16 0.5, then bits
    dense = q1_0(torch.from_numpy(raw)).to_dense()[0]
    assert (dense == 0.5).nonzero()[:, 0].tolist() == [0, 15]
    assert (dense == -0.5).sum() == 126
    raw[0, :2] = 0x00, 0x7C  # infinity
    with pytest.raises(FormatError, match="no finite number"):
        q1_0(torch.from_numpy(raw))


def test_literal_bytes_of_tq2_0():
    raw = np.full((1, 66), 0b01010101, dtype=np.uint8)
    raw[0, 0], raw[0, 33] = 0b10_01_00_10, 0b01_01_00_01
    raw[0, 64:] = 0x00, 0x38
    weight = tq2_0(torch.from_numpy(raw))
    dense = weight.to_dense()[0]
    assert weight.planes == 2
    assert (dense == 0.5).nonzero()[:, 0].tolist() == [0, 96]
    assert (dense == -0.5).nonzero()[:, 0].tolist() == [32, 161]
    raw[0, :64] = 0b10001000  # no zeros: one plane is enough
    weight = tq2_0(torch.from_numpy(raw))
    assert weight.planes == 1
    assert weight.to_dense()[0, [0, 32, 64, 96]].tolist() == [-0.5, 0.5, -0.5, 0.5]
    raw[0, 5] = 0b11
    with pytest.raises(FormatError, match="code is 3"):
        tq2_0(torch.from_numpy(raw))


def test_the_tokenizer_in_the_file(ggml, tmp_path, capsys):
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    tokens = ["<unk>", "<s>", "</s>", *bytes_to_unicode().values(), "ab"]
    model = write(tmp_path / "file.gguf", ggml, Type.Q1_0, make=Qwen3ForCausalLM, tokens=tokens, vocab_size=len(tokens))
    assert main(["import", str(tmp_path), "-o", str(tmp_path / "out")]) == 0  # a directory that holds one file
    made = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert made.decode(made.encode("cab", add_special_tokens=False)) == "cab"
    assert made.convert_ids_to_tokens(made.encode("cab", add_special_tokens=False)) == ["c", "ab"]
    assert signbit.load(tmp_path / "out").config.eos_token_id == 2
    capsys.readouterr()
    assert main(["generate", str(tmp_path / "out"), "cab", "--max-new-tokens", "2"]) == 0
    want = continued(model, tmp_path / "out", "cab", 2)
    assert capsys.readouterr().out.removeprefix("cab").split() == want


def test_what_is_no_1_bit_file_is_refused(ggml, tmp_path):
    write(tmp_path / "file", ggml, Type.Q8_0)
    with pytest.raises(FormatError, match=r"no Q1_0 or TQ2_0 matrix.*Q8_0"):
        convert(str(tmp_path / "file"), tmp_path / "out")
    whole = (tmp_path / "file").read_bytes()
    (tmp_path / "file").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(FormatError, match="damaged or cut short"):
        convert(str(tmp_path / "file"), tmp_path / "out")
    writer = gguf.GGUFWriter(tmp_path / "other", "mamba")
    writer.add_tensor("token_embd.weight", np.zeros((4, 4), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(FormatError, match="architecture 'mamba'; llama, qwen2, qwen3"):
        convert(str(tmp_path / "other"), tmp_path / "out")


def test_a_file_in_parts_is_refused_by_name(ggml, tmp_path, monkeypatch):
    monkeypatch.setattr(gguf, "GGUFWriter", partial(gguf.GGUFWriter, split_max_tensors=15))
    write(tmp_path / "model.gguf", ggml, Type.Q1_0)
    parts = sorted(tmp_path.glob("*.gguf"))
    assert [part.name for part in parts] == ["model-00001-of-00002.gguf", "model-00002-of-00002.gguf"]
    merge = "llama-gguf-split --merge model-00001-of-00002.gguf WHOLE.gguf"
    for source, number in ((parts[0], 1), (parts[1], 2), (tmp_path, 1)):
        with pytest.raises(FormatError, match=rf"is part {number} of 2 of one GGUF file\. .*{merge}"):
            convert(str(source), tmp_path / "out")


def test_a_directory_of_several_files(ggml, tmp_path):
    for name in ("a", "b"):
        write(tmp_path / f"{name}.gguf", ggml, Type.Q1_0, num_hidden_layers=1)
    with pytest.raises(FormatError, match=r"holds 2 GGUF files; give the one to read, such as .*a\.gguf"):
        convert(str(tmp_path), tmp_path / "out")


@pytest.mark.parametrize("change", ["blk.0.ffn_up.weight", "rope_freqs.weight"])
def test_missing_and_strange_tensors_are_named(change, ggml, tmp_path, monkeypatch):
    add = gguf.GGUFWriter.add_tensor

    def other(self, name, *args, **kwargs):
        if name != change:
            add(self, name, *args, **kwargs)
        if name == "output_norm.weight" and change.startswith("rope"):
            add(self, change, np.ones(16, dtype=np.float32))

    monkeypatch.setattr(gguf.GGUFWriter, "add_tensor", other)
    write(tmp_path / "file", ggml, Type.Q1_0)
    said = "mlp.up_proj is not binarized" if change.startswith("blk") else "the tensor rope_freqs.weight is not one of"
    with pytest.raises(FormatError, match=said):
        convert(str(tmp_path / "file"), tmp_path / "out")


@pytest.mark.parametrize("kind", ["linear", "yarn"])
def test_rotary_scaling_is_read(kind, ggml, tmp_path, ids, text):
    def more(writer):
        writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
        writer.add_rope_scaling_factor(4.0)
        writer.add_rope_scaling_orig_ctx_len(32)

    parameters = {"rope_theta": 10000.0, "rope_type": kind, "factor": 4.0}
    parameters |= {"original_max_position_embeddings": 32} if kind == "yarn" else {}
    model = write(tmp_path / "file", ggml, Type.Q1_0, more=more, rope_parameters=parameters)
    convert(str(tmp_path / "file"), tmp_path / "out", tokenizer=text)
    assert difference(model, tmp_path / "out", ids) < ROUNDING
    plain = write(tmp_path / "plain", ggml, Type.Q1_0, more=lambda w: w.add_rope_dimension_count(16))
    assert plain.config.head_dim == 64
    with pytest.raises(FormatError, match="turn 16 of 64 numbers"):
        convert(str(tmp_path / "plain"), tmp_path / "other")


@pytest.mark.parametrize(
    ("add", "value", "default"),
    [("yarn_beta_fast", 8.0, 32.0), ("yarn_attn_factor", 0.5, 1.0), ("yarn_ext_factor", 0.5, 1.0)],
)
def test_other_rotary_scaling_is_refused_unless_it_changes_nothing(add, value, default, ggml, tmp_path, text):
    def more(number):
        def write_scaling(writer):
            writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
            writer.add_rope_scaling_factor(4.0)
            writer.add_rope_scaling_orig_ctx_len(32)
            writer.add_float32(f"{writer.arch}.rope.scaling.{add}", number)

        return write_scaling

    write(tmp_path / "other", ggml, Type.Q1_0, more=more(value))
    with pytest.raises(FormatError, match=rf"rope\.scaling\.{add} is {value}, which is not read"):
        convert(str(tmp_path / "other"), tmp_path / "out", tokenizer=text)
    write(tmp_path / "default", ggml, Type.Q1_0, more=more(default))
    convert(str(tmp_path / "default"), tmp_path / "out", tokenizer=text)
