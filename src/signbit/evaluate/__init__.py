"""Measuring models: perplexity by named protocols, true size."""

from signbit.evaluate.perplexity import Perplexity, TextOptions, perplexity
from signbit.evaluate.size import LayerSize, ModelSize, measure_size

__all__ = ["LayerSize", "ModelSize", "Perplexity", "TextOptions", "measure_size", "perplexity"]
