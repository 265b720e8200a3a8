"""Sources that are wrong or cut short: an error says what and where, and nothing is written."""

import copy
import json
from dataclasses import replace

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type

from signbit.cli import main
from signbit.errors import FormatError
from signbit.interop.convert import convert
from signbit.interop.recognise import open_checkpoint
from tests.interop import test_import as forms
from tests.interop.test_gguf import ggml, write  # noqa: F401 (a fixture)

YARN = {"rope_type": "yarn", "rope_theta": 1e4, "original_max_position_embeddings": 32}
WHOLE = "; a whole number from 1 on is expected"
ABOVE_0 = "; a number above 0 is expected"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """An FBI-LLM checkpoint, whose config.json the tests change."""
    return forms.fbi(tmp_path_factory.mktemp("bad") / "source")[1]


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("hidden_size", "x", "Field 'hidden_size' expected int, got str .value: 'x'."),
        ("hidden_size", None, "Field 'hidden_size' expected int, got NoneType"),
        ("hidden_size", -32, f"hidden_size -32{WHOLE}"),
        ("hidden_size", 32.5, "Field 'hidden_size' expected int, got float"),
        ("hidden_size", [32], "Field 'hidden_size' expected int, got list"),
        ("hidden_size", True, "Field 'hidden_size' expected int, got bool"),
        ("num_attention_heads", 0, f"num_attention_heads 0{WHOLE}"),
        ("num_attention_heads", 3, "hidden size .32. is not a multiple of the number of attention"),
        ("num_key_value_heads", 0, f"num_key_value_heads 0{WHOLE}"),
        ("num_key_value_heads", 3, r"k_proj is \[16, 32\] without one in the checkpoint, \[24, 32\]"),
        ("num_hidden_layers", -1, f"num_hidden_layers -1{WHOLE}"),
        ("num_hidden_layers", 1, "no linear layer model.layers.1.mlp.down_proj"),
        ("num_hidden_layers", 3, "model.layers.2.self_attn.q_proj is not binarized"),
        ("num_hidden_layers", 10**9, "num_hidden_layers 1000000000, and there are 50 tensors"),
        ("head_dim", 7, "RoPE requires an even"),
        ("vocab_size", 63, r"lm_head.weight is \[64, 32\], \[63, 32\] by config.json"),
        ("max_position_embeddings", 0, f"max_position_embeddings 0{WHOLE}"),
        ("rms_norm_eps", -1, "rms_norm_eps"),
        ("rms_norm_eps", float("nan"), "NaN is no number of JSON"),
        ("hidden_act", "nope", "makes no model of what the configuration says .'nope'."),
        ("model_type", ["llama"], r"the model_type \['llama'\], which transformers does not know"),
        ("pad_token_id", 999, "Padding_idx must be within"),
        ("quantization_config", 3, "has quantization_config 3, no object"),
        ("rope_parameters", [1], "rope_parameters"),
        ("rope_parameters", {"rope_theta": 0}, f"rope_theta 0{ABOVE_0}"),
        ("rope_parameters", {**YARN, "factor": None}, f"factor None{ABOVE_0}"),
        ("rope_parameters", {**YARN, "factor": -4.0}, rf"factor -4\.0{ABOVE_0}"),
        ("rope_parameters", {**YARN, "factor": "x"}, f"factor 'x'{ABOVE_0}"),
        ("rope_scaling", {"type": "linear", "factor": 0}, f"factor 0{ABOVE_0}"),
    ],
)
def test_values_of_config_json(key, value, said, source, tmp_path, monkeypatch, capsys):
    good = (source / "config.json").read_text()
    try:
        (source / "config.json").write_text(json.dumps({**json.loads(good), key: value}))
        with pytest.raises(FormatError, match=said):
            convert(str(source), tmp_path / "out")
        assert main(["import", str(source), "-o", str(tmp_path / "out")]) == 1
    finally:
        (source / "config.json").write_text(good)
    said_by_it = capsys.readouterr().err
    assert "\nsignbit: " in f"\n{said_by_it}" and "Traceback" not in said_by_it
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("key", ["hidden_size", "num_hidden_layers", "model_type", "vocab_size"])
def test_keys_that_config_json_lacks(key, source, tmp_path):
    """transformers has defaults, with which the tensors do not agree."""
    good = (source / "config.json").read_text()
    try:
        (source / "config.json").write_text(json.dumps({k: v for k, v in json.loads(good).items() if k != key}))
        with pytest.raises(FormatError, match=r"config\.json|is missing|is not binarized"):
            convert(str(source), tmp_path / "out")
    finally:
        (source / "config.json").write_text(good)


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
@pytest.mark.parametrize(
    ("file", "how"),
    [
        ("config.json", {}),
        ("model.safetensors", {}),
        ("model.safetensors.index.json", {"shards": 2}),
        ("model-00002-of-00002.safetensors", {"shards": 2}),
        ("pytorch_model.bin", {"kind": "bin"}),
    ],
)
def test_files_that_are_cut_short(file, how, share, tmp_path):
    _, folder = forms.fbi(tmp_path / "source", **how)
    content = (folder / file).read_bytes()
    (folder / file).write_bytes(content[: int(len(content) * share)])
    with pytest.raises(FormatError, match=f"{file}"):
        convert(str(folder), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_gguf_files_that_are_cut_short(ggml, tmp_path):  # noqa: F811
    write(tmp_path / "file", ggml, Type.Q1_0, num_hidden_layers=1, tokens=["<unk>", "<s>", "</s>", "a", "b"])
    content = (tmp_path / "file").read_bytes()
    header = content.index(b"blk.0.attn_q.weight")
    for end in (4, 8, 20, 24, 33, 60, header // 2, header, header + 30, len(content) // 2, len(content) - 1):
        (tmp_path / "file").write_bytes(content[:end])
        with pytest.raises(FormatError, match=r"damaged or cut short|is missing in the metadata|architecture None"):
            convert(str(tmp_path / "file"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("attention.head_count", 0, f"attention.head_count is 0{WHOLE}"),
        ("attention.head_count", 3, "no llama model of this .*hidden size .256. is not a multiple"),
        ("attention.head_count_kv", [2, 2], rf"attention.head_count_kv is \[2, 2\]{WHOLE}"),
        ("embedding_length", "x", f"embedding_length is 'x'{WHOLE}"),
        ("embedding_length", 128, r"by config\.json"),
        ("block_count", 10**9, "block_count is 1000000000, more than it has tensors"),
        ("context_length", 0, f"context_length is 0{WHOLE}"),
        ("rope.freq_base", 0.0, f"rope_theta 0.0{ABOVE_0}"),
        ("rope.scaling.factor", -2.0, f"factor -2.0{ABOVE_0}"),
        ("rope.scaling.factor", float("nan"), f"factor nan{ABOVE_0}"),
        ("rope.scaling.factor", "x", "rope.scaling.factor is 'x'; a number is expected"),
        ("attention.layer_norm_rms_epsilon", "x", "layer_norm_rms_epsilon is 'x'; a number is expected"),
        ("rope.scaling.type", "longrope", "rope.scaling.type is 'longrope'; none, linear, yarn"),
    ],
)
def test_metadata_of_gguf(key, value, said, ggml, tmp_path):  # noqa: F811
    def change(writer):
        full = f"{writer.arch}.{key}"
        kinds = {int: gguf.GGUFValueType.UINT32, float: gguf.GGUFValueType.FLOAT32, str: gguf.GGUFValueType.STRING}
        if isinstance(value, list):
            writer.kv_data[0][full] = gguf.gguf_writer.GGUFValue(value, gguf.GGUFValueType.ARRAY)
        else:
            writer.kv_data[0][full] = gguf.gguf_writer.GGUFValue(value, kinds[type(value)])

    write(tmp_path / "file", ggml, Type.Q1_0, more=change, num_hidden_layers=1)
    with pytest.raises(FormatError, match=said):
        convert(str(tmp_path / "file"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_masks_that_are_cut_short(tmp_path):
    from tests.interop.test_pbllm import saved

    _, folder, masks = saved(
        tmp_path / "source", skip=("k_proj", "v_proj", "o_proj", "up_proj", "gate_proj", "down_proj")
    )
    first = min(masks.glob("*.pkl"))
    for content in (b"", first.read_bytes()[:100], first.read_bytes()[:-30]):
        first.write_bytes(content)
        with pytest.raises(FormatError, match=first.name):
            convert(str(folder), tmp_path / "out", masks=masks)
    torch.save(np.float64(1), first)
    with pytest.raises(FormatError, match=first.name):
        convert(str(folder), tmp_path / "out", masks=masks)


@pytest.fixture
def unread(monkeypatch):
    """Imports fail as soon as they read a layer."""

    def opened(*args):
        def read():
            raise AssertionError("a layer was read")

        checkpoint = open_checkpoint(*args)
        return replace(checkpoint, layers=dict.fromkeys(checkpoint.layers, read))

    monkeypatch.setattr("signbit.interop.convert.open_checkpoint", opened)


def test_a_tokenizer_larger_than_the_embedding_is_refused(unread, tmp_path, tokenizer):
    _, folder = forms.fbi(tmp_path / "source")
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.save_pretrained(tmp_path / "larger")
    with pytest.raises(AssertionError, match="a layer was read"):  # 64 tokens, 64 rows
        convert(str(folder), tmp_path / "out", tokenizer=str(tmp_path / "larger"))
    tokenizer.add_tokens(["w61"])
    tokenizer.save_pretrained(tmp_path / "larger")
    said = r" is not this model's: its token 'w61' has the id 64, and the embedding has 64 rows .*--tokenizer DIR"
    with pytest.raises(FormatError, match="--tokenizer .*larger" + said):
        convert(str(folder), tmp_path / "out", tokenizer=str(tmp_path / "larger"))
    tokenizer.save_pretrained(folder)
    with pytest.raises(FormatError, match="the tokenizer beside it" + said):
        convert(str(folder), tmp_path / "out")


def test_what_is_wrong_in_the_options_is_said_before_a_layer_is_read(unread, tmp_path, tokenizer):
    _, folder = forms.fbi(tmp_path / "source")
    tokenizer.save_pretrained(folder)
    with pytest.raises(FormatError, match="nowhere has no tokenizer"):
        convert(str(folder), tmp_path / "out", tokenizer=str(tmp_path / "nowhere"))
    (tmp_path / "file").write_text("x")
    with pytest.raises(FormatError, match=r"file/out cannot be made, because .*/file is a file"):
        convert(str(folder), tmp_path / "file" / "out")
    (folder / "generation_config.json").write_text("{")
    with pytest.raises(FormatError, match=r"generation_config\.json is damaged"):
        convert(str(folder), tmp_path / "out")
