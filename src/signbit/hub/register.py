"""Makes transformers know `quant_method: signbit`."""

from __future__ import annotations

from transformers.quantizers.auto import register_quantization_config, register_quantizer

from signbit.format.description import QUANT_METHOD
from signbit.hub.config import SignbitConfig
from signbit.hub.quantizer import SignbitHfQuantizer


def register() -> None:
    """Adds the config and the quantizer to the tables of transformers; `import signbit` calls it once."""
    register_quantization_config(QUANT_METHOD)(SignbitConfig)
    register_quantizer(QUANT_METHOD)(SignbitHfQuantizer)
