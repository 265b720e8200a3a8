"""SignbitConfig: what a user passes as `quantization_config`, and what stands in config.json."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from signbit import ptq
from signbit.errors import OptionError
from signbit.format import Description
from signbit.format.description import QUANT_METHOD
from signbit.methods import METHODS
from signbit.methods.base import check_choice, make_options
from signbit.methods.rules import Rules, check_rules
from signbit.models import Selection


def _patterns(values: Iterable[str]) -> tuple[str, ...]:
    return (values,) if isinstance(values, str) else tuple(values)


class SignbitConfig(QuantizationConfigMixin):
    """How to quantize a model while it loads: `from_pretrained(MODEL, quantization_config=SignbitConfig(...))`.

    `method` names one of `signbit.methods.METHODS`, `options` are that method's (group=64 …). `head="int8"` stores
    the embedding and the output head in int8; "binary" makes the output head a binary layer, in training alone. `rules`
    maps patterns of layer names to options that differ there ({"mlp.down_proj": {"salient": 0.3}}; the last match wins).
    `keep` are patterns of names that stay as they are, `only` of those outside of which everything stays; blocks from
    `min_layer` up to (not including) `max_layer` are binarized, `invert` turns that selection round; `allow_partial`
    accepts a result in which under 90 % of the blocks' parameters are binarized.

    Raises OptionError for an unknown method or option, with the allowed ones.
    """

    def __init__(
        self,
        method: str = "absmean",
        head: str = "keep",
        keep: Iterable[str] = (),
        allow_partial: bool = False,
        rules: Rules | Iterable[tuple[str, Mapping[str, Any]]] = (),
        min_layer: int = 0,
        max_layer: int | None = None,
        only: Iterable[str] = (),
        invert: bool = False,
        **options: Any,
    ) -> None:
        check_choice("head", head, ("keep", "int8", "binary"))
        self.quant_method: Any = QUANT_METHOD
        self.method = method
        self.head = head
        selection = Selection(_patterns(keep), min_layer, max_layer, _patterns(only), invert)
        pairs = rules.items() if isinstance(rules, Mapping) else rules
        by_pattern = {pattern: dict(values) for pattern, values in pairs}
        self.plan = ptq.Plan(make_options(METHODS, method, options), selection, by_pattern, allow_partial)
        check_rules(self.plan.options, by_pattern)
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
        settings = {
            "method": self.method,
            "options": asdict(self.plan.options),
            "head": self.head,
            "keep": list(self.plan.selection.keep),
            "allow_partial": self.plan.allow_partial,
        }
        # What is at its default is left out, so that a plain run's settings stay short.
        selection = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self.plan.selection).items()}
        default = asdict(Selection())
        settings |= {k: v for k, v in selection.items() if k != "keep" and v != default[k] and v != []}
        if self.plan.rules:
            # A list, because their order counts and JSON writers sort keys.
            settings["rules"] = [[pattern, dict(values)] for pattern, values in self.plan.rules.items()]
        return settings

    def to_dict(self) -> dict[str, Any]:
        """What config.json keeps."""
        if self.description is not None:
            return self.description.to_dict()
        settings = self.settings()
        return {"quant_method": QUANT_METHOD, **settings.pop("options"), **settings}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SignbitConfig) and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]
