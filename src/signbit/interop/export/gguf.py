"""GGUF files that stock llama.cpp runs: Q1_0 and TQ2_0 where that is exact, a LoRA adapter for shifts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from signbit import format as packed_format
from signbit.errors import ExportError, OptionError
from signbit.extras import install
from signbit.hub.load import load_tokenizer
from signbit.interop.export import blocks as stored
from signbit.interop.export.architecture import (
    architecture,
    rope_factors,
    rotary_pairs,
    tensor_name,
    turned,
    write_metadata,
)
from signbit.interop.export.dense import no_matrix
from signbit.interop.export.folding import Folded, folded
from signbit.interop.export.notes import Written, modelfile, readme
from signbit.interop.export.ollama import turns
from signbit.interop.export.request import ExportRequest, Progress
from signbit.interop.export.source import Packed
from signbit.interop.export.vocabulary import Vocabulary, vocabulary
from signbit.linear import PackedLinear

_ITEM = {"F32": 4, "F16": 2, "BF16": 2}
_FLOATS = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
#: general.file_type of most of the weights.
_FILE_TYPES = {"F16": "MOSTLY_F16", "Q8_0": "MOSTLY_Q8_0", "Q1_0": "MOSTLY_Q1_0", "TQ2_0": "MOSTLY_TQ2_0"}


@dataclass(frozen=True)
class _Tensor:
    """A tensor of the file: llama.cpp's name, shape and type, and what makes its bytes or floats."""

    name: str
    shape: tuple[int, ...]
    kind: str
    make: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        rows, columns = int(np.prod(self.shape[:-1])), self.shape[-1]
        if self.kind in _ITEM:
            return rows * columns * _ITEM[self.kind]
        return rows * columns // stored.COLUMNS[self.kind] * stored.BYTES[self.kind]


@dataclass
class _Plan:
    tensors: list[_Tensor] = field(default_factory=list)
    adapter: list[_Tensor] = field(default_factory=list)
    #: Kind and weights of each packed layer, and why it is not exact.
    layers: dict[str, tuple[str, int]] = field(default_factory=dict)
    unfit: dict[str, str] = field(default_factory=dict)
    rounding: dict[str, float] = field(default_factory=dict)
    #: What was not in 8 bits, and is in the file.
    to_q8_0: list[str] = field(default_factory=list)

    def bits_per_weight(self) -> float:
        """Of the packed layers, as they are in the files."""
        names = {tensor_name(f"{name}.weight") for name in self.layers}
        parts = (*self.tensors, *self.adapter)
        nbytes = sum(t.nbytes for t in parts if t.name.removesuffix(".lora_a").removesuffix(".lora_b") in names)
        return 8 * nbytes / max(1, sum(count for _, count in self.layers.values()))


def write(
    packed: Packed, out: Path, request: ExportRequest, overwrite: bool, progress: Progress, note: Callable[[str], None]
) -> Path:
    """Writes DIR/NAME-TYPE-….gguf, where there are shifts an adapter beside it, a Modelfile and a README.

    Raises ExportError, with layer, reason and K, for what no type holds exactly (unless request.approximate makes it dense),
    or for an architecture or tokenizer that llama.cpp does not run.
    """
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise OptionError(f"GGUF files are written with the package gguf: {install('gguf')}") from error
    arch = architecture(packed.config)
    tokenizer = load_tokenizer(str(packed.folder))
    words = vocabulary(tokenizer, packed.config.vocab_size)
    plan = _planned(packed, request, progress)
    if plan.unfit and not request.approximate:
        raise ExportError(_refusal(plan, len(packed.names)))
    _say(packed, plan, note)
    bits, parameters = plan.bits_per_weight(), _parameters(packed)
    kinds = tuple(kind for kind, _ in Counter(kind for kind, _ in plan.layers.values()).most_common())
    whole = 8 * sum(t.nbytes for t in (*plan.tensors, *plan.adapter)) / parameters
    stem = f"{packed.folder.resolve().name}-{kinds[0]}-{bits:.3f}bpw"
    files = Written(
        f"{stem}.gguf", f"{stem}-shifts-lora.gguf" if plan.adapter else None, kinds, bits, whole, arch,
        packed.config.max_position_embeddings, bool(words.chat_template), turns(tokenizer, words.add_bos),
        _stops(packed, words),
    )  # fmt: skip
    if files.chats and files.turns is None:
        note(
            "Ollama runs no Jinja, and the chat template is more than texts around messages: the Modelfile has no TEMPLATE"
        )
    need = sum(t.nbytes for t in (*plan.tensors, *plan.adapter)) + (1 << 20)
    with packed_format.staged(out, need, overwrite) as staging:
        _write_model(staging / files.model, packed, plan, files, words, progress)
        if files.adapter is not None:
            _write_adapter(staging / files.adapter, arch, plan)
        (staging / "Modelfile").write_text(modelfile(files))
        (staging / "README.md").write_text(readme(files, packed.description.settings, plan.unfit))
    return out


