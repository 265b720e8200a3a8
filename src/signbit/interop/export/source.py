"""A packed directory, read layer by layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from signbit import format as packed_format
from signbit.errors import FormatError
from signbit.hub.save import MODULE
from signbit.interop.files import read_json
from signbit.interop.form import empty_model, transformers_config
from signbit.linear import VARIABLE, Int8Head, PackedLinear

#: Files that another form has no use for, or gets in its own way.
_OWN_FILES = ("config.json", "README.md", f"{MODULE}.py", "model.safetensors.index.json")


class Packed:
    """The packed directory `folder`: its config, and its layers and tensors, none of which is kept.

    Raises FormatError if it is none, or is damaged.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.values, self.description = packed_format.read_description(folder)
        headers = packed_format.read_headers(packed_format.weight_files(folder))
        packed_format.verify(headers, self.description)
        digest = self.description.tensors_sha256
        if digest is not None and digest != packed_format.headers_sha256(headers):
            raise FormatError(f"{folder} is damaged: its tensors are not those that config.json was written for; "
                              "copy or download it again")  # fmt: skip
        self.tensors = packed_format.StoredTensors(headers)

    @cached_property
    def config(self) -> Any:
        """transformers' configuration, without what signbit says in it."""
        return transformers_config(self.plain_values, self.folder)

    @property
    def plain_values(self) -> dict[str, Any]:
        """config.json as a model in full precision has it."""
        return {key: value for key, value in self.values.items() if key not in ("quantization_config", "auto_map")}

    @cached_property
    def skeleton(self) -> Any:
        """The model in full precision on the meta device."""
        return empty_model(self.config, self.folder)

    @property
    def files(self) -> dict[str, bytes]:
        """Tokenizer and generation config: the small files as they are."""
        files = (file for file in sorted(self.folder.rglob("*")) if file.is_file())
        return {
            str(file.relative_to(self.folder)): file.read_bytes()
            for file in files
            if file.suffix != ".safetensors" and file.name not in _OWN_FILES
        }

    @property
    def generation(self) -> dict[str, Any]:
        """What generation_config.json says; nothing where there is none."""
        path = self.folder / "generation_config.json"
        return read_json(path) if path.is_file() else {}

    @property
    def names(self) -> tuple[str, ...]:
        """The packed layers."""
        return tuple(self.description.layers)

    def layer(self, name: str) -> PackedLinear:
        """The packed layer of this name."""
        own = {key.removeprefix(f"{name}."): key for key in self.tensors if key.rpartition(".")[0] == name}
        state = {last: self.tensors[key] for last, key in own.items()}
        lengths = {last: prod(tensor.shape) for last, tensor in state.items() if last.startswith(VARIABLE)}
        bias = state.get("bias")
        dtype = torch.float32 if bias is None else bias.dtype
        layer = PackedLinear.from_spec(self.description.layers[name], lengths, dtype, "meta")
        layer.load_state_dict(state, assign=True)
        return layer.eval().requires_grad_(False)

    def int8(self, name: str) -> tuple[Tensor, Tensor]:
        """Codes int8 [rows, columns] and scale [rows] of an int8 layer, a tied head's of its embedding."""
        home = self.description.int8[name].tied_to or name
        return self.tensors[f"{home}.weight"], self.tensors[f"{home}.scale"]

    def int8_dense(self, name: str) -> Tensor:
        """The matrix of an int8 layer in float32; a constant by which the model's own embedding multiplies is left out."""
        return Int8Head(*self.int8(name)).to_dense()

    @property
    def rest(self) -> Iterator[str]:
        """The tensors that belong to no packed and no int8 layer."""
        own = {*self.description.layers, *self.description.int8}
        return (name for name in self.tensors if name.rpartition(".")[0] not in own)


class Made(packed_format.LazyTensors):
    """Tensors that are computed when they are asked for; of each, dtype and shape are known before."""

    def __init__(self) -> None:
        self._made: dict[str, tuple[torch.dtype, tuple[int, ...], Any]] = {}

    def add(self, name: str, dtype: torch.dtype, shape: tuple[int, ...], make: Any) -> None:
        """`make` is called without arguments, and gives a tensor that is cast to `dtype`."""
        self._made[name] = (dtype, shape, make)

    def __getitem__(self, name: str) -> Tensor:
        dtype, shape, make = self._made[name]
        tensor: Tensor = make().to(dtype)
        assert tensor.shape == shape, f"{name} is {list(tensor.shape)}, {list(shape)} was announced"
        return tensor.contiguous()

    def __iter__(self) -> Iterator[str]:
        return iter(self._made)

    def __len__(self) -> int:
        return len(self._made)

    def empty(self, name: str) -> Tensor:
        dtype, shape, _ = self._made[name]
        return torch.empty(shape, dtype=dtype, device="meta")


def float_dtype(values: Mapping[str, Any]) -> torch.dtype:
    """The dtype that config.json names; float32 where it names none."""
    return getattr(torch, str(values.get("dtype") or values.get("torch_dtype") or "float32"))  # type: ignore[no-any-return]
