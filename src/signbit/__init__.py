"""signbit: 1-bit language models, made, packed, loaded with transformers and measured.

The public names are below; each is imported when it is first used. Importing signbit makes transformers load packed
directories: at once where transformers is imported already, otherwise as soon as it is.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from typing import TYPE_CHECKING, Any

from signbit.version import VERSION as __version__

if TYPE_CHECKING:
    from signbit.data.calibration import CalibrationOptions, draw_windows
    from signbit.errors import SignbitError
    from signbit.evaluate.perplexity import perplexity
    from signbit.hub.config import SignbitConfig
    from signbit.hub.load import load
    from signbit.hub.quantizer import quantize_
    from signbit.hub.save import save
    from signbit.linear import BinaryLinear, Int8Embedding, Int8Head, PackedLinear, set_activations
    from signbit.methods import METHODS
    from signbit.models.lora import load_adapter, lora_config
    from signbit.ops import explain
    from signbit.weight import BinaryWeight, Salient

__all__ = [
    "METHODS",
    "BinaryLinear",
    "BinaryWeight",
    "CalibrationOptions",
    "Int8Embedding",
    "Int8Head",
    "PackedLinear",
    "Salient",
    "SignbitConfig",
    "SignbitError",
    "__version__",
    "draw_windows",
    "explain",
    "load",
    "load_adapter",
    "lora_config",
    "perplexity",
    "quantize_",
    "save",
    "set_activations",
]

_HOME = {
    "METHODS": "signbit.methods",
    "BinaryLinear": "signbit.linear",
    "BinaryWeight": "signbit.weight",
    "CalibrationOptions": "signbit.data.calibration",
    "Int8Embedding": "signbit.linear",
    "Int8Head": "signbit.linear",
    "PackedLinear": "signbit.linear",
    "Salient": "signbit.weight",
    "SignbitConfig": "signbit.hub.config",
    "SignbitError": "signbit.errors",
    "draw_windows": "signbit.data.calibration",
    "explain": "signbit.ops",
    "load": "signbit.hub.load",
    "load_adapter": "signbit.models.lora",
    "lora_config": "signbit.models.lora",
    "perplexity": "signbit.evaluate.perplexity",
    "quantize_": "signbit.hub.quantizer",
    "save": "signbit.hub.save",
    "set_activations": "signbit.linear",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'signbit' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)


#: The module of transformers that every way of loading a model goes through; it imports the table of quantizers.
_LOADING = "transformers.modeling_utils"


class _RegisterAfterImport(MetaPathFinder, Loader):
    """Runs the registration right after transformers has imported what loads models."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != _LOADING:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return None
        self._loader = spec.loader
        spec.loader = self
        return spec

    def create_module(self, spec: ModuleSpec) -> Any:
        return self._loader.create_module(spec)

    def exec_module(self, module: Any) -> None:
        self._loader.exec_module(module)
        _register()


def _register() -> None:
    from signbit.hub.register import register

    register()


if _LOADING in sys.modules:
    _register()
else:
    sys.meta_path.insert(0, _RegisterAfterImport())
