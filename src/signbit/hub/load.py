"""Loading models, packed or not, with errors that a user can act on."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.hooks import remove_hook_from_submodules
from accelerate.utils.offload import PrefixedDataset
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from signbit import format as packed_format
from signbit.errors import FormatError, OptionError, SignbitError
from signbit.models.structure import find_blocks

#: What PEFT writes beside an adapter.
_ADAPTER = "adapter_config.json"
DTYPES = ("auto", "float32", "float16", "bfloat16")


def _check_directory(model: str) -> None:
    """Raises FormatError where `model` is meant as a directory and is not one of a model."""
    path = Path(model)
    if path.is_file():
        raise FormatError(f"{model} is a file; give a Hugging Face model directory or a hub id")
    if path.is_dir() and not (path / "config.json").exists():
        empty = "is empty" if not any(path.iterdir()) else "has no config.json"
        raise FormatError(f"the directory {model} {empty}; give a Hugging Face model directory or a hub id")
    looks_local = model.startswith((".", "/", "~")) or model.count("/") > 1
    if looks_local and not path.exists():
        raise FormatError(f"there is no directory {model}; give a Hugging Face model directory or a hub id")


#: What transformers, safetensors and json raise for a model that is damaged or not one.
_LOADING_ERRORS = (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, ImportError, SafetensorError)


def _from_pretrained(model: str, **kwargs: Any) -> Any:
    """AutoModelForCausalLM.from_pretrained that does not go on with random numbers for tensors that are missing."""
    loaded, loading = AutoModelForCausalLM.from_pretrained(model, output_loading_info=True, **kwargs)
    for problem in ("missing", "mismatched"):
        if names := sorted(map(str, loading[f"{problem}_keys"])):
            raise FormatError(f"{model}: the tensor {names[0]} is {problem}; copy or download the model again")
    return loaded


def _explain(model: str, error: Exception) -> FormatError:
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if isinstance(error, SafetensorError):
        first += ": a weight file is damaged or cut short; copy or download the model again"
    return FormatError(f"{model} could not be loaded: {first}")


@contextmanager
def _explained(model: str) -> Iterator[None]:
    try:
        yield
    except SignbitError:
        raise
    except _LOADING_ERRORS as error:
        raise _explain(model, error) from error


def is_packed(model: str) -> bool:
    """Whether `model` is a directory that signbit packed."""
    try:
        config = json.loads((Path(model) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    quantization = config.get("quantization_config") if isinstance(config, dict) else None
    return isinstance(quantization, dict) and quantization.get("quant_method") == "signbit"


def _torch_dtype(dtype: str, device: str) -> Any:
    if dtype not in DTYPES:
        raise OptionError(f"dtype is {dtype!r}; allowed: {', '.join(DTYPES)}")
    if dtype == "auto":
        return torch.float32 if torch.device(device).type == "cpu" else "auto"
    return getattr(torch, dtype)


def torch_device(device: str) -> str:
    """`device` itself; raises OptionError if torch cannot use it here."""
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, ValueError) as error:
        raise OptionError(
            f"the device {device!r} cannot be used here ({str(error).splitlines()[0]}); use cpu"
        ) from None
    return device


def load(out: str | Path, **kwargs: Any) -> Any:
    """A packed directory as a transformers model: `AutoModelForCausalLM.from_pretrained` after its checks.

    Raises FormatError if `out` is no packed directory, is damaged or of a newer version.
    """
    packed_format.read_description(out)
    packed_format.weight_files(out)
    return AutoModelForCausalLM.from_pretrained(str(out), **kwargs)


def base_of(model: str) -> str | None:
    """The model beside which the adapter in the directory `model` stands; None if `model` is none."""
    try:
        config = json.loads((Path(model) / _ADAPTER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    base = config.get("base_model_name_or_path") if isinstance(config, dict) else None
    if not isinstance(base, str):
        raise FormatError(f"{model} holds an adapter that does not name its model; write base_model_name_or_path there")
    return base


def load_any(model: str, dtype: str = "auto", device: str = "cpu") -> Any:
    """A packed or a full-precision model in evaluation mode; dtype "auto" is float32 on a CPU, else as stored.

    The directory of an adapter gives the model beside which it was trained, with it. Raises FormatError, OptionError for
    what cannot be loaded, with the reason.
    """
    torch_dtype, device = _torch_dtype(dtype, device), torch_device(device)
    if (base := base_of(model)) is not None:
        from signbit.models.lora import load_adapter

        return load_adapter(load_any(base, dtype, device), model)
    _check_directory(model)
    with _explained(model):
        loaded = load(model, dtype=torch_dtype) if is_packed(model) else _from_pretrained(model, dtype=torch_dtype)
    return loaded.to(device).eval()


def load_config(model: str, packed: bool = False) -> Any:
    """The configuration of a full-precision model, or with `packed` of any; raises FormatError as `load_source` does."""
    _check_directory(model)
    with _explained(model):
        return AutoConfig.from_pretrained(model) if packed else _source_config(model)


def load_source(model: str, device: str = "cpu", skeleton: bool = False) -> Any:
    """The full-precision model to quantize, in the dtype it is stored in; `skeleton`: on meta, no weight is read.

    Raises FormatError if it cannot be loaded or is quantized already.
    """
    _check_directory(model)
    device = torch_device(device)
    with _explained(model):
        config = _source_config(model)
        if skeleton:
            return _skeleton(config)
        return _from_pretrained(model, dtype="auto").to(device).eval()


def load_streamed(
    model: str, blocks: str, folder: str | Path, device: str = "cpu", dtype: str | None = None
) -> tuple[Any, Mapping[str, Tensor]]:
    """A model without the weights of its blocks, which stay on the disk, and those by name, as they are stored.

    `blocks` is the name of the list of blocks. What stands outside of it is on `device`. The weights are read from the
    model's own files when they are asked for; those that transformers converts while it loads (experts that it fuses)
    are written to `folder` first. Without `dtype` it is a model to quantize, as stored; with one of `DTYPES` any, packed
    too, as `load_any` loads it. Raises FormatError as `load_source` does.
    """
    _check_directory(model)
    with _explained(model):
        config = load_config(model, packed=dtype is not None)
        places = dict.fromkeys(_outside(_skeleton(config), blocks), "cpu") | {blocks: "disk"}
        chosen = "auto" if dtype is None else _torch_dtype(dtype, device)
        read = load if is_packed(model) else _from_pretrained
        loaded = read(
            model, dtype=chosen, device_map=places, offload_folder=str(folder), offload_buffers=is_packed(model)
        ).eval()
    hooks = [getattr(module, "_hf_hook", None) for module in loaded.get_submodule(blocks).modules()]
    weights = next(w for hook in hooks if (w := getattr(hook, "weights_map", None)) is not None)
    remove_hook_from_submodules(loaded)
    for name in _outside(loaded, blocks):
        part = loaded.get_submodule(name) if name in dict(loaded.named_modules()) else None
        if part is not None:
            part.to(device)
    return loaded, weights.dataset if isinstance(weights, PrefixedDataset) else weights


def _skeleton(config: Any) -> Any:
    """The model of `config` in full precision on the meta device."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=config.dtype or torch.float32)


