"""Measuring models: perplexity by named protocols, true size; and what multiplies on this machine."""

from signbit.evaluate.doctor import Machine, Multiplied, examine, multiplied
from signbit.evaluate.perplexity import Perplexity, TextOptions, perplexity
from signbit.evaluate.size import LayerSize, ModelSize, measure_size

__all__ = [
    "LayerSize",
    "Machine",
    "ModelSize",
    "Multiplied",
    "Perplexity",
    "TextOptions",
    "examine",
    "measure_size",
    "multiplied",
    "perplexity",
]
