"""The shape of a decoder that is trained from scratch."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from transformers import LlamaConfig

from signbit.errors import OptionError


@dataclass(frozen=True)
class Shape:
    """A LLaMA (RMSNorm, rotary positions, SwiGLU, no biases), under transformers' names; its vocabulary is the tokenizer's."""

    hidden_size: int = 768
    """Width of the residual stream."""
    intermediate_size: int = 2048
    """Width inside the MLP."""
    num_hidden_layers: int = 12
    """Blocks."""
    num_attention_heads: int = 12
    """Heads of attention."""
    num_key_value_heads: int | None = None
    """Heads of keys and values; default: as many as of queries."""
    max_position_embeddings: int = 2048
    """Longest text that the model is made for."""
    rms_norm_eps: float = 1e-5
    """Epsilon of its norms."""
    tie_word_embeddings: bool = False
    """Whether the output head is the embedding."""
    initializer_range: float = 0.02
    """Standard deviation of the normal distribution that matrices and embedding are drawn from."""

    def __post_init__(self) -> None:
        for name in (
            "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
            "max_position_embeddings",
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value < 1:
                raise OptionError(f"--{name.replace('_', '-')} is {value}; at least 1 is needed")
        if not 0 <= self.rms_norm_eps < 1:
            raise OptionError(f"--rms-norm-eps is {self.rms_norm_eps}; a small number is needed, 0 or more")
        if not 0 < self.initializer_range <= 1:
            raise OptionError(
                f"--initializer-range is {self.initializer_range}; above 0, where all signs would be one, and at most 1"
            )
        if self.hidden_size % (2 * self.num_attention_heads):
            raise OptionError(
                f"--hidden-size is {self.hidden_size}, of which {self.num_attention_heads} heads have no even part each; "
                "give a multiple of twice --num-attention-heads"
            )
        if self.num_attention_heads % (self.num_key_value_heads or self.num_attention_heads):
            raise OptionError(
                f"--num-key-value-heads is {self.num_key_value_heads}, which does not divide {self.num_attention_heads} heads"
            )

    def config(self, vocabulary: int, **ids: int | None) -> Any:
        """transformers' configuration of this shape; `ids` are those of special tokens (bos_token_id …)."""
        return LlamaConfig(vocab_size=vocabulary, **asdict(self), **ids)
