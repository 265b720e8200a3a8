"""Options of single layers: `--rule 'pattern: key=value, …'`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from signbit.errors import OptionError
from signbit.methods.base import MethodOptions, check_options

#: Pattern of layer names → the options that differ there; a later pattern goes before an earlier one.
Rules = Mapping[str, Mapping[str, Any]]
#: Options that hold for a whole model, because they say in which order its layers are measured.
_WHOLE = ("sequential",)


def parse_rule(text: str, options: type[MethodOptions]) -> tuple[str, dict[str, Any]]:
    """Pattern and values of 'mlp.down_proj: salient=0.3, group=64'; raises OptionError for text of another form."""
    pattern, colon, rest = text.partition(":")
    pairs = [pair.partition("=") for pair in rest.split(",")]
    if (
        not colon
        or not pattern.strip()
        or not all(key.strip() and sign and value.strip() for key, sign, value in pairs)
    ):
        raise OptionError(f"--rule {text!r} is not of the form 'pattern: key=value, key=value'")
    values = {key.strip().replace("-", "_"): value.strip() for key, _, value in pairs}
    check_options(options, values)
    defaults = {field.name: field.default for field in fields(options)}
    return pattern.strip(), {key: _typed(key, value, defaults[key]) for key, value in values.items()}


def _typed(key: str, value: str, default: Any) -> Any:
    """`value` in the type of the option's default."""
    if isinstance(default, bool):
        words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
        if value.lower() not in words:
            raise OptionError(f"{key} is {value!r} in a --rule; true or false is needed")
        return words[value.lower()]
    if isinstance(default, (int, float)):
        try:
            return type(default)(value)
        except ValueError:
            raise OptionError(f"{key} is {value!r} in a --rule; a number like {default} is needed") from None
    return value


def check_rules(options: MethodOptions, rules: Rules) -> None:
    """Raises OptionError for a rule whose options are unknown, unfit or hold for a whole model only."""
    for pattern, values in rules.items():
        try:
            check_options(type(options), values)
            if whole := [key for key in values if key in _WHOLE]:
                raise OptionError(f"{whole[0]} holds for the whole model; give it outside of rules")
            replace(options, **values)
        except (OptionError, TypeError) as error:
            raise OptionError(f"--rule '{pattern}': {error}") from error


def with_rules(options: MethodOptions, values: list[Mapping[str, Any]]) -> MethodOptions:
    """`options` with the values of the rules that match a layer, the last one winning."""
    merged = {key: value for rule in values for key, value in rule.items()}
    return replace(options, **merged) if merged else options
