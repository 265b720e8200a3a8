"""What config.json says about the packed tensors: its `quantization_config`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from signbit.errors import FormatError
from signbit.linear import LayerSpec

QUANT_METHOD = "signbit"
#: Raised by one when a reader of the old version could no longer read what is written.
FORMAT_VERSION = 1


@dataclass(frozen=True)
class Int8Spec:
    """One int8 layer: codes int8 [rows, columns] and a scale [rows]; `tied_to` names the layer whose tensors it uses."""

    kind: Literal["embedding", "head"]
    rows: int
    columns: int
    bias: bool = False
    multiplier: float = 1.0
    tied_to: str | None = None


@dataclass(frozen=True)
class Description:
    """The packed layers of a directory, by dotted module name, and how they were made."""

    layers: dict[str, LayerSpec]
    int8: dict[str, Int8Spec] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    """Method, its options and the rest of the command, for the reader; loading does not use it."""
    tensors_sha256: str | None = None
    """SHA-256 over all tensors of the directory (docs/format.md); None before it was written."""

    def to_dict(self) -> dict[str, Any]:
        """The `quantization_config` of config.json; layers of one spec share an entry."""
        shared: dict[LayerSpec, list[str]] = {}
        for name, spec in self.layers.items():
            shared.setdefault(spec, []).append(name)
        return {
            "quant_method": QUANT_METHOD,
            "format_version": FORMAT_VERSION,
            "settings": self.settings,
            "layers": [{**spec.to_dict(), "modules": names} for spec, names in shared.items()],
            "int8": {name: asdict(spec) for name, spec in self.int8.items()},
            "tensors_sha256": self.tensors_sha256,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Description:
        """The inverse of `to_dict`; raises FormatError for a newer version, an unknown or a missing key."""
        values = dict(values)
        if values.pop("quant_method", None) != QUANT_METHOD:
            raise FormatError("this quantization_config is not signbit's (quant_method is another)")
        version = values.pop("format_version", None)
        if version != FORMAT_VERSION:
            newer = isinstance(version, int) and version > FORMAT_VERSION
            advice = "upgrade signbit (pip install -U signbit)" if newer else "quantize the source model again"
            raise FormatError(
                f"format_version is {version!r} in config.json; this signbit reads version {FORMAT_VERSION}: {advice}"
            )
        try:
            layers: dict[str, LayerSpec] = {}
            for entry in values.pop("layers"):
                entry = dict(entry)
                names = entry.pop("modules")
                spec = LayerSpec.from_dict(entry)
                layers.update(dict.fromkeys(names, spec))
            int8 = {name: Int8Spec(**spec) for name, spec in values.pop("int8").items()}
            return cls(layers, int8, **values)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise FormatError(
                f"quantization_config in config.json is damaged ({type(error).__name__}: {error}); "
                "copy or download the directory again"
            ) from error
