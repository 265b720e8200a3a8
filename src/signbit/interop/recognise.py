"""Which form a checkpoint has, told by its bytes and the tensors in it and never by its name."""

from __future__ import annotations

from pathlib import Path

from signbit.errors import FormatError, OptionError
from signbit.interop import bitnet_transformers, fbi, gguf, onebit, pbllm, ternary
from signbit.interop.checkpoint import Checkpoint
from signbit.interop.files import read_json, read_tensors
from signbit.interop.form import require

#: The directories that name their layers' tensors in their own way, in the order in which they are looked for: OneBit's
#: layers have a weight_scale too.
FORMS = (fbi.FORM, onebit.FORM, bitnet_transformers.FORM, ternary.FORM)


def open_checkpoint(source: str | Path, masks: str | Path | None = None) -> Checkpoint:
    """The checkpoint at `source`, a directory or a GGUF file; `masks` is PB-LLM's directory of mask files.

    Raises FormatError if it is none that signbit reads, is damaged, or is packed by signbit already; OptionError for
    masks that nothing would use.
    """
    path = Path(source)
    if path.is_dir() and not (path / "config.json").exists() and (files := sorted(path.glob("*.gguf"))):
        path = _one(files)
    if path.is_file():
        with path.open("rb") as stream:
            if stream.read(4) != gguf.MAGIC:
                raise FormatError(f"{path} is a file, but no GGUF file; give that or the directory of a checkpoint")
        _no_masks(masks, "a GGUF file")
        return gguf.open_gguf(path)
    if not path.is_dir():
        raise FormatError(f"there is no {path}; give a local directory or GGUF file (hf download REPO --local-dir DIR)")
    values, tensors = read_json(path / "config.json"), read_tensors(path)
    quantization = values.get("quantization_config") or {}
    require(
        isinstance(quantization, dict), f"{path / 'config.json'} has quantization_config {quantization!r}, no object"
    )
    kind, blocks = quantization.get("quant_method"), values.get("num_hidden_layers")
    require(
        not isinstance(blocks, int) or blocks <= len(tensors),
        f"{path / 'config.json'} has num_hidden_layers {blocks}, and there are {len(tensors)} tensors; "
        "copy or download it again",
    )
    if kind not in (None, "bitnet"):
        what = "packed by signbit already" if kind == "signbit" else f"quantized by {kind}, which signbit does not read"
        raise FormatError(f"{path} is {what}")
    last = {name.rpartition(".")[2] for name in tensors}
    for form in FORMS:
        if form.marks & last:
            _no_masks(masks, form.title)
            return form.open(path, values, tensors)
    if kind == "bitnet":
        raise FormatError(
            f"{path} says quant_method bitnet, but its layers have no weight_scale: its weights are latents still (online). "
            "Take quantization_config out of config.json, then signbit quantize --method bitnet --weights ternary --norm none"
        )
    return pbllm.open_dense(path, values, tensors, masks)


def _one(files: list[Path]) -> Path:
    """The only one of `files`; raises FormatError if there are more, by name if they are parts of one."""
    if len(files) > 1:
        gguf.read_whole(files[0])
        raise FormatError(f"{files[0].parent} holds {len(files)} GGUF files; give the one to read, such as {files[0]}")
    return files[0]


def _no_masks(masks: str | Path | None, what: str) -> None:
    if masks is not None:
        raise OptionError(f"--masks {masks} would not be used: this is {what}, not PB-LLM; leave it out")
