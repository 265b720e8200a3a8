"""Writing a packed directory: everything to a temporary name, then one rename."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections import ChainMap
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError
from safetensors.torch import save
from torch import Tensor

from signbit.errors import FormatError
from signbit.format.reader import LazyTensors

#: Files that a model directory has; --overwrite deletes no directory with others in it.
_MODEL_FILES = ("Modelfile",)
_MODEL_SUFFIXES = (".json", ".safetensors", ".bin", ".md", ".py", ".jinja", ".txt", ".model", ".gguf")
#: The size at which transformers' save_pretrained begins another file; the same here, so that both write equal files.
SHARD_BYTES = 50_000_000_000
_SAFETENSORS_NAMES = {
    torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.int16: "I16", torch.int32: "I32",
    torch.int64: "I64", torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32", torch.float64: "F64",
}  # fmt: skip


def _bytes(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def _on_meta(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors' dtypes and shapes; none of those on disk is read."""
    if isinstance(tensors, ChainMap):
        return {name: tensor for part in reversed(tensors.maps) for name, tensor in _on_meta(part).items()}
    if isinstance(tensors, LazyTensors):
        return {name: tensors.empty(name) for name in tensors}
    return {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors.items()}


def total_bytes(tensors: Mapping[str, Tensor]) -> int:
    """The bytes of all `tensors`, none of which is read."""
    return sum(tensor.numel() * tensor.element_size() for tensor in _on_meta(tensors).values())


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], names: Iterable[str] | None = None) -> None:
    """Writes the `names` (default: all) of `tensors` one after another, each asked for when its turn has come.

    The bytes are those of safetensors' own save_file, which wants all tensors in memory.
    """
    shapes = _on_meta(tensors)
    chosen = {name: shapes[name] for name in (shapes if names is None else names)}
    # The library orders by dtype and name; it is asked for the order with empty tensors in their place.
    empty = save({name: torch.empty(0, dtype=tensor.dtype) for name, tensor in chosen.items()})
    order = list(json.loads(empty[8 : 8 + int.from_bytes(empty[:8], "little")]))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in order:
        end = offset + chosen[name].numel() * chosen[name].element_size()
        dtype = _SAFETENSORS_NAMES[chosen[name].dtype]
        header[name] = {"dtype": dtype, "shape": list(chosen[name].shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            stream.write(_bytes(tensors[name]))


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over all tensors: for each, by name, "name\\0dtype\\0shape\\0" and its bytes (docs/format.md)."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        shape = ",".join(map(str, tensor.shape))
        digest.update(f"{name}\0{_SAFETENSORS_NAMES[tensor.dtype]}\0{shape}\0".encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def check_target(out: str | Path, overwrite: bool) -> Path:
    """The absolute path of OUT; raises FormatError if something is there that may not be replaced, or it cannot be made."""
    path = Path(out).absolute()
    above = next(folder for folder in path.parents if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        why = "may not be written to" if above.is_dir() else "is a file"
        raise FormatError(f"{out} cannot be made, because {above} {why}; give another -o")
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise FormatError(f"{out} is a file or a link; give the name of a directory that signbit may make")
    try:
        names = sorted(entry.name for entry in path.iterdir()) if path.exists() else []
    except OSError as error:
        raise FormatError(f"{out} cannot be read ({error.strerror}); give another -o") from error
    if not names:
        return path
    if not overwrite:
        raise FormatError(f"{out} exists; give another -o, or --overwrite to replace it")
    known = {name for name in names if name in _MODEL_FILES or Path(name).suffix in _MODEL_SUFFIXES}
    strange = [name for name in names if name not in known or (path / name).is_dir()]
    if strange or not any(name.endswith((".safetensors", ".bin", ".gguf")) for name in names):
        what = f"holds {strange[0]}" if strange else "holds no weights"
        raise FormatError(f"{out} {what}, so it is more than a model; signbit will not replace it: delete it yourself")
    return path


@contextlib.contextmanager
def _staging(out: Path) -> Iterator[Path]:
    """A new directory beside `out`, removed if the block fails."""
    out.parent.mkdir(parents=True, exist_ok=True)
    for stale in out.parent.glob(f".{out.name}.partial-*"):
        pid = stale.name.rpartition("-")[2]
        if pid.isdigit() and not Path(f"/proc/{pid}").exists() and Path("/proc/self").exists():
            shutil.rmtree(stale, ignore_errors=True)
    staging = out.parent / f".{out.name}.partial-{os.getpid()}"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _replace_directory(staging: Path, out: Path) -> None:
    old = out.parent / f".{out.name}.old-{os.getpid()}"
    existed = out.exists()
    if existed:
        out.rename(old)
    try:
        staging.rename(out)
    except BaseException:  # Ctrl-C between the two renames too
        if existed:
            old.rename(out)
        raise
    shutil.rmtree(old, ignore_errors=True)


def write(out: str | Path, tensors: Mapping[str, Tensor], files: Mapping[str, bytes], overwrite: bool = False) -> Path:
    """Writes a directory of `tensors` (safetensors, in shards where large) and `files` (name → content), or nothing.

    `tensors` may be read from the disk one by one (`StoredTensors`, alone or in a ChainMap). `files` holds config.json,
    the auto_map module, tokenizer files and the card as the caller made them. All is written to a temporary directory
    beside `out` and renamed once it is complete; what stood at `out` stays until then. Raises FormatError if `out` may
    not be replaced or the disk is full.
    """
    shapes = _on_meta(tensors)
    need = total_bytes(tensors) + sum(map(len, files.values()))
    with staged(out, need, overwrite) as staging:
        split = split_torch_state_dict_into_shards(shapes, max_shard_size=SHARD_BYTES)
        for file_name, names in split.filename_to_tensors.items():
            write_safetensors(staging / file_name, tensors, names)
        if split.is_sharded:
            index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
            content = json.dumps(index, indent=2, sort_keys=True) + "\n"
            (staging / "model.safetensors.index.json").write_text(content)
        for name, content_bytes in files.items():
            (staging / name).parent.mkdir(parents=True, exist_ok=True)
            (staging / name).write_bytes(content_bytes)
    return Path(out).absolute()


@contextlib.contextmanager
def staged(out: str | Path, need: int, overwrite: bool = False) -> Iterator[Path]:
    """A new directory that takes the place of `out` when the block ends well, and goes if it does not.

    `need` is how many bytes it will hold. Raises FormatError if `out` may not be replaced or the disk is full.
    """
    path = check_target(out, overwrite)
    try:
        with _staging(path) as staging:
            free = shutil.disk_usage(staging).free
            if free < need:
                raise OSError(errno.ENOSPC, f"{need} bytes are needed, {free} are free")
            yield staging
            for file in staging.rglob("*"):
                if file.is_file():
                    with file.open("rb") as stream:
                        os.fsync(stream.fileno())
            _replace_directory(staging, path)
    except (OSError, SafetensorError) as error:
        raise FormatError(
            f"{out} could not be written ({error}); nothing was changed there. Free space or give another -o"
        ) from error