def _stops(packed: Packed, words: Vocabulary) -> tuple[str, ...]:
    """What ends an answer: the tokenizer's eos, and those that generation_config.json or config.json names."""
    named = packed.generation.get("eos_token_id", packed.values.get("eos_token_id"))
    ids = [words.special.get("eos"), *(named if isinstance(named, list) else [named])]
    return tuple(dict.fromkeys(words.tokens[i] for i in ids if isinstance(i, int) and 0 <= i < len(words.tokens)))


def _planned(packed: Packed, request: ExportRequest, progress: Progress) -> _Plan:
    """Looks at each layer once; what stands in it is read again when it is written."""
    plan, folds = _Plan(), folded(packed)
    for done, name in enumerate(packed.names):
        progress("looking at layers", done + 1, len(packed.names), name)
        _plan_layer(plan, packed, name, request, folds)
    for name, spec in packed.description.int8.items():
        if spec.bias:
            raise ExportError(f"{name} has a bias, which llama.cpp's has not; --format dense keeps it")
        if spec.tied_to is None:
            shape = (spec.rows, spec.columns)
            kind = _plan_matrix(
                plan, f"{name}.weight", shape, torch.float32, request, partial(_int8_rows, packed, name)
            )
            scale = packed.int8(name)[1].float()
            if kind == "Q8_0" and not torch.equal(scale.half().float(), scale):
                plan.rounding[name] = 2.0**-11
    for name in packed.rest:
        empty = packed.tensors.empty(name)
        own = name.rpartition(".")[0] in ("model.embed_tokens", "lm_head")
        if own and empty.ndim == 2:
            make = partial(_rest_rows, packed, name)
            if _plan_matrix(plan, name, tuple(empty.shape), empty.dtype, request, make) == "Q8_0":
                plan.to_q8_0.append(name.removesuffix(".weight"))
        else:
            _plan_rest(plan, packed, name, empty, folds)
    if (factors := rope_factors(packed.config)) is not None:
        plan.tensors.append(_Tensor("rope_freqs.weight", tuple(factors.shape), "F32", factors.numpy))
    return plan


def _layer(packed: Packed, name: str, folds: Folded) -> PackedLinear:
    """The layer with vectors that were folded gone from its inputs, or come to its rows."""
    layer = packed.layer(name)
    if name in folds.layers:
        weight = replace(layer.weights[0], in_scale=None)
        layer = PackedLinear(weight, layer.bias, act_bits=layer.act_bits, norm_out=layer.norm_out)
    return stored.scaled_rows(layer, folds.rows[name]) if name in folds.rows else layer


