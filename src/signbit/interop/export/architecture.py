"""What llama.cpp is told of a model: its architecture's name, sizes, rotary positions, and how tensors are named."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from signbit.errors import ExportError
from signbit.interop.gguf import INSIDE, OUTSIDE

#: transformers' model types and llama.cpp's architectures.
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
#: YaRN's settings that are not written, and transformers' defaults, which are llama.cpp's.
_YARN = {
    "attention_factor": None,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": None,
    "mscale_all_dim": None,
    "truncate": True,
}
_GGUF = {theirs: ours for ours, theirs in (OUTSIDE | INSIDE).items()}


def architecture(config: Any) -> str:
    """llama.cpp's name; raises ExportError for a model that it, or this export, does not compute as transformers does."""
    name = ARCHITECTURES.get(config.model_type)
    if name is None:
        raise ExportError(
            f"the model is {config.model_type}; {', '.join(ARCHITECTURES)} are written as GGUF. --format dense writes any "
            "model, which llama.cpp's own convert_hf_to_gguf.py may know"
        )
    rope = config.rope_parameters
    kind, part = rope.get("rope_type", "default"), rope.get("partial_rotary_factor", 1.0)
    heads = config.num_attention_heads * head_dim(config)
    for holds, what in (
        (config.hidden_act == "silu", f"the activation {config.hidden_act}, not silu"),
        (kind in ("default", "linear", "yarn", "llama3"), f"rotary positions of the type {kind}; default, linear, yarn, "
         "llama3 are written"),
        (name != "qwen2" or heads == config.hidden_size, f"attention heads of {heads} numbers in all beside hidden_size "
         f"{config.hidden_size}"),
        (part == 1.0, f"rotary positions that turn {part} of a head"),
        (kind != "yarn" or _is_plain_yarn(config), f"rotary positions of the type yarn with {_of_its_own(rope)}"),
    ):  # fmt: skip
        if not holds:
            raise ExportError(f"the model has {what}, which llama.cpp's {name} has not; --format dense keeps it")
    return name


def _is_plain_yarn(config: Any) -> bool:
    """Whether YaRN's frequencies and attention factor are those without the settings that are not written."""
    plain = copy.deepcopy(config)
    plain.rope_parameters = {key: value for key, value in config.rope_parameters.items() if key not in _YARN}
    (own, own_factor), (want, want_factor) = (ROPE_INIT_FUNCTIONS["yarn"](each) for each in (config, plain))
    return torch.equal(own, want) and math.isclose(own_factor, want_factor, rel_tol=1e-6)


def _of_its_own(rope: dict[str, Any]) -> str:
    return ", ".join(f"{key} {rope[key]}" for key, default in _YARN.items() if rope.get(key) not in (None, default))


def tensor_name(name: str) -> str:
    """llama.cpp's name of one of transformers' tensors; raises ExportError for one that it does not have."""
    stem, _, last = name.rpartition(".")
    if stem.startswith("model.layers."):
        block, _, inner = stem.removeprefix("model.layers.").partition(".")
        if inner in _GGUF:
            return f"blk.{block}.{_GGUF[inner]}.{last}"
    elif stem in _GGUF and last == "weight":
        return f"{_GGUF[stem]}.{last}"
    raise ExportError(f"llama.cpp has no tensor for {name}; --format dense keeps it")


def head_dim(config: Any) -> int:
    """Numbers of an attention head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def turned(config: Any, name: str) -> int | None:
    """The heads of q or k, where llama.cpp keeps their rows in pairs; None for other tensors and architectures."""
    if ARCHITECTURES[config.model_type] != "llama":
        return None
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    return next(
        (n for part, n in heads.items() if name.endswith((f".self_attn.{part}.weight", f".self_attn.{part}.bias"))),
        None,
    )


def rotary_pairs(rows: Any, heads: int) -> Any:
    """The inverse of `interop.gguf.rotary_halves`, for arrays and tensors."""
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def write_metadata(writer: Any, config: Any) -> None:
    """Sizes and rotary positions into a gguf.GGUFWriter."""
    import gguf

    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim(config))
    writer.add_value_length(head_dim(config))
    writer.add_rope_dimension_count(head_dim(config))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    rope = config.rope_parameters
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    if (kind := rope.get("rope_type", "default")) in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
        writer.add_rope_scaling_factor(float(rope["factor"]))
        if kind == "yarn":
            original = rope.get("original_max_position_embeddings") or config.max_position_embeddings
            writer.add_rope_scaling_orig_ctx_len(int(original))


def rope_factors(config: Any) -> Tensor | None:
    """By what llama3's rotary scaling divides each frequency, float32 [head/2]; None for other scalings.

    1 for wavelengths under original/high, `factor` for those over original/low, and between them such that the frequency
    goes linearly in original/wavelength. Source: Llama 3.1; transformers.modeling_rope_utils.
    """
    rope = config.rope_parameters
    if rope.get("rope_type") != "llama3":
        return None
    size = head_dim(config)
    wavelength = 2 * math.pi * rope["rope_theta"] ** (torch.arange(0, size, 2).double() / size)
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    share = ((rope["original_max_position_embeddings"] / wavelength - low) / (high - low)).clamp(0, 1)
    divided: Tensor = 1 / ((1 - share) / factor + share)
    return divided.float()
