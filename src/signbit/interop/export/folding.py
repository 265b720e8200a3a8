"""Vectors that multiply a layer's inputs, moved into what stands before it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from signbit.interop.export.source import Packed

_ATTENTION, _MLP = "self_attn", "mlp"
#: A norm, and the layers that read it alone.
_NORMS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}
#: A layer that is linear in the rows of another.
_LAYERS = {"mlp.down_proj": "mlp.up_proj", "self_attn.o_proj": "self_attn.v_proj"}


@dataclass
class Folded:
    """Where vectors went: `norms` and `rows` by what they multiply, `layers` those that have none any more."""

    norms: dict[str, Tensor] = field(default_factory=dict)
    rows: dict[str, Tensor] = field(default_factory=dict)
    layers: set[str] = field(default_factory=set)


def folded(packed: Packed) -> Folded:
    """Of a Llama-like model: in_scale into the norm before it where all of its readers have the same, down_proj's into the
    rows of up_proj, o_proj's into those of v_proj where heads that share a value share it."""
    made = Folded()
    for block in range(packed.config.num_hidden_layers):
        stem = f"model.layers.{block}"
        for norm, readers in _NORMS.items():
            vectors = [_vector(packed, f"{stem}.{reader}") for reader in readers]
            first = vectors[0]
            if first is not None and all(v is not None and torch.equal(v, first) for v in vectors):
                made.norms[f"{stem}.{norm}.weight"] = first
                made.layers |= {f"{stem}.{reader}" for reader in readers}
        for reader, producer in _LAYERS.items():
            vector = _vector(packed, f"{stem}.{reader}")
            if vector is not None and reader.startswith("self_attn"):
                vector = _shared(packed, vector)
            if vector is not None and f"{stem}.{producer}" in packed.description.layers:
                made.rows[f"{stem}.{producer}"] = vector
                made.layers.add(f"{stem}.{reader}")
    return made


def _vector(packed: Packed, name: str) -> Tensor | None:
    """The in_scale float32 [K] of a layer that has one and no shift, which it would not multiply."""
    spec = packed.description.layers.get(name)
    if spec is None or len(spec.weights) > 1:
        return None
    w = spec.weights[0]
    if w.in_scale_planes != 1 or w.shift or w.in_shift or w.salient_bits or spec.norm_in != "none":
        return None
    return packed.tensors[f"{name}.in_scale"][0].float()


def _shared(packed: Packed, vector: Tensor) -> Tensor | None:
    config = packed.config
    heads = vector.reshape(config.num_key_value_heads, config.num_attention_heads // config.num_key_value_heads, -1)
    return heads[:, 0].reshape(-1) if bool((heads == heads[:, :1]).all()) else None