def _plan_layer(plan: _Plan, packed: Packed, name: str, request: ExportRequest, folds: Folded) -> None:
    layer = _layer(packed, name, folds)
    if (never := no_matrix(layer)) is not None:
        raise ExportError(
            f"{name} (K = {layer.in_features}) is more than a matrix: {never}. No GGUF holds it: keep it packed"
        )
    shape = (layer.out_features, layer.in_features)
    weight = f"{name}.weight"
    made: stored.Blocks | str = "it is a product of matrices"
    if len(layer.weights) == 1:
        kind = stored.kind_of(layer.weights[0], request.type)
        made = stored.blocks(layer.weights[0], kind)
    if isinstance(made, str):
        plan.unfit[name] = made
        kind = "Q8_0" if request.approximate_type == "q8_0" and shape[1] % stored.Q8_0 == 0 else "F16"
        make = partial(_dense_rows, packed, name, folds, kind)
    else:
        if made.rounding:
            plan.rounding[name] = made.rounding
        make = partial(_block_rows, packed, name, folds, kind)
        _plan_adapter(plan, packed, name, folds)
    plan.layers[name] = (kind, shape[0] * shape[1])
    plan.tensors.append(_Tensor(tensor_name(weight), shape, kind, _in_pairs(packed, weight, make)))
    if layer.bias is not None:
        bias = f"{name}.bias"
        make = partial(_bias, packed, name, folds)
        plan.tensors.append(_Tensor(tensor_name(bias), (shape[0],), "F32", _in_pairs(packed, bias, make)))


def _plan_adapter(plan: _Plan, packed: Packed, name: str, folds: Folded) -> None:
    def part(which: int) -> np.ndarray:
        made = stored.adapter(_layer(packed, name, folds).weights[0], folds.rows.get(name))
        assert made is not None
        return made[which].contiguous().numpy()

    spec = packed.description.layers[name].weights[0]
    rank = spec.groups * spec.shift + spec.in_shift
    if rank:
        weight = f"{name}.weight"
        full = tensor_name(weight)
        plan.adapter.append(_Tensor(f"{full}.lora_a", (rank, spec.in_features), "F32", partial(part, 0)))
        rows = _in_pairs(packed, weight, partial(part, 1))
        plan.adapter.append(_Tensor(f"{full}.lora_b", (spec.out_features, rank), "F32", rows))


def _plan_matrix(
    plan: _Plan, name: str, shape: tuple[int, ...], dtype: torch.dtype, request: ExportRequest,
    make: Callable[[str], np.ndarray],
) -> str:  # fmt: skip
    """An embedding or a head, Q8_0 or as it is; returns its type."""
    kind = "Q8_0" if request.head == "q8_0" and shape[1] % stored.Q8_0 == 0 else _FLOATS[dtype]
    plan.tensors.append(_Tensor(tensor_name(name), shape, kind, partial(make, kind)))
    return kind


def _plan_rest(plan: _Plan, packed: Packed, name: str, empty: Tensor, folds: Folded) -> None:
    """A norm or bias in float32, a matrix that was kept as it is."""
    kind = "F32" if empty.ndim == 1 else _FLOATS[empty.dtype]

    def make() -> np.ndarray:
        tensor = packed.tensors[name]
        if name in folds.norms:
            tensor = tensor.float() * folds.norms[name]
        return _floats(tensor, kind)

    plan.tensors.append(_Tensor(tensor_name(name), tuple(empty.shape), kind, _in_pairs(packed, name, make)))


def _in_pairs(packed: Packed, name: str, make: Callable[[], np.ndarray]) -> Callable[[], np.ndarray]:
    heads = turned(packed.config, name)
    return make if heads is None else lambda: np.ascontiguousarray(rotary_pairs(make(), heads))


def _block_rows(packed: Packed, name: str, folds: Folded, kind: str) -> np.ndarray:
    made = stored.blocks(_layer(packed, name, folds).weights[0], kind)
    assert isinstance(made, stored.Blocks)
    return made.rows


def _dense_rows(packed: Packed, name: str, folds: Folded, kind: str) -> np.ndarray:
    w = _layer(packed, name, folds).to_dense()
    if float(w.abs().max()) > torch.finfo(torch.float16).max:
        raise ExportError(f"{name} has a weight of {float(w.abs().max()):.3g}, which float16 cannot hold")
    return _rounded(w, kind)


def _bias(packed: Packed, name: str, folds: Folded) -> np.ndarray:
    bias = _layer(packed, name, folds).bias
    assert bias is not None
    return _floats(bias, "F32")


def _int8_rows(packed: Packed, name: str, kind: str) -> np.ndarray:
    return stored.q8_0(*packed.int8(name)) if kind == "Q8_0" else _floats(packed.int8_dense(name), kind)


