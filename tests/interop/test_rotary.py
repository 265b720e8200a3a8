"""Rotary positions and biases of GGUF files: llama.cpp itself says what metadata mean."""

import json

import pytest
import torch
from gguf import GGMLQuantizationType as Type
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

import signbit
from signbit.cli import main
from signbit.errors import ExportError, FormatError
from signbit.interop.convert import convert
from signbit.interop.export.request import ExportRequest
from signbit.interop.export.run import export
from tests.interop import llamacpp
from tests.interop.test_export_gguf import PROMPT, byte_level, compare, config, relative, same_layers, with_norms
from tests.interop.test_gguf import ggml, write  # noqa: F401 (a fixture)
from tests.interop.test_round_trips import BYTES

CLOSE, FAR = 1e-3, 1e-2
#: Texts that are long enough for positions to matter; of the first that the model does not end, the logits are compared.
TEXTS = [[3 + (7 * i + last) % 250 for i in range(48)] for last in range(8)]


def scaling(values):
    """Writes keys of rope.scaling, or rope.scale_linear, into a file's metadata."""

    def more(writer):
        for key, value in values.items():
            add = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32}[type(value)]
            add(f"{writer.arch}.rope.{key}", value)

    return more


LINEAR, NONE = {"rope_type": "linear", "factor": 4.0}, {"rope_type": "default"}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
KEYS = {
    "a factor without a type": ({"scaling.factor": 4.0}, LINEAR),
    "the factor's old name": ({"scale_linear": 4.0}, LINEAR),
    "both names": ({"scaling.factor": 4.0, "scale_linear": 2.0}, LINEAR),
    "a type without a factor": ({"scaling.type": "linear"}, NONE),
    "a factor of 0": ({"scaling.type": "linear", "scaling.factor": 0.0}, NONE),
    "none, and a factor": ({"scaling.type": "none", "scaling.factor": 4.0}, NONE),
    "yarn without its original context": ({"scaling.type": "yarn", "scaling.factor": 4.0}, YARN),
    "yarn without a factor": ({"scaling.type": "yarn", "scaling.original_context_length": 32}, NONE),
    "yarn": ({"scaling.type": "yarn", "scaling.factor": 4.0, "scaling.original_context_length": 32},
             {**YARN, "original_max_position_embeddings": 32}),
}  # fmt: skip


def expected(values):
    return {"rope_theta": 10000.0, **values}


@pytest.mark.parametrize("keys", KEYS)
def test_scaling_is_read_as_llama_cpp_reads_it(keys, ggml, tmp_path):  # noqa: F811
    written, read = KEYS[keys]
    write(
        tmp_path / "file.gguf", ggml, Type.Q1_0, make=Qwen3ForCausalLM, more=scaling(written), tokens=BYTES,
        vocab_size=len(BYTES), num_hidden_layers=1, initializer_range=0.2,
    )  # fmt: skip
    convert(str(tmp_path / "file.gguf"), tmp_path / "out")
    model = signbit.load(tmp_path / "out", dtype=torch.float32)
    assert model.config.rope_parameters == expected(read)
    with llamacpp.running(tmp_path / "file.gguf") as server:
        ids, said = next((ids, made[1]) for ids in TEXTS if (made := llamacpp.next_token(server, ids, len(BYTES))))

    @torch.no_grad()
    def logits(parameters):
        model.config.rope_parameters = parameters
        changed = type(model)(model.config).eval()
        model.model.rotary_emb = changed.model.rotary_emb
        return model(torch.tensor([ids])).logits[0, -1]

    llamacpp.with_its_rounding(model)
    right = relative(said, logits(expected(read)))
    others = [relative(said, logits(expected(other))) for other in (LINEAR, NONE, YARN) if other != read]
    assert right < CLOSE < FAR < min(others)


