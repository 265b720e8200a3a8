"""Each form there and back: import → save → load → export → import gives the same signs and scales, or a refusal says why."""

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

import signbit
from signbit.bits import unpack_signs
from signbit.errors import ExportError, FormatError
from signbit.interop.convert import convert
from signbit.interop.export import bitnet, blocks, gguf
from signbit.interop.export.request import ExportRequest
from signbit.interop.export.run import export
from signbit.linear import PackedLinear
from tests.conftest import tiny_llama_config
from tests.interop import test_import as forms
from tests.interop import test_pbllm as pbllm
from tests.interop.test_export_gguf import byte_level, gguf_in
from tests.interop.test_gguf import ggml, write  # noqa: F401 (a fixture)

#: The bytes of a GPT-2 vocabulary: the tokenizer that stands in a GGUF file.
BYTES = ["<unk>", "<s>", "</s>", *bytes_to_unicode().values(), "ab"]


@pytest.fixture(scope="module")
def packed(tmp_path_factory, ggml):  # noqa: F811
    """A function that gives the packed directory of a form, loaded and saved once more, and the options of its import."""
    made, folder = {}, tmp_path_factory.mktemp("forms")
    byte_level().save_pretrained(folder / "words")

    def imported(form):
        if form not in made:
            source, first, saved = (folder / f"{form} {part}" for part in ("source", "imported", "saved"))
            options = write_source(form, source, ggml)
            options |= {} if form.startswith("gguf") else {"tokenizer": str(folder / "words")}
            convert(str(source), first, **options)
            signbit.save(signbit.load(first), saved, AutoTokenizer.from_pretrained(first))
            one, other = ((out / "model.safetensors").read_bytes() for out in (first, saved))
            assert one == other, "what is saved is not what was loaded"
            made[form] = str(saved), options
        return made[form]

    return imported


def write_source(form, source, ggml):  # noqa: F811
    """Writes a checkpoint of a form, wide enough for the blocks of GGUF; returns the options of its import."""
    torch.manual_seed(2)
    source.parent.mkdir(exist_ok=True)
    if form.startswith("gguf"):
        write(source, ggml, Type[form.removeprefix("gguf ")], tokens=BYTES, vocab_size=len(BYTES), num_hidden_layers=1)
        return {}
    wide = {} if form == "pb-llm" else {"hidden_size": 256, "intermediate_size": 256}
    sizes = {"vocab_size": 300, "num_hidden_layers": 1, "initializer_range": 0.05, **wide}
    with pytest.MonkeyPatch.context() as patch:
        for module in (forms, pbllm):
            patch.setattr(module, "tiny_llama_config", lambda **changes: tiny_llama_config(**{**sizes, **changes}))
        if form != "pb-llm":
            forms.FORMS[form](source)
            return {}
        _, _, masks = pbllm.saved(source, dtype=torch.float16)
        return {"masks": masks}


def layers(folder):
    return {n: m for n, m in signbit.load(folder).named_modules() if isinstance(m, PackedLinear)}


def whole(w, part):
    """A float part of a weight, one number for each of its own: [P, N, K]."""
    value = getattr(w, part)
    if part == "scale":
        value = value.repeat_interleave(w.in_features // w.groups, dim=-1).expand(-1, w.out_features, w.in_features)
    return value


def assert_same(folder, again, dtype=None):
    """Signs equal, and all floats, which went through `dtype` on their way."""
    one, other = layers(folder), layers(again)
    assert set(one) == set(other)
    for name, layer in one.items():
        theirs = other[name]
        assert (layer.norm_in, layer.norm_out) == (theirs.norm_in, theirs.norm_out)
        for w, v in zip(layer.weights, theirs.weights, strict=True):
            assert torch.equal(unpack_signs(w.signs, w.in_features), unpack_signs(v.signs, v.in_features)), name
            for part in ("scale", "shift", "in_scale", "in_shift"):
                if getattr(w, part) is None:
                    assert getattr(v, part) is None, (name, part)
                    continue
                mine = whole(w, part)
                mine = mine if dtype is None else mine.to(dtype)
                assert torch.equal(mine.float(), whole(v, part).float()), (name, part)
            assert (w.salient is None) == (v.salient is None)
            if w.salient is not None:
                for part in ("codes", "scale", "zero"):
                    assert torch.equal(getattr(w.salient, part), getattr(v.salient, part)), (name, part)


def back(out, request, options, folder):
    """Exports, and imports that."""
    export(out, folder / "exported", request)
    kept = options if request.format == "dense" else {}
    convert(str(folder / "exported"), folder / "again", **kept)
    return str(folder / "again")


GGUF, BITNET = ExportRequest("gguf", head="keep"), ExportRequest("bitnet", dtype="float32")
#: Form, what it is exported as, and what that stores floats in (None: as they are).
EXACT = [
    ("bitnet ternary", BITNET, None),
    ("bitnet ternary, autobitlinear", BITNET, None),
    ("bitnet ternary, norm", BITNET, None),
    ("gguf Q1_0", GGUF, torch.float16),
    ("gguf TQ2_0", GGUF, torch.float16),
    ("pb-llm", ExportRequest("dense", dtype="float16"), None),
]


@pytest.mark.parametrize(("form", "request_", "dtype"), EXACT, ids=lambda value: str(value)[:40])
def test_there_and_back_is_exact(form, request_, dtype, packed, tmp_path):
    out, options = packed(form)
    assert_same(out, back(out, request_, options, tmp_path), dtype)


def test_ternary_weights_through_gguf_are_exact_but_for_their_activations(packed, tmp_path):
    out, options = packed("bitnet ternary")
    again = back(out, GGUF, options, tmp_path)
    assert_same(out, again, torch.float16)
    assert {m.act_bits for m in layers(out).values()} == {8}
    assert {m.act_bits for m in layers(again).values()} == {0}


DENSE = ExportRequest("dense", dtype="float32")


@pytest.mark.parametrize("form", ["fbi column", "fbi row", "fbi single", "gguf Q1_0", "gguf TQ2_0"])
def test_dense_matrices_are_the_packed_ones(form, packed, tmp_path):
    """A dense directory says no more which of its values are signs: it is not imported, but its matrices are equal."""
    out, _ = packed(form)
    export(out, tmp_path / "exported", DENSE)
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "exported", dtype=torch.float32)
    for name, layer in layers(out).items():
        assert torch.equal(dense.get_submodule(name).weight, layer.to_dense()), name
    with pytest.raises(FormatError, match="is a dense model"):
        convert(str(tmp_path / "exported"), tmp_path / "again")


