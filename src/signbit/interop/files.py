"""Reading a foreign directory: its config.json, and its tensors out of safetensors files or of torch's own."""

from __future__ import annotations

import json
import pickle
import zipfile
from collections import ChainMap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from signbit.errors import FormatError
from signbit.format import StoredTensors, read_headers

#: An index, and the files without one, in the order in which transformers looks for them.
_WEIGHTS = (("model.safetensors.index.json", "*.safetensors"), ("pytorch_model.bin.index.json", "pytorch_model*.bin"))


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; raises FormatError if there is none."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_number)
    except FileNotFoundError as error:
        raise FormatError(
            f"{path.parent} has no {path.name}: it is no Hugging Face directory; give one, or a GGUF file"
        ) from error
    except (OSError, ValueError) as error:
        raise FormatError(f"{path} cannot be read ({error}); copy or download it again") from error
    if not isinstance(values, dict):
        raise FormatError(f"{path} holds no JSON object; copy or download it again")
    return values


def _no_number(word: str) -> Any:
    raise ValueError(f"{word} is no number of JSON")


def load_pickle(path: Path) -> Any:
    """What torch saved in `path`, of which only tensors and plain containers are taken (weights_only=True).

    Files in torch's zip form are mapped, not read. Raises FormatError for a file that holds anything else, none of which
    is run, or that is damaged.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, AttributeError, OSError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise FormatError(
            f"{path} is damaged or holds more than tensors ({first}); signbit runs nothing out of a pickle. Have its "
            "owner save the tensors alone (safetensors), or copy it again"
        ) from error


def read_tensors(folder: Path) -> Mapping[str, Tensor]:
    """The tensors of all weight files of a directory, by name; safetensors are read when they are asked for.

    Raises FormatError if there is no weight file, one that the index names is missing, or two hold the same name.
    """
    for index, pattern in _WEIGHTS:
        if (folder / index).is_file():
            named = read_json(folder / index).get("weight_map")
            if not isinstance(named, dict):
                raise FormatError(f"{folder / index} has no weight_map; copy or download it again")
            files = [folder / name for name in sorted(set(named.values()))]
            if gone := [file for file in files if not file.is_file()]:
                raise FormatError(f"{gone[0]} is missing, though {index} names it; copy or download it again")
        else:
            files = sorted(folder.glob(pattern))
        if files:
            return _merged(files)
    raise FormatError(
        f"{folder} holds no weights: model.safetensors or pytorch_model.bin, or shards of one, are needed"
    )


def _merged(files: list[Path]) -> Mapping[str, Tensor]:
    parts: list[Mapping[str, Tensor]] = []
    home: dict[str, Path] = {}
    for file in files:
        part = StoredTensors(read_headers([file])) if file.suffix == ".safetensors" else _state(file)
        for name in part:
            if name in home:
                raise FormatError(
                    f"the tensor {name} is in {home[name].name} and in {file.name}; remove one of the files"
                )
            home[name] = file
        parts.append(part)
    return ChainMap(*parts)  # type: ignore[arg-type]


def _state(file: Path) -> dict[str, Tensor]:
    state = load_pickle(file)
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise FormatError(
            f"{file} is no state dict: names and their tensors, and nothing else, are expected. Of a training checkpoint, "
            "save state['state_dict'] alone"
        )
    return state