def _rest_rows(packed: Packed, name: str, kind: str) -> np.ndarray:
    return _rounded(packed.tensors[name], kind)


def _rounded(values: Tensor, kind: str) -> np.ndarray:
    if kind != "Q8_0":
        return _floats(values, kind)
    import gguf

    rows: np.ndarray = gguf.quantize(values.float().contiguous().numpy(), gguf.GGMLQuantizationType.Q8_0)
    return rows


def _floats(values: Tensor, kind: str) -> np.ndarray:
    """Floats of F32 or F16; of BF16, which numpy has not, the bytes of each row."""
    dtype = {name: dtype for dtype, name in _FLOATS.items()}[kind]
    cast = values.detach().to(dtype).contiguous()
    return cast.view(torch.uint8).numpy() if kind == "BF16" else cast.numpy()


def _refusal(plan: _Plan, count: int) -> str:
    name, reason = next(iter(plan.unfit.items()))
    more = f" ({len(plan.unfit)} of {count} layers do not fit)" if len(plan.unfit) > 1 else ""
    return (
        f"{name} cannot be written exactly: {reason}{more}. Exact is --format dense; a GGUF file with --approximate, where "
        "such layers are dense: F16, or Q8_0 with --approximate-type q8_0"
    )


def _say(packed: Packed, plan: _Plan, note: Callable[[str], None]) -> None:
    if plan.unfit:
        name, reason = next(iter(plan.unfit.items()))
        note(
            f"{len(plan.unfit)} of {len(packed.names)} layers are written dense ({plan.layers[name][0]}); {name}: {reason}"
        )
    if plan.rounding:
        name = max(plan.rounding, key=lambda name: plan.rounding[name])
        note(f"float16 rounds scales of {len(plan.rounding)} layers, by up to {plan.rounding[name]:.1e} ({name})")
    if plan.to_q8_0:
        note(
            f"{' and '.join(plan.to_q8_0)} are rounded to 8 bits (Q8_0); --head keep leaves them as they are, and is exact"
        )
    if any(spec.act_bits for spec in packed.description.layers.values()):
        note("the packed layers have one scale of 8-bit activations a token; llama.cpp has one for 32 or 256 numbers")
    window = getattr(packed.config, "sliding_window", None)
    if window is not None and window < packed.config.max_position_embeddings:
        note(f"the model's window of {window} tokens is not written: longer texts are seen whole")


def _parameters(packed: Packed) -> int:
    total = sum(parameter.numel() for parameter in packed.skeleton.parameters())
    return int(total)


def _write_model(
    path: Path, packed: Packed, plan: _Plan, files: Written, words: Vocabulary, progress: Progress
) -> None:
    import gguf

    writer = gguf.GGUFWriter(path, files.architecture)
    writer.add_name(packed.folder.resolve().name)
    writer.add_file_type(gguf.LlamaFileType[_FILE_TYPES[files.kinds[0]]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_description(
        f"made by signbit ({packed.description.settings.get('method', 'unknown')}), {files.bits:.3f} bits a weight"
    )
    if files.adapter is not None:
        writer.add_string("signbit.adapter", files.adapter)
    write_metadata(writer, packed.config)
    words.write(writer)
    _write_tensors(writer, plan.tensors, progress)


def _write_adapter(path: Path, arch: str, plan: _Plan) -> None:
    import gguf

    writer = gguf.GGUFWriter(path, arch)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 0.0)  # B·A itself, whatever its rank
    _write_tensors(writer, plan.adapter, lambda *_: None)


def _write_tensors(writer: Any, tensors: list[_Tensor], progress: Progress) -> None:
    """One tensor after another; the header has said where each will lie."""
    import gguf

    for t in tensors:
        kind = gguf.GGMLQuantizationType[t.kind]
        shape = t.shape if t.kind in ("F32", "F16") else gguf.quant_shape_to_byte_shape(t.shape, kind)
        dtype = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16)}.get(t.kind, np.dtype(np.uint8))
        writer.add_tensor_info(t.name, shape, dtype, t.nbytes, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for done, t in enumerate(tensors):
        writer.write_tensor_data(t.make())
        progress("writing", done + 1, len(tensors), t.name)
    writer.close()