def blocks_of(model: str) -> str:
    """The name of the list of blocks of any model, packed or not; no weight is read. Raises FormatError, StructureError."""
    config = load_config(model, packed=True)
    with _explained(model):
        return find_blocks(_skeleton(config))[0]


def _outside(model: torch.nn.Module, blocks: str) -> list[str]:
    """Names that together hold all parameters and buffers outside of `blocks`: the siblings on the way down to it."""
    names: list[str] = []
    parts = blocks.split(".")
    for depth in range(len(parts)):
        parent = ".".join(parts[:depth])
        module = model.get_submodule(parent)
        direct = [name for name, _ in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))]
        children = [name for name, _ in module.named_children() if name != parts[depth]]
        names += [f"{parent}.{name}" if parent else name for name in (*direct, *children)]
    return names


def _source_config(model: str) -> Any:
    config = AutoConfig.from_pretrained(model)
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization.quant_method
        raise FormatError(f"{model} is quantized already ({method}); start from the full-precision model")
    return config


def load_tokenizer(model: str) -> Any:
    """The tokenizer beside a model, of an adapter its model's; raises FormatError if there is none."""
    model = base_of(model) or model
    try:
        return AutoTokenizer.from_pretrained(model)
    except _LOADING_ERRORS as error:
        raise FormatError(
            f"{model} has no tokenizer that transformers can load; copy the tokenizer's files there"
        ) from error
