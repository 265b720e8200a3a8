"""SignbitConfig: what a user passes as `quantization_config`, and what stands in config.json."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from signbit.errors import OptionError
from signbit.format import Description
from signbit.format.description import QUANT_METHOD
from signbit.methods import METHODS
from signbit.methods.base import MethodOptions, check_choice, make_options


class SignbitConfig(QuantizationConfigMixin):
    """How to quantize a model while it loads: `from_pretrained(MODEL, quantization_config=SignbitConfig(...))`.

    `method` names one of `signbit.methods.METHODS`, `options` are that method's (group=64 …). `head="int8"` stores
    the embedding and the output head in int8; `keep` are patterns of layer names that stay as they are;
    `allow_partial` accepts a result in which under 90 % of the blocks' parameters are binarized.

    Raises OptionError for an unknown method or option, with the allowed ones.
    """

    def __init__(
        self,
        method: str = "absmean",
        head: str = "keep",
        keep: Iterable[str] = (),
        allow_partial: bool = False,
        **options: Any,
    ) -> None:
        check_choice("head", head, ("keep", "int8"))
        self.quant_method: Any = QUANT_METHOD
        self.options: MethodOptions = make_options(METHODS, method, options)
        self.method = method
        self.head = head
        self.keep = (keep,) if isinstance(keep, str) else tuple(keep)
        self.allow_partial = allow_partial
        self.description: Description | None = None

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """From the `quantization_config` of a packed directory, or from the arguments of `SignbitConfig`."""
        if "format_version" not in config_dict:
            config = cls(**{key: value for key, value in config_dict.items() if key != "quant_method"})
        else:
            config = cls.__new__(cls)
            config.quant_method = QUANT_METHOD
            config.description = Description.from_dict(config_dict)
        if kwargs and not return_unused_kwargs:
            raise OptionError(f"{sorted(kwargs)[0]!r} is no key of a packed model's configuration")
        return (config, kwargs) if return_unused_kwargs else config

    def settings(self) -> dict[str, Any]:
        """The arguments in JSON values, for config.json and the model card."""
        return {
            "method": self.method,
            "options": asdict(self.options),
            "head": self.head,
            "keep": list(self.keep),
            "allow_partial": self.allow_partial,
        }

    def to_dict(self) -> dict[str, Any]:
        """What config.json keeps."""
        if self.description is not None:
            return self.description.to_dict()
        settings = self.settings()
        return {"quant_method": QUANT_METHOD, **settings.pop("options"), **settings}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SignbitConfig) and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]
