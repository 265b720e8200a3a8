"""A form of checkpoint that is a directory, and the way from its tensors' names to layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

from signbit.errors import FormatError, ShapeError
from signbit.interop.checkpoint import Checkpoint, Layer

#: Buffers of old releases of transformers, which are computed from the config today.
_COMPUTED = ".rotary_emb.inv_freq"
#: Keys of config.json that say how the old directory was loaded, and not what the model is.
_OF_THE_DIRECTORY = ("_name_or_path", "architectures", "auto_map", "dtype", "quantization_config", "torch_dtype",
                     "transformers_version")  # fmt: skip

#: Keys of config.json, by any family's name, that are at least 1 where they are numbers; transformers checks their kinds.
_SIZES = (
    "hidden_size", "intermediate_size", "ffn_dim", "n_embd", "num_hidden_layers", "n_layer", "num_attention_heads", "n_head",
    "num_key_value_heads", "head_dim", "vocab_size", "max_position_embeddings",
)  # fmt: skip
#: Rotary scalings that have a factor.
_SCALED = ("linear", "dynamic", "yarn", "llama3")


@dataclass(frozen=True)
class Form:
    """How one program stores a binarized layer: the last parts of its tensors' names, and what they mean.

    `layer` is called with the tensors of a module by these names, and with config.json.
    """

    title: str
    marks: frozenset[str]
    """Names that tell this form from others."""
    needs: frozenset[str]
    """Names that each layer has."""
    layer: Callable[[Mapping[str, Tensor], Mapping[str, Any]], Layer]
    may: frozenset[str] = frozenset({"bias"})
    """Names that a layer can have."""
    zero: str = ""
    """Of stored weights that are exactly 0: what they were there, and are here."""
    config: Callable[[dict[str, Any]], dict[str, Any]] = lambda values: values
    """config.json with what transformers does not know made such as it knows."""
    may_be_dense: Callable[[Mapping[str, Any], str], bool] = lambda values, name: False
    """Whether, by config.json, the linear of this name is not binarized."""
    notes: Callable[[Mapping[str, Tensor]], tuple[str, ...]] = field(default=lambda tensors: ())

    def open(self, folder: Path, values: dict[str, Any], tensors: Mapping[str, Tensor]) -> Checkpoint:
        """The checkpoint in `folder`; raises FormatError, by name, for a layer that is incomplete."""
        telling = (self.marks | self.needs) - {"weight"}
        modules = {name.rpartition(".")[0] for name in tensors if name.rpartition(".")[2] in telling}
        own = {module: {part: f"{module}.{part}" for part in self.needs | self.may} for module in sorted(modules)}
        for module, names in own.items():
            for part in sorted(self.needs):
                if names[part] not in tensors:
                    raise FormatError(
                        f"the tensor {names[part]} is missing: in the form of {self.title} a layer has "
                        f"{', '.join(sorted(self.needs))}, and {module} has not; copy or download the checkpoint again"
                    )

        def read(module: str) -> Layer:
            parts = {part: tensors[name] for part, name in own[module].items() if name in tensors}
            try:
                return self.layer(parts, values)
            except (ShapeError, FormatError) as error:
                raise FormatError(f"{module}: {error}") from error

        taken = {name for names in own.values() for name in names.values()}
        return Checkpoint(
            form=self.title,
            config=transformers_config(self.config(dict(values)), folder),
            layers={module: partial(read, module) for module in own},
            rest=Rest((n for n in tensors if n not in taken and not n.endswith(_COMPUTED)), tensors.__getitem__),
            tokenizer={"pretrained_model_name_or_path": str(folder)},
            may_be_dense=partial(self.may_be_dense, values),
            zero=self.zero,
            notes=self.notes(tensors),
        )


class Rest(Mapping[str, Tensor]):
    """Tensors by name, each read when it is asked for."""

    def __init__(self, names: Iterable[str], read: Callable[[str], Tensor]) -> None:
        self._names, self._read = dict.fromkeys(names), read

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def transformers_config(values: Mapping[str, Any], folder: Path) -> Any:
    """transformers' configuration of `values`; raises FormatError for what it is none of, with the key where one is wrong."""
    kept = {key: value for key, value in values.items() if key not in _OF_THE_DIRECTORY}
    kind = kept.pop("model_type", None)
    require(
        isinstance(kind, str) and kind in CONFIG_MAPPING,
        f"{folder}: config.json has the model_type {kind!r}, which transformers does not know; one that it knows is needed",
    )
    for key in _SIZES:
        value = kept.get(key)
        require(
            not isinstance(value, (int, float)) or value >= 1,
            f"{folder}: config.json has {key} {value!r}; a whole number from 1 on is expected; copy or download it again",
        )
    return made_config(type(AutoConfig.for_model(kind)), kept, f"{folder}: config.json")


def made_config(config_class: Any, values: dict[str, Any], where: str) -> Any:
    """A configuration of transformers; raises FormatError, with `where` and the reason, for values that it does not take."""
    try:
        config = config_class.from_dict(values)
    except Exception as error:  # transformers and huggingface_hub each raise their own
        raise FormatError(
            f"{where}: transformers makes no {config_class.model_type} model of this ({_in_one_line(error)}); copy or download "
            "it again"
        ) from error
    _check_rope(config, where)
    return config


def _check_rope(config: Any, where: str) -> None:
    """Raises FormatError unless base and factor of the rotary positions are numbers above 0; transformers only warns."""
    rope = getattr(config, "rope_parameters", None) or {}
    for settings in (rope, *(each for each in rope.values() if isinstance(each, dict))):
        for key in ("rope_theta", "factor") if settings.get("rope_type") in _SCALED else ("rope_theta",):
            value = settings.get(key, 1.0)
            require(
                isinstance(value, (int, float)) and 0 < value < math.inf,
                f"{where} has rotary positions of the {key} {value!r}; a number above 0 is expected; copy or download it again",
            )


def empty_model(config: Any, where: str | Path) -> Any:
    """The model of `config` in float32 on the meta device; raises FormatError, with `where`, if there is none such."""
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except Exception as error:  # transformers and torch each raise their own
        raise FormatError(
            f"{where}: transformers makes no model of what the configuration says ({_in_one_line(error)}); copy or download "
            "it again"
        ) from error


def _in_one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def one_dtype(*tensors: Tensor) -> list[Tensor]:
    """Float tensors in the widest dtype among theirs: one packed layer has one."""
    dtype = tensors[0].dtype
    for tensor in tensors[1:]:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return [tensor.to(dtype) for tensor in tensors]


def require(condition: bool, message: str) -> None:
    """Raises FormatError with `message` unless `condition`."""
    if not condition:
        raise FormatError(message)


def count_zeros(weight: Tensor) -> int:
    """How many entries are exactly 0."""
    return int((weight == 0).sum())