@pytest.mark.parametrize(
    "parameters",
    [
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    ],
    ids=lambda value: value["rope_type"],
)
@pytest.mark.parametrize("kind", [Qwen2ForCausalLM, Qwen3ForCausalLM])
def test_qwen_with_rotary_scaling_in_llama_cpp_and_back(kind, parameters, tmp_path):
    packed = qwen(kind, tmp_path, rope_parameters={"rope_theta": 1e6, **parameters})
    export(packed, tmp_path / "out", ExportRequest("gguf"))
    compare(signbit.load(packed, dtype=torch.float32), tmp_path / "out", tokens=2)
    convert(str(tmp_path / "out"), tmp_path / "again")
    one, other = same_layers(packed, tmp_path / "again")
    assert one.config.rope_parameters == other.config.rope_parameters
    same_biases_and_logits(one, other)


def qwen(kind, folder, **changes):
    """A packed Qwen with random biases, in float16."""
    tokenizer = byte_level()
    tokenizer.add_special_tokens({"pad_token": "<|endoftext|>"})  # transformers gives it to a Qwen2 that has it not
    config_class = {Qwen2ForCausalLM: Qwen2Config, Qwen3ForCausalLM: Qwen3Config}[kind]
    head_dim = 64 if kind is Qwen2ForCausalLM else 32
    values = config(len(tokenizer), num_hidden_layers=1, initializer_range=0.1, **changes).to_dict()
    model = with_norms(
        kind(
            config_class(
                **{
                    **values,
                    **changes,
                    "head_dim": changes.get("head_dim", head_dim),
                    "model_type": config_class.model_type,
                }
            )
        )
    )
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    model.half().save_pretrained(folder / "m")
    tokenizer.save_pretrained(folder / "m")
    assert main(["quantize", str(folder / "m"), "-o", str(folder / "p"), "--method", "absmean", "--head", "int8"]) == 0
    return folder / "p"


@torch.no_grad()
def same_biases_and_logits(one, other):
    biases = {name: each for name, each in one.state_dict().items() if name.endswith("bias")}
    for name, bias in biases.items():
        assert torch.equal(bias.float(), other.state_dict()[name].float()), name
    assert len(biases) == (3 if one.config.model_type == "qwen2" else 0)
    ids = torch.tensor([PROMPT])
    assert relative(other(ids).logits, one(ids).logits) < 1e-5


def test_a_qwen2_whose_heads_are_narrower_is_refused(tmp_path):
    packed = qwen(Qwen2ForCausalLM, tmp_path, head_dim=32)
    with pytest.raises(
        ExportError, match=r"heads of 128 numbers in all beside hidden_size 256, which llama\.cpp's qwen2 has"
    ):
        export(packed, tmp_path / "out", ExportRequest("gguf"))


def test_a_factor_that_is_none_is_refused_when_it_is_written(tmp_path):
    packed = qwen(Qwen3ForCausalLM, tmp_path)
    values = json.loads((packed / "config.json").read_text())
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": None, "original_max_position_embeddings": 32}
    (packed / "config.json").write_text(json.dumps({**values, "rope_parameters": rope}))
    with pytest.raises(FormatError, match=r"config\.json has rotary positions of the factor None; a number above 0"):
        export(packed, tmp_path / "out", ExportRequest("gguf"))


def test_a_qwen2_without_one_of_its_biases_is_refused(ggml, tmp_path, monkeypatch):  # noqa: F811
    import gguf

    add = gguf.GGUFWriter.add_tensor
    monkeypatch.setattr(
        gguf.GGUFWriter, "add_tensor",
        lambda self, name, *a, **k: None if name == "blk.0.attn_k.bias" else add(self, name, *a, **k),
    )  # fmt: skip
    write(tmp_path / "file", ggml, Type.Q1_0, make=Qwen2ForCausalLM, num_hidden_layers=1)
    with pytest.raises(
        FormatError, match=r"self_attn\.k_proj is \[64, 256\] without one in the checkpoint, .* with a bias"
    ):
        convert(str(tmp_path / "file"), tmp_path / "out")
