"""GGUF files of the LLaMA, Qwen2 and Qwen3 families whose matrices are Q1_0 or TQ2_0."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaConfig, Qwen2Config, Qwen3Config

from signbit.errors import FormatError, OptionError
from signbit.extras import install
from signbit.interop.checkpoint import Checkpoint, Layer
from signbit.interop.form import Rest, made_config, require
from signbit.linear import PackedLinear
from signbit.weight import BinaryWeight

MAGIC = b"GGUF"
_Q1_BLOCK, _TQ2_BLOCK = 128, 256
_CONFIGS = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}
#: Of rope.scaling: what is read or does nothing, and what llama.cpp takes where another key is missing.
_SCALING_READ = ("type", "factor", "original_context_length", "finetuned")
_SCALING = {
    "attn_factor": (1.0,), "yarn_attn_factor": (1.0,), "yarn_log_multiplier": (0.0,), "yarn_beta_fast": (32.0,),
    "yarn_beta_slow": (1.0,),
}  # fmt: skip
#: What stands outside of the blocks and in them: llama.cpp's names, and transformers'.
OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
INSIDE = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm", "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip


def q1_0(raw: Tensor) -> BinaryWeight:
    """W = d·S from blocks of 128 columns: fp16 d, then 16 bytes, weight j in bit j%8 of byte j/8, 1 → +d, 0 → −d.

    `raw` uint8 [N, K/128·18] → signs and a scale float16 [1, N, K/128], exact. Source: ggml's block_q1_0 (type 41).
    Raises FormatError for a scale that is no number.
    """
    blocks = raw.reshape(len(raw), -1, 2 + _Q1_BLOCK // 8)
    scale = _scales(blocks[:, :, :2])
    return BinaryWeight(blocks[:, :, 2:].reshape(1, len(raw), -1).clone(), scale[None], scale.shape[1] * _Q1_BLOCK)


def tq2_0(raw: Tensor) -> BinaryWeight:
    """W = d·T, T of −1, 0, 1, from blocks of 256 columns: 64 bytes, then fp16 d; 0, 1, 2 stand for −1, 0, 1.

    Bits 2l and 2l + 1 of byte 32·h + m are column 128·h + 32·l + m. `raw` uint8 [N, K/256·66] → two planes with the scale
    d/2 each, or one with d where no weight is 0; exact. Source: ggml's block_tq2_0 (type 35). Raises FormatError for a code
    of 3 or a scale that is no number.
    """
    blocks = raw.reshape(len(raw), -1, _TQ2_BLOCK // 4 + 2)
    scale = _scales(blocks[:, :, -2:])
    halves = blocks[:, :, :-2].reshape(len(raw), -1, 2, 1, 32)
    codes = (halves >> torch.tensor([0, 2, 4, 6], dtype=torch.uint8)[:, None] & 3).reshape(len(raw), -1)
    require(not bool((codes == 3).any()), "a TQ2_0 code is 3; 0, 1 and 2 (−1, 0, +1) are allowed. The file is damaged")
    if not bool((codes == 1).any()):
        return BinaryWeight.from_signs(codes == 2, scale[None])
    half = scale / 2
    if not torch.equal(half * 2, scale):  # a subnormal d
        half = scale.float() / 2
    return BinaryWeight.from_signs(torch.stack([codes >= 1, codes == 2]), torch.stack([half, half]))


def _scales(raw: Tensor) -> Tensor:
    """float16 [N, G] of its bytes uint8 [N, G, 2]."""
    scale = raw.contiguous().view(torch.float16)[:, :, 0]
    require(bool(scale.isfinite().all()), "a block's scale is no finite number; the file is damaged")
    return scale.clone()


_PACKED: dict[str, Callable[[Tensor], BinaryWeight]] = {"Q1_0": q1_0, "TQ2_0": tq2_0}


def rotary_halves(rows: Tensor, heads: int) -> Tensor:
    """llama.cpp keeps the two numbers that a rotary position turns next to each other; transformers, half a head apart.

    `rows` [N, …] of q or k, N = heads · head size, in the order of a llama GGUF → in transformers' order.
    """
    return rows.reshape(heads, -1, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def read_whole(path: Path) -> tuple[list[Any], dict[str, Any]]:
    """The tensors, not yet read, and the metadata of a GGUF file; raises FormatError if it is damaged or a part of one."""
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise OptionError(f"GGUF files are read with the package gguf: {install('gguf')}") from error
    try:
        reader = GGUFReader(str(path))
        metadata = {name: field.contents() for name, field in reader.fields.items()}
    except (ValueError, KeyError, IndexError, TypeError, OSError, OverflowError, AttributeError) as error:
        raise FormatError(f"{path} is damaged or cut short ({error}); copy or download it again") from error
    parts, number = metadata.get("split.count", 1), metadata.get("split.no", 0) + 1
    require(
        parts <= 1,
        f"{path} is part {number} of {parts} of one GGUF file. Merge them first, with llama.cpp's llama-gguf-split --merge "
        f"{path.name.replace(f'-{number:05}-of-', '-00001-of-')} WHOLE.gguf, and give WHOLE.gguf",
    )
    return reader.tensors, metadata


class _File:
    """A GGUF file: its metadata, and its tensors under transformers' names."""

    def __init__(self, path: Path) -> None:
        self.path = path
        tensors, self.metadata = read_whole(path)
        self.kind = self.metadata.get("general.architecture")
        require(
            self.kind in _CONFIGS,
            f"{path} is of the architecture {self.kind!r}; {', '.join(_CONFIGS)} are read",
        )
        self.tensors: dict[str, Any] = {}
        for tensor in tensors:
            self.tensors[self._name(tensor.name)] = tensor

    def _name(self, name: str) -> str:
        match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
        known = (OUTSIDE if match is None or match[1] is None else INSIDE).get(match[2]) if match else None
        if match is None or known is None:
            raise FormatError(
                f"{self.path}: the tensor {name} is not one of a {self.kind} model that transformers has; nothing was imported"
            )
        return f"model.layers.{match[1]}.{known}.{match[3]}" if match[1] else f"{known}.{match[3]}"

    def value(self, key: str, default: Any = None) -> Any:
        """Of the metadata `ARCHITECTURE.key`; raises FormatError if it is missing and has no default."""
        value = self.metadata.get(f"{self.kind}.{key}", default)
        require(
            value is not None, f"{self.path}: {self.kind}.{key} is missing in the metadata; copy or download it again"
        )
        return value

    def size(self, key: str, default: int | None = None) -> int:
        """Of the metadata a whole number from 1 on; raises FormatError for another, or if it is missing without a default."""
        value = self.value(key, default)
        require(
            type(value) is int and value >= 1,
            f"{self.path}: {self.kind}.{key} is {value!r}; a whole number from 1 on is expected",
        )
        return int(value)

    def number(self, key: str, default: float | None = None) -> float:
        """Of the metadata a number; raises FormatError for another, or if it is missing without a default."""
        value = self.value(key, default)
        require(isinstance(value, (int, float)), f"{self.path}: {self.kind}.{key} is {value!r}; a number is expected")
        return float(value)

    def config(self) -> Any:
        """transformers' configuration: sizes, rotary positions and special tokens, out of the metadata."""
        embedding = self.tensors.get("model.embed_tokens.weight")
        if embedding is None:
            raise FormatError(f"{self.path}: the tensor token_embd.weight is missing; copy or download it again")
        heads, hidden = self.size("attention.head_count"), self.size("embedding_length")
        head = self.size("attention.key_length", hidden // heads)
        turned = self.size("rope.dimension_count", head)
        require(
            turned == head, f"{self.path}: rotary positions turn {turned} of {head} numbers of a head; all are expected"
        )
        tokens = {
            f"{name}_token_id": int(self.metadata[key])
            for name, key in (("bos", _token("bos")), ("eos", _token("eos")), ("pad", _token("padding")))
            if key in self.metadata
        }
        biases = {}
        if self.kind != "qwen2":  # whose q, k and v always have one
            biases["attention_bias"] = "model.layers.0.self_attn.q_proj.bias" in self.tensors
        if self.kind == "llama":
            biases["mlp_bias"] = "model.layers.0.mlp.gate_proj.bias" in self.tensors
        blocks = self.size("block_count")
        require(
            blocks <= len(self.tensors), f"{self.path}: {self.kind}.block_count is {blocks}, more than it has tensors"
        )
        values = {
            "hidden_size": hidden,
            "intermediate_size": self.size("feed_forward_length"),
            "num_hidden_layers": blocks,
            "num_attention_heads": heads,
            "num_key_value_heads": self.size("attention.head_count_kv", heads),
            "head_dim": head,
            "max_position_embeddings": self.size("context_length"),
            "rms_norm_eps": self.number("attention.layer_norm_rms_epsilon"),
            "vocab_size": int(embedding.shape[1]),
            "tie_word_embeddings": "lm_head.weight" not in self.tensors,
            "rope_parameters": self._rope(),
        }
        return made_config(_CONFIGS[str(self.kind)], values | biases | tokens, str(self.path))

    def _rope(self) -> dict[str, Any]:
        """transformers' rotary positions, with llama.cpp's defaults.

        Without a type the scaling is linear, without a factor (also under its old name) or with 0 there is none, and YaRN's
        original context is the model's own. Source: llama.cpp, load_hparams in src/llama-model.cpp.
        """
        rope: dict[str, Any] = {"rope_type": "default", "rope_theta": self.number("rope.freq_base", 10000.0)}
        kind = self.value("rope.scaling.type", "linear")
        require(kind in ("none", "linear", "yarn"), f"{self.path}: rope.scaling.type is {kind!r}; none, linear, yarn")
        self._check_scaling(str(kind))
        factor = self.number("rope.scaling.factor", self.number("rope.scale_linear", 0.0)) or 1.0
        if kind == "none" or factor == 1:
            return rope
        rope |= {"rope_type": kind, "factor": factor}
        if kind == "yarn":
            original = self.size("rope.scaling.original_context_length", self.size("context_length"))
            rope["original_max_position_embeddings"] = original
        return rope

    def _check_scaling(self, kind: str) -> None:
        """Raises FormatError for rotary scaling's other settings, unless they say what llama.cpp does without them."""
        defaults = {**_SCALING, "yarn_ext_factor": (-1.0, float(kind == "yarn"))}
        prefix = f"{self.kind}.rope.scaling."
        for key in sorted(key for key in self.metadata if key.startswith(prefix)):
            name, value = key.removeprefix(prefix), self.metadata[key]
            require(
                name in _SCALING_READ or value in defaults.get(name, ()),
                f"{self.path}: {key} is {value}, which is not read; nothing was imported, because what it does would be lost",
            )

    def stored(self, name: str) -> tuple[str, Tensor]:
        """The type of a tensor, and its rows in transformers' order: bytes of a quantized type, floats otherwise."""
        tensor = self.tensors[name]
        rows = torch.from_numpy(np.array(tensor.data))
        for projection, key in ((".self_attn.q_proj.", "head_count"), (".self_attn.k_proj.", "head_count_kv")):
            if self.kind == "llama" and projection in name:
                rows = rotary_halves(rows, self.size(f"attention.{key}", self.size("attention.head_count")))
        return tensor.tensor_type.name, rows

    def dense(self, name: str) -> Tensor:
        """A tensor as floats: float16 where that holds all of it, else float32."""
        from gguf import dequantize

        kind, rows = self.stored(name)
        if kind in _PACKED:
            values = _PACKED[kind](rows).to_dense()
        elif rows.is_floating_point():
            values = rows.float()
        else:
            try:
                values = torch.from_numpy(dequantize(rows.numpy(), self.tensors[name].tensor_type))
            except NotImplementedError as error:
                raise FormatError(
                    f"{self.path}: {name} is of the type {kind}, which the package gguf cannot read"
                ) from error
        half = values.half()
        return half if torch.equal(half.float(), values) else values


def _token(name: str) -> str:
    return f"tokenizer.ggml.{name}_token_id"


def open_gguf(path: Path) -> Checkpoint:
    """The checkpoint in a GGUF file; raises FormatError for another architecture, or if no matrix is Q1_0 or TQ2_0."""
    file = _File(path)
    require(
        "signbit.adapter" not in file.metadata,
        f"{path} is half of a model: its shifts are in {file.metadata.get('signbit.adapter')}, which is not read. Go back to "
        "the packed directory that it was made of",
    )
    packed = [
        name
        for name, tensor in file.tensors.items()
        if (tensor.tensor_type.name in _PACKED and name.endswith("_proj.weight")) or _is_packed_head(name, tensor)
    ]
    require(
        any(name.startswith("model.layers.") for name in packed),
        f"{path} holds no Q1_0 or TQ2_0 matrix, so it is no 1-bit model (its types: "
        f"{', '.join(sorted({tensor.tensor_type.name for tensor in file.tensors.values()}))})",
    )
    modules = [name.removesuffix(".weight") for name in packed]
    own = {f"{module}.{part}" for module in modules for part in ("weight", "bias")}
    kinds = sorted({file.tensors[name].tensor_type.name for name in packed})
    dense = sorted(
        f"{name} ({tensor.tensor_type.name})"
        for name, tensor in file.tensors.items()
        if name.endswith("_proj.weight") and name not in own
    )
    return Checkpoint(
        form=f"GGUF {' and '.join(kinds)}",
        config=file.config(),
        layers={module: partial(_read, file, module) for module in modules},
        rest=Rest((name for name in file.tensors if name not in own), file.dense),
        tokenizer={"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name},
        may_be_dense=lambda name: f"{name}.weight" in file.tensors,
        notes=tuple(f"{name} becomes a dense matrix" for name in dense),
    )


def _is_packed_head(name: str, tensor: Any) -> bool:
    return name == "lm_head.weight" and tensor.tensor_type.name in _PACKED


def _read(file: _File, module: str) -> Layer:
    kind, rows = file.stored(f"{module}.weight")
    bias = file.dense(f"{module}.bias") if f"{module}.bias" in file.tensors else None
    try:
        return Layer(PackedLinear(_PACKED[kind](rows), bias))
    except FormatError as error:
        raise FormatError(f"{file.path}: {module}: {error}") from error
