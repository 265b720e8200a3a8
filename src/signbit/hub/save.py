"""Saving a packed model as an ordinary Hugging Face directory."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from signbit import format as packed_format
from signbit.errors import FormatError, OptionError
from signbit.hub.card import make_card
from signbit.hub.quantizer import SignbitHfQuantizer, saved_tensors
from signbit.models import Report

MODULE = "modeling_signbit"


def _auto_map_module(architecture: str, config: str) -> str:
    """The module that makes `trust_remote_code=True` work where signbit is installed but not imported.

    The config has a class in it too: some programs (lm-eval) read the quantization config before they load a model.
    """
    return (
        "import signbit  # noqa: F401  pip install signbit: registers its packed layers with transformers\n"
        "import transformers\n\n\n"
        f"class {config}(transformers.{config}):\n"
        "    pass\n\n\n"
        f"class {architecture}(transformers.{architecture}):\n"
        f"    config_class = {config}\n"
    )


def _small_files(model: Any, tokenizer: Any) -> dict[str, bytes]:
    """Config, generation config and tokenizer files as transformers writes them."""
    with tempfile.TemporaryDirectory() as folder:
        model.config.save_pretrained(folder)
        if getattr(model, "generation_config", None) is not None:
            model.generation_config.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        return {str(file.relative_to(folder)): file.read_bytes() for file in Path(folder).rglob("*") if file.is_file()}


def save(
    model: nn.Module,
    out: str | Path,
    tokenizer: Any = None,
    report: Report | None = None,
    base_model: str | None = None,
    command: str | None = None,
    overwrite: bool = False,
    tensors: Mapping[str, Tensor] | None = None,
) -> Path:
    """Writes a packed model to the directory `out`, complete or not at all; returns its path.

    `tokenizer` is saved beside it. `report` (by default that of the quantizer), `base_model` and `command` go into
    the model card. `tensors` are the model's where it is on the meta device; they may be read one by one. Raises
    OptionError if `model` holds no layer of signbit, FormatError if `out` exists (without `overwrite`) or the disk is
    full.
    """
    quantizer = getattr(model, "hf_quantizer", None)
    if not isinstance(quantizer, SignbitHfQuantizer):
        raise OptionError("the model is not quantized by signbit; call signbit.quantize_(model, config) first")
    packed_format.check_target(out, overwrite)
    architecture = type(model).__name__
    config: Any = model.config
    # As save_pretrained does, so that saving the loaded model again gives the same bytes.
    config.architectures = [architecture]
    config.dtype = str(model.dtype).removeprefix("torch.")
    config_class = type(config).__name__
    config.auto_map = {"AutoConfig": f"{MODULE}.{config_class}", "AutoModelForCausalLM": f"{MODULE}.{architecture}"}
    if tensors is None:
        tensors, _ = quantizer.get_state_dict_and_metadata(model)
    else:
        quantizer.describe(model, tensors)
    if tensors is None:
        raise OptionError("parts of the model are offloaded; load it without offloading, then save it")
    try:
        files = _small_files(model, tokenizer)
    except OSError as error:
        raise FormatError(
            f"{out} could not be written ({error}); nothing was changed there. Free space in /tmp"
        ) from error
    files[f"{MODULE}.py"] = _auto_map_module(architecture, config_class).encode()
    files["README.md"] = make_card(model, tensors, report or quantizer.report, base_model, command).encode()
    return packed_format.write(out, tensors, files, overwrite)


def save_dense(model: nn.Module, out: str | Path, tokenizer: Any = None, overwrite: bool = False) -> Path:
    """Writes a model in full precision to the directory `out`, complete or not at all; returns its path.

    Raises FormatError as `save` does.
    """
    packed_format.check_target(out, overwrite)
    config: Any = model.config
    config.architectures, config.dtype = [type(model).__name__], str(model.dtype).removeprefix("torch.")
    return packed_format.write(out, saved_tensors(model), _small_files(model, tokenizer), overwrite)