@pytest.mark.parametrize("form", ["fbi row", "fbi single"])
def test_shifts_go_into_an_adapter_which_is_not_read_back(form, packed, tmp_path):
    out, _ = packed(form)
    export(out, tmp_path / "exported", GGUF)
    path, adapter = gguf_in(tmp_path / "exported")
    assert adapter is not None
    with pytest.raises(FormatError, match=rf"its shifts are in {adapter.name}.*the packed directory"):
        convert(str(path), tmp_path / "again")


VECTOR, NORM = "a vector multiplies its inputs", "LayerNorm stands behind its product"
BATCH, FLOAT = "scaled by the largest of the batch", "its activations are float"
REFUSED = [
    ("fbi column", "gguf", VECTOR), ("fbi column", "bitnet", FLOAT), ("fbi row", "bitnet", FLOAT),
    ("onebit packed", "gguf", NORM), ("onebit packed", "bitnet", r"norm \(layer\) stands behind its product"),
    ("onebit packed", "dense", NORM), ("onebit training", "gguf", NORM), ("onebit training", "dense", NORM),
    ("bitnet-transformers", "gguf", BATCH), ("bitnet-transformers", "dense", BATCH),
    ("bitnet-transformers", "bitnet", r"a norm \(batch_absmax\) stands behind its product"),
    ("bitnet ternary, norm", "gguf", r"a norm \(rms\) of its own stands before"),
    ("bitnet ternary", "dense", "takes activations of 8 bits.*--format bitnet keeps it"),
    ("pb-llm", "gguf", "salient weights of more bits"), ("pb-llm", "bitnet", FLOAT), ("gguf Q1_0", "bitnet", FLOAT),
]  # fmt: skip


@pytest.mark.parametrize(("form", "kind", "why"), REFUSED, ids=lambda value: value[:24])
def test_what_no_export_holds_is_refused_by_layer_and_reason(form, kind, why, packed, tmp_path):
    out, _ = packed(form)
    with pytest.raises(ExportError, match=rf"model\.layers\.0\.\S+_proj .*{why}"):
        export(out, tmp_path / "exported", ExportRequest(kind))
    assert not (tmp_path / "exported").exists()


def test_every_form_of_import_is_here():
    tried = {form for form, *_ in (*EXACT, *REFUSED)}
    assert tried >= {*forms.FORMS, "pb-llm", "gguf Q1_0", "gguf TQ2_0"} - {"fbi single"}, "fbi single is fbi row's"


def _big_endian(codes, scale):
    bits = np.packbits((codes == 2).reshape(*scale.shape, blocks.Q1_0).numpy(), axis=-1, bitorder="big")
    return torch.cat([blocks._bytes(scale), torch.from_numpy(bits)], dim=-1).reshape(len(codes), -1)


#: Form, its export, and one convention turned round: where, and what stands there instead.
FLIPS = {
    "order of bits": ("gguf Q1_0", GGUF, (blocks, "_q1_0"), _big_endian),
    "order of rows": ("gguf Q1_0", GGUF, (gguf, "rotary_pairs"), lambda rows, heads: rows),
    "sign of a code": ("gguf TQ2_0", GGUF, (blocks, "ternary"), lambda w: (2 - bitnet.ternary(w)[0], w.scale[0] * 2)),
    "scale of two planes": ("gguf TQ2_0", GGUF, (blocks, "ternary"), lambda w: (bitnet.ternary(w)[0], w.scale[0])),
    "rows of a byte": ("bitnet ternary", BITNET, (bitnet, "pack"), lambda codes: pack_rows(codes)),
}


def pack_rows(codes):
    """Four rows that follow each other in a byte, where transformers has them a quarter apart."""
    return sum(codes[i::4] << 2 * i for i in range(4))


@pytest.mark.parametrize("flip", FLIPS)
def test_one_convention_turned_round_is_seen(flip, packed, tmp_path, monkeypatch):
    form, request_, where, instead = FLIPS[flip]
    out, options = packed(form)
    monkeypatch.setattr(*where, instead)
    again = back(out, request_, options, tmp_path)
    with pytest.raises(AssertionError, match="proj"):
        assert_same(out, again, torch.float16 if request_ is GGUF else None)
